"""Converted models in `torch.export` and `torch.compile`: with a mask too, nothing asks for the values of a tensor."""

import pytest
import torch
from tiny_models import make_bert, make_student
from tiny_students import MAKERS, MIXERS, token_ids

CLOSE = {"rtol": 0, "atol": 1e-5}


@pytest.fixture
def ids():
    return token_ids(9)


@pytest.fixture
def mask():
    mask = torch.ones(2, 9, dtype=torch.int64)
    mask[0, :3] = 0
    return mask


def one_layer(backbone: str, mechanism: str):
    layers = {"n_layer": 1} if backbone.startswith("gpt") else {"num_hidden_layers": 1}
    return make_student(MAKERS[backbone](**layers), {"student": MIXERS[mechanism]})


def exported(model, ids, mask):
    with torch.no_grad():
        return torch.export.export(model, (ids,), {"attention_mask": mask, **NO_CACHE}, strict=False).module()


NO_CACHE = {"use_cache": False}
PAIRS = [*((backbone, "linear") for backbone in MAKERS), *(("llama", name) for name in MIXERS if name != "linear")]


@pytest.mark.parametrize(("backbone", "mechanism"), PAIRS)
def test_an_exported_model_takes_any_mask(backbone, mechanism, ids, mask):
    student = one_layer(backbone, mechanism)
    program = exported(student, ids, mask)
    for each in (mask, mask.flip(0), torch.ones_like(mask)):
        want = student(ids, attention_mask=each).logits
        found = program(ids, attention_mask=each, **NO_CACHE).logits
        torch.testing.assert_close(found[each.bool()], want[each.bool()], **CLOSE)


@pytest.mark.parametrize("mechanism", MIXERS)
def test_a_compiled_model_is_one_graph_with_a_mask(mechanism, ids, mask):
    torch._dynamo.reset()
    student = one_layer("llama", mechanism)
    with torch.no_grad():
        found = torch.compile(student, backend="eager", fullgraph=True)(ids, attention_mask=mask, **NO_CACHE).logits
    want = student(ids, attention_mask=mask).logits
    torch.testing.assert_close(found[mask.bool()], want[mask.bool()], **CLOSE)


@pytest.mark.parametrize("positions", [False, True])
def test_an_exported_encoder_takes_any_mask(positions, ids, mask):
    student = make_student(make_bert(num_hidden_layers=1), {"cosine": MIXERS["cosine"]})
    given = {"position_ids": torch.arange(9)[None]} if positions else {}
    with torch.no_grad():
        program = torch.export.export(student, (ids,), {"attention_mask": mask, **given}, strict=False).module()
    for each in (mask, torch.ones_like(mask)):
        want = student(ids, attention_mask=each).last_hidden_state
        found = program(ids, attention_mask=each, **given).last_hidden_state
        torch.testing.assert_close(found[each.bool()], want[each.bool()], **CLOSE)
