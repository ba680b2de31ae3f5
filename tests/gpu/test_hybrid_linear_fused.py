"""The Triton kernels on a GPU, against the chunked path in float64: dtypes, widths, rows, lengths, graphs."""

import logging

import pytest
import torch
from cuda_checks import assert_capturable
from tiny_models import make_student, make_teacher, perturb

import linearize.modeling.op_dispatch as dispatch
from linearize.modeling import FeatureMapWeights, hybrid_linear_attention

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]

# Relative Frobenius error of outputs and of gradients; bf16's are the bars of the project.
TOLERANCE = {torch.bfloat16: (5e-3, 1e-2), torch.float16: (1e-3, 2e-3), torch.float32: (2e-5, 5e-5)}


def make_call(dtype, batch=1, heads=2, groups=1, length=300, dim=64, width=64, as_weights=False, seed=0):
    generator = torch.Generator("cuda").manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, device="cuda")

    inputs = [draw(batch, h, length, dim).to(dtype) for h in (heads, groups, groups)]
    if as_weights:
        maps = [
            FeatureMapWeights(draw(heads, dim, width // 2) / dim**0.5, None, draw(heads, dim) / dim, "softmax")
            for _ in "qk"
        ]
    else:
        scores = [2 * draw(batch, heads, length, width // 2) for _ in "qk"]
        maps = [torch.cat([s.softmax(-1), (-s).softmax(-1)], -1).to(dtype) for s in scores]
    mix = {"window_weight": draw(heads).exp() * 4, "window_shift": 0.5 + 0.1 * draw(heads)}
    return inputs, maps, mix


def leaves_of(values):
    for value in values:
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            yield value
        elif isinstance(value, tuple):
            yield from leaves_of(value)


def convert(value, dtype):
    if isinstance(value, torch.Tensor):
        value = value.detach().clone()
        return value.to(dtype) if dtype is not None and value.is_floating_point() else value
    return value._make(convert(x, dtype) for x in value) if isinstance(value, tuple) else value


def run(backend, inputs, maps, mix, options, direction, wide):
    """Output, and gradients of all floating-point inputs, in float64 if `wide`."""
    dtype = torch.float64 if wide else None
    inputs, maps = [convert(x, dtype) for x in inputs], [convert(x, dtype) for x in maps]
    mix = {name: convert(x, dtype) for name, x in mix.items()}
    leaves = [x.requires_grad_() for x in leaves_of([*inputs, *maps, *mix.values()])]
    output, _ = hybrid_linear_attention(*inputs, *maps, **mix, **options, backend=backend)
    total = (output * direction.to(output.dtype)).sum()
    return [output.detach(), *torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True)]


def relative(found, expected):
    return ((found.double() - expected).norm() / expected.norm().clamp_min(1e-30)).item()


def compare(dtype, call, options, bars=None):
    inputs, maps, mix = call
    direction = torch.randn(*inputs[0].shape[:3], inputs[2].shape[3], device="cuda").to(dtype)
    expected = run("chunked", inputs, maps, mix, options, direction, wide=True)
    found = run("triton", inputs, maps, mix, options, direction, wide=False)
    output_bar, gradient_bar = bars or TOLERANCE[dtype]
    errors = [relative(a, b) for a, b in zip(found, expected, strict=True)]
    assert errors[0] <= output_bar, errors
    for place, (ours, reference) in enumerate(zip(found[1:], expected[1:], strict=True)):
        # A single key has a softmax weight of 1, whatever its score: gradients may be zero but for rounding.
        least, bar = 1e-4, gradient_bar
        if reference.dim() == 1:  # one number per head: the sum over all tokens of terms that may cancel
            least, bar = 1e-2, 10 * gradient_bar
        scale = reference.norm().clamp_min(least * direction.double().norm())
        assert (ours.double() - reference).norm() <= bar * scale, (place, errors)


@pytest.mark.parametrize("level", ["logsumexp", "max"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("as_weights", [True, False], ids=["maps", "features"])
def test_dtypes(dtype, level, as_weights):
    call = make_call(dtype, batch=2, heads=4, groups=2, as_weights=as_weights)
    compare(dtype, call, {"window": 64, "sinks": 4, "window_reference": level})


@pytest.mark.parametrize("dim, width", [(32, 32), (80, 64), (96, 256), (112, 96), (128, 128), (256, 128), (256, 256)])
def test_widths(dim, width):
    compare(torch.bfloat16, make_call(torch.bfloat16, dim=dim, width=width), {"window": 64, "sinks": 4})


@pytest.mark.parametrize(
    "dtype, dim, width",
    [(torch.float32, 80, 64), (torch.float32, 128, 128), (torch.float16, 128, 128), (torch.float16, 96, 32)],
)
def test_widths_in_other_dtypes(dtype, dim, width):
    compare(dtype, make_call(dtype, dim=dim, width=width), {"window": 64})


@pytest.mark.parametrize("window, sinks", [(0, 0), (0, 4), (1, 0), (64, 0), (100, 16), (256, 4)])
def test_windows(window, sinks):
    compare(torch.bfloat16, make_call(torch.bfloat16), {"window": window, "sinks": sinks})


@pytest.mark.parametrize("length", [1, 63, 64, 65, 128, 129, 1000])
def test_lengths(length):
    compare(torch.bfloat16, make_call(torch.bfloat16, length=length), {"window": 64, "sinks": 4})


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding(side):
    call = make_call(torch.bfloat16, batch=3)
    mask = torch.ones(3, 300, device="cuda", dtype=torch.long)
    mask[1, slice(0, 77) if side == "left" else slice(-77, None)] = 0
    compare(torch.bfloat16, call, {"window": 64, "sinks": 4, "attention_mask": mask})


def test_packing():
    bounds = torch.tensor([0, 1, 130, 130, 259, 300], device="cuda", dtype=torch.int32)
    compare(torch.bfloat16, make_call(torch.bfloat16), {"window": 64, "sinks": 4, "cu_seqlens": bounds})


@pytest.mark.parametrize("length", [8192, 32768])
def test_error_at_length(length):
    """The bars: 5e-3 forward, 1e-2 gradients, with the state growing."""
    compare(torch.bfloat16, make_call(torch.bfloat16, length=length, dim=128, width=128), {"window": 64})


def test_two_runs_are_bit_equal():
    inputs, maps, mix = make_call(torch.bfloat16, batch=2, heads=8, groups=2, length=1000, as_weights=True)
    direction = torch.randn(2, 8, 1000, 64, device="cuda")
    options = {"window": 64, "sinks": 4}
    first, second = (run("triton", inputs, maps, mix, options, direction, wide=False) for _ in "ab")
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@torch.no_grad()
@pytest.mark.parametrize("as_weights", [True, False], ids=["maps", "features"])
def test_a_state_goes_on(as_weights):
    """A prompt in pieces, and token by token, as in one call."""
    inputs, maps, mix = make_call(torch.float32, batch=2, length=200, as_weights=as_weights)
    options = {**mix, "window": 64, "sinks": 4, "return_state": True, "backend": "triton"}
    expected, expected_state = hybrid_linear_attention(*inputs, *maps, **options)
    outputs, state, start = [], None, 0
    for tokens in [70, 1, 100, *[1] * 29]:
        pieces = [x[:, :, start : start + tokens] for x in inputs]
        cut = [x[:, :, start : start + tokens] if isinstance(x, torch.Tensor) else x for x in maps]
        output, state = hybrid_linear_attention(*pieces, *cut, **options, initial_state=state)
        outputs.append(output)
        start += tokens
    assert relative(torch.cat(outputs, 2), expected.double()) <= 2e-5
    assert relative(state.kv, expected_state.kv.double()) <= 1e-4
    assert torch.equal(state.window_key, expected_state.window_key) and torch.equal(state.count, expected_state.count)


def test_no_host_synchronisation_and_graph_capture():
    """Forward and backward wait for nothing, so that a CUDA graph can hold them; padded rows included."""
    inputs, maps, mix = make_call(torch.bfloat16, batch=2, as_weights=True)
    mask = torch.ones(2, 300, device="cuda", dtype=torch.long)
    mask[0, :50] = 0
    leaves = [x.requires_grad_() for x in leaves_of([*inputs, *maps, *mix.values()])]

    def step():
        output, _ = hybrid_linear_attention(*inputs, *maps, **mix, sinks=4, attention_mask=mask, backend="triton")
        return [output.detach(), *torch.autograd.grad(output.sum(), leaves)]

    assert_capturable(step)


def test_models_run_the_kernels_by_default(monkeypatch, caplog):
    """`auto` on a GPU is Triton, without a warning; the environment's chunked path gives the same to rounding."""
    student = make_student(make_teacher(), {"linear": {"type": "linear", "window": 5, "sinks": 2}})
    perturb(student)
    student.cuda()
    ids = torch.randint(3, 97, (2, 40), device="cuda")
    dispatch.warn_once.cache_clear()
    with caplog.at_level(logging.WARNING), torch.no_grad():
        found = student(ids).logits
        assert not caplog.records
        monkeypatch.setenv(dispatch.BACKEND_VARIABLE, "chunked")
        expected = student(ids).logits
    assert (found - expected).abs().max() <= 1e-3 * expected.abs().max()
    assert not torch.equal(found, expected)
