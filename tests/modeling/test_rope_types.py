"""Every RoPE scaling that a backbone takes, with every mechanism: what it trains on is what it generates with."""

import pytest
import torch
from tiny_models import make_mistral, make_student, make_teacher, perturb
from transformers import DynamicCache

TEACHERS = {"llama": make_teacher, "mistral": make_mistral}
LEARNED = 64  # positions of the stock model before its scaling
LONGER = {"original_max_position_embeddings": LEARNED, "factor": 4.0}
TYPES = {
    "default": {},
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 4.0},
    "llama3": {**LONGER, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "yarn": LONGER,
    "longrope": {**LONGER, "short_factor": [1.0 + 0.1 * i for i in range(8)], "long_factor": [4.0] * 8},
}
MECHANISMS = {
    "linear": {"window": 5, "sinks": 2},
    "cosine": {"window": 5, "sinks": 2},
    "gain_cell": {"window": 64},
    "landmark": {"block_size": 4, "top_k": 20},  # reads all blocks; its tables are longer than what the model learned
}


def make(backbone, kind, mechanism):
    rope = {"rope_type": kind, "rope_theta": 1e4, **TYPES[kind]}
    positions = 4 * LEARNED if "original_max_position_embeddings" in rope else LEARNED
    teacher = TEACHERS[backbone](rope_parameters=rope, max_position_embeddings=positions, num_hidden_layers=2)
    student = make_student(teacher, {"mixer": {"type": mechanism, **MECHANISMS[mechanism]}})
    perturb(student)
    return student


@pytest.mark.parametrize("mechanism", MECHANISMS)
@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("backbone", TEACHERS)
@torch.no_grad()
def test_with_a_cache_and_without(backbone, kind, mechanism):
    model = make(backbone, kind, mechanism)
    ids = torch.randint(3, 97, (2, 30), generator=torch.Generator().manual_seed(1))
    whole = model(ids, use_cache=False).logits
    cache = DynamicCache(config=model.config)
    parts = [model(x, past_key_values=cache).logits for x in (ids[:, :17], ids[:, 17:28], *ids[:, 28:].split(1, 1))]
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", ["yarn", "longrope"])
@torch.no_grad()
def test_pooled_landmarks_are_scaled_once(kind):
    """By the scores themselves: a key that is rotated on from its place in the block is the key rotated at once."""
    from linearize.modeling.attention_landmark import block_rotated, rotated

    model = make("llama", kind, "landmark")
    tables, place = model.model.rotary_tables(40), torch.arange(40)
    assert tables[0][0, 0] > 1.1  # these two scale the attention
    keys = torch.randn(1, 2, 40, 16)
    placed = rotated(keys, tables, place[None] % 4).unflatten(2, (10, 4))
    at_once = rotated(keys, tables, place[None]).unflatten(2, (10, 4))
    torch.testing.assert_close(block_rotated(placed, tables, 4), at_once, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
@torch.no_grad()
def test_tables_that_change_with_the_text_do_not_change_what_landmarks_read(kind):
    """A text past the learned positions, of which retrieval reads through tables of its own reach with both."""
    model = make("llama", kind, "landmark")
    ids = torch.randint(3, 97, (1, 90), generator=torch.Generator().manual_seed(2))
    whole, cached = (model(ids, use_cache=flag).logits for flag in (False, True))
    torch.testing.assert_close(cached, whole, rtol=0, atol=1e-4)
