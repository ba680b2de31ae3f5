"""The Triton kernels of salient-token attention in the interpreter (float32), against the definition in float64."""

import pytest
import torch

import linearize.kernels.salient.function as function
from linearize.kernels import salient as kernel
from linearize.kernels.triton_support import interpreting
from linearize.modeling import SalientState, salient_attention

pytestmark = pytest.mark.skipif(not interpreting(), reason="a GPU is there: tests/gpu has these")

TOLERANCE = 2e-5  # float32 sums of about 60 terms
DIM = 8
CHOOSE_TILES = function.choose_tiles


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    use_tiles(monkeypatch)


def use_tiles(monkeypatch, block=16, forward_span=16, backward_span=32, queries=16, keys=16):
    """Several blocks at test lengths, and several of them to a list of the key's gradient."""
    sizes = function.Launch(queries, keys, 1, 1)
    tiles = function.Tiles(block, forward_span, backward_span, *[sizes] * 6)
    monkeypatch.setattr(function, "choose_tiles", lambda dot, dim: tiles)


def make_inputs(length=70, batch=1, heads=2, groups=1, dim=DIM, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(batch, count, length, dim) for count in (heads, groups, groups)]
    query, key, value = (torch.randn(shape, generator=generator) for shape in shapes)
    return [2 * query, key, value]


def options(window=9, sinks=2, kept=5, age_penalty=20.0, **others):
    return {"window": window, "sinks": sinks, "kept": kept, "age_penalty": age_penalty} | others


def by_rank(state):
    """The kept tokens in the order of their ranks, which is no part of the contract; 0 where a slot is empty."""
    order = state.kept_rank.sort(dim=-1, descending=True)
    key, value = (x.gather(2, order.indices[..., None].expand_as(x)) for x in (state.kept_key, state.kept_value))
    return state._replace(kept_rank=order.values.nan_to_num(neginf=-99.0), kept_key=key, kept_value=value)


def run(backend, inputs, settings, cuts=()):
    """Output, gradients by the same direction for every backend, and the last state, over calls that end at `cuts`."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    mask, settings = settings.get("attention_mask"), dict(settings)
    stateful, state, outputs = settings.get("cu_seqlens") is None, None, []
    for a, b in zip((0, *cuts), (*cuts, inputs[0].shape[2]), strict=True):
        if stateful:
            settings |= {"initial_state": state, "return_state": True}
        settings["attention_mask"] = None if mask is None else mask[:, a:b]
        output, state = salient_attention(*(x[:, :, a:b] for x in leaves), backend=backend, **settings)
        outputs.append(output)
    output = torch.cat(outputs, dim=2)
    direction = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(output)
    loss = (output * direction).sum()
    if state is not None:  # gradients go through the state as well
        loss = loss + sum(
            x.cos().sum() for x in (state.kept_key, state.kept_value, state.window_key, state.sink_value)
        )
    gradients = torch.autograd.grad(loss, leaves)
    return [output.detach(), *gradients], state


def check(inputs, settings, cuts=()):
    found, state = run("triton", inputs, settings, cuts)
    expected, other = run("reference", [x.double() for x in inputs], settings)
    for name, a, b in zip(("output", "query", "key", "value"), found, expected, strict=True):
        assert a.shape == b.shape and a.dtype == torch.float32 and torch.isfinite(a).all(), name
        assert (a - b).abs().max() <= TOLERANCE * (1 + b.abs().max()), name
    if state is not None:
        for name, a, b in zip(SalientState._fields, by_rank(state), by_rank(other), strict=True):
            assert a.shape == b.shape, name
            assert a.numel() == 0 or (a - b).abs().max() <= TOLERANCE * (1 + b.abs().max()), name
    return found


# none kept, no sinks, more kept than there are, lists of more than a tile, windows of one, within and beyond a block
@pytest.mark.parametrize(
    "see", [(9, 2, 5), (4, 0, 3), (1, 1, 6), (7, 2, 0), (8, 0, 0), (90, 2, 3), (3, 20, 40), (33, 3, 17)], ids=str
)
def test_outputs_gradients_and_state(see):
    check(make_inputs(), options(*see))


@pytest.mark.parametrize("heads, groups, length", [(2, 2, 37), (4, 2, 16), (2, 1, 1)])
def test_query_heads_share_key_heads(heads, groups, length):
    check(make_inputs(length, heads=heads, groups=groups, batch=2), options())


@pytest.mark.parametrize("tiles", [(32, 32, 32, 16, 16), (16, 32, 16, 16, 32), (32, 64, 64, 32, 16)], ids=str)
def test_blocks_of_other_sizes(tiles, monkeypatch):
    use_tiles(monkeypatch, *tiles)
    check(make_inputs(90, heads=1), options(11, 2, 6), cuts=(50,))


def make_mask(kind, batch=2, *, length):
    mask = torch.ones(batch, length, dtype=torch.bool)
    if kind == "between":
        mask[0, [3, 4, 11, 30]] = False
        mask[1, ::3] = False
    else:
        mask[0, {"left": slice(0, 21), "right": slice(-21, None), "all": slice(None)}[kind]] = False
    return mask


@pytest.mark.parametrize("kind", ["left", "right", "between", "all"])
def test_padding_is_never_read(kind):
    mask = make_mask(kind, length=50)
    inputs = [x.masked_fill(~mask[:, None, :, None], torch.nan) for x in make_inputs(50, batch=2)]
    for found in check(inputs, options(attention_mask=mask)):
        assert not found.transpose(1, 2)[~mask].any()


@pytest.mark.parametrize("see", [(9, 2, 5), (20, 0, 30), (6, 2, 0)], ids=str)
def test_any_cut_gives_the_same(see):
    check(make_inputs(50), options(*see), cuts=(19, 20, 20))
    check(make_inputs(50, batch=2), options(*see, attention_mask=make_mask("between", length=50)), cuts=(1, 40))


def test_packed_rows_are_rows_of_their_own():
    bounds = torch.tensor([0, 3, 3, 37, 54, 54, 70], dtype=torch.int32)
    check(make_inputs(), options(cu_seqlens=bounds))
    check(make_inputs(), options(5, 1, 0, cu_seqlens=bounds))


def test_strided_inputs_widths_and_a_scaling_of_its_own():
    inputs = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in make_inputs(40, dim=12)]
    inputs[2] = inputs[2].mT.contiguous().mT
    check(inputs, options(scaling=0.6))


def test_equal_ranks_fill_the_store_once():
    """Keys of zeros receive the same masses; who is kept is then arbitrary, but it is K different tokens."""
    query, key, value = make_inputs(70)
    _, state = salient_attention(
        query, key * 0, value, **options(age_penalty=0.0), return_state=True, backend="triton"
    )
    assert len(state.kept_value[0, 0].unique(dim=0)) == 5


def test_no_tokens():
    inputs, settings = make_inputs(30), options(return_state=True, backend="triton")
    _, state = salient_attention(*inputs, **settings)
    output, after = salient_attention(*(x[:, :, :0] for x in inputs), **settings, initial_state=state)
    assert output.shape == (1, 2, 0, DIM)
    for a, b in zip(by_rank(state), by_rank(after), strict=True):
        assert torch.equal(a, b)


def test_memory_is_linear():
    """What autograd keeps: the inputs, the output, a number a query, one a key, and a list a block."""
    kept = []
    leaves = [x.requires_grad_() for x in make_inputs(64)]
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        salient_attention(*leaves, **options(), backend="triton")
    assert sum(kept) == sum(x.numel() for x in leaves) + 2 * 64 * DIM + 2 * 64 + 64 + 5 * 5


def test_what_the_kernels_refuse():
    inputs = make_inputs(4)
    assert "float64" in kernel.unsupported(*(x.double() for x in inputs), **options())
    assert "at most 128" in kernel.unsupported(*make_inputs(2, dim=130), **options())
    with pytest.raises(ValueError, match="at most 128 sinks and 1024 kept"):
        salient_attention(*inputs, **options(kept=1025), backend="triton")
    assert "at most 128 sinks" in kernel.unsupported(*inputs, **options(sinks=129))
    assert kernel.unsupported(*inputs, **options(), return_state=True) is None


def test_every_size_has_tiles_that_fit_its_blocks():
    for dtype in (torch.bfloat16, torch.float32):
        for dim in (16, 64, 80, 128):
            tiles = CHOOSE_TILES(dtype, dim)
            assert tiles.forward_span % tiles.block == tiles.backward_span % tiles.block == 0
            for sizes in tiles[3:]:
                assert tiles.block % sizes.queries == 0
