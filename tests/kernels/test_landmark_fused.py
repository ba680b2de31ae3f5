"""The Triton kernels of landmark attention in the interpreter (float32, CPU), against the definition in float64."""

import pytest
import torch
from landmark_toys import draw

import linearize.kernels.landmark.function as function
from linearize.kernels import landmark as kernel
from linearize.kernels.triton_support import interpreting
from linearize.modeling.op_landmark import landmark_attention

pytestmark = pytest.mark.skipif(not interpreting(), reason="a GPU is there: tests/gpu has these")

TOLERANCE = 2e-5  # float32 sums of about 100 terms
SIZE = 16


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Tiles of one block's queries."""
    use_tiles(monkeypatch, 16)


def use_tiles(monkeypatch, queries):
    sizes = function.Launch(queries, 1, 1)
    monkeypatch.setattr(function, "choose_tiles", lambda dot, block_size, dim: function.Tiles(*[sizes] * 3))


def make_inputs(length, heads=2, groups=1, batch=1, dim=16):
    return draw(length, batch=batch, heads=heads, groups=groups, dim=dim, dtype=torch.float32)


def run(backend, inputs, options):
    """Output and gradients, by the same direction for every backend."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    output, state = landmark_attention(*leaves, backend=backend, **options)
    assert state is None
    direction = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(output)
    return [output.detach(), *torch.autograd.grad(output, leaves, direction)]


def check(inputs, block_size=SIZE, **options):
    options["block_size"] = block_size
    found = run("triton", inputs, options)
    expected = run("reference", [x.double() for x in inputs], options)
    for place, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert a.shape == b.shape and a.dtype == torch.float32 and torch.isfinite(a).all(), place
        assert (a - b).abs().max() <= TOLERANCE * (1 + b.abs().max()), place
    return found


# partial and complete first and last blocks, a row within one block, a row that starts on a landmark, only a landmark
@pytest.mark.parametrize("offset, length", [(0, 48), (0, 41), (5, 43), (5, 60), (15, 34), (0, 7), (3, 13), (15, 1)])
def test_outputs_and_gradients(offset, length):
    check(make_inputs(length), offset=offset)


@pytest.mark.parametrize("queries", [16, 32, 64])
@pytest.mark.parametrize("block_size", [16, 32])
@pytest.mark.parametrize("padded", [False, True])
def test_tiles_of_parts_of_a_block_and_of_several(padded, block_size, queries, monkeypatch):
    use_tiles(monkeypatch, queries)
    inputs, options = make_inputs(75, batch=2), {"offset": 20 % block_size}
    if padded:
        options = {"offset": torch.tensor([0, 9]), "attention_mask": make_mask("left", 2, 75)}
        options["open_blocks"] = torch.tensor([[False, True, True], [True, False, True]])
    check(inputs, block_size, **options)


@pytest.mark.parametrize("block_size", [64, 128])
def test_large_blocks(block_size, monkeypatch):
    use_tiles(monkeypatch, 64)
    check(make_inputs(2 * block_size + 9, heads=1), block_size, offset=3)


@pytest.mark.parametrize("heads, groups", [(3, 3), (6, 2), (4, 1)])
def test_query_heads_share_key_heads_in_runs(heads, groups):
    check(make_inputs(38, heads=heads, groups=groups, batch=2), offset=4)


@pytest.mark.parametrize("dim", [6, 24, 80])
def test_widths_that_are_no_power_of_two(dim):
    check(make_inputs(36, dim=dim))


def make_mask(kind, batch, length):
    mask = torch.ones(batch, length, dtype=torch.bool)
    mask[0, {"left": slice(0, 21), "right": slice(-21, None), "both": slice(0, 7)}[kind]] = False
    if kind == "both":
        mask[0, -5:] = False
    if batch > 2:
        mask[2] = False
    return mask


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64])
@pytest.mark.parametrize("kind", ["left", "right", "both"])
def test_padding_is_never_read(kind, dtype):
    mask = make_mask(kind, 3, 45)
    inputs = [x.masked_fill(~mask[:, None, :, None], torch.nan) for x in make_inputs(45, batch=3, heads=1)]
    for found in check(inputs, offset=torch.tensor([3, 15, 0]), attention_mask=mask.to(dtype)):
        assert not found.transpose(1, 2)[~mask].any()


@pytest.mark.parametrize("offset", [2, torch.tensor([15, 0, 9, 0, 4])], ids=["one offset", "each its own"])
def test_packed_rows(offset):
    bounds = torch.tensor([0, 3, 3, 37, 37, 70], dtype=torch.int32)
    open_blocks = torch.ones(5, 4, dtype=torch.bool)
    open_blocks[2, 0] = open_blocks[4, 1] = False
    inputs = make_inputs(70)
    check(inputs, offset=offset, cu_seqlens=bounds)
    check(inputs, offset=offset, cu_seqlens=bounds, open_blocks=open_blocks)


@pytest.mark.parametrize("reach", [2, 4, 7])
def test_blocks_that_are_left_out(reach):
    """More or fewer of them than the row has; all closed, later queries see their own block alone."""
    open_blocks = torch.rand(2, reach, generator=torch.Generator().manual_seed(reach)) < 0.5
    open_blocks[1] = False
    check(make_inputs(60, batch=2), offset=2, open_blocks=open_blocks)


def test_a_large_score_and_a_scaling_of_its_own():
    """Weights of e^-200 and gates far above all tokens."""
    query, key, value = make_inputs(40)
    key[:, :, 15] *= 20
    check((5 * query, key, value), scaling=0.6)


def test_strided_inputs_and_gradients():
    inputs = make_inputs(40)
    expected = landmark_attention(*inputs, block_size=SIZE, backend="triton")[0]
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs[:2]]
    strided.append(inputs[2].mT.contiguous().mT)
    leaves = [x.requires_grad_() for x in strided]
    output, _ = landmark_attention(*leaves, block_size=SIZE, backend="triton")
    assert torch.equal(output, expected)
    sums = torch.autograd.grad(output.sum(), leaves, retain_graph=True)  # a gradient of strides 0
    ones = torch.autograd.grad(output, leaves, torch.ones_like(output))
    assert all(torch.equal(a, b) for a, b in zip(sums, ones, strict=True))


def test_no_tokens():
    output, _ = landmark_attention(*make_inputs(0), block_size=SIZE, backend="triton")
    assert output.shape == (1, 2, 0, 16)


def test_memory_is_linear():
    """What autograd keeps: the inputs, the output, and one number a query."""
    kept = []
    leaves = [x.requires_grad_() for x in make_inputs(64)]
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        landmark_attention(*leaves, block_size=SIZE, backend="triton")
    assert sum(kept) == sum(x.numel() for x in leaves) + 2 * 64 * 16 + 2 * 64


def test_what_the_kernels_refuse():
    inputs = make_inputs(4)
    for size in (2, 8, 50, 256):
        assert "blocks of 16, 32, 64 or 128" in kernel.unsupported(*inputs, block_size=size)
    with pytest.raises(ValueError, match="blocks of 50"):
        landmark_attention(*inputs, block_size=50, backend="triton")
    assert "float64" in kernel.unsupported(*(x.double() for x in inputs), block_size=SIZE)
    assert "at most 128" in kernel.unsupported(*make_inputs(2, dim=130), block_size=SIZE)
    assert "dimension of 64" in kernel.unsupported(*make_inputs(2, dim=80), block_size=128)
    assert kernel.unsupported(*inputs, block_size=SIZE, offset=3, open_blocks=None) is None


def test_every_size_has_tiles_that_fit_its_blocks(monkeypatch):
    monkeypatch.undo()
    for dtype in (torch.bfloat16, torch.float32):
        for block_size in (16, 32, 64, 128):
            for dim in (16, 48, 64, 80, 128):
                for sizes in function.choose_tiles(dtype, block_size, dim):
                    assert sizes.queries % block_size == 0 or block_size % sizes.queries == 0
                    assert sizes.warps == 4 or min(block_size, dim) > 16
