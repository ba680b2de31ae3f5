"""The Triton kernels of cosine attention in Triton's interpreter (float32, CPU), against the definition in float64."""

import itertools

import pytest
import torch

import linearize.kernels.cosine.launch as launch
from linearize.kernels import cosine as kernel
from linearize.kernels.triton_support import interpreting
from linearize.modeling import CosineState, cosine_attention

pytestmark = pytest.mark.skipif(not interpreting(), reason="a GPU is there: tests/gpu has these")

TOLERANCE = 1e-5  # float32 sums of a few dozen terms
SIDES = ["query", "key"]
FORMS = [(True, "query"), (True, "key"), (False, "query")]


def small_tiles(apply_rows, project_rows):
    """Several chunks, parts of a chunk, blocks of other tokens and of value columns at test sizes."""
    return launch.Tiles(
        32,
        launch.Tile(32, 0, 16, 4, 1),
        launch.Tile(apply_rows, 16, 16, 4, 1),
        launch.Tile(project_rows, 16, 16, 4, 1),
    )


@pytest.fixture(autouse=True)
def short_chunks(monkeypatch):
    monkeypatch.setattr(launch, "NARROW_FLOAT", small_tiles(16, 32))


def make_inputs(batch=2, heads=2, groups=1, length=37, dim=16, value_dim=16, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    inputs = [
        draw(batch, heads, length, dim),
        draw(batch, groups, length, dim),
        draw(batch, groups, length, value_dim),
    ]
    return inputs, {"exponent": draw(heads).sigmoid(), "gain": draw(heads)}


def make_state(inputs, side, counts=(5, 9)):
    """A state of rows of different ages."""
    query, key, value = inputs
    heads = query.shape[1] if side == "key" else key.shape[1]
    kv = torch.randn(query.shape[0], heads, key.shape[3], value.shape[3], generator=torch.Generator().manual_seed(3))
    rings = [x.new_zeros(*x.shape[:2], 0, x.shape[3]) for x in (key, value, key, value)]
    return CosineState(kv, *rings, torch.tensor(counts[: query.shape[0]]))


def make_mask(side, batch=2, length=37):
    mask = torch.ones(batch, length, dtype=torch.bool)
    mask[0, slice(0, 7) if side == "left" else slice(-20, None)] = False
    if batch > 2:
        mask[2] = False
    return mask


def poison(tensors, mask):
    return tensors if mask is None else [x.masked_fill(~mask[:, None, :, None], torch.nan) for x in tensors]


def wide(x):
    if isinstance(x, torch.Tensor):
        return x.double() if x.is_floating_point() else x
    return CosineState(*(wide(field) for field in x)) if isinstance(x, tuple) else x


def run(backend, inputs, mix, state, options):
    """Output, new sum and all gradients; the same directions for every backend."""
    leaves = [x.clone().requires_grad_() for x in (*inputs, *mix.values())]
    if state is not None:
        leaves.append(state.kv.clone().requires_grad_())
        state = state._replace(kv=leaves[-1])
    names = dict(zip(mix, leaves[3:], strict=False))
    output, after = cosine_attention(*leaves[:3], **names, initial_state=state, backend=backend, **options)
    generator = torch.Generator().manual_seed(1)
    loss = (output * torch.randn(output.shape, generator=generator).to(output)).sum()
    results = [output]
    if after is not None:
        loss = loss + (after.kv * torch.randn(after.kv.shape, generator=generator).to(output)).sum()
        results += [after.kv, after.count]
    return [x.detach() for x in results] + list(torch.autograd.grad(loss, leaves, allow_unused=True))


def check(inputs, mix, state=None, **options):
    ours = run("triton", inputs, mix, state, options)
    double = [wide(x) for x in inputs]
    expected = run("reference", double, {name: wide(x) for name, x in mix.items()}, wide(state), options)
    for place, (a, b) in enumerate(zip(ours, expected, strict=True)):
        assert a.shape == b.shape and torch.isfinite(a).all(), place
        assert (a - b).abs().max() <= TOLERANCE * (1 + b.abs().max()), place


@pytest.mark.parametrize(("causal", "side"), FORMS)
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_outputs_and_gradients(groups, causal, side):
    inputs, mix = make_inputs(heads=4, groups=groups)
    check(inputs, mix, causal=causal, scale_side=side)


@pytest.mark.parametrize(("causal", "side"), FORMS)
def test_other_parts_of_a_chunk(causal, side, monkeypatch):
    monkeypatch.setattr(launch, "NARROW_FLOAT", small_tiles(32, 16))
    inputs, mix = make_inputs(batch=1, length=37)
    check(inputs, mix, causal=causal, scale_side=side)


@pytest.mark.parametrize(("causal", "side"), FORMS)
@pytest.mark.parametrize(("dim", "value_dim"), [(40, 24), (16, 40)])
def test_widths_that_are_no_power_of_two(dim, value_dim, causal, side):
    inputs, mix = make_inputs(batch=1, length=21, dim=dim, value_dim=value_dim)
    check(inputs, mix, causal=causal, scale_side=side)


@pytest.mark.parametrize(("causal", "side"), FORMS)
@pytest.mark.parametrize("padding", ["left", "right"])
def test_padding(padding, causal, side):
    inputs, mix = make_inputs(batch=3)
    mask = make_mask(padding, batch=3)
    check(poison(inputs, mask), mix, causal=causal, scale_side=side, attention_mask=mask)


@pytest.mark.parametrize(("causal", "side"), FORMS)
def test_packing(causal, side):
    inputs, mix = make_inputs(batch=1, length=50)
    bounds = torch.tensor([0, 3, 3, 36, 36, 50], dtype=torch.int32)
    check(inputs, mix, causal=causal, scale_side=side, cu_seqlens=bounds)


def test_segments_of_whole_rows():
    """Not causal and long: several programs share a row's sum."""
    inputs, mix = make_inputs(batch=2, heads=1, groups=1, length=8 * 32 + 5)
    mask = make_mask("right", length=8 * 32 + 5)
    check(poison(inputs, mask), mix, causal=False, attention_mask=mask)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("padding", [None, "left"])
def test_states_in_and_out(padding, side):
    inputs, mix = make_inputs(length=37)
    mask = None if padding is None else make_mask(padding)
    state = make_state(inputs, side)
    check(poison(inputs, mask), mix, state, scale_side=side, attention_mask=mask, return_state=True)


@pytest.mark.parametrize("side", SIDES)
def test_a_state_without_gradient(side):
    inputs, mix = make_inputs(length=20)
    call = {"scale_side": side, "return_state": True, "initial_state": make_state(inputs, side)}
    expected, after = cosine_attention(*inputs, **mix, **call, backend="reference")
    output, state = cosine_attention(*inputs, **mix, **call, backend="triton")
    assert (output - expected).abs().max() <= TOLERANCE * (1 + expected.abs().max())
    assert (state.kv - after.kv).abs().max() <= TOLERANCE * (1 + after.kv.abs().max())
    assert torch.equal(state.count, after.count)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("masked", [False, True], ids=["all real", "one padded"])
@pytest.mark.parametrize("heads", [1, 4])
def test_one_token(heads, masked, side):
    inputs, mix = make_inputs(heads=heads, groups=max(1, heads // 2), length=1, dim=24, value_dim=40)
    mask = torch.tensor([[0], [1]]) if masked else None
    inputs = poison(inputs, None if mask is None else mask.bool())
    call = {"scale_side": side, "return_state": True, "initial_state": make_state(inputs, side, (0, 9))}
    expected, after = cosine_attention(*inputs, **mix, **call, attention_mask=mask, backend="reference")
    output, state = cosine_attention(*inputs, **mix, **call, attention_mask=mask, backend="triton")
    assert (output - expected).abs().max() <= TOLERANCE
    assert state.mass is None and after.mass is None
    for a, b in zip(state[:-1], after[:-1], strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        assert a.numel() == 0 or (a - b).abs().max() <= TOLERANCE


@pytest.mark.parametrize("side", SIDES)
def test_any_cut_into_calls_gives_the_same(side):
    inputs, mix = make_inputs(length=24)
    call = {**mix, "scale_side": side, "return_state": True, "backend": "triton"}
    expected, expected_state = cosine_attention(*inputs, **call)
    for cut in ([17, 1, 1, 5], [1] * 4 + [20, 0]):
        state, outputs = None, []
        for pieces in zip(*(x.split(cut, dim=2) for x in inputs), strict=True):
            output, state = cosine_attention(*pieces, **call, initial_state=state)
            outputs.append(output)
        assert (torch.cat(outputs, 2) - expected).abs().max() <= TOLERANCE
        for a, b in zip(state[:-1], expected_state[:-1], strict=True):
            assert a.shape == b.shape and (a.numel() == 0 or (a - b).abs().max() <= TOLERANCE)


def test_without_gain_and_strided_inputs():
    (query, key, value), mix = make_inputs(length=20)
    options = {"exponent": mix["exponent"]}
    expected, _ = cosine_attention(query.double(), key.double(), value.double(), **options, backend="reference")
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (query, key)]
    strided.append(value.mT.contiguous().mT)
    output, state = cosine_attention(*strided, **options, backend="triton")
    assert state is None and (output - expected).abs().max() <= TOLERANCE


def test_zero_vectors_and_a_zero_gain():
    """A zero query or key has weight 0 and no gradient; a gain of 0 still learns."""
    inputs, mix = make_inputs(length=20)
    inputs[0][:, :, 3], inputs[1][:, :, 5] = 0, 0
    check(inputs, {**mix, "gain": torch.zeros(2)}, causal=True)
    for causal, side in FORMS:
        check(inputs, mix, causal=causal, scale_side=side)
        query, key = run("triton", inputs, mix, None, {"causal": causal, "scale_side": side})[1:3]
        assert not query[:, :, 3].any() and not key[:, :, 5].any()


@pytest.mark.parametrize("wanted", [[0], [1], [2], [3], [4]], ids=["query", "key", "value", "exponent", "gain"])
@pytest.mark.parametrize("side", SIDES)
def test_a_single_gradient(side, wanted):
    inputs, mix = make_inputs(batch=1, length=20)
    grads = []
    for only in (wanted, range(5)):
        leaves = [x.clone().requires_grad_(i in only) for i, x in enumerate((*inputs, *mix.values()))]
        output, _ = cosine_attention(
            *leaves[:3], exponent=leaves[3], gain=leaves[4], scale_side=side, backend="triton"
        )
        output.square().sum().backward()
        grads.append(leaves[wanted[0]].grad)
    assert torch.equal(*grads)


def test_what_the_kernels_refuse():
    inputs, mix = make_inputs(length=4)
    for change, sentence in (({"window": 2}, "window and sinks"), ({"sinks": 1}, "window and sinks")):
        assert sentence in kernel.unsupported(*inputs, **mix, **change)
        with pytest.raises(ValueError, match=sentence):
            cosine_attention(*inputs, **mix, **change, backend="triton")
    assert "float64" in kernel.unsupported(*(x.double() for x in inputs), **mix)
    wide_inputs, mix = make_inputs(length=2, dim=300)
    assert "at most 256" in kernel.unsupported(*wide_inputs, **mix)
    assert kernel.unsupported(*inputs, **mix) is None


def test_every_tile_divides_its_chunk():
    for dim, value_dim in itertools.product((32, 64, 80, 128, 200, 256), repeat=2):
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            tiles = launch.choose_tiles(dim, value_dim, dtype)
            for tile in (tiles.apply, tiles.project):
                assert tiles.chunk % tile.rows == 0 and tile.rows % tile.others == 0
            assert tiles.sums.rows == tiles.chunk
