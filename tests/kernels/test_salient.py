"""Salient-token attention: chunked against the definition in float64, the definition against formulas written out."""

import itertools

import pytest
import torch
from torch.nn import functional

import linearize.modeling.op_salient_chunked as chunked
from linearize.modeling import SalientState, salient_attention

HEADS, GROUPS, LENGTH, DIM = 4, 2, 41, 8
SEES = [(4, 0, 3), (5, 2, 4), (8, 3, 1), (1, 1, 6), (6, 2, 0), (64, 2, 3), (7, 50, 3), (3, 0, 60)]
"""Window, sinks, kept."""


@pytest.fixture(autouse=True)
def short_blocks(monkeypatch):
    """Several blocks at test lengths."""
    monkeypatch.setattr(chunked, "BLOCK", 8)


def make_inputs(seed=0, batch=2, groups=GROUPS, dtype=torch.float64, length=LENGTH):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    query, key = 2 * draw(batch, HEADS, length, DIM), draw(batch, groups, length, DIM)
    return [query, key, draw(batch, groups, length, DIM)]


def make_mask(kind, batch=2, length=LENGTH):
    if kind is None:
        return None
    mask = torch.ones(batch, length, dtype=torch.bool)
    if kind == "between":
        mask[0, [3, 4, 11, 30]] = False
        mask[1, ::3] = False
    else:
        mask[0, {"left": slice(0, 7), "right": slice(-7, None), "all": slice(None)}[kind]] = False
    return mask


def poison(tensors, mask):
    """NaN where padded: padding must be selected away, never multiplied by zero."""
    return tensors if mask is None else [x.masked_fill(~mask[:, None, :, None], torch.nan) for x in tensors]


def options(see, age_penalty=20.0):
    return {"window": see[0], "sinks": see[1], "kept": see[2], "age_penalty": age_penalty}


def by_rank(state):
    """The kept tokens in the order of their ranks, which is no part of the contract."""
    order = state.kept_rank.sort(dim=-1, descending=True)
    key, value = (x.gather(2, order.indices[..., None].expand_as(x)) for x in (state.kept_key, state.kept_value))
    empty = torch.isneginf(order.values)[..., None]
    return state._replace(
        kept_rank=order.values.nan_to_num(neginf=0.0),
        kept_key=key.masked_fill(empty, 0.0),
        kept_value=value.masked_fill(empty, 0.0),
    )


def assert_states_equal(left, right, tolerance):
    for name, a, b in zip(SalientState._fields, by_rank(left), by_rank(right), strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype, name
        assert a.numel() == 0 or (a - b).abs().max() <= tolerance, name


@pytest.mark.parametrize("see", SEES, ids=str)
def test_chunked_equals_reference(see):
    for groups, padding in itertools.product([1, GROUPS, HEADS], [None, "left", "between", "all"]):
        mask = make_mask(padding)
        inputs = [x.requires_grad_() for x in poison(make_inputs(groups=groups), mask)]
        results = []
        for backend in ("reference", "chunked"):
            output, state = salient_attention(
                *inputs, **options(see), attention_mask=mask, return_state=True, backend=backend
            )
            weight = torch.arange(output.numel()).view_as(output).cos()
            gradients = torch.autograd.grad((output * weight).sum(), inputs)
            results.append((output, state, gradients))
        (expected, state, gradients), (output, found, others) = results
        assert (output - expected).abs().max() < 1e-12
        assert_states_equal(found, state, 1e-12)
        for a, b in zip(gradients, others, strict=True):
            assert (a.nan_to_num() - b.nan_to_num()).abs().max() < 1e-10
        if mask is not None:
            assert (output.masked_select(~mask[:, None, :, None]) == 0).all()


@pytest.mark.parametrize("see", SEES, ids=str)
@pytest.mark.parametrize("backend", ["chunked", "reference"])
def test_any_cut_gives_the_same(see, backend):
    inputs, mask = make_inputs(), make_mask("between")
    whole, last = salient_attention(*inputs, **options(see), attention_mask=mask, return_state=True, backend=backend)
    state, parts, start = None, [], 0
    for size in (13, 1, 1, 0, 9, 1, 16):
        span = slice(start, start + size)
        part, state = salient_attention(
            *(x[:, :, span] for x in inputs),
            **options(see),
            attention_mask=mask[:, span],
            initial_state=state,
            return_state=True,
            backend=backend,
        )
        parts.append(part)
        start += size
    assert start == LENGTH
    assert (torch.cat(parts, 2) - whole).abs().max() < 1e-12
    assert_states_equal(state, last, 1e-12)


@pytest.mark.parametrize("backend", ["chunked", "reference"])
def test_packed_rows_are_rows_of_their_own(backend):
    inputs = make_inputs(batch=1)
    bounds = torch.tensor([0, 11, 11, 40, 41], dtype=torch.int32)
    packed, _ = salient_attention(*inputs, **options((4, 1, 3)), cu_seqlens=bounds, backend=backend)
    for a, b in itertools.pairwise(bounds.tolist()):
        if a < b:
            alone, _ = salient_attention(*(x[:, :, a:b] for x in inputs), **options((4, 1, 3)), backend=backend)
            assert (packed[:, :, a:b] - alone).abs().max() < 1e-12


@pytest.mark.parametrize("backend", ["chunked", "reference"])
def test_all_kept_is_softmax_attention_and_none_kept_its_window(backend):
    inputs = make_inputs()
    place = torch.arange(LENGTH)
    distance = place[:, None] - place
    causal, window = distance >= 0, (distance < 5) | (place < 2)
    for kept, visible in ((LENGTH, causal), (0, causal & window)):
        output, _ = salient_attention(*inputs, **options((5, 2, kept)), backend=backend)
        expected = functional.scaled_dot_product_attention(*inputs, attn_mask=visible, enable_gqa=True)
        assert (output - expected).abs().max() < 1e-12


def test_the_definition_written_out():
    """One group of two heads: which tokens are seen at each step, from the whole matrix of the window's softmax."""
    window, sinks, kept, penalty = 6, 1, 3, 30.0
    query, key, value = make_inputs(batch=1, groups=1)
    query = query[:, :2]
    place = torch.arange(LENGTH)
    distance = place[:, None] - place
    near = (distance >= 0) & ((distance < window) | (place < sinks))
    scores = query[0] @ key[0, 0].T / DIM**0.5
    share = scores.masked_fill(~near, -torch.inf).softmax(-1)
    mass = (share * ((distance >= 3) & (distance < window))).sum((0, 1))
    rank = mass.log() + penalty * place / 1000
    seen = near.clone()
    for n in range(LENGTH):
        left = range(sinks, n - window + 1)
        for j in sorted(left, key=lambda j: rank[j], reverse=True)[:kept]:
            seen[n, j] = True
    expected = scores.masked_fill(~seen, -torch.inf).softmax(-1) @ value[0, 0]
    for backend in ("reference", "chunked"):
        output, _ = salient_attention(query, key, value, **options((window, sinks, kept), penalty), backend=backend)
        assert (output[0] - expected).abs().max() < 1e-12
    assert (seen & ~near).any(0).sum() > kept + 3  # some were kept and then given up


def test_the_age_penalty_lets_go_of_old_tokens():
    inputs = make_inputs(length=200)
    states = [salient_attention(*inputs, **options((8, 1, 6), p), return_state=True)[1] for p in (0.0, 1e5)]
    newest = inputs[1][:, :, 192 - 6 : 192]  # with a great penalty the window grows by what is kept
    found = by_rank(states[1]).kept_key
    assert (found - newest.flip(2)).abs().max() == 0
    assert (by_rank(states[0]).kept_key - newest.flip(2)).abs().max() > 0.1


def test_half_precision_keeps_the_same_tokens():
    inputs = [x.bfloat16() for x in make_inputs(length=64)]
    output, state = salient_attention(*inputs, **options((8, 1, 6)), return_state=True)
    wide, other = salient_attention(*(x.double() for x in inputs), **options((8, 1, 6)), return_state=True)
    assert output.dtype == state.kept_key.dtype == torch.bfloat16 and state.kept_rank.dtype == torch.float32
    assert (by_rank(state).kept_key.double() - by_rank(other).kept_key).abs().max() == 0
    assert (output.double() - wide).abs().max() < 2e-2


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"window": 0}, "window is 0"),
        ({"kept": -1}, "at least 0"),
        ({"age_penalty": -1.0}, "age_penalty"),
        ({"age_penalty": float("nan")}, "age_penalty"),
        ({"backend": "triton"}, "no Triton kernel"),
    ],
)
def test_refusals(change, words):
    with pytest.raises(ValueError, match=words):
        salient_attention(*make_inputs(), **options((4, 1, 3)) | change)


def test_a_state_of_other_sizes_is_refused():
    inputs = make_inputs()
    _, state = salient_attention(*inputs, **options((4, 1, 3)), return_state=True)
    with pytest.raises(ValueError, match=r"made with window, sinks and kept \(4, 1, 3\)"):
        salient_attention(*inputs, **options((4, 1, 2)), initial_state=state)
