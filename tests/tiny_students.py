"""One tiny student of every causal backbone and mechanism: a hybrid, but for landmarks, which every layer has."""

import torch
from tiny_models import TINY, make_gpt2, make_gptj, make_mistral, make_student, make_teacher

MAKERS = {"llama": make_teacher, "mistral": make_mistral, "gpt2": make_gpt2, "gptj": make_gptj}
MIXERS = {
    "linear": {"type": "linear", "window": 4},
    "cosine": {"type": "cosine"},
    "gain_cell": {"type": "gain_cell", "window": 64},
    "landmark": {"type": "landmark", "block_size": 4},
    "salient": {"type": "salient", "window": 4, "sinks": 1, "kept_tokens": 3},
}
HYBRID = ["student", "softmax", "student"]


def student_of(backbone: str, mechanism: str = "linear", types: list[str] | None = None):
    types = None if mechanism == "landmark" else types or HYBRID
    return make_student(MAKERS[backbone](), {"student": MIXERS[mechanism]}, types)


def token_ids(length: int) -> torch.Tensor:
    """Two rows."""
    return torch.randint(3, TINY["vocab_size"], (2, length), generator=torch.Generator().manual_seed(0))
