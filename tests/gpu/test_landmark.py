"""Landmark attention on a GPU: what the CPU gives, blocks in CPU memory, half precision, compiled training."""

import pytest
import torch
from landmark_toys import draw, retrieval_call, rotary_tables
from tiny_models import make_student, make_teacher, perturb
from torch.testing import assert_close
from transformers import DynamicCache

from linearize.modeling.compiled import compiled_training
from linearize.modeling.op_landmark import SELECTIONS, LandmarkBlocks, landmark_attention, landmark_retrieval_attention

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]


def to(x, device="cuda", dtype=None):
    if x is None:
        return None
    return x.to(device) if dtype is None or not x.is_floating_point() else x.to(device, dtype)


def test_all_blocks():
    inputs = draw(150)
    expected, _ = landmark_attention(*inputs, block_size=8, offset=3)
    found, _ = landmark_attention(*(to(x) for x in inputs), block_size=8, offset=3)
    assert_close(found.cpu(), expected, rtol=0, atol=1e-10)
    rounded = [x.bfloat16() for x in inputs]
    expected, _ = landmark_attention(*(x.double() for x in rounded), block_size=8, offset=3)
    half, _ = landmark_attention(*(to(x) for x in rounded), block_size=8, offset=3)
    assert_close(half.cpu().double(), expected, rtol=0, atol=0.08)


@pytest.mark.parametrize("stored_on", ["cuda", "cpu"])
@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("spans", [[(0, 90), (0, 61)], [(89, 90), (60, 61)]])
def test_blocks_on_either_side(spans, selection, stored_on):
    args, options = retrieval_call(draw(90), 6, rotary_tables(100), spans=spans)
    query, key, value = (x.nan_to_num() for x in args[:3])
    blocks = LandmarkBlocks(*(x.nan_to_num() for x in args[3][:3]), args[3][3])
    options |= {"top_k": 3, "selection": selection}
    expected = landmark_retrieval_attention(query, key, value, blocks, **options)
    options |= {name: to(options[name]) for name in ("position", "first")}
    options["rotary"] = tuple(to(x) for x in options["rotary"])
    moved = LandmarkBlocks(*(to(x, stored_on) for x in blocks[:2]), *(to(x) for x in blocks[2:]))
    found = landmark_retrieval_attention(to(query), to(key), to(value), moved, **options)
    assert_close(found.cpu(), expected, rtol=0, atol=1e-10)


def test_a_cache_in_cpu_memory_holds_only_landmarks_on_the_gpu():
    ids, logits, held = torch.randint(3, 97, (2, 200), device="cuda"), [], []
    for offload in (False, True):
        mixer = {"type": "landmark", "block_size": 8, "top_k": 3, "offload": offload}
        model = make_student(make_teacher(), {"landmark": mixer})
        perturb(model)
        model = model.cuda()
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            pieces = [model(piece, past_key_values=cache).logits for piece in ids.split([150, 1, 1, 47, 1], dim=1)]
        logits.append(torch.cat(pieces, dim=1))
        state = cache.layers[0].state
        held.append(sum(x.nbytes for x in state if x.is_cuda))
        assert state.key.is_pinned() == offload and state.landmark.is_cuda
    assert_close(logits[1], logits[0], rtol=0, atol=1e-4)
    assert held[1] < held[0] / 3


@pytest.mark.parametrize("share", [0.0, 0.6])
def test_compiled_training_gives_the_same_gradients(share):
    mixer = {"type": "landmark", "block_size": 8, "top_k": 4, "block_dropout": share}
    model = make_student(make_teacher(), {"landmark": mixer}).cuda().train()
    ids, gradients = torch.randint(3, 97, (2, 120), device="cuda"), []
    for compiled in (False, True):
        torch.manual_seed(3)
        model.zero_grad()
        if compiled:
            with compiled_training():
                model(ids, labels=ids).loss.backward()
        else:
            model(ids, labels=ids).loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    for plain, other in zip(*gradients, strict=True):
        assert_close(other, plain, rtol=1e-3, atol=1e-5)
