"""The Triton kernels of salient-token attention on a GPU: every dtype, width and size against float64.

Ranks in float32 may order two keys otherwise than in float64, where they are as good as equal: then another key is
kept for a while, and the queries meanwhile get another output. So outputs are compared query by query, and a small
share of queries may differ; so may a small share of the tokens kept at the end, which are compared as sets.
"""

import pytest
import torch

from linearize.kernels import salient as kernel
from linearize.modeling import SalientState, salient_attention
from linearize.modeling.op_salient_decode import new_buffers, read_buffers, salient_step_

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]

ROW = {torch.bfloat16: 1.5e-2, torch.float16: 4e-3, torch.float32: 1e-4}  # of a query's output, by its norm
BACKWARD = {torch.bfloat16: 1e-2, torch.float16: 4e-3, torch.float32: 2e-3}  # relative Frobenius; one flip is 1e-3
OTHERWISE = 0.02  # share of queries and of kept tokens that may differ
SEES = [(224, 4, 220), (33, 0, 40), (64, 20, 300), (8, 2, 0), (1, 1, 3)]
"""Window, sinks, kept."""


def options(see=SEES[0], age_penalty=0.6, **others):
    return dict(zip(("window", "sinks", "kept"), see, strict=True)) | {"age_penalty": age_penalty} | others


def make_inputs(batch, heads, groups, length, dim, dtype):
    generator = torch.Generator("cuda").manual_seed(0)
    shapes = [(batch, count, length, dim) for count in (heads, groups, groups)]
    query, key, value = (torch.randn(shape, generator=generator, device="cuda") for shape in shapes)
    return [x.to(dtype) for x in (1.5 * query, key, value)]


def run(backend, dtype, inputs, settings, cuts=()):
    """Output and gradients, computed in dtype, in float64; and the last state, over calls that end at `cuts`."""
    leaves = [x.detach().to(dtype).requires_grad_() for x in inputs]
    mask, settings, state, outputs = settings.get("attention_mask"), dict(settings), None, []
    for a, b in zip((0, *cuts), (*cuts, inputs[0].shape[2]), strict=True):
        if settings.get("cu_seqlens") is None:
            settings |= {"initial_state": state, "return_state": True}
        settings["attention_mask"] = None if mask is None else mask[:, a:b]
        output, state = salient_attention(*(x[:, :, a:b] for x in leaves), backend=backend, **settings)
        outputs.append(output)
    output = torch.cat(outputs, dim=2)
    generator = torch.Generator("cuda").manual_seed(1)
    direction = torch.randn(output.shape, generator=generator, device="cuda").to(inputs[0].dtype)
    gradients = torch.autograd.grad(output, leaves, direction.to(dtype))
    return [x.detach().double() for x in (output, *gradients)], state


def same_tokens(state, other):
    """The share of kept tokens that both states hold; a token is known by its value."""
    shared = whole = 0
    for a, b in zip(state.kept_value.flatten(0, 1).double(), other.kept_value.flatten(0, 1).double(), strict=True):
        a, b = ({tuple(row) for row in x.tolist() if any(row)} for x in (a, b))
        assert len(a) == len(b)
        shared, whole = shared + len(a & b), whole + len(a)
    return shared / whole if whole else 1.0


def check(inputs, settings, definition="chunked", cuts=()):
    dtype = inputs[0].dtype
    found, state = run("triton", dtype, inputs, settings, cuts)
    expected, other = run(definition, torch.float64, inputs, settings)
    wrong = (found[0] - expected[0]).norm(dim=-1) > ROW[dtype] * (expected[0].norm(dim=-1) + 1e-3)
    share = wrong.double().mean().item()
    assert share <= OTHERWISE, share
    for name, a, b in zip(("query", "key", "value"), found[1:], expected[1:], strict=True):
        error = ((a.nan_to_num() - b.nan_to_num()).norm() / b.nan_to_num().norm()).item()
        assert torch.isfinite(a).all() and error <= BACKWARD[dtype], (name, error)
    if state is not None:
        assert same_tokens(state, other) >= 1 - OTHERWISE
        assert torch.equal(state.count, other.count)
        for name in ("window_key", "window_value", "sink_key", "sink_value"):
            assert torch.equal(getattr(state, name).double(), getattr(other, name).double()), name
        assert (state.window_mass - other.window_mass).abs().max() <= 1e-3
    print(f"queries with another output: {share:.2%}")


@pytest.mark.parametrize("see", SEES, ids=str)
@pytest.mark.parametrize("dim", [16, 48, 64, 128])
@pytest.mark.parametrize("dtype", ROW, ids=str)
def test_every_dtype_width_and_size(dtype, dim, see):
    check(make_inputs(2, 4, 2, 777, dim, dtype), options(see))


def test_the_definition():
    check(make_inputs(1, 4, 2, 300, 64, torch.float32), options((32, 2, 40)), definition="reference")


@pytest.mark.parametrize("groups", [1, 3, 9])
def test_query_heads_share_key_heads(groups):
    check(make_inputs(2, 9, groups, 1000, 64, torch.bfloat16), options())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("padding", ["left", "right", "between"])
def test_padding(padding, dtype):
    inputs = make_inputs(3, 4, 2, 800, 64, dtype)
    mask = torch.ones(3, 800, dtype=torch.bool, device="cuda")
    mask[0, {"left": slice(0, 77), "right": slice(-300, None), "between": slice(5, None, 3)}[padding]] = False
    mask[2] = False
    inputs = [x.masked_fill(~mask[:, None, :, None], torch.nan) for x in inputs]
    check(inputs, options((64, 4, 60), attention_mask=mask))


def test_packing():
    bounds = torch.tensor([0, 3, 3, 900, 1028, 1028, 1500], dtype=torch.int32, device="cuda")
    check(make_inputs(1, 4, 2, 1500, 128, torch.bfloat16), options((64, 4, 60), cu_seqlens=bounds))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("see", SEES[:4], ids=str)
def test_any_cut_gives_the_same(see, dtype):
    check(make_inputs(2, 4, 2, 900, 64, dtype), options(see), cuts=(500, 501, 502, 880))


@torch.no_grad()
@pytest.mark.parametrize("see", [*SEES, (225, 128, 1024), (2048, 4, 220)], ids=str)
@pytest.mark.parametrize("heads, dim", [((9, 3), 64), ((8, 2), 128), ((2, 2), 48), ((20, 1), 16)], ids=str)
@pytest.mark.parametrize("dtype", ROW, ids=str)
def test_steps_of_one_token(dtype, heads, dim, see):
    """In place and from state to state, after a text of several lengths; a row pauses, and NaN is its input then."""
    start, length = 300, 460
    inputs, settings = make_inputs(3, *heads, length, dim, dtype), options(see)
    mask = torch.ones(3, length, dtype=torch.bool, device="cuda")
    mask[0, :297], mask[1, :100], mask[2, [310, 444]] = False, False, False
    wide = [x.double() for x in inputs]
    call = {**settings, "return_state": True}
    expected, last = salient_attention(*wide, **call, attention_mask=mask, backend="chunked")
    inputs = [x.masked_fill(~mask[:, None, :, None], torch.nan) for x in inputs]
    before = mask[:, :start]
    _, state = salient_attention(*(x[:, :, :start] for x in inputs), **call, attention_mask=before, backend="triton")
    buffers = new_buffers(SalientState._make(x[:1] for x in state), 3).load_(state)
    count, functional, in_place = state.count.clone(), [], []
    for i in range(start, length):
        token, real = [x[:, :, i : i + 1] for x in inputs], mask[:, i : i + 1]
        output, state = salient_attention(*token, **call, attention_mask=real, initial_state=state, backend="triton")
        functional.append(output)
        held = {"buffers": buffers, "count": count, "backend": "triton"}
        in_place.append(salient_step_(*token, **settings, scaling=None, attention_mask=real, **held))
        count += real[:, 0]
    assert all(torch.equal(a, b) for a, b in zip(functional, in_place, strict=True))
    found, final = torch.cat(in_place, 2).double(), read_buffers(buffers, count)
    assert all(torch.equal(a, b) for a, b in zip(state, final, strict=True))
    expected = expected[:, :, start:]
    wrong = (found - expected).norm(dim=-1) > ROW[dtype] * (expected.norm(dim=-1) + 1e-3)
    assert wrong.double().mean().item() <= OTHERWISE
    assert same_tokens(final, last) >= 1 - OTHERWISE and torch.equal(final.count, last.count)
    assert torch.equal(final.window_value.double(), last.window_value)
    assert (final.window_mass - last.window_mass).abs().max() <= 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_the_largest_settings(dtype):
    inputs, settings = make_inputs(1, 4, 2, 2500, 128, dtype), options((225, 128, 1024))
    assert kernel.unsupported(*inputs, **settings) is None
    check(inputs, settings)
    check(inputs, settings, cuts=(2000,))


@pytest.mark.parametrize("length", [8192, 8191])
def test_bfloat16_at_length(length):
    check(make_inputs(1, 4, 2, length, 128, torch.bfloat16), options())


def test_two_runs_keep_the_same_and_give_the_same_outputs():
    inputs = make_inputs(2, 8, 2, 3000, 128, torch.bfloat16)
    runs = [salient_attention(*inputs, **options(), return_state=True, backend="triton") for _ in range(2)]
    assert torch.equal(runs[0][0], runs[1][0])
    assert all(torch.equal(a, b) for a, b in zip(runs[0][1], runs[1][1], strict=True))


def test_memory_is_linear_in_length():
    peaks = []
    for length in (4096, 16384):
        leaves = [x.requires_grad_() for x in make_inputs(1, 4, 4, length, 64, torch.bfloat16)]
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        output, _ = salient_attention(*leaves, **options(), backend="triton")
        output.backward(torch.ones_like(output))
        peaks.append((torch.cuda.max_memory_allocated() - before) / length)
        del output, leaves
    assert peaks[1] <= 1.1 * peaks[0]


def test_auto_runs_the_kernels():
    inputs = make_inputs(1, 4, 2, 700, 64, torch.bfloat16)
    assert kernel.unsupported(*inputs, **options()) is None
    output, _ = salient_attention(*inputs, **options())
    assert torch.equal(output, salient_attention(*inputs, **options(), backend="triton")[0])
