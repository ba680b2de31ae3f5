"""The kernels that choose: which keys are stored before each block of queries, and when each one is given up.

The K highest ranks of a prefix come from those of two parts of it: sorted lists of the blocks are merged over 1, 2, 4,
... blocks, all blocks at a time. An item's place in a merged list is its place in its own, plus the items above it in
the other. Legend as in `tiles.py`; ties of ranks go to the earlier place along N, so that the order is strict.
"""

import triton
import triton.language as tl

from .tiles import locate


@triton.jit
def is_above(rank, index, other_rank, other_index):
    """Whether items come before others."""
    return (rank > other_rank) | ((rank == other_rank) & (index < other_index))


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
    rank, lists, table, base, start, size, past, number, length, reach, blocks,
    G: tl.constexpr, W: tl.constexpr, S: tl.constexpr, K: tl.constexpr, C: tl.constexpr, BE: tl.constexpr,
    BC: tl.constexpr, KIND: tl.constexpr, PAST: tl.constexpr,
):  # fmt: skip
    """Grid (blocks, B x G); lists `(B, G, blocks, K)` int32, -1 all over, get the sorted items that enter each."""
    batch, row = tl.program_id(1) // G, tl.program_id(1).to(tl.int64)
    place, slot, origin, _, _, count, before = locate(
        tl.program_id(0), batch, table, base, number, start, size, past, length, W, S, K, KIND, PAST
    )
    rank += row * reach
    index, own = entering(tl.arange(0, BE), place, origin, count, before, rank, W, S, K, C, PAST)
    order = tl.zeros((BE,), tl.int32)
    for low in range(0, BE, BC):
        item = low + tl.arange(0, BC)
        other, ranks = entering(item, place, origin, count, before, rank, W, S, K, C, PAST)
        over = is_above(ranks[None, :], other[None, :], own[:, None], index[:, None]) & (other >= 0)[None, :]
        order += tl.sum(over.to(tl.int32), 1)
    tl.store(lists + (row * blocks + slot) * K + order, index, mask=(index >= 0) & (order < K))


@triton.jit
def load_list(rank, items, item, K: tl.constexpr):
    """Places along N (-1: none) and ranks of items of a list."""
    index = tl.load(items + item, mask=item < K, other=-1)
    return index, tl.load(rank + index, mask=index >= 0, other=float("-inf"))


@triton.jit
def put_among(rank, items, others, target, K: tl.constexpr, BK: tl.constexpr, BC: tl.constexpr):
    """Write a list's items where they come in its union with another."""
    item = tl.arange(0, BK)
    index, own = load_list(rank, items, item, K)
    order = item
    for low in range(0, K, BC):
        other, ranks = load_list(rank, others, low + tl.arange(0, BC), K)
        over = is_above(ranks[None, :], other[None, :], own[:, None], index[:, None]) & (other >= 0)[None, :]
        order += tl.sum(over.to(tl.int32), 1)
    tl.store(target + order, index, mask=(index >= 0) & (order < K))


@triton.jit
def salient_merge_kernel(
    rank, lists, merged, table, base, start, size, past, number, length, reach, blocks, distance,
    G: tl.constexpr, W: tl.constexpr, S: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, BC: tl.constexpr,
    KIND: tl.constexpr, PAST: tl.constexpr,
):  # fmt: skip
    """Grid (blocks, B x G); each list, of what entered over `distance` blocks, takes up the one of the `distance`
    blocks before them. `merged` is -1 all over, or holds the lists of an earlier turn, which never are longer."""
    batch, row = tl.program_id(1) // G, tl.program_id(1).to(tl.int64)
    place, slot, _, _, _, _, _ = locate(
        tl.program_id(0), batch, table, base, number, start, size, past, length, W, S, K, KIND, PAST
    )
    rank += row * reach
    items, others = lists + (row * blocks + slot) * K, lists + (row * blocks + slot - distance) * K
    target = merged + (row * blocks + slot) * K
    if place < distance:
        item = tl.arange(0, BK)
        tl.store(target + item, tl.load(items + item, mask=item < K, other=-1), mask=item < K)
        return
    put_among(rank, items, others, target, K, BK, BC)
    put_among(rank, others, items, target, K, BK, BC)


@triton.jit
def salient_until_kernel(
    rank, lists, until, table, base, start, size, past, number, length, reach, blocks,
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
    rank, until, items = rank + row * reach, until + row * reach, lists + (row * blocks + slot) * K
    new = tl.arange(0, C)
    index, own = entering(new, place + 1, origin, count, before, rank, W, S, K, C, False)
    stored = tl.zeros((C,), tl.int32)
    for low in range(0, K, BC):
        item = low + tl.arange(0, BC)
        other, ranks = load_list(rank, items, item, K)
        over = is_above(own[None, :], index[None, :], ranks[:, None], other[:, None]) & (index >= 0)[None, :]
        higher = item[:, None] + tl.cumsum(over.to(tl.int32), 1)
        gone = begin + tl.sum((higher < K).to(tl.int32), 1)
        tl.store(until + other, gone, mask=(other >= 0) & (gone < begin + C))
        stored += tl.sum(((other >= 0)[:, None] & (~over)).to(tl.int32), 0)
    over = is_above(own[None, :], index[None, :], own[:, None], index[:, None]) & (index >= 0)[None, :]
    higher = stored[:, None] + tl.cumsum(over.to(tl.int32), 1)
    sees = (higher < K) | (new[None, :] < new[:, None])
    gone = begin + tl.sum(sees.to(tl.int32), 1)
    tl.store(until + index, gone, mask=(index >= 0) & (gone < begin + C))
