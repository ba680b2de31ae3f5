"""The Triton kernels in the interpreter, at tiny sizes, against the definition in float64."""

import pytest
import torch
import torch.utils.checkpoint
from torch import Tensor

import linearize.kernels.hybrid_linear.function as function
from linearize.kernels.triton_support import interpreting
from linearize.modeling import FeatureMapWeights, HybridLinearState, hybrid_linear_attention

pytestmark = pytest.mark.skipif(not interpreting(), reason="a GPU is there: tests/gpu has these")

LENGTH, DIM, VALUE_DIM, WIDTH, WEIGHTS = 45, 8, 12, 6, 5
CHOOSE_TILES = function.choose_tiles
TOLERANCE = 2e-5  # float32 sums of about 50 terms


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Several chunks, and several blocks in each, at test lengths."""
    launch = function.Launch(16, 16, 1, 1)
    monkeypatch.setattr(function, "choose_tiles", lambda dot, widest: function.Tiles(32, *[launch] * 4))


def make_inputs(
    heads=2, groups=1, key_heads=2, batch=1, length=LENGTH, as_weights=False, activation="softmax", seed=0
):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    query, key = 1.5 * draw(batch, heads, length, DIM), 1.5 * draw(batch, groups, length, DIM)
    value = draw(batch, groups, length, VALUE_DIM)
    if as_weights:
        features = [
            FeatureMapWeights(draw(h, DIM, WEIGHTS), draw(h, WEIGHTS), 0.3 * draw(h, DIM), activation)
            for h in (heads, key_heads)
        ]
    else:
        features = [draw(batch, h, length, WIDTH).abs() for h in (heads, key_heads)]
    mix = {"window_weight": draw(heads).abs() + 0.1, "window_shift": draw(heads)}
    return [query, key, value, *features], mix


def to(dtype, values):
    if isinstance(values, Tensor):
        return values.to(dtype) if values.is_floating_point() else values
    if isinstance(values, tuple) and hasattr(values, "_make"):
        return values._make(to(dtype, x) for x in values)
    if isinstance(values, (list, tuple)):
        return [to(dtype, x) for x in values]
    if isinstance(values, dict):
        return {name: to(dtype, x) for name, x in values.items()}
    return values


def leaves_of(values):
    for value in values:
        if isinstance(value, Tensor) and value.is_floating_point():
            yield value
        elif isinstance(value, tuple):
            yield from leaves_of(value)


def call(backend, inputs, mix, options, directions=None):
    """Outputs of a call, and gradients of everything by the given directions of output (and state sums)."""
    state = options.get("initial_state")
    leaves = list(leaves_of([*inputs, *mix.values(), *(state or ())]))
    for leaf in leaves:
        leaf.requires_grad_()
    output, new_state = hybrid_linear_attention(*inputs, **mix, **options, backend=backend)
    if directions is None:
        return output, new_state, None
    parts = [output] + ([x for x in new_state if x is not None and x.is_floating_point()] if new_state else [])
    total = sum((part * direction.to(part.dtype)).sum() for part, direction in zip(parts, directions, strict=False))
    gradients = torch.autograd.grad(total, leaves, allow_unused=True)
    return output, new_state, [torch.zeros_like(x) if g is None else g for x, g in zip(leaves, gradients, strict=True)]


def compare(inputs, mix, options, tolerance=TOLERANCE, gradients=True):
    """Triton in float32 against the reference in float64: outputs, state and all gradients."""
    generator = torch.Generator().manual_seed(1)
    wide = to(torch.float64, inputs), to(torch.float64, mix), to(torch.float64, options)
    with torch.no_grad():
        probe, state, _ = call("reference", *(to(torch.float64, x) for x in (inputs, mix, options)))
    parts = [probe] + ([x for x in state if x is not None and x.is_floating_point()] if state else [])
    directions = [torch.randn(x.shape, generator=generator, dtype=torch.float64) for x in parts] if gradients else None
    expected, expected_state, expected_gradients = call("reference", *wide, directions)
    output, new_state, found = call("triton", inputs, mix, options, directions)
    assert_close(output, expected, tolerance, "output")
    if expected_state is not None:
        for name, a, b in zip(HybridLinearState._fields, new_state, expected_state, strict=True):
            assert (a is None) == (b is None), name
            if a is not None:
                assert_close(a, b, tolerance, name)
    for place, (a, b) in enumerate(zip(found or [], expected_gradients or [], strict=True)):
        assert_close(a, b, 5 * tolerance, f"gradient {place} of shape {tuple(b.shape)}")


def assert_close(found, expected, tolerance, what):
    assert found.shape == expected.shape, what
    if found.numel():
        error = (found.double() - expected.double()).abs().max()
        assert error <= tolerance * (1 + expected.abs().max()), f"{what}: {error:.2e}"


@pytest.mark.parametrize("level", ["logsumexp", "max"])
@pytest.mark.parametrize("span", [(0, 0), (5, 0), (21, 3), (0, 2), (64, 4)], ids=lambda s: f"window{s[0]}-sinks{s[1]}")
def test_equals_the_definition(span, level):
    inputs, mix = make_inputs()
    compare(inputs, mix, {"window": span[0], "sinks": span[1], "window_reference": level})


@pytest.mark.parametrize("heads, groups, key_heads", [(1, 1, 1), (4, 2, 4), (4, 2, 2), (3, 1, 1)])
def test_grouped_heads(heads, groups, key_heads):
    inputs, mix = make_inputs(heads, groups, key_heads, length=20)
    compare(inputs, mix, {"window": 5, "sinks": 2})


@pytest.mark.parametrize(
    "activation, key_heads", [("softmax", 2), ("softmax", 1), ("exp", 2), ("relu", 2), ("elu", 1)]
)
def test_maps_as_weights(activation, key_heads):
    inputs, mix = make_inputs(key_heads=key_heads, length=37, as_weights=True, activation=activation)
    compare(inputs, mix, {"window": 5, "sinks": 2})


def test_softmax_branch_alone():
    inputs, _ = make_inputs()
    compare([*inputs[:3], None, None], {}, {"window": 5, "sinks": 2})


def make_mask(kind, batch, length):
    mask = torch.ones(batch, length, dtype=torch.bool)
    mask[0, {"left": slice(0, 7), "right": slice(-7, None), "all": slice(None)}[kind]] = False
    return mask


def poison(inputs, mask):
    """NaN where padded: padding must be selected away, never multiplied by zero."""
    gap = ~mask[:, None, :, None]
    return [x.masked_fill(gap, torch.nan) if isinstance(x, Tensor) else x for x in inputs]


@pytest.mark.parametrize("as_weights", [True, False], ids=["maps", "features"])
@pytest.mark.parametrize("padding", ["left", "right", "all"])
def test_padding(padding, as_weights):
    inputs, mix = make_inputs(batch=2, length=21, as_weights=as_weights)
    mask = make_mask(padding, 2, 21)
    options = {"window": 5, "sinks": 3, "attention_mask": mask, "return_state": True}
    compare(poison(inputs, mask), mix, options)
    output, _ = hybrid_linear_attention(*poison(inputs, mask), **mix, **options, backend="triton")
    assert (output[~mask[:, None].expand(-1, 2, -1)] == 0).all()


@pytest.mark.parametrize("span", [(5, 2), (0, 0), (17, 0)], ids=str)
def test_packed_sequences(span):
    inputs, mix = make_inputs()
    bounds = torch.tensor([0, 1, 1, 18, 43, LENGTH], dtype=torch.int32)
    compare(inputs, mix, {"window": span[0], "sinks": span[1], "cu_seqlens": bounds})


@pytest.mark.parametrize("padding", [None, "left", "right"])
@pytest.mark.parametrize(
    "span, level", [((5, 3), "logsumexp"), ((0, 0), "max"), ((0, 3), "max"), ((16, 2), "max")], ids=str
)
@pytest.mark.parametrize("as_weights, key_heads", [(True, 2), (False, 1)], ids=["maps", "features"])
def test_a_state_comes_in_and_goes_out(as_weights, key_heads, span, level, padding):
    """Two calls, gradients through the state of the first and to everything that it holds."""
    first, mix = make_inputs(batch=2, length=19, as_weights=as_weights, key_heads=key_heads)
    second, _ = make_inputs(batch=2, length=18, as_weights=as_weights, key_heads=key_heads, seed=1)
    if as_weights:
        second[3:] = first[3:]
    options = {"window": span[0], "sinks": span[1], "window_reference": level, "return_state": True}
    mask = None if padding is None else make_mask(padding, 2, 19)
    with torch.no_grad():
        before = hybrid_linear_attention(*first, **mix, **options, attention_mask=mask, backend="reference")[1]
    mask = None if padding is None else make_mask(padding, 2, 18)
    second = second if mask is None else poison(second, mask)
    compare(second, mix, {**options, "attention_mask": mask, "initial_state": before})


@pytest.mark.parametrize("padding", [None, "left", "right"])
@pytest.mark.parametrize("as_weights", [True, False], ids=["maps", "features"])
def test_any_cut_into_calls_gives_the_same(as_weights, padding):
    inputs, mix = make_inputs(batch=2, length=30, as_weights=as_weights)
    options = {"window": 5, "sinks": 3, "return_state": True, "backend": "triton"}
    with torch.no_grad():
        expected, expected_state = hybrid_linear_attention(*inputs, **mix, **options)
        for cut in ([1, 1, 2, 6, 1, 18, 1], [29, 1]):
            state, outputs, start = None, [], 0
            for tokens in cut:
                pieces = [x[:, :, start : start + tokens] if isinstance(x, Tensor) else x for x in inputs]
                mask = None
                if padding:
                    mask = torch.ones(2, tokens + 2)
                    mask[:, slice(0, 2) if padding == "left" else slice(-2, None)] = 0
                    sides = (2, 0) if padding == "left" else (0, 2)
                    pieces = [
                        torch.nn.functional.pad(x, (0, 0, *sides), value=torch.nan) if isinstance(x, Tensor) else x
                        for x in pieces
                    ]
                output, state = hybrid_linear_attention(
                    *pieces, **mix, **options, initial_state=state, attention_mask=mask
                )
                outputs.append({None: output, "left": output[:, :, 2:], "right": output[:, :, :-2]}[padding])
                start += tokens
            assert_close(torch.cat(outputs, 2), expected.double(), TOLERANCE, "output")
            for name, a, b in zip(HybridLinearState._fields, state, expected_state, strict=True):
                if a is not None:
                    assert_close(a, b.double(), TOLERANCE, name)


def test_only_the_mechanism_learns():
    """Stage 1: queries, keys and values are frozen, and the kernels skip their gradients."""
    inputs, mix = make_inputs(as_weights=True, length=37)
    options = {"window": 5, "sinks": 2}
    leaves = list(leaves_of([*inputs[3:], *mix.values()]))
    direction = torch.randn(1, 2, 37, VALUE_DIM)
    found = []
    for backend in ("triton", "chunked"):
        for leaf in leaves:
            leaf.requires_grad_()
        output, _ = hybrid_linear_attention(*inputs, **mix, **options, backend=backend)
        found.append(torch.autograd.grad((output * direction).sum(), leaves))
    for a, b in zip(*found, strict=True):
        assert_close(a, b.double(), 5 * TOLERANCE, str(tuple(b.shape)))


def test_strided_inputs():
    """Queries, keys and values as a model gives them: (B, T, H, D) turned."""
    inputs, mix = make_inputs(batch=2, length=20)
    inputs = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs]
    compare(inputs, mix, {"window": 5, "sinks": 2})


def test_calls_without_tokens():
    inputs, mix = make_inputs(batch=2, length=7)
    options = {"window": 5, "sinks": 2, "return_state": True, "backend": "triton"}
    with torch.no_grad():
        _, state = hybrid_linear_attention(*inputs, **mix, **options)
        none = [x[:, :, :0] for x in inputs]
        output, after = hybrid_linear_attention(*none, **mix, **options, initial_state=state)
    assert output.shape == (2, 2, 0, VALUE_DIM)
    assert all(a is b or torch.equal(a, b) for a, b in zip(state, after, strict=True))


def test_says_what_it_cannot_do():
    inputs, mix = make_inputs(length=4)
    for options, reason in (({"causal": False}, "bidirectional"), ({"sinks": 99}, "sinks")):
        with pytest.raises(ValueError, match=reason):
            hybrid_linear_attention(*inputs, **mix, **options, backend="triton")
    with pytest.raises(ValueError, match="float64"):
        hybrid_linear_attention(*to(torch.float64, inputs), **to(torch.float64, mix), backend="triton")


@pytest.mark.parametrize("dot", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("widest", [64, 128, 256])
def test_tiles_divide_each_other(dot, widest):
    tiles = CHOOSE_TILES(dot, widest)
    for launch in tiles[2:]:
        assert tiles.chunk % launch.block == 0
        assert all(launch.block % other.inner == 0 for other in tiles[2:])


def test_gradient_checkpointing():
    """The forward runs again in the backward pass, whose saved tensors may be unpacked once only."""
    inputs, mix = make_inputs(as_weights=True, length=20)
    leaves = list(leaves_of([*inputs, *mix.values()]))
    for leaf in leaves:
        leaf.requires_grad_()

    def run():
        return hybrid_linear_attention(*inputs, **mix, window=5, sinks=2, backend="triton")[0]

    expected = torch.autograd.grad(run().square().sum(), leaves)
    found = torch.autograd.grad(torch.utils.checkpoint.checkpoint(run, use_reentrant=False).square().sum(), leaves)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_inside_a_compiled_function():
    inputs, mix = make_inputs(length=20)

    def run(query):
        return 2 * hybrid_linear_attention(query, *inputs[1:], **mix, window=5, sinks=2, backend="triton")[0]

    compiled = torch.compile(run, backend="eager")
    assert torch.equal(compiled(inputs[0]), run(inputs[0]))
