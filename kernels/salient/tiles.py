"""What the kernels of salient-token attention share: a program's row, and the keys that a tile of queries meets.

Legend: B batch, H query heads, G key heads, T tokens, D head dim (BD rounded up), W window, S sinks, K kept, C tokens
of a block of queries, BQ queries of a tile, BN keys of a tile. A row's tokens of this call are t = 0, 1, ...; with a
state, `before` tokens came earlier, its ring holds the keys t = -W .. -1, and `(B, G, N, D)` keys are those of the K
kept slots, the S sinks, the ring and the call, in this order; without one they are the call's.
"""

import triton
import triton.language as tl

from ..hybrid_linear.rows import find_block

EMPTY = tl.constexpr(-1e30)  # stands for the maximum of no scores
LOG2E = tl.constexpr(1.4426950408889634)
NEVER = tl.constexpr(2**31 - 1)  # a key that no token of this call gives up


@triton.jit
def locate(
    program, batch, table, base, number, start, size, past, length,
    W: tl.constexpr, S: tl.constexpr, K: tl.constexpr, KIND: tl.constexpr, PAST: tl.constexpr,
):  # fmt: skip
    """A program's block of its row.

    Returns:
        The block's place in the row and its slot among all blocks; the places along N of token 0, of sink 0, and along
        T of token 0; the row's tokens of this call, and those before it.
    """
    place, slot, first, count = find_block(program, batch, table, base, number, start, size, length, KIND)
    if PAST:
        return place, slot + place, K + S + W, K, first, count, tl.load(past + batch).to(tl.int32)
    else:
        return place, slot + place, first, first, first, count, 0


@triton.jit
def far_keys(
    column, stored, until, sink, before, count, S: tl.constexpr, K: tl.constexpr
):  # fmt: skip
    """The keys that a block of queries gathers: the sinks, then those stored before the block.

    Args:
        column: `(BN,)`, from 0 to S + K. stored: the block's list. until: of the row's keys.

    Returns:
        Places along N `(BN,)`, -1 where there is none, the first token that sees each and the first that no longer
        does.
    """
    index = tl.where((column < S) & (column < before + count), sink + column, -1)
    since = tl.where(column < S, column - before, -NEVER)
    end = tl.full(column.shape, NEVER, tl.int32)
    if K > 0:
        kept = tl.load(stored + column - S, mask=(column >= S) & (column < S + K), other=-1)
        index = tl.where(column < S, index, kept)
        end = tl.load(until + index, mask=(column >= S) & (index >= 0), other=NEVER)
    return index, since, end


@triton.jit
def holds_keys(column, stored, S: tl.constexpr, K: tl.constexpr):
    """Whether the tile of gathered keys from this column on has any: lists are filled from the front."""
    if K > 0:
        return (column < S) | (tl.load(stored + tl.maximum(column - S, 0)) >= 0)
    else:
        return column < S


@triton.jit
def walk_start(begin, before, W: tl.constexpr, K: tl.constexpr, CS: tl.constexpr):
    """The first key of the walk of a tile of queries: of its window, or of those that leave within its CS tokens."""
    low = begin - W + 1
    if K > 0:
        low = begin // CS * CS - W
    return tl.maximum(low, -before)


@triton.jit
def sees_near(n, j, until, origin, before, count, W: tl.constexpr, S: tl.constexpr, K: tl.constexpr):
    """`(BQ, BN)`, whether queries n see the keys j of their walk."""
    real = (j + before >= S) & (j < count)
    if K > 0:
        end = tl.load(until + origin + j, mask=real, other=0)
    else:
        end = j + W
    return real[None, :] & (j[None, :] <= n[:, None]) & (n[:, None] < end[None, :]) & (n < count)[:, None]


@triton.jit
def sees_far(n, index, since, end, count):
    """`(BQ, BN)`, whether queries n see the gathered keys."""
    inside = (n[:, None] >= since[None, :]) & (n[:, None] < end[None, :])
    return inside & (index >= 0)[None, :] & (n < count)[:, None]
