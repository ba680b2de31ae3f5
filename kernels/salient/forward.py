"""The forward kernel: a tile of queries of one head gathers the sinks and the keys stored before its block, then walks
over its window and the keys that leave it within the block, by online softmax. Legend as in `tiles.py`.
"""

import triton
import triton.language as tl

from ..hybrid_linear.rows import load_rows, store_rows
from .tiles import EMPTY, LOG2E, far_keys, holds_keys, locate, sees_far, sees_near, walk_start


@triton.jit
def softmax_step(q, k, v, seen, scale, acc, top, total, DOT: tl.constexpr, PRECISION: tl.constexpr):
    """One tile of keys of the online softmax, base 2."""
    scores = tl.where(seen, tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale, float("-inf"))
    return fold_scores(scores, v, acc, top, total, DOT, PRECISION)


@triton.jit
def fold_scores(scores, v, acc, top, total, DOT: tl.constexpr, PRECISION: tl.constexpr):
    """The same by the tile's scores, -inf where a key is not seen."""
    new_top = tl.maximum(top, tl.max(scores, 1))
    decay = tl.exp2(top - new_top)
    p = tl.exp2(scores - new_top[:, None])
    acc = tl.dot(p.to(DOT), v, acc * decay[:, None], input_precision=PRECISION)
    return acc, new_top, total * decay + tl.sum(p, 1)


@triton.jit
def salient_fwd_kernel(
    query, key, value, lists, until, output, level, table, base, start, size, past,
    number, length, reach, blocks, scale, q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, o_b, o_h, o_t,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, W: tl.constexpr, S: tl.constexpr,
    K: tl.constexpr, C: tl.constexpr, CS: tl.constexpr, BQ: tl.constexpr, BN: tl.constexpr, KIND: tl.constexpr,
    PAST: tl.constexpr, SAVE: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (tiles of queries, B x H); level `(B, H, T)` float32, log-sum-exp in base 2."""
    batch, head = tl.program_id(1) // H, tl.program_id(1) % H
    block, part = tl.program_id(0) // (C // BQ), tl.program_id(0) % (C // BQ)
    place, slot, origin, sink, first, count, before = locate(
        block, batch, table, base, number, start, size, past, length, W, S, K, KIND, PAST
    )
    begin = place * C + part * BQ
    if begin >= count:
        return
    scale = scale * LOG2E
    group = head // (H // G)
    b64, h64, g64 = batch.to(tl.int64), head.to(tl.int64), group.to(tl.int64)
    row = b64 * G + g64
    k_row, v_row = key + b64 * k_b + g64 * k_h, value + b64 * v_b + g64 * v_h
    stored, ends = lists, until
    if K > 0:
        ends = until + row * reach
        stored = lists + (row * blocks + slot - place % (CS // C)) * K
    n = begin + tl.arange(0, BQ)
    q = load_rows(query + b64 * q_b + h64 * q_h, q_t, first + n, n < count, D, BD).to(DOT)
    acc = tl.zeros((BQ, BD), tl.float32)
    top = tl.full((BQ,), EMPTY, tl.float32)
    total = tl.zeros((BQ,), tl.float32)
    for low in range(0, S + K, BN):
        if holds_keys(low, stored, S, K):
            index, since, end = far_keys(low + tl.arange(0, BN), stored, ends, sink, before, count, S, K)
            k = load_rows(k_row, k_t, index, index >= 0, D, BD).to(DOT)
            v = load_rows(v_row, v_t, index, index >= 0, D, BD).to(DOT)
            seen = sees_far(n, index, since, end, count)
            acc, top, total = softmax_step(q, k, v, seen, scale, acc, top, total, DOT, PRECISION)
    for low in range(walk_start(begin, before, W, K, CS), tl.minimum(begin + BQ, count), BN):
        j = low + tl.arange(0, BN)
        k = load_rows(k_row, k_t, origin + j, j < count, D, BD).to(DOT)
        v = load_rows(v_row, v_t, origin + j, j < count, D, BD).to(DOT)
        seen = sees_near(n, j, ends, origin, before, count, W, S, K)
        acc, top, total = softmax_step(q, k, v, seen, scale, acc, top, total, DOT, PRECISION)
    total = tl.where(total > 0, total, 1.0)
    store_rows(output + b64 * o_b + h64 * o_h, o_t, first + n, n < count, acc / total[:, None], D, BD)
    if SAVE:
        tl.store(level + (b64 * H + h64) * length + first + n, top + tl.log2(total), mask=n < count)
