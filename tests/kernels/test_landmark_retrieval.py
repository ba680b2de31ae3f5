"""Retrieval of landmark blocks: the definition against loops over tokens, and against the attention that reads all."""

import cmath
import math

import pytest
import torch
from landmark_toys import BASE, Blocks, draw, retrieval_call, rotary_tables, rotate, shuffled

from linearize.kernels.landmark import reference as dense_reference
from linearize.kernels.landmark_retrieval import reference

SELECTIONS = ["token_and_head", "head", "token"]


def retrieve(call, **options):
    args, given = call
    return reference(*args, **{**given, **options})


def dense(inputs, block_size, rotary=None):
    """Every earlier block open, all tokens at their true positions."""
    query, key, value = inputs
    if rotary is not None:
        query, key = (rotate(x, *rotary) for x in (query, key))
    return dense_reference(query, key, value, block_size=block_size)[0]


def close(left, right, tolerance=1e-10):
    return left.shape == right.shape and (left - right).abs().max() <= tolerance


# --- every earlier block retrieved


@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("factor", [None, 1.0, 1.3])
@pytest.mark.parametrize(("block_size", "length"), [(2, 11), (3, 12), (4, 19), (4, 3)])
def test_with_every_block_it_is_landmark_attention(block_size, length, factor, selection):
    """At as many blocks as there are, and at more; in blocks that are complete, partial, first."""
    inputs = draw(length)
    count = (length - 1) // block_size  # earlier blocks of the last token
    for top_k in (count, count + 1, count + 4):
        rotary = None if factor is None else rotary_tables((top_k + 2) * block_size, factor=factor)
        true = None if factor is None else rotary_tables(length, factor=factor)
        output = retrieve(retrieval_call(inputs, block_size, rotary), top_k=top_k, selection=selection)
        assert close(output, dense(inputs, block_size, true))


@pytest.mark.parametrize(("heads", "groups"), [(1, 1), (3, 3), (6, 2), (4, 1)])
def test_query_heads_share_key_heads_in_runs(heads, groups):
    inputs, rotary = draw(13, heads=heads, groups=groups), rotary_tables(18)
    assert close(retrieve(retrieval_call(inputs, 3, rotary), top_k=4), dense(inputs, 3, rotary))


def test_scaling_is_an_option():
    query, key, value = draw(13)
    rotary = rotary_tables(18)
    expected = dense_reference(rotate(query, *rotary), rotate(key, *rotary), value, block_size=3, scaling=0.7)[0]
    call = retrieval_call((query, key, value), 3, rotary)
    assert close(retrieve(call, top_k=4, scaling=0.7), expected)
    assert close(retrieve(call, top_k=1), retrieve(call, top_k=1, scaling=6**-0.5))


def test_more_than_64_blocks():
    inputs, rotary = draw(135, batch=1, heads=2, groups=1), rotary_tables(140)
    call = retrieval_call(inputs, 2, rotary, spans=[(130, 135)])
    assert close(retrieve(call, top_k=67), dense(inputs, 2, rotary)[:, :, 130:])


# --- some retrieved


def by_tokens(
    inputs,
    block_size,
    spans,
    *,
    top_k,
    selection="token_and_head",
    factor=None,
    max_blocks=None,
    lost=(),
    scaling=None,
):
    """Section 3.2 of the mathematics with the own block as its window, at absolute positions, in Python floats.

    A list with one `(H, tokens, D)` for each row. `lost` are blocks that the store does not hold.
    """
    query, key, value = (x.tolist() for x in inputs)
    heads, dim = inputs[0].shape[1], inputs[0].shape[3]
    scaling = dim**-0.5 if scaling is None else scaling

    def turn(x, position):
        if factor is None:
            return x
        pairs = [
            factor * complex(x[d], x[d + dim // 2]) * cmath.exp(1j * position * BASE ** (-2 * d / dim))
            for d in range(dim // 2)
        ]
        return [z.real for z in pairs] + [z.imag for z in pairs]

    def exponential(h, p, token, position):
        k = turn(key[b][h * inputs[1].shape[1] // heads][token], position)
        return math.exp(scaling * sum(x * y for x, y in zip(turn(query[b][h][p], p), k, strict=True)))

    results = []
    for b, (start, stop) in enumerate(spans):
        result = torch.zeros(heads, stop - start, dim, dtype=torch.float64)
        for n in range(start // block_size, (stop - 1) // block_size + 1):
            tokens = [p for p in range(start, stop) if p // block_size == n]
            cached = [i for i in range(n) if i not in lost and (max_blocks is None or i >= n - max_blocks)]
            count = min(top_k, len(cached))
            full = n * block_size
            prefix = full - (count + 1) * block_size
            gates = {}
            for h in range(heads):
                for p in tokens:
                    for i in cached:
                        at = (i * block_size if i >= n - count else prefix) + block_size - 1
                        gates[h, p, i] = exponential(h, p, i * block_size + block_size - 1, at)

            def share(h, p, i, cached=cached, gates=gates):
                return gates[h, p, i] / sum(gates[h, p, c] for c in cached)

            for h in range(heads):
                for p in tokens:
                    merit = {i: gates[h, p, i] for i in cached}
                    if selection == "head":
                        merit = {i: max(share(h, other, i) for other in tokens) for i in cached}
                    elif selection == "token":
                        merit = {i: max(share(other, p, i) for other in range(heads)) for i in cached}
                    # Ours: the newer of near equals, by a factor e^-0.00001 for each block of age.
                    merit = {i: m * math.exp(-1e-5 * (n - i)) for i, m in merit.items()}
                    chosen = sorted(sorted(cached, key=merit.__getitem__, reverse=True)[:count])
                    local = {
                        t: exponential(h, p, t, t) for t in range(full, p + 1) if t % block_size != block_size - 1
                    }
                    starts = {
                        i: prefix + s * block_size + (block_size if i >= n - count else 0)
                        for s, i in enumerate(chosen)
                    }
                    # The gate is the landmark's score where the block is read, not the one that selected it.
                    weighs = {
                        i: exponential(h, p, (i + 1) * block_size - 1, at + block_size - 1) for i, at in starts.items()
                    }
                    total = sum(local.values()) + sum(weighs.values())
                    weights = {t: w / total for t, w in local.items()}
                    for i, at in starts.items():
                        inner = [exponential(h, p, i * block_size + f, at + f) for f in range(block_size - 1)]
                        for f, w in enumerate(inner):
                            weights[i * block_size + f] = weighs[i] / total * w / sum(inner)
                    v = value[b][h * inputs[2].shape[1] // heads]
                    for d in range(dim):
                        result[h, p - start, d] = sum(w * v[t][d] for t, w in weights.items())
        results.append(result)
    return results


def same_rows(output, expected):
    assert output.shape[2] == max(row.shape[1] for row in expected)
    return all(close(found[:, : row.shape[1]], row) for found, row in zip(output, expected, strict=True))


@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("factor", [None, 1.0, 1.3])
@pytest.mark.parametrize(("block_size", "top_k"), [(2, 3), (3, 2), (4, 1), (4, 0)])
def test_the_definition_is_the_published_retrieval(block_size, top_k, factor, selection):
    """All tokens in one call, so that queries have no, fewer, as many and more blocks behind them than K."""
    inputs = draw(6 * block_size + 1)
    rotary = None if factor is None else rotary_tables((top_k + 2) * block_size, factor=factor)
    output = retrieve(retrieval_call(inputs, block_size, rotary), top_k=top_k, selection=selection)
    spans = [(0, 6 * block_size + 1)] * 2
    expected = by_tokens(inputs, block_size, spans, top_k=top_k, selection=selection, factor=factor)
    assert same_rows(output, expected)


@pytest.mark.parametrize("selection", SELECTIONS)
def test_what_is_chosen_is_not_always_the_last_blocks(selection):
    """The random inputs of these tests do select old blocks, and differently by head, by query and by selection."""
    inputs, rotary = draw(25), rotary_tables(16)
    call = retrieval_call(inputs, 4, rotary)
    few = retrieve(call, top_k=2, selection=selection)
    last = retrieve(call, top_k=2, selection=selection, max_blocks=2)
    assert not close(few[:, :, 12:], last[:, :, 12:], 0.1)
    assert all(
        not close(few, retrieve(call, top_k=2, selection=other), 0.1) for other in SELECTIONS if other != selection
    )


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("selection", SELECTIONS)
def test_rows_of_different_lengths(selection, side):
    """A long row, one that starts and ends inside blocks, one in its first block, and one without tokens."""
    spans = [(9, 22), (13, 18), (0, 2), (5, 5)]
    inputs, rotary = draw(22, batch=4), rotary_tables(16)
    output = retrieve(retrieval_call(inputs, 4, rotary, spans=spans, side=side), top_k=2, selection=selection)
    expected = by_tokens(inputs, 4, spans[:3], top_k=2, selection=selection, factor=1.0)
    for found, row in zip(output, expected, strict=False):
        absent = output.shape[2] - row.shape[1]
        padding = found[:, :absent] if side == "left" else found[:, row.shape[1] :]
        assert padding.shape[1] == absent and (padding == 0).all()
        assert close(found[:, absent:] if side == "left" else found[:, : row.shape[1]], row)
    assert (output[3] == 0).all()


@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("max_blocks", [1, 3, 50])
def test_max_blocks_bounds_what_a_query_may_choose(max_blocks, selection):
    inputs, rotary = draw(23), rotary_tables(12)
    call = retrieval_call(inputs, 3, rotary)
    output = retrieve(call, top_k=2, selection=selection, max_blocks=max_blocks)
    options = {"top_k": 2, "selection": selection, "factor": 1.0, "max_blocks": max_blocks}
    assert same_rows(output, by_tokens(inputs, 3, [(0, 23)] * 2, **options))


@pytest.mark.parametrize("lost", [(0,), (0, 1, 2), (1, 4)])
def test_only_stored_blocks_are_candidates(lost):
    """Also where blocks are missing between others."""
    inputs, rotary = draw(20), rotary_tables(12)
    (*local, blocks), options = retrieval_call(inputs, 3, rotary, spans=[(17, 20)] * 2)
    gone = torch.isin(blocks.index, torch.tensor(lost))
    sides = [x.masked_fill(gone.view(2, 1, -1, *[1] * (x.ndim - 3)), torch.nan) for x in blocks[:3]]
    blocks = Blocks(*sides, blocks.index.masked_fill(gone, -1))
    output = retrieve(((*local, blocks), options), top_k=2)
    assert same_rows(output, by_tokens(inputs, 3, [(17, 20)] * 2, top_k=2, factor=1.0, lost=lost))


@pytest.mark.parametrize("selection", SELECTIONS)
def test_the_order_of_the_slots_does_not_matter(selection):
    inputs, rotary = draw(25), rotary_tables(20)
    (*local, blocks), options = retrieval_call(inputs, 4, rotary)
    moved = shuffled(blocks)
    assert not moved.index[0].equal(moved.index[1])
    for max_blocks in (None, 50):  # 50 before the start of the row, where no block is
        choice = {"top_k": 3, "selection": selection, "max_blocks": max_blocks}
        expected = retrieve(((*local, blocks), options), **choice)
        assert close(retrieve(((*local, moved), options), **choice), expected, 0)


def test_nothing_is_stored():
    inputs, rotary = draw(4), rotary_tables(20)
    (query, key, value, blocks), options = retrieval_call(inputs, 4, rotary)
    empty = [
        blocks._replace(index=torch.full_like(blocks.index, -1)),
        Blocks(*(x[:, :, :0] for x in blocks[:3]), blocks.index[:, :0]),
    ]
    for stored in empty:
        output = retrieve(((query, key, value, stored), options), top_k=3)
        assert close(output, dense(inputs, 4, rotary))


@pytest.mark.parametrize("selection", ["token_and_head", "token"])
def test_token_by_token_is_one_call(selection):
    inputs, rotary = draw(17), rotary_tables(16)
    steps = [retrieval_call(inputs, 4, rotary, spans=[(t, t + 1)] * 2) for t in range(17)]
    output = torch.cat([retrieve(step, top_k=2, selection=selection) for step in steps], 2)
    assert close(output, retrieve(retrieval_call(inputs, 4, rotary), top_k=2, selection=selection))


def test_weights_sum_to_one_and_landmarks_have_none():
    query, key, _ = draw(15, dim=16)
    one_hot = torch.eye(15, 16, dtype=query.dtype).expand(2, 2, 15, 16)
    weights = retrieve(retrieval_call((query, key, one_hot), 3, rotary_tables(12, 16)), top_k=2)
    assert close(weights.sum(-1), torch.ones(2, 4, 15, dtype=query.dtype))
    assert (weights[..., 2:15:3] == 0).all() and (weights[..., :15].triu(1) == 0).all()
    assert ((weights[:, :, 12:, :12] > 0).sum(-1) == 4).all()  # two blocks of two tokens


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_sums_are_at_least_in_float32(dtype):
    inputs, rotary = [x.to(dtype) for x in draw(13)], rotary_tables(12)
    call = retrieval_call([x.double() for x in inputs], 3, rotary)
    (query, key, value, blocks), options = call
    args = (query.to(dtype), key.float(), value.to(dtype), Blocks(*(x.float() for x in blocks[:3]), blocks.index))
    with torch.autocast("cpu", torch.bfloat16):
        output = retrieve((args, options), top_k=2)
    exact = retrieve(call, top_k=2)
    assert output.dtype == dtype
    assert ((output.double() - exact).abs() <= torch.finfo(dtype).eps * exact.abs() + 1e-4).all()


def test_an_unknown_selection_is_refused():
    with pytest.raises(ValueError, match="not 'tokens'"):
        retrieve(retrieval_call(draw(5), 2), top_k=1, selection="tokens")


# --- gradients


def test_gradients_are_those_of_landmark_attention_where_every_block_is_read():
    inputs, rotary = [x.requires_grad_() for x in draw(14)], rotary_tables(20, factor=1.3)
    grad = torch.randn(inputs[0].shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    output = retrieve(retrieval_call(inputs, 4, rotary), top_k=3)
    found = torch.autograd.grad(output, inputs, grad)
    expected = torch.autograd.grad(dense(inputs, 4, rotary), inputs, grad)
    assert all(close(left, right) for left, right in zip(found, expected, strict=True))


@pytest.mark.parametrize("selection", SELECTIONS)
def test_gradcheck(selection):
    """Of each input by itself: local and stored blocks of the same tokens are different tensors here."""
    inputs, rotary = draw(9, batch=1, heads=2, groups=1, dim=4), rotary_tables(6, 4, factor=1.3)
    (query, _, _, blocks), options = retrieval_call(inputs, 2, rotary, spans=[(6, 9)])
    local = [x.unflatten(2, (2, 2)) for x in draw(4, batch=1, heads=2, groups=1, dim=4, seed=1)[1:]]
    leaves = [x.clone().requires_grad_() for x in (query, *local, *blocks[:3])]

    def run(query, key, value, *sides):
        return retrieve(((query, key, value, Blocks(*sides, blocks.index)), options), top_k=1, selection=selection)

    assert torch.autograd.gradcheck(run, leaves)
