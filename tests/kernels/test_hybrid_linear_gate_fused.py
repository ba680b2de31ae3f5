"""Contract 2 in the Triton kernels, interpreted at tiny sizes: a memory that forgets, maps that read other tensors."""

import importlib

import pytest
import torch
from test_hybrid_linear_fused import (
    WEIGHTS,
    assert_close,
    compare,
    make_inputs,
    make_mask,
    poison,
    small_tiles,  # noqa: F401 # used by every test
    to,
)

import linearize.kernels.hybrid_linear.function as function
from linearize.kernels.triton_support import interpreting
from linearize.modeling import HybridLinearState, hybrid_linear_attention
from linearize.modeling import op_hybrid_linear_decode as in_place_steps

pytestmark = [
    pytest.mark.skipif(not interpreting(), reason="a GPU is there: tests/gpu has these"),
    # The decay of keys that enter after a query may overflow; what is not selected is computed all the same.
    pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning"),
]


KERNELS = "linearize.kernels.hybrid_linear"
PER_TOKEN = ("map_query", "map_key", "log_decay")
MAP_DIM = 10  # the maps may read something of another width
TOLERANCE = 2e-5


def make_call(heads=2, groups=1, key_heads=2, batch=1, length=45, maps=True, seed=0):
    """Inputs and options with decays of every size, 0 and the closing of a whole memory among them."""
    inputs, mix = make_inputs(heads, groups, key_heads, batch, length, as_weights=maps, seed=seed)
    generator = torch.Generator().manual_seed(seed + 1)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    log_decay = -(3 * draw(batch, key_heads, length) - 4).exp()
    log_decay[..., 5], log_decay[..., 11] = 0.0, -60.0
    mix["log_decay"] = log_decay
    if maps:
        mix |= {"map_query": draw(batch, heads, length, MAP_DIM), "map_key": draw(batch, groups, length, MAP_DIM)}
        for place, count in ((3, heads), (4, key_heads)):
            changed = {"weight": draw(count, MAP_DIM, WEIGHTS), "magnitude": 0.3 * draw(count, MAP_DIM)}
            inputs[place] = inputs[place]._replace(**changed)
    return inputs, mix


def poison_options(mix, mask):
    gap = ~mask[:, None]
    per_token = {name: mix[name] for name in PER_TOKEN if name in mix}
    return mix | {
        name: x.masked_fill(gap if x.dim() == 3 else gap[..., None], torch.nan) for name, x in per_token.items()
    }


@pytest.mark.parametrize("span", [(0, 0), (5, 3), (0, 2), (16, 0), (37, 2)], ids=str)
def test_equals_the_definition(span):
    inputs, mix = make_call(length=75, maps=False)
    options = {"window": span[0], "sinks": span[1], "return_state": True}
    compare(inputs, mix, options)


@pytest.mark.parametrize("gate", [True, False], ids=["gate", "none"])
def test_sums_in_tiles_of_unequal_sides(gate, monkeypatch):
    """Several tiles along features and along values, none of them full at its end, of a state that goes on."""
    tiles = function.choose_tiles(None, 0)._replace(sums=function.Launch(16, 32, 1, 1))
    monkeypatch.setattr(function, "choose_tiles", lambda dot, widest: tiles)
    inputs, mix = make_call(key_heads=1, length=45, maps=False)
    generator = torch.Generator().manual_seed(3)
    inputs[2] = torch.randn(1, 1, 45, 40, generator=generator)
    inputs[3:] = [torch.rand(1, heads, 45, 21, generator=generator) for heads in (2, 1)]
    if not gate:
        del mix["log_decay"]
    options = {"window": 5, "sinks": 2, "return_state": True}
    with torch.no_grad():
        before = hybrid_linear_attention(*inputs, **mix, **options, backend="reference")[1]
    compare(inputs, mix, {**options, "initial_state": before})


@pytest.mark.parametrize("heads, groups, key_heads", [(4, 2, 4), (4, 2, 2), (3, 1, 1)])
def test_grouped_heads_and_maps(heads, groups, key_heads):
    inputs, mix = make_call(heads, groups, key_heads, length=40)
    compare(inputs, mix, {"window": 5, "sinks": 2, "window_reference": "max"})


def test_maps_read_their_own_tensors_without_a_gate():
    inputs, mix = make_call(key_heads=1, length=37)
    del mix["log_decay"]
    compare(inputs, mix, {"window": 5, "sinks": 2, "return_state": True})


@pytest.mark.parametrize("maps", [True, False], ids=["maps", "features"])
@pytest.mark.parametrize("padding", ["left", "all"])
def test_padding(padding, maps):
    inputs, mix = make_call(batch=2, length=21, maps=maps)
    mask = make_mask(padding, 2, 21)
    mask[1, 9] = False
    options = {"window": 5, "sinks": 3, "attention_mask": mask, "return_state": True}
    compare(poison(inputs, mask), poison_options(mix, mask), options)


def test_packed_sequences():
    inputs, mix = make_call(groups=2, key_heads=2)
    bounds = torch.tensor([0, 1, 1, 18, 43, 45], dtype=torch.int32)
    compare(inputs, mix, {"window": 5, "sinks": 2, "cu_seqlens": bounds})


@pytest.mark.parametrize("padding", [None, "left"])
@pytest.mark.parametrize("maps, key_heads, window", [(True, 2, 5), (False, 1, 16), (True, 1, 0)], ids=str)
def test_a_state_comes_in_and_goes_out(maps, key_heads, window, padding):
    first, mix = make_call(batch=2, length=19, maps=maps, key_heads=key_heads)
    second, other = make_call(batch=2, length=40, maps=maps, key_heads=key_heads, seed=2)
    if maps:
        second[3:] = first[3:]
    options = {"window": window, "sinks": 3, "return_state": True}
    with torch.no_grad():
        before = hybrid_linear_attention(*first, **mix, **options, backend="reference")[1]
    if padding is not None:
        mask = make_mask(padding, 2, 40)
        second, other, options["attention_mask"] = poison(second, mask), poison_options(other, mask), mask
    compare(second, other, {**options, "initial_state": before})


@pytest.mark.parametrize("maps", [True, False], ids=["maps", "features"])
def test_any_cut_into_calls_gives_the_same(maps):
    inputs, mix = make_call(batch=2, length=30, maps=maps)
    options = {"window": 5, "sinks": 3, "return_state": True, "backend": "triton"}
    names = [name for name in PER_TOKEN if name in mix]
    with torch.no_grad():
        expected, expected_state = hybrid_linear_attention(*inputs, **mix, **options)
        state, outputs, start = None, [], 0
        for tokens in (1, 1, 0, 6, 1, 21):
            span = slice(start, start + tokens)
            pieces = [x[:, :, span] if isinstance(x, torch.Tensor) else x for x in inputs]
            cut = mix | {name: mix[name][:, :, span] for name in names}
            output, state = hybrid_linear_attention(*pieces, **cut, **options, initial_state=state)
            outputs.append(output)
            start += tokens
    assert_close(torch.cat(outputs, 2), expected.double(), TOLERANCE, "output")
    for name, a, b in zip(HybridLinearState._fields, state, expected_state, strict=True):
        if a is not None:
            assert_close(a, b.double(), TOLERANCE, name)


def test_strong_decays_stay_finite_and_exact():
    """What a chunk forgets altogether leaves the rest exact."""
    inputs, mix = make_call(length=70, maps=False)
    mix["log_decay"] = mix["log_decay"] * 4
    mix["log_decay"][..., 50:] = -0.01
    compare(inputs, mix, {"window": 5, "sinks": 2, "return_state": True})


def test_refused_only_where_nothing_can_be_done():
    inputs, mix = make_call(length=12)
    without = {name: x for name, x in mix.items() if name != "log_decay"}
    with pytest.raises(ValueError, match="bidirectional"):
        hybrid_linear_attention(*inputs, **without, causal=False, backend="triton")
    wide = {name: torch.zeros(1, h, 12, 129) for name, h in (("map_query", 2), ("map_key", 1))}
    inputs[3:] = [x._replace(weight=torch.zeros(2, 129, WEIGHTS), magnitude=None) for x in inputs[3:]]
    with pytest.raises(ValueError, match="dimension of what the maps read of at most 128"):
        hybrid_linear_attention(*inputs, **mix | wide, backend="triton")


def steps_of(inputs, mix, mask, options):
    """What a call of each token takes, and the definition's output and state after it, in float64."""
    state = None
    for i in range(mask.shape[1]):
        pieces = [x[:, :, i : i + 1] if isinstance(x, torch.Tensor) else x for x in inputs]
        cut = mix | {name: mix[name][:, :, i : i + 1] for name in PER_TOKEN if name in mix}
        real = mask[:, i : i + 1]
        call = {**options, "attention_mask": real, "return_state": True}
        output, state = hybrid_linear_attention(
            *to(torch.float64, pieces), **to(torch.float64, cut), **call, initial_state=state, backend="reference"
        )
        yield poison(pieces, real), poison_options(cut, real), real, output, state


def step_case(maps, key_heads, window):
    """Twelve tokens of two rows, two of them padding."""
    mask = torch.ones(2, 12, dtype=torch.bool)
    mask[0, [0, 5]] = False
    inputs, mix = make_call(batch=2, length=12, maps=maps, key_heads=key_heads)
    return inputs, mix, mask, {"window": window, "sinks": 2}


STEP_CASES = [(True, 2, 3), (True, 1, 0), (False, 1, 4), (True, 1, 1)]


@pytest.mark.parametrize("maps, key_heads, window", STEP_CASES, ids=str)
@torch.no_grad()
def test_one_token_in_one_launch(maps, key_heads, window, monkeypatch):
    inputs, mix, mask, options = step_case(maps, key_heads, window)
    state = None
    for pieces, cut, real, output, expected in steps_of(inputs, mix, mask, options):
        call = {**options, **cut, "attention_mask": real, "return_state": True, "backend": "triton"}
        found, state = hybrid_linear_attention(*pieces, **call, initial_state=state)
        monkeypatch.setattr(importlib.import_module(f"{KERNELS}.fused"), "run", None)  # all but the first
        assert_close(found, output, TOLERANCE, "output")
        for name, a, b in zip(HybridLinearState._fields, state, expected, strict=True):
            assert (a is None) == (b is None), name
            if a is not None:
                assert_close(a, b, TOLERANCE, name)


@pytest.mark.parametrize("maps, key_heads, window", STEP_CASES, ids=str)
@torch.no_grad()
def test_steps_in_place(maps, key_heads, window, monkeypatch):
    inputs, mix, mask, options = step_case(maps, key_heads, window)
    none = [x[:, :, :0] if isinstance(x, torch.Tensor) else x for x in inputs]
    call = mix | {name: mix[name][:, :, :0] for name in PER_TOKEN if name in mix}
    state = hybrid_linear_attention(*none, **call, **options, return_state=True, backend="reference")[1]
    buffers, count = in_place_steps.new_buffers(state, 2), torch.zeros(2, dtype=torch.int64)
    buffers.load_(state)
    steps = list(steps_of(inputs, mix, mask, options))
    monkeypatch.setattr(in_place_steps, "hybrid_linear_attention", None)
    for pieces, cut, real, output, expected in steps:
        found = in_place_steps.hybrid_linear_step_(
            *pieces, **cut, **options, window_reference="logsumexp", scaling=None, attention_mask=real,
            log_weight=False, buffers=buffers, count=count, backend="triton",
        )  # fmt: skip
        count += real[:, 0]
        assert_close(found, output, TOLERANCE, "output")
        for name, a, b in zip(
            HybridLinearState._fields, in_place_steps.read_buffers(buffers, count), expected, strict=True
        ):
            if a is not None:
                assert_close(a, b, TOLERANCE, name)
