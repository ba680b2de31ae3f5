"""The kernels that choose: which keys are stored before each block of queries, and when each one is given up.

The K highest ranks of a prefix come from those of two parts of it: sorted lists of the blocks are merged over 1, 2, 4,
... blocks, all blocks at a time. An item's place in a merged list is its place in its own, plus the items above it in
the other, which a binary search finds. Lists are filled from the front; beyond, places are -1 and ranks -inf. Legend
as in `tiles.py`; of equal ranks the earlier token's goes first, so that the order is strict.
"""

import triton
import triton.language as tl

from .tiles import locate


@triton.jit
def is_above(rank, item, other_rank, other):
    """Whether items come before others of the same block."""
    return (rank > other_rank) | ((rank == other_rank) & (item < other))


@triton.jit
def entering(
    item, place, origin, count, before, rank,
    W: tl.constexpr, S: tl.constexpr, K: tl.constexpr, C: tl.constexpr, PAST: tl.constexpr,
):  # fmt: skip
    """Places along N (-1: none) and ranks of what a block's predecessor adds to the store: the C keys that leave the
    window at its queries, or before block 0 what the state holds."""
    j = (place - 1) * C - W + item
    index = tl.where((item < C) & (place > 0) & (j + before >= S) & (j + W < count), origin + j, -1)
    if PAST:
        index = tl.where(place == 0, tl.where(item < K, item, -1), index)
    ranks = tl.load(rank + index, mask=index >= 0, other=float("-inf"))
    return tl.where(ranks > float("-inf"), index, -1), ranks


@triton.jit
def salient_sort_kernel(
    rank, items, ranks, table, base, start, size, past, number, length, reach, blocks,
    G: tl.constexpr, W: tl.constexpr, S: tl.constexpr, K: tl.constexpr, C: tl.constexpr, BE: tl.constexpr,
    BC: tl.constexpr, KIND: tl.constexpr, PAST: tl.constexpr,
):  # fmt: skip
    """Grid (blocks, B x G); items `(B, G, blocks, K)` int32, -1 all over, and ranks, -inf, get what enters each."""
    batch, row = tl.program_id(1) // G, tl.program_id(1).to(tl.int64)
    place, slot, origin, _, _, count, before = locate(
        tl.program_id(0), batch, table, base, number, start, size, past, length, W, S, K, KIND, PAST
    )
    rank += row * reach
    item = tl.arange(0, BE)
    index, own = entering(item, place, origin, count, before, rank, W, S, K, C, PAST)
    order = tl.zeros((BE,), tl.int32)
    for low in range(0, BE, BC):
        other = low + tl.arange(0, BC)
        indices, theirs = entering(other, place, origin, count, before, rank, W, S, K, C, PAST)
        over = is_above(theirs[None, :], other[None, :], own[:, None], item[:, None])
        order += tl.sum(over.to(tl.int32), 1)
    target, stay = (row * blocks + slot) * K + order, (index >= 0) & (order < K)
    tl.store(items + target, index, mask=stay)
    tl.store(ranks + target, own, mask=stay)


@triton.jit
def put_among(
    items, ranks, others, new_items, new_ranks,
    EARLIER: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """Write a list where its items come in the union with another, whose ranks are `others`, of later tokens where
    EARLIER."""
    item = tl.arange(0, BK)
    index = tl.load(items + item, mask=item < K, other=-1)
    own = tl.load(ranks + item, mask=item < K, other=float("-inf"))
    above = tl.zeros((BK,), tl.int32)
    for turn in tl.static_range(STEPS):
        probe = above + (BK >> turn)
        theirs = tl.load(others + probe - 1, mask=probe <= K, other=float("-inf"))
        if EARLIER:
            over = theirs > own
        else:
            over = theirs >= own
        above = tl.where(over, probe, above)
    order = item + above
    stay = (index >= 0) & (order < K)
    tl.store(new_items + order, index, mask=stay)
    tl.store(new_ranks + order, own, mask=stay)


@triton.jit
def salient_merge_kernel(
    items, ranks, new_items, new_ranks, table, base, start, size, past, number, length, blocks, distance,
    G: tl.constexpr, W: tl.constexpr, S: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, STEPS: tl.constexpr,
    KIND: tl.constexpr, PAST: tl.constexpr,
):  # fmt: skip
    """Grid (blocks, B x G); each list, of what entered over `distance` blocks, takes up the one of the `distance`
    blocks before them. The new lists are empty, or those of an earlier turn, which never are longer."""
    batch, row = tl.program_id(1) // G, tl.program_id(1).to(tl.int64)
    place, slot, _, _, _, _, _ = locate(
        tl.program_id(0), batch, table, base, number, start, size, past, length, W, S, K, KIND, PAST
    )
    late = (row * blocks + slot) * K
    if place < distance:
        item = tl.arange(0, BK)
        inside = item < K
        tl.store(new_items + late + item, tl.load(items + late + item, mask=inside), mask=inside)
        tl.store(new_ranks + late + item, tl.load(ranks + late + item, mask=inside), mask=inside)
    else:
        early = (row * blocks + slot - distance) * K
        new_items, new_ranks = new_items + late, new_ranks + late
        put_among(items + late, ranks + late, ranks + early, new_items, new_ranks, False, K, BK, STEPS)
        put_among(items + early, ranks + early, ranks + late, new_items, new_ranks, True, K, BK, STEPS)


@triton.jit
def salient_until_kernel(
    rank, items, ranks, until, table, base, start, size, past, number, length, reach, blocks,
    G: tl.constexpr, W: tl.constexpr, S: tl.constexpr, K: tl.constexpr, C: tl.constexpr, BC: tl.constexpr,
    KIND: tl.constexpr, PAST: tl.constexpr,
):  # fmt: skip
    """Grid (blocks, B x G); until `(B, G, N)` int32, NEVER all over, gets the tokens of the blocks that give up a key.

    A key is given up at the first query by which K keys of higher rank have left the window, and it itself.
    """
    batch, row = tl.program_id(1) // G, tl.program_id(1).to(tl.int64)
    place, slot, origin, _, _, count, before = locate(
        tl.program_id(0), batch, table, base, number, start, size, past, length, W, S, K, KIND, PAST
    )
    begin = place * C
    if begin >= count:
        return
    rank, until = rank + row * reach, until + row * reach
    items, ranks = items + (row * blocks + slot) * K, ranks + (row * blocks + slot) * K
    new = tl.arange(0, C)
    index, own = entering(new, place + 1, origin, count, before, rank, W, S, K, C, False)
    stored = tl.zeros((C,), tl.int32)
    for low in range(0, K, BC):
        item = low + tl.arange(0, BC)
        other = tl.load(items + item, mask=item < K, other=-1)
        theirs = tl.load(ranks + item, mask=item < K, other=float("-inf"))
        over = own[None, :] > theirs[:, None]
        higher = item[:, None] + tl.cumsum(over.to(tl.int32), 1)
        gone = begin + tl.sum((higher < K).to(tl.int32), 1)
        tl.store(until + other, gone, mask=(other >= 0) & (gone < begin + C))
        stored += tl.sum(((other >= 0)[:, None] & (~over)).to(tl.int32), 0)
    over = is_above(own[None, :], new[None, :], own[:, None], new[:, None])
    higher = stored[:, None] + tl.cumsum(over.to(tl.int32), 1)
    sees = (higher < K) | (new[None, :] < new[:, None])
    gone = begin + tl.sum(sees.to(tl.int32), 1)
    tl.store(until + index, gone, mask=(index >= 0) & (gone < begin + C))
