"""Cosine attention on a GPU: every dtype and width of the kernels against float64, CUDA graphs, determinism."""

import pytest
import torch

from linearize.kernels import cosine as kernel
from linearize.modeling import CosineState, cosine_attention

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]

FORMS = [(True, "query"), (True, "key"), (False, "query")]
FORWARD = {torch.bfloat16: 5e-3, torch.float16: 2e-3, torch.float32: 1e-5}  # relative Frobenius error
BACKWARD = {torch.bfloat16: 1e-2, torch.float16: 4e-3, torch.float32: 1e-5}


def make_inputs(batch, heads, groups, length, dim, value_dim, dtype):
    generator = torch.Generator("cuda").manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, device="cuda")

    inputs = [
        draw(batch, heads, length, dim),
        draw(batch, groups, length, dim),
        draw(batch, groups, length, value_dim),
    ]
    return [x.to(dtype) for x in inputs], {"exponent": draw(heads).sigmoid(), "gain": draw(heads)}


def make_state(inputs, side):
    query, key, value = inputs
    heads = query.shape[1] if side == "key" else key.shape[1]
    kv = torch.randn(query.shape[0], heads, key.shape[3], value.shape[3], device="cuda")
    rings = [x.new_zeros(*x.shape[:2], 0, x.shape[3]) for x in (key, value, key, value)]
    return CosineState(kv, *rings, torch.arange(query.shape[0], device="cuda") + 100)


def run(backend, dtype, inputs, mix, state, options):
    """Output and gradients (with a state: its new sum too) in float64, computed in dtype."""
    leaves = [x.detach().to(dtype).requires_grad_() for x in inputs]
    wide = torch.promote_types(dtype, torch.float32)
    leaves += [x.detach().to(wide).requires_grad_() for x in mix.values()]
    names = dict(zip(mix, leaves[3:], strict=True))
    if state is not None:
        leaves.append(state.kv.to(wide).requires_grad_())
        state = state._replace(kv=leaves[-1])
    output, after = cosine_attention(*leaves[:3], **names, initial_state=state, backend=backend, **options)
    generator = torch.Generator("cuda").manual_seed(1)
    loss = (output * torch.randn(output.shape, generator=generator, device="cuda").to(inputs[0].dtype)).sum()
    results = [output]
    if after is not None:
        loss = loss + (after.kv * torch.randn(after.kv.shape, generator=generator, device="cuda")).sum()
        results.append(after.kv)
    found = [*results, *torch.autograd.grad(loss, leaves)]
    return [x.detach().double() for x in found], len(results)


def check(inputs, mix, state=None, definition="reference", **options):
    dtype = inputs[0].dtype
    ours, forward = run("triton", dtype, inputs, mix, state, options)
    expected, _ = run(definition, torch.float64, inputs, mix, state, options)
    for place, (a, b) in enumerate(zip(ours, expected, strict=True)):
        error = ((a - b).norm() / b.norm()).item()
        bar = (FORWARD if place < forward else BACKWARD)[dtype]
        # One number per head, the sum of signed terms over all tokens, is held to ten times the bar of the tensors.
        assert error <= bar * (10 if b.dim() == 1 else 1), (place, error)


@pytest.mark.parametrize(("causal", "side"), FORMS)
@pytest.mark.parametrize("dim", [32, 64, 80, 96, 112, 128, 256])
@pytest.mark.parametrize("dtype", FORWARD, ids=str)
def test_every_dtype_and_width(dtype, dim, causal, side):
    inputs, mix = make_inputs(2, 4, 2, 333, dim, dim, dtype)
    check(inputs, mix, causal=causal, scale_side=side)


@pytest.mark.parametrize("groups", [1, 8])
@pytest.mark.parametrize(("dim", "value_dim"), [(128, 64), (40, 136)])
def test_widths_and_heads_that_differ(dim, value_dim, groups):
    inputs, mix = make_inputs(1, 8, groups, 257, dim, value_dim, torch.bfloat16)
    check(inputs, mix)


@pytest.mark.parametrize(("causal", "side"), FORMS)
@pytest.mark.parametrize("padding", ["left", "right"])
def test_padding(padding, causal, side):
    inputs, mix = make_inputs(3, 4, 2, 400, 128, 128, torch.bfloat16)
    mask = torch.ones(3, 400, dtype=torch.bool, device="cuda")
    mask[0, slice(0, 77) if padding == "left" else slice(-300, None)] = False
    mask[2] = False
    inputs = [x.masked_fill(~mask[:, None, :, None], torch.nan) for x in inputs]
    check(inputs, mix, causal=causal, scale_side=side, attention_mask=mask)


@pytest.mark.parametrize(("causal", "side"), FORMS)
def test_packing(causal, side):
    inputs, mix = make_inputs(1, 4, 2, 900, 128, 128, torch.bfloat16)
    bounds = torch.tensor([0, 3, 3, 300, 428, 428, 900], dtype=torch.int32, device="cuda")
    check(inputs, mix, causal=causal, scale_side=side, cu_seqlens=bounds)


@pytest.mark.parametrize("side", ["query", "key"])
@pytest.mark.parametrize("dtype", FORWARD, ids=str)
def test_states_in_and_out(dtype, side):
    inputs, mix = make_inputs(2, 4, 2, 300, 64, 128, dtype)
    check(inputs, mix, make_state(inputs, side), scale_side=side, return_state=True)


@pytest.mark.parametrize(("causal", "side"), FORMS)
@pytest.mark.parametrize("length", [8192, 8191, 32768])
def test_bfloat16_at_length(length, causal, side):
    """The sum grows with the row and the error does not; expected values by the chunked path in float64."""
    inputs, mix = make_inputs(1, 4, 4, length, 128, 128, torch.bfloat16)
    check(inputs, mix, definition="chunked", causal=causal, scale_side=side)


@torch.no_grad()
@pytest.mark.parametrize("side", ["query", "key"])
def test_decoding_gives_the_prefill_state(side):
    inputs, mix = make_inputs(2, 4, 2, 1000, 128, 128, torch.bfloat16)
    call = {**mix, "scale_side": side, "return_state": True, "backend": "triton"}
    expected, expected_state = cosine_attention(*inputs, **call)
    start, state = cosine_attention(*(x[:, :, :500] for x in inputs), **call)
    outputs = [start]
    for n in range(500, 1000):
        output, state = cosine_attention(*(x[:, :, n : n + 1] for x in inputs), **call, initial_state=state)
        outputs.append(output)
    # The prefill rounds each normalised key to bfloat16 (1.7e-3 of a key), decoding does not.
    assert (state.kv - expected_state.kv).norm() <= 2e-3 * expected_state.kv.norm()
    assert torch.equal(state.count, expected_state.count)
    assert (torch.cat(outputs, 2) - expected).float().norm() <= 5e-3 * expected.float().norm()


@torch.no_grad()
@pytest.mark.parametrize("tokens", [1, 700], ids=["decode", "prefill"])
def test_cuda_graph(tokens):
    """Captured with one state and one mask, replayed on other values: nothing asks the GPU for a number."""
    inputs, mix = make_inputs(2, 4, 2, tokens, 128, 128, torch.bfloat16)
    state = make_state(inputs, "query")
    mask = torch.ones(2, tokens, dtype=torch.bool, device="cuda")

    def step():
        return cosine_attention(
            *inputs, **mix, initial_state=state, return_state=True, attention_mask=mask, backend="triton"
        )

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output, after = step()
    for x in (*inputs, state.kv):
        x.copy_(torch.randn_like(x))
    state.count.add_(7)
    mask[0, : (tokens + 1) // 2] = False
    graph.replay()
    expected, expected_state = step()
    assert torch.equal(output, expected)
    assert torch.equal(after.kv, expected_state.kv) and torch.equal(after.count, expected_state.count)


@pytest.mark.parametrize(("causal", "side"), FORMS)
def test_two_runs_are_bit_equal(causal, side):
    inputs, mix = make_inputs(2, 8, 2, 1500, 128, 128, torch.bfloat16)
    first, _ = run("triton", torch.bfloat16, inputs, mix, None, {"causal": causal, "scale_side": side})
    second, _ = run("triton", torch.bfloat16, inputs, mix, None, {"causal": causal, "scale_side": side})
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_auto_runs_the_kernels():
    inputs, mix = make_inputs(1, 4, 2, 300, 64, 64, torch.bfloat16)
    assert kernel.unsupported(*inputs, **mix) is None
    output, _ = cosine_attention(*inputs, **mix)
    assert torch.equal(output, cosine_attention(*inputs, **mix, backend="triton")[0])
