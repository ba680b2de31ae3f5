"""The backward kernels: scores are computed again, and with the saved log-sum-exp they give the probabilities.

`query`: a tile of queries meets the keys as forward, for the gradient of its queries; it leaves `grad . output`, which
the others read. `far`: a tile of the keys gathered for CS queries walks over these, of every query head of the group,
and adds to float32 gradients that other blocks share, by atomics. `key`: a block of keys walks over the queries from
its own place to the end of the CS ones at which it leaves the window, and adds the rest. Legend as in `tiles.py`.
"""

import triton
import triton.language as tl

from ..hybrid_linear.rows import load_rows, store_rows
from .tiles import LOG2E, far_keys, holds_keys, locate, sees_far, sees_near, walk_start


@triton.jit
def weigh(q, k, v, grad, level, delta, seen, scale, PRECISION: tl.constexpr):
    """Probabilities and gradients of the scaled scores, `(BQ, BN)` each; scale: times log2(e)."""
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale - level[:, None]
    p = tl.exp2(tl.where(seen, scores, float("-inf")))
    return p, p * (tl.dot(grad, tl.trans(v), input_precision=PRECISION) - delta[:, None])


@triton.jit
def salient_bwd_query_kernel(
    query, key, value, lists, until, output, grad_output, level, delta, grad_query, table, base, start, size, past,
    number, length, reach, blocks, scale, q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, o_b, o_h, o_t,
    do_b, do_h, do_t, dq_b, dq_h, dq_t,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, W: tl.constexpr, S: tl.constexpr,
    K: tl.constexpr, C: tl.constexpr, CS: tl.constexpr, BQ: tl.constexpr, BN: tl.constexpr, KIND: tl.constexpr,
    PAST: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (tiles of queries, B x H); delta `(B, H, T)` float32 gets `grad . output`."""
    batch, head = tl.program_id(1) // H, tl.program_id(1) % H
    block, part = tl.program_id(0) // (C // BQ), tl.program_id(0) % (C // BQ)
    place, slot, origin, sink, first, count, before = locate(
        block, batch, table, base, number, start, size, past, length, W, S, K, KIND, PAST
    )
    begin = place * C + part * BQ
    if begin >= count:
        return
    base_2 = scale * LOG2E
    group = head // (H // G)
    b64, h64, g64 = batch.to(tl.int64), head.to(tl.int64), group.to(tl.int64)
    row = b64 * G + g64
    k_row, v_row = key + b64 * k_b + g64 * k_h, value + b64 * v_b + g64 * v_h
    stored, ends = lists, until
    if K > 0:
        ends = until + row * reach
        stored = lists + (row * blocks + slot - place % (CS // C)) * K
    n = begin + tl.arange(0, BQ)
    real = n < count
    stat = (b64 * H + h64) * length + first + n
    q = load_rows(query + b64 * q_b + h64 * q_h, q_t, first + n, real, D, BD).to(DOT)
    grad = load_rows(grad_output + b64 * do_b + h64 * do_h, do_t, first + n, real, D, BD)
    out = load_rows(output + b64 * o_b + h64 * o_h, o_t, first + n, real, D, BD)
    drift = tl.sum(grad.to(tl.float32) * out.to(tl.float32), 1)
    tl.store(delta + stat, drift, mask=real)
    grad = grad.to(DOT)
    lse = tl.load(level + stat, mask=real, other=0.0)
    acc = tl.zeros((BQ, BD), tl.float32)
    for low in range(0, S + K, BN):
        if holds_keys(low, stored, S, K):
            index, since, end = far_keys(low + tl.arange(0, BN), stored, ends, sink, before, count, S, K)
            k = load_rows(k_row, k_t, index, index >= 0, D, BD).to(DOT)
            v = load_rows(v_row, v_t, index, index >= 0, D, BD).to(DOT)
            _, ds = weigh(q, k, v, grad, lse, drift, sees_far(n, index, since, end, count), base_2, PRECISION)
            acc = tl.dot(ds.to(DOT), k, acc, input_precision=PRECISION)
    for low in range(walk_start(begin, before, W, K, CS), tl.minimum(begin + BQ, count), BN):
        j = low + tl.arange(0, BN)
        k = load_rows(k_row, k_t, origin + j, j < count, D, BD).to(DOT)
        v = load_rows(v_row, v_t, origin + j, j < count, D, BD).to(DOT)
        seen = sees_near(n, j, ends, origin, before, count, W, S, K)
        _, ds = weigh(q, k, v, grad, lse, drift, seen, base_2, PRECISION)
        acc = tl.dot(ds.to(DOT), k, acc, input_precision=PRECISION)
    store_rows(grad_query + b64 * dq_b + h64 * dq_h, dq_t, first + n, real, acc * scale, D, BD)


@triton.jit
def key_step(
    q_row, do_row, q_t, do_t, level, delta, n, seen, real, k, v, scale, grad_k, grad_v,
    D: tl.constexpr, BD: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add one tile of queries' part to the gradients of a tile of keys and values; n: places along T."""
    q = load_rows(q_row, q_t, n, real, D, BD).to(DOT)
    grad = load_rows(do_row, do_t, n, real, D, BD).to(DOT)
    lse = tl.load(level + n, mask=real, other=0.0)
    drift = tl.load(delta + n, mask=real, other=0.0)
    p, ds = weigh(q, k, v, grad, lse, drift, seen, scale, PRECISION)
    grad_v = tl.dot(tl.trans(p.to(DOT)), grad, grad_v, input_precision=PRECISION)
    grad_k = tl.dot(tl.trans(ds.to(DOT)), q, grad_k, input_precision=PRECISION)
    return grad_k, grad_v


@triton.jit
def salient_bwd_far_kernel(
    query, key, value, lists, until, grad_output, level, delta, far_key, far_value, table, base, start, size, past,
    number, length, reach, blocks, scale, q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, do_b, do_h, do_t,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, W: tl.constexpr, S: tl.constexpr,
    K: tl.constexpr, C: tl.constexpr, CS: tl.constexpr, BQ: tl.constexpr, BN: tl.constexpr, KIND: tl.constexpr,
    PAST: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (blocks times tiles of gathered keys, B x G); far_key, far_value `(B, G, N, D)` float32, dense."""
    batch, group = tl.program_id(1) // G, tl.program_id(1) % G
    tiles = (S + K + BN - 1) // BN
    block, low = tl.program_id(0) // tiles, tl.program_id(0) % tiles * BN
    place, slot, _, sink, first, count, before = locate(
        block, batch, table, base, number, start, size, past, length, W, S, K, KIND, PAST
    )
    begin = place * C
    if (begin >= count) | (begin % CS != 0):
        return
    b64, g64 = batch.to(tl.int64), group.to(tl.int64)
    row = b64 * G + g64
    stored, ends = lists, until
    if K > 0:
        ends = until + row * reach
        stored = lists + (row * blocks + slot) * K
    if holds_keys(low, stored, S, K):
        index, since, end = far_keys(low + tl.arange(0, BN), stored, ends, sink, before, count, S, K)
        k = load_rows(key + b64 * k_b + g64 * k_h, k_t, index, index >= 0, D, BD).to(DOT)
        v = load_rows(value + b64 * v_b + g64 * v_h, v_t, index, index >= 0, D, BD).to(DOT)
        grad_k = tl.zeros((BN, BD), tl.float32)
        grad_v = tl.zeros((BN, BD), tl.float32)
        for turn in range(0, H // G):
            head = g64 * (H // G) + turn
            q_row, do_row = query + b64 * q_b + head * q_h, grad_output + b64 * do_b + head * do_h
            stat = (b64 * H + head) * length
            for top in range(begin, tl.minimum(begin + CS, count), BQ):
                n = top + tl.arange(0, BQ)
                seen = sees_far(n, index, since, end, count)
                grad_k, grad_v = key_step(
                    q_row, do_row, q_t, do_t, level + stat, delta + stat, first + n, seen, n < count, k, v,
                    scale * LOG2E, grad_k, grad_v, D, BD, DOT, PRECISION,
                )  # fmt: skip
        column = tl.arange(0, BD)
        address = (row * reach + index)[:, None] * D + column[None, :]
        inside = (index >= 0)[:, None] & (column < D)[None, :]
        tl.atomic_add(far_key + address, grad_k * scale, mask=inside, sem="relaxed")
        tl.atomic_add(far_value + address, grad_v, mask=inside, sem="relaxed")


@triton.jit
def salient_bwd_key_kernel(
    query, key, value, until, grad_output, level, delta, far_key, far_value, grad_key, grad_value, table, base, start,
    size, past,
    number, length, reach, scale, q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, do_b, do_h, do_t, dk_b, dk_h, dk_t,
    dv_b, dv_h, dv_t,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, W: tl.constexpr, S: tl.constexpr,
    K: tl.constexpr, CS: tl.constexpr, BQ: tl.constexpr, BN: tl.constexpr, KIND: tl.constexpr, PAST: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (blocks of keys, the ring's first, B x G)."""
    batch, group = tl.program_id(1) // G, tl.program_id(1) % G
    place, _, origin, _, first, count, before = locate(
        tl.program_id(0), batch, table, base, number, start, size, past, length, W, S, K, KIND, PAST
    )
    begin = place * BN
    if PAST:
        begin = begin - W
    if begin >= count:
        return
    b64, g64 = batch.to(tl.int64), group.to(tl.int64)
    row = b64 * G + g64
    j = begin + tl.arange(0, BN)
    here = j < count
    k = load_rows(key + b64 * k_b + g64 * k_h, k_t, origin + j, here, D, BD).to(DOT)
    v = load_rows(value + b64 * v_b + g64 * v_h, v_t, origin + j, here, D, BD).to(DOT)
    grad_k = tl.zeros((BN, BD), tl.float32)
    grad_v = tl.zeros((BN, BD), tl.float32)
    ends, stop = until, begin + BN - 1 + W
    if K > 0:
        ends = until + row * reach
        stop = (stop // CS + 1) * CS
    for turn in range(0, H // G):
        head = g64 * (H // G) + turn
        q_row, do_row = query + b64 * q_b + head * q_h, grad_output + b64 * do_b + head * do_h
        stat = (b64 * H + head) * length
        for low in range(tl.maximum(begin, 0), tl.minimum(stop, count), BQ):
            n = low + tl.arange(0, BQ)
            seen = sees_near(n, j, ends, origin, before, count, W, S, K)
            if K > 0:
                seen = seen & (j[None, :] >= (n // CS * CS - W)[:, None])  # beyond, it is gathered
            grad_k, grad_v = key_step(
                q_row, do_row, q_t, do_t, level + stat, delta + stat, first + n, seen, n < count, k, v,
                scale * LOG2E, grad_k, grad_v, D, BD, DOT, PRECISION,
            )  # fmt: skip
    grad_k *= scale
    if S + K > 0:
        grad_k += load_rows(far_key + row * reach * D, D, origin + j, here, D, BD)
        grad_v += load_rows(far_value + row * reach * D, D, origin + j, here, D, BD)
    store_rows(grad_key + b64 * dk_b + g64 * dk_h, dk_t, origin + j, here, grad_k, D, BD)
    store_rows(grad_value + b64 * dv_b + g64 * dv_h, dv_t, origin + j, here, grad_v, D, BD)
