"""Padding anywhere in a model's rows: holes, padding on the right of a growing text, words dropped from an encoder."""

import pytest
import torch
from tiny_models import make_bert, make_gpt2, make_gptj, make_mistral, make_student, make_teacher, perturb
from transformers import DynamicCache

TEACHERS = {"llama": make_teacher, "gpt2": make_gpt2, "gptj": make_gptj, "mistral": make_mistral}
MODELS = {
    "linear": {"type": "linear", "window": 4, "sinks": 2},
    "cosine": {"type": "cosine", "window": 4, "sinks": 2},
    "cosine-pure": {"type": "cosine", "window": 0, "sinks": 0},
    "gain-cell": {"type": "gain_cell", "window": 8, "cell": {"tile": 4, "leak": 0.01}},
    "landmark": {"type": "landmark", "block_size": 4, "top_k": 2},
}
HOLES = [slice(2, 4), slice(7, 10), slice(12, 13)]


def make_model(backbone, kind):
    model = make_student(TEACHERS[backbone](), {kind: MODELS[kind]})
    perturb(model)
    return model.double()


def make_rows():
    """Two rows of 20 tokens, the second with holes."""
    ids = torch.randint(3, 97, (2, 20), generator=torch.Generator().manual_seed(3))
    mask = torch.ones(2, 20, dtype=torch.long)
    for hole in HOLES:
        mask[1, hole] = 0
    return ids, mask


@torch.no_grad()
@pytest.mark.parametrize("backbone", TEACHERS)
@pytest.mark.parametrize("kind", MODELS)
def test_holes_in_a_mask(backbone, kind):
    model, (ids, mask) = make_model(backbone, kind), make_rows()
    alone = model(ids[1:, mask[1].bool()], use_cache=False).logits[0]
    assert (model(ids, attention_mask=mask, use_cache=False).logits[1, mask[1].bool()] - alone).abs().max() <= 1e-6
    cache, outputs = DynamicCache(config=model.config), []
    for start, stop in ((0, 9), (9, 15), (15, 16), (16, 20)):
        part = {"attention_mask": mask[:, :stop], "past_key_values": cache, "use_cache": True}
        outputs.append(model(ids[:, start:stop], **part).logits)
    assert (torch.cat(outputs, 1)[1, mask[1].bool()] - alone).abs().max() <= 1e-5


@torch.no_grad()
@pytest.mark.parametrize("backbone", TEACHERS)
@pytest.mark.parametrize("kind", MODELS)
def test_generating_behind_padding_on_the_right(backbone, kind):
    """New tokens stand behind the padding, which becomes a hole; transformers counts their positions from 0."""
    model, (ids, mask) = make_model(backbone, kind), make_rows()
    mask = torch.ones_like(mask)
    mask[1, 11:] = 0
    options = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    cached, whole = (model.generate(ids, use_cache=use_cache, **options) for use_cache in (True, False))
    assert torch.equal(cached, whole)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["linear", "cosine", "cosine-pure"])
def test_words_dropped_from_an_encoder(kind):
    model, (ids, mask) = make_student(make_bert(), {kind: MODELS[kind]}), make_rows()
    perturb(model)
    model.double()
    real = mask[1].bool()
    alone = model(ids[1:, real], position_ids=torch.arange(20)[None, real]).last_hidden_state[0]
    masked = model(ids, attention_mask=mask).last_hidden_state[1, real]
    assert (masked - alone).abs().max() <= 1e-6
    with pytest.raises(ValueError, match=r"must be \(2, 20\)"):
        model(ids, attention_mask=mask[:, :-1])
