"""Autocast: the ops leave it, and what it hands them in two dtypes runs in one."""

import pytest
import torch
from tiny_models import make_student, make_teacher, perturb

from linearize.kernels import triton_support
from linearize.kernels.triton_support import common_dtype, interpreting
from linearize.modeling import (
    FeatureMapWeights,
    GainCell,
    LandmarkBlocks,
    cosine_attention,
    gain_cell_attention,
    hybrid_linear_attention,
    landmark_attention,
    landmark_retrieval_attention,
)
from linearize.modeling.landmark_keys import LandmarkKeys

BF16 = torch.bfloat16
HEADS, GROUPS, LENGTH, DIM, BLOCK = 4, 2, 37, 8, 16


def draws(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(*shape, generator=generator)


def call_of(op, length=LENGTH):
    """Function, its query, key and value, and the rest, in float32."""
    draw = draws()
    tensors = [2 * draw(2, heads, length, DIM) for heads in (HEADS, GROUPS, GROUPS)]
    maps = [FeatureMapWeights(draw(HEADS, DIM, 5), None, None, "softmax") for _ in range(2)]
    mix = {"window_weight": draw(HEADS).abs() + 0.1, "window_shift": draw(HEADS), "window": 5, "sinks": 2}
    if op == "landmark_retrieval":
        tensors[1:] = [2 * draw(2, GROUPS, 1, BLOCK, DIM) for _ in range(2)]
        stored = [2 * draw(2, GROUPS, 4, BLOCK, DIM) for _ in range(2)]
        blocks = LandmarkBlocks(*stored, stored[0][..., -1, :], torch.arange(4).expand(2, 4))
        place = {"position": 4 * BLOCK + torch.arange(3).expand(2, 3), "first": torch.tensor([4, 4]), "top_k": 2}
        tensors[0] = tensors[0][:, :, :3]
        return (lambda q, k, v, **kw: landmark_retrieval_attention(q, k, v, blocks, **kw)), tensors, place
    if op == "linear":
        return (lambda q, k, v, **kw: hybrid_linear_attention(q, k, v, *maps, **kw)[0]), tensors, mix
    function, options = {
        "cosine": (cosine_attention, {"exponent": draw(HEADS).sigmoid()}),
        "gain_cell": (gain_cell_attention, {"cell": GainCell(), "window": 64}),
        "landmark": (landmark_attention, {"block_size": BLOCK}),
    }[op]
    return (lambda q, k, v, **kw: function(q, k, v, **kw)[0]), tensors, options


OPS = ["linear", "cosine", "gain_cell", "landmark", "landmark_retrieval"]
KERNELS = ["linear", "cosine", "landmark"]


@pytest.mark.parametrize("backend", ["chunked", "reference"])
@pytest.mark.parametrize("op", OPS)
def test_ops_leave_autocast(op, backend):
    function, tensors, options = call_of(op)
    expected = function(*tensors, **options, backend=backend)
    with torch.autocast("cpu", BF16):
        found = function(*tensors, **options, backend=backend)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_pooled_landmark_keys_leave_autocast():
    keys, blocks = LandmarkKeys(2, DIM, BLOCK), draws()(1, 2, 3, BLOCK, DIM)
    torch.nn.init.normal_(keys.mix)
    for parameter in (keys.content, keys.place, keys.bias, keys.landmark):
        torch.nn.init.normal_(parameter)
    with torch.autocast("cpu", BF16):
        found = keys(blocks)
    torch.testing.assert_close(found, keys(blocks), rtol=0, atol=1e-6)


@pytest.mark.parametrize("op", OPS)
def test_bfloat16_is_rounded_only_on_the_way_in_and_out(op):
    """Scores of 20 would be off by 0.06 if they were kept in bfloat16, and so would the weights by 6%."""
    function, tensors, options = call_of(op)
    tensors = [(2 * x).to(BF16) for x in tensors[:2]] + [tensors[2].to(BF16)]
    expected = function(*(x.float() for x in tensors), **options, backend="reference")
    found = function(*tensors, **options, backend="chunked")
    assert found.dtype == BF16
    assert (found - expected).abs().max() <= 2**-8 * expected.abs().max()


@pytest.mark.skipif(not interpreting(), reason="a GPU is there")
@pytest.mark.parametrize("op", KERNELS)
def test_the_kernels_take_values_of_another_dtype(op):
    """As rotation leaves them under autocast; gradients come back in each tensor's own."""
    function, tensors, options = call_of(op, length=20)
    tensors[2] = tensors[2].to(BF16)
    results = []
    for backend in ("triton", "reference"):
        leaves = [x.clone().requires_grad_() for x in tensors]
        with torch.autocast("cpu", BF16):
            output = function(*leaves, **options, backend=backend)
        assert output.dtype == torch.float32
        grads = torch.autograd.grad(output.square().sum(), leaves)
        assert [x.dtype for x in grads] == [torch.float32, torch.float32, BF16]
        results.append((output, *grads))
    for found, expected in zip(*results, strict=True):
        tolerance = 1e-4 if found.dtype == torch.float32 else 2**-7
        assert (found - expected).abs().max() <= tolerance * (1 + expected.abs().max())


def test_one_dtype_a_call(monkeypatch):
    monkeypatch.setattr(triton_support, "INTERPRETING", False)
    wide, narrow = torch.zeros(1), torch.zeros(1, dtype=BF16)
    assert common_dtype(narrow, narrow, narrow) == BF16
    assert common_dtype(wide, wide, narrow) == torch.float32
    with torch.autocast("cpu", BF16):
        assert common_dtype(wide, wide, narrow) == BF16
        assert common_dtype(wide, wide, wide) == torch.float32  # what was given in one dtype stays in it
        assert common_dtype(wide, wide.half(), narrow) == torch.float32
        assert common_dtype(wide.double(), wide, narrow) == torch.float64


MODELS = {
    "linear": {"window": 5, "sinks": 2},
    "cosine": {"window": 0, "sinks": 0},
}  # landmark attention rotates in the model's dtype: its queries and keys come as its values do


@pytest.mark.skipif(not interpreting(), reason="a GPU is there")
@pytest.mark.parametrize("kind", MODELS)
def test_a_model_trains_under_autocast_in_the_kernels(kind):
    model = make_student(make_teacher(num_hidden_layers=1), {"mixer": {"type": kind, **MODELS[kind]}}).train()
    perturb(model)
    ids = torch.randint(3, 97, (1, 20), generator=torch.Generator().manual_seed(1))
    found = {}
    for backend in ("chunked", "triton"):
        model.set_op_backend(backend)
        model.zero_grad()
        with torch.autocast("cpu", BF16):
            loss = model(ids, labels=ids, use_cache=False).loss
        loss.backward()
        found[backend] = loss.detach(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    (loss, grad), (same, close) = found["triton"], found["chunked"]
    assert (loss - same).abs() < 0.01
    assert (grad - close).norm() < 0.05 * close.norm()
