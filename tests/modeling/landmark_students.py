"""Tiny models with landmark attention."""

import torch
from tiny_models import make_gpt2, make_gptj, make_mistral, make_student, make_teacher, perturb

TEACHERS = {"llama": make_teacher, "gpt2": make_gpt2, "gptj": make_gptj, "mistral": make_mistral}
BOUNDS = {"landmark_key": "bounds", "block_weight": "tokens", "key_parts": 2}


def make(kind="llama", **settings):
    mixer = {"type": "landmark", "block_size": 4, "top_k": 2, **settings}
    model = make_student(TEACHERS[kind](), {"landmark": mixer})
    perturb(model)
    return model


def make_ids():
    return torch.randint(3, 97, (2, 29), generator=torch.Generator().manual_seed(1))
