"""How operands lie in memory: expanded, sliced, transposed and offset ones give the kernels what dense ones do.

Every tensor of a call draws a layout, gradients that come back among them; what lies between its elements is NaN.
"""

import random

import pytest
import torch
from torch import Tensor

from linearize.kernels.triton_support import interpreting
from linearize.modeling import (
    CosineState,
    FeatureMapWeights,
    HybridLinearState,
    SalientState,
    cosine_attention,
    hybrid_linear_attention,
    landmark_attention,
    salient_attention,
)

pytestmark = pytest.mark.skipif(not interpreting(), reason="a GPU is there")

BATCH, HEADS, GROUPS, DIM, VALUE_DIM, WIDTH, WINDOW, SINKS = 2, 4, 2, 8, 6, 5, 4, 2


def filler(x: Tensor):
    return torch.nan if x.is_floating_point() else 77


def sliced(x: Tensor, dim: int) -> Tensor:
    """Every second place of a buffer."""
    shape = list(x.shape)
    shape[dim] = 2 * shape[dim] + 1
    view = x.new_full(shape, filler(x)).narrow(dim, 1, shape[dim] - 1).unfold(dim, 1, 2)[..., 0]
    return view.copy_(x)


def transposed(x: Tensor) -> Tensor:
    return x.transpose(0, -1).contiguous().transpose(0, -1)


def offset(x: Tensor) -> Tensor:
    return x.new_full((x.numel() + 3,), filler(x))[3:].view(x.shape).copy_(x)


def lay_out(x: Tensor, dice: random.Random) -> Tensor:
    """The same values in another layout; expanded, those of its first heads (or rows) for all."""
    kind = dice.choice(["dense", "expanded", "sliced", "transposed", "offset"]) if x.numel() else "dense"
    dim = dice.randrange(x.dim())
    if kind == "expanded" and x.is_floating_point():
        return x.narrow(dim, 0, 1).expand_as(x)
    if kind == "sliced":
        return sliced(x, dim)
    return {"transposed": transposed, "offset": offset}.get(kind, torch.clone)(x)


def through(values, change):
    """Values with `change` done to every tensor, in tuples and dictionaries too."""
    if isinstance(values, Tensor):
        return change(values)
    if isinstance(values, tuple) and hasattr(values, "_make"):
        return values._make(through(x, change) for x in values)
    if isinstance(values, (list, tuple)):
        return [through(x, change) for x in values]
    if isinstance(values, dict):
        return {name: through(x, change) for name, x in values.items()}
    return values


def tensors_of(values) -> list[Tensor]:
    found: list[Tensor] = []
    through(values, lambda x: found.append(x) if x.is_floating_point() else None)
    return found


def check(op, args, options, seed, train=True, tolerance=1e-4):
    """The kernels on laid-out operands against the definition on dense ones: outputs, state and gradients."""
    dice = random.Random(seed)
    laid = through([args, options], lambda x: lay_out(x, dice))
    dense = through(laid, lambda x: x.contiguous().clone())
    incoming: list[Tensor] = []
    results = []
    for backend, (values, settings) in (("triton", laid), ("reference", dense)):
        leaves = [x.requires_grad_(train) for x in tensors_of([values, settings])]
        outputs = tensors_of(op(*values, **settings, backend=backend))
        grads = []
        if train:
            pick = [x for x in outputs if x.requires_grad]
            if not incoming:
                generator = torch.Generator().manual_seed(seed)
                incoming = [lay_out(torch.randn(x.shape, generator=generator), dice) for x in pick]
            given = incoming if backend == "triton" else [x.contiguous() for x in incoming]
            grads = torch.autograd.grad(pick, leaves, given, allow_unused=True, materialize_grads=True)
        results.append([*outputs, *grads])
    for place, (found, expected) in enumerate(zip(*results, strict=True)):
        assert found.shape == expected.shape
        if found.numel():
            error = (found - expected).abs().max() / (1 + expected.abs().max())
            assert error < tolerance, f"tensor {place}, of shape {tuple(found.shape)}, is off by {error:.2g}"


def draws(seed):
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(*shape, generator=generator)


def qkv(draw, length, batch=BATCH, value_dim=VALUE_DIM):
    shapes = ((HEADS, DIM), (GROUPS, DIM), (GROUPS, value_dim))
    return [draw(batch, heads, length, width) for heads, width in shapes]


def counts(batch=BATCH):
    return torch.arange(5, 5 + 4 * batch, 4)


# --- hybrid linear


def hybrid(seed, length, maps, state=False, batch=BATCH, **options):
    draw = draws(seed)
    inputs = qkv(draw, length, batch)
    if maps:
        inputs += [
            FeatureMapWeights(draw(HEADS, DIM, WIDTH), draw(HEADS, WIDTH), 0.3 * draw(HEADS, DIM), "softmax")
            for _ in range(2)
        ]
    else:
        inputs += [draw(batch, HEADS, length, WIDTH).abs() for _ in range(2)]
    options |= {
        "window_weight": draw(HEADS).abs() + 0.1,
        "window_shift": draw(HEADS),
        "window": WINDOW,
        "sinks": SINKS,
    }
    if state:
        width = 2 * WIDTH if maps else WIDTH
        rings = [draw(batch, GROUPS, n, d) for n in (WINDOW, SINKS) for d in (DIM, VALUE_DIM)]
        options["initial_state"] = HybridLinearState(
            kv=draw(batch, HEADS, width, VALUE_DIM),
            normalizer=draw(batch, HEADS, width).abs() + 1,
            window_key=rings[0],
            window_value=rings[1],
            window_features=None if maps else draw(batch, HEADS, WINDOW, WIDTH).abs(),
            sink_key=rings[2],
            sink_value=rings[3],
            count=counts(batch),
        )
        options["return_state"] = True
    return hybrid_linear_attention, inputs, options


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("maps", [False, True], ids=["features", "maps"])
def test_hybrid_linear(maps, seed):
    check(*hybrid(seed, 17, maps, state=seed % 2 == 0), seed)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("maps", [False, True], ids=["features", "maps"])
def test_hybrid_linear_decodes(maps, seed):
    mask = torch.tensor([[1], [seed % 2]]).bool()
    check(*hybrid(seed, 1, maps, state=True, attention_mask=mask), seed, train=False)


# --- cosine


def cosine(seed, length, side, state=False, batch=BATCH, **options):
    draw = draws(seed)
    options |= {"exponent": draw(HEADS).sigmoid(), "gain": draw(HEADS), "scale_side": side}
    if state:
        empty = [torch.zeros(batch, GROUPS, 0, d) for _ in range(2) for d in (DIM, VALUE_DIM)]
        kv = draw(batch, HEADS if side == "key" else GROUPS, DIM, VALUE_DIM)
        options |= {"initial_state": CosineState(kv, *empty, counts(batch)), "return_state": True}
    return cosine_attention, qkv(draw, length, batch), options


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("side", ["query", "key"])
def test_cosine(side, seed):
    check(*cosine(seed, 17, side, state=seed % 2 == 0), seed)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("side", ["query", "key"])
def test_cosine_decodes(side, seed):
    mask = torch.tensor([[1], [seed % 2]]).bool()
    check(*cosine(seed, 1, side, state=True, attention_mask=mask), seed, train=False)


# --- landmark


@pytest.mark.parametrize("seed", range(3))
def test_landmark(seed):
    draw = draws(seed)
    options = {
        "block_size": 16,
        "offset": torch.tensor([3, 9]),
        "open_blocks": draw(BATCH, 2) > 0,
        "attention_mask": torch.arange(20) >= torch.tensor([[0], [5]]),
    }
    check(landmark_attention, qkv(draw, 20, value_dim=DIM), options, seed)


# --- salient


def salient_by_rank(*args, **options):
    """The store in the order of its ranks, which is no part of the contract."""
    output, state = salient_attention(*args, **options)
    rank, order = state.kept_rank.sort(dim=-1)
    key, value = (x.gather(2, order[..., None].expand_as(x)) for x in (state.kept_key, state.kept_value))
    return output, state._replace(kept_key=key, kept_value=value, kept_rank=rank)


@pytest.mark.parametrize("seed", range(4))
def test_salient_decodes(seed):
    draw = draws(seed)
    held = {name: (draw(BATCH, GROUPS, n, DIM), draw(BATCH, GROUPS, n, DIM)) for name, n in (("w", 6), ("k", 3))}
    mass, rank = draw(BATCH, GROUPS, 6).abs(), draw(BATCH, GROUPS, 3)
    sinks = (draw(BATCH, GROUPS, SINKS, DIM), draw(BATCH, GROUPS, SINKS, DIM))
    state = SalientState._make((*held["w"], mass, *held["k"], rank, *sinks, 40 + counts()))
    options = {"window": 6, "sinks": SINKS, "kept": 3, "age_penalty": 0.6, "initial_state": state}
    options |= {"return_state": True, "attention_mask": torch.tensor([[1], [seed % 2]]).bool()}
    check(salient_by_rank, qkv(draw, 1, value_dim=DIM), options, seed, train=False)


# --- packed rows


@pytest.mark.parametrize("op", ["hybrid linear", "cosine", "landmark"])
def test_bounds_of_packed_rows(op):
    bounds = torch.tensor([0, 4, 4, 13, 17], dtype=torch.int32)
    calls = {
        "hybrid linear": hybrid(0, 17, True, batch=1),
        "cosine": cosine(0, 17, "query", batch=1),
        "landmark": (landmark_attention, qkv(draws(0), 17, 1, DIM), {"block_size": 16}),
    }
    function, inputs, options = calls[op]
    found = function(*inputs, **options, cu_seqlens=sliced(bounds, 0), backend="triton")[0]
    expected = function(*inputs, **options, cu_seqlens=bounds, backend="reference")[0]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
