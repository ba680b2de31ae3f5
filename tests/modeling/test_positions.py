"""Positions of calls after a padded prompt: padding takes none, whatever part of the mask a call is given."""

import pytest
import torch
from tiny_models import make_gpt2, make_gptj, make_mistral, make_student, make_teacher, perturb
from transformers import DynamicCache

TEACHERS = {"llama": make_teacher, "gpt2": make_gpt2, "gptj": make_gptj, "mistral": make_mistral}
MODELS = {
    "linear": ({"linear": {"type": "linear", "window": 5, "sinks": 2}}, None),
    "cosine": ({"cosine": {"type": "cosine", "window": 5}}, None),
    "gain-cell": ({"gain_cell": {"type": "gain_cell", "window": 8, "cell": {"tile": 4, "leak": 0.01}}}, None),
    "landmark": ({"landmark": {"type": "landmark", "block_size": 4, "top_k": 2}}, None),
    "softmax-first": ({"linear": {"type": "linear", "window": 5}}, ["softmax", "linear", "linear"]),
}


def make_prompt():
    """Two rows of 12 tokens, the first with 5 of padding; and 4 more tokens of each."""
    ids = torch.randint(3, 97, (2, 16), generator=torch.Generator().manual_seed(3))
    mask = torch.ones(2, 16, dtype=torch.long)
    mask[0, :5] = 0
    return ids, mask


def read(model, ids, mask, masks, **more):
    """The prompt, then two calls of one token and one of two, each with the mask that `masks` makes of the whole."""
    cache, outputs = DynamicCache(config=model.config), []
    model(ids[:, :12], attention_mask=mask[:, :12], past_key_values=cache, use_cache=True)
    for start, stop in ((12, 13), (13, 14), (14, 16)):
        part = {"attention_mask": masks(mask, start, stop), "past_key_values": cache, "use_cache": True}
        outputs.append(model(ids[:, start:stop], **part, **more).logits)
    return torch.cat(outputs, 1)


MASKS = {
    "whole": lambda mask, start, stop: mask[:, :stop],
    "none": lambda mask, start, stop: None,
    "of the call": lambda mask, start, stop: mask[:, start:stop],
}


@torch.no_grad()
@pytest.mark.parametrize("backbone", TEACHERS)
@pytest.mark.parametrize("name", MODELS)
def test_calls_after_a_padded_prompt(backbone, name):
    model, (ids, mask) = make_student(TEACHERS[backbone](), *MODELS[name]), make_prompt()
    perturb(model)
    model.double()
    expected = model(ids[:1, 5:], use_cache=False).logits[:, -4:]
    for part, masks in MASKS.items():
        if name == "softmax-first" and part != "whole":  # softmax layers see the padding then, as in stock models
            continue
        found = read(model, ids, mask, masks)
        assert (found[:1] - expected).abs().max() <= 1e-5, part


@torch.no_grad()
def test_states_behind_softmax_layers_know_their_count():
    """A hybrid's first layers may hold no count: positions follow the first state."""
    model, (ids, _) = make_student(make_teacher(), *MODELS["softmax-first"]), make_prompt()
    cache = DynamicCache(config=model.config)
    model(ids[:, :12], past_key_values=cache, use_cache=True)
    seen = []
    model.model.rotary_emb.register_forward_hook(
        lambda module, args, kwargs, output: seen.append(kwargs["position_ids"]), with_kwargs=True
    )
    model(ids[:, 12:14], past_key_values=cache, use_cache=True)
    cache.layers[1].state = cache.layers[1].state._replace(count=torch.tensor([7, 12]))
    model(ids[:, 12:14], past_key_values=cache, use_cache=True)
    assert seen[0].tolist() == [[12, 13]] * 2 and seen[1].tolist() == [[7, 8], [12, 13]]


@torch.no_grad()
@pytest.mark.parametrize("backbone", TEACHERS)
def test_captured_decoding_takes_the_callers_positions(backbone):
    model, (ids, mask) = make_student(TEACHERS[backbone](), *MODELS["linear"]), make_prompt()
    model.double()

    def steps(captured):
        cache, outputs = DynamicCache(config=model.config), []
        model(ids[:, :12], attention_mask=mask[:, :12], past_key_values=cache, use_cache=True)
        for place, position in ((12, torch.tensor([[30]])), (13, torch.tensor([[40], [9]])), (14, None)):
            more = {} if position is None else {"position_ids": position}
            step = ids[:, place : place + 1]
            outputs.append(model(step, past_key_values=cache, use_cache=True, **more).logits)
            assert (cache.layers[0].holder is not None) == captured
        return torch.cat(outputs, 1)

    ordinary = steps(False)
    with model.captured_decoding():
        assert (steps(True) - ordinary).abs().max() <= 1e-10


@torch.no_grad()
def test_captured_decoding_refuses_what_the_model_refuses():
    model, (ids, _) = make_student(make_gpt2(), *MODELS["linear"]), make_prompt()
    cache = DynamicCache(config=model.config)
    with model.captured_decoding():
        model(ids, past_key_values=cache, use_cache=True)
        with pytest.raises(ValueError, match="learned positions"):
            model(ids[:, :1], past_key_values=cache, use_cache=True, position_ids=torch.tensor([[256]]))
        with pytest.raises(ValueError, match=r"must be \(2, 1 or 17\)"):
            model(ids[:, :1], past_key_values=cache, use_cache=True, attention_mask=torch.ones(2, 12))
