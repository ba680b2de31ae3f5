"""The Triton kernels of landmark attention on a GPU: every dtype, block and width against float64."""

import pytest
import torch

from linearize.kernels import landmark as kernel
from linearize.modeling.op_landmark import landmark_attention

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]

FORWARD = {torch.bfloat16: 5e-3, torch.float16: 2e-3, torch.float32: 2e-5}  # relative Frobenius error
BACKWARD = {torch.bfloat16: 1e-2, torch.float16: 4e-3, torch.float32: 5e-5}


def make_inputs(batch, heads, groups, length, dim, dtype):
    generator = torch.Generator("cuda").manual_seed(0)
    shapes = [(batch, count, length, dim) for count in (heads, groups, groups)]
    return [torch.randn(shape, generator=generator, device="cuda").to(dtype) for shape in shapes]


def run(backend, dtype, inputs, options):
    """Output and gradients in float64, computed in dtype."""
    leaves = [x.detach().to(dtype).requires_grad_() for x in inputs]
    output, _ = landmark_attention(*leaves, backend=backend, **options)
    generator = torch.Generator("cuda").manual_seed(1)
    direction = torch.randn(output.shape, generator=generator, device="cuda").to(inputs[0].dtype)
    gradients = torch.autograd.grad(output, leaves, direction.to(dtype))
    return [x.detach().double() for x in (output, *gradients)]


def check(inputs, definition="reference", **options):
    dtype = inputs[0].dtype
    found = run("triton", dtype, inputs, options)
    expected = run(definition, torch.float64, inputs, options)
    for name, a, b in zip(("output", "query", "key", "value"), found, expected, strict=True):
        error = ((a - b).norm() / b.norm()).item()
        assert error <= (FORWARD if name == "output" else BACKWARD)[dtype], (name, error)


@pytest.mark.parametrize("block_size", [16, 32, 64, 128])
@pytest.mark.parametrize("dim", [16, 48, 64, 80, 128])
@pytest.mark.parametrize("dtype", FORWARD, ids=str)
def test_every_dtype_block_and_width(dtype, dim, block_size):
    inputs = make_inputs(2, 4, 2, 460, dim, dtype)
    if dtype == torch.float32 and block_size == 128 and dim > 64:
        assert "dimension of 64" in kernel.unsupported(*inputs, block_size=block_size)
        return
    check(inputs, block_size=block_size, offset=5)


@pytest.mark.parametrize("offset, length", [(0, 256), (0, 1), (63, 1), (63, 130), (17, 47), (17, 48), (1, 300)])
def test_partial_blocks(offset, length):
    query, key, value = make_inputs(1, 4, 4, length, 128, torch.bfloat16)
    if (offset, length) == (63, 1):  # a landmark alone in its block
        for x in run("triton", torch.bfloat16, (query, key, value), {"block_size": 64, "offset": offset}):
            assert not x.any()
        return
    found = run("triton", torch.bfloat16, (query, key, value), {"block_size": 64, "offset": offset})
    expected = run("reference", torch.float64, (query, key, value), {"block_size": 64, "offset": offset})
    for a, b in zip(found, expected, strict=True):  # one token's gradients of query and key are 0
        assert (a - b).norm() <= BACKWARD[torch.bfloat16] * (b.norm() + 0.1)


@pytest.mark.parametrize("groups", [1, 2, 8])
def test_query_heads_share_key_heads(groups):
    check(make_inputs(2, 8, groups, 333, 64, torch.bfloat16), block_size=64)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("block_size", [16, 64])
@pytest.mark.parametrize("padding", ["left", "right"])
def test_padding(padding, block_size, dtype):
    inputs = make_inputs(3, 4, 2, 400, 64, dtype)
    mask = torch.ones(3, 400, dtype=torch.bool, device="cuda")
    mask[0, slice(0, 77) if padding == "left" else slice(-300, None)] = False
    mask[2] = False
    inputs = [x.masked_fill(~mask[:, None, :, None], torch.nan) for x in inputs]
    offset = torch.tensor([3, block_size - 1, 0], device="cuda")
    check(inputs, block_size=block_size, attention_mask=mask, offset=offset)


@pytest.mark.parametrize("block_size", [16, 64, 128])
def test_packing_and_closed_blocks(block_size):
    bounds = torch.tensor([0, 3, 3, 300, 428, 428, 900], dtype=torch.int32, device="cuda")
    inputs = make_inputs(1, 4, 2, 900, 64, torch.bfloat16)
    generator = torch.Generator("cuda").manual_seed(2)
    is_open = torch.rand(6, 900 // block_size + 1, generator=generator, device="cuda") < 0.5
    check(inputs, block_size=block_size, cu_seqlens=bounds, offset=7)
    check(inputs, block_size=block_size, cu_seqlens=bounds, offset=7, open_blocks=is_open)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_closed_blocks(dtype):
    inputs = make_inputs(2, 4, 2, 1000, 128, dtype)
    is_open = torch.rand(2, 16, generator=torch.Generator("cuda").manual_seed(2), device="cuda") < 0.5
    check(inputs, block_size=64, open_blocks=is_open)


@pytest.mark.parametrize("length", [4096, 4095])
def test_bfloat16_at_length(length):
    """Expected values by the chunked path in float64."""
    check(make_inputs(1, 2, 2, length, 128, torch.bfloat16), definition="chunked", block_size=64)


def test_two_runs_are_bit_equal():
    inputs = make_inputs(2, 8, 2, 1500, 128, torch.bfloat16)
    first, second = (run("triton", torch.bfloat16, inputs, {"block_size": 64}) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_memory_is_linear_in_length():
    """Beside the inputs a step holds outputs, gradients and two numbers a query."""
    peaks = []
    for length in (4096, 16384):
        leaves = [x.requires_grad_() for x in make_inputs(1, 4, 4, length, 64, torch.bfloat16)]
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        output, _ = landmark_attention(*leaves, block_size=64, backend="triton")
        output.backward(torch.ones_like(output))
        peaks.append((torch.cuda.max_memory_allocated() - before) / length)
        del output, leaves
    assert peaks[1] <= 1.1 * peaks[0]


def test_auto_runs_the_kernels():
    inputs = make_inputs(1, 4, 2, 300, 64, torch.bfloat16)
    assert kernel.unsupported(*inputs, block_size=64) is None
    output, _ = landmark_attention(*inputs, block_size=64)
    assert torch.equal(output, landmark_attention(*inputs, block_size=64, backend="triton")[0])
