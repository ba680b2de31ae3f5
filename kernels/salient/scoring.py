"""The kernels that rank keys: how much of their window's attention they received.

`window`: the log-sum-exp of each query over its window and the sinks. `mass`: a block of keys walks over the queries
in whose window's far half its keys lie, of every query head of the group. Legend as in `tiles.py`.
"""

import triton
import triton.language as tl

from ..hybrid_linear.rows import load_rows
from .tiles import EMPTY, LOG2E, locate

MASS_FLOOR = tl.constexpr(1e-20)


@triton.jit
def level_step(q, k, seen, scale, top, total, PRECISION: tl.constexpr):
    """One tile of keys of the running maximum and the sum, base 2."""
    scores = tl.where(seen, tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale, float("-inf"))
    new_top = tl.maximum(top, tl.max(scores, 1))
    return new_top, total * tl.exp2(top - new_top) + tl.sum(tl.exp2(scores - new_top[:, None]), 1)


@triton.jit
def salient_window_kernel(
    query, key, level, table, base, start, size, past,
    number, length, reach, scale, q_b, q_h, q_t, k_b, k_h, k_t,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, W: tl.constexpr, S: tl.constexpr,
    K: tl.constexpr, C: tl.constexpr, BQ: tl.constexpr, BN: tl.constexpr, BS: tl.constexpr, KIND: tl.constexpr,
    PAST: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (tiles of queries, B x H); level `(B, H, T)` float32, in base 2."""
    batch, head = tl.program_id(1) // H, tl.program_id(1) % H
    block, part = tl.program_id(0) // (C // BQ), tl.program_id(0) % (C // BQ)
    place, _, origin, sink, first, count, before = locate(
        block, batch, table, base, number, start, size, past, length, W, S, K, KIND, PAST
    )
    begin = place * C + part * BQ
    if begin >= count:
        return
    scale = scale * LOG2E
    b64, h64, g64 = batch.to(tl.int64), head.to(tl.int64), (head // (H // G)).to(tl.int64)
    k_row = key + b64 * k_b + g64 * k_h
    n = begin + tl.arange(0, BQ)
    q = load_rows(query + b64 * q_b + h64 * q_h, q_t, first + n, n < count, D, BD).to(DOT)
    top = tl.full((BQ,), EMPTY, tl.float32)
    total = tl.zeros((BQ,), tl.float32)
    if S > 0:
        column = tl.arange(0, BS)
        there = (column < S) & (column < before + count)
        sinks = load_rows(k_row, k_t, sink + column, there, D, BD).to(DOT)
        sees = there[None, :] & (column[None, :] <= n[:, None] + before)
        top, total = level_step(q, sinks, sees, scale, top, total, PRECISION)
    for low in range(tl.maximum(begin - W + 1, -before), tl.minimum(begin + BQ, count), BN):
        j = low + tl.arange(0, BN)
        real = (j + before >= S) & (j < count)
        k = load_rows(k_row, k_t, origin + j, real, D, BD).to(DOT)
        distance = n[:, None] - j[None, :]
        seen = real[None, :] & (distance >= 0) & (distance < W)
        top, total = level_step(q, k, seen, scale, top, total, PRECISION)
    total = tl.where(total > 0, total, 1.0)
    tl.store(level + (b64 * H + h64) * length + first + n, top + tl.log2(total), mask=n < count)


@triton.jit
def salient_mass_kernel(
    query, key, level, mass, rank, table, base, start, size, past,
    number, length, reach, scale, age, q_b, q_h, q_t, k_b, k_h, k_t,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, W: tl.constexpr, S: tl.constexpr,
    K: tl.constexpr, BQ: tl.constexpr, BN: tl.constexpr, KIND: tl.constexpr, PAST: tl.constexpr, DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (blocks of keys, the ring's first, B x G); mass `(B, G, N)` float32, with a state what the ring's keys have
    received before, gets this call's; rank `(B, G, N)` float32, -inf where a key has not left."""
    batch, group = tl.program_id(1) // G, tl.program_id(1) % G
    place, _, origin, _, first, count, before = locate(
        tl.program_id(0), batch, table, base, number, start, size, past, length, W, S, K, KIND, PAST
    )
    begin = place * BN
    if PAST:
        begin = begin - W
    if begin >= count:
        return
    scale = scale * LOG2E
    b64, g64 = batch.to(tl.int64), group.to(tl.int64)
    j = begin + tl.arange(0, BN)
    real = (j + before >= S) & (j < count)
    k = load_rows(key + b64 * k_b + g64 * k_h, k_t, origin + j, real, D, BD).to(DOT)
    own = (b64 * G + g64) * reach + origin + j
    given = tl.zeros((BN,), tl.float32)
    if PAST:
        given = tl.load(mass + own, mask=real, other=0.0)
    for turn in range(0, H // G):
        head = g64 * (H // G) + turn
        q_row, levels = query + b64 * q_b + head * q_h, level + (b64 * H + head) * length + first
        for low in range(tl.maximum(begin + W // 2, 0), tl.minimum(begin + BN - 1 + W, count), BQ):
            n = low + tl.arange(0, BQ)
            q = load_rows(q_row, q_t, first + n, n < count, D, BD).to(DOT)
            lse = tl.load(levels + n, mask=n < count, other=0.0)
            distance = n[:, None] - j[None, :]
            far = (n < count)[:, None] & real[None, :] & (distance >= W // 2) & (distance < W)
            scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale - lse[:, None]
            given += tl.sum(tl.exp2(tl.where(far, scores, float("-inf"))), 0)
    tl.store(mass + own, given, mask=real)
    position = (j + before).to(tl.float32)
    ranked = tl.log(tl.maximum(given, MASS_FLOOR)) + age * position
    tl.store(rank + own, tl.where(j + W < count, ranked, float("-inf")), mask=real)
