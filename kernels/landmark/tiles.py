"""What the kernels of landmark attention share: a program's row, and how a tile of queries weighs a block of keys.

A row's tokens stand at places of its blocks: token t (counted from the row's first real one) at place t + offset,
block c at the places c P to c P + P - 1, its landmark last. A tile of queries is BQ places from a multiple of BQ on: a
part of a block, or several. A tile of keys is always one block, so that a block's own softmax lies within it.
"""

import triton
import triton.language as tl

from ..hybrid_linear.rows import find_block

EMPTY = tl.constexpr(-1e30)  # stands for the maximum of no scores
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def locate(
    program, batch, table, base, offsets, offset, number, start, size, length, KIND: tl.constexpr,
    OFFSETS: tl.constexpr,
):  # fmt: skip
    """A program's tile on its row's grid.

    Returns:
        The row, the tile's number, the token at place 0 (below the tensor's first one, where the row starts in
        mid-block), and the row's real places: the first one, and the one after the last.
    """
    tile, _, first, count = find_block(program, batch, table, base, number, start, size, length, KIND)
    row = batch
    if KIND == 2:
        row = tl.minimum(tl.load(table + program), number - 1)
    if OFFSETS:
        lowest = tl.load(offsets + row)
    else:
        lowest = offset
    return row, tile, first - lowest, lowest, lowest + count


@triton.jit
def block_is_open(open_blocks, row, block, reach, OPEN: tl.constexpr):
    """Whether later blocks read this one; those that `open_blocks` `(rows, reach)` does not reach are open."""
    if OPEN:
        flag = tl.load(open_blocks + row.to(tl.int64) * reach + block, mask=block < reach, other=1)
        return flag != 0
    else:
        return block >= 0


@triton.jit
def weigh_block(
    q, k, place, block, shown, lowest, stop, scale, P: tl.constexpr, OWN: tl.constexpr, PRECISION: tl.constexpr
):
    """Weigh one block of keys for a tile of queries, in base 2.

    The own block's visible tokens are a group like any earlier block, whose gate is their own log-sum-exp.

    Args:
        q: `(BQ, D)`; k: `(P, D)`. place: of each query. shown: whether later blocks read this one.
        scale: of the scores, times log2(e). OWN: whether the tile may hold queries of this block and before it.

    Returns:
        `(BQ, P)` weights within the group before their division by their sum; `(BQ,)` that sum, 1 for no tokens;
        `(BQ,)` gates, -inf where hidden; `(BQ,)` whether the block is the query's own (all false without OWN).
    """
    column = tl.arange(0, P)
    there = block * P + column
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
    gate = tl.sum(tl.where((column == P - 1)[None, :], scores, 0.0), 1)
    token = (there >= lowest) & (there < stop) & (column < P - 1)
    own = place < 0
    if OWN:
        own = place // P == block
        later = (place // P > block) & shown
        seen = token[None, :] & (later[:, None] | (own[:, None] & (there[None, :] <= place[:, None])))
    else:
        seen = (token & shown)[None, :]
    scores = tl.where(seen, scores, float("-inf"))
    top = tl.maximum(tl.max(scores, 1), EMPTY)
    weights = tl.exp2(scores - top[:, None])
    mass = tl.sum(weights, 1)
    some = mass > 0
    mass = tl.where(some, mass, 1.0)
    if OWN:
        gate = tl.where(own, top + tl.log2(mass), gate)
    return weights, mass, tl.where(some, gate, float("-inf")), own


@triton.jit
def score_gradient(weights, share, own, v, grad, delta, P: tl.constexpr, OWN: tl.constexpr, PRECISION: tl.constexpr):
    """Gradient of the scaled scores `(BQ, P)` of a tile of queries and a block of keys.

    With w the weights within a group, G its gate's probability and g = grad . v, a token of an earlier block has
    `G w (g - sum of w g)`, its landmark `G (sum of w g - delta)`, and a token of the own block `G w (g - delta)`.

    Args:
        weights: `(BQ, P)`, w; share: `(BQ,)`, G; own: as `weigh_block` returns it. v: `(P, D)`.
        grad: `(BQ, D)`, of the output; delta: `(BQ,)`, `grad . output`.
    """
    pull = tl.dot(grad, tl.trans(v), input_precision=PRECISION)
    mean = tl.sum(weights * pull, 1)
    centre = mean
    landmark = share * (mean - delta)
    if OWN:
        centre = tl.where(own, delta, mean)
        landmark = tl.where(own, 0.0, landmark)
    last = (tl.arange(0, P) == P - 1)[None, :]
    return tl.where(last, landmark[:, None], weights * (share[:, None] * (pull - centre[:, None])))
