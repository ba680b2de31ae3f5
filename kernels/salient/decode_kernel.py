"""The Triton kernel of a one-token step: from query, key and value to output and state, one program per key head.

Legend: B batch, H query heads, G key heads, D head dim (BD rounded up), W window, S sinks, K kept, R = H / G query
heads that share a key head (BR rounded up), BW, BK, BS keys of a tile of the window, the store and the sinks, BM keys
of a tile of masses, BA the store's ranks rounded up. The token n is `count`; the key at distance d is token n - d.

Loads of a whole program come before a barrier, stores to the same places after it: a tile smaller than the program is
held by several of its threads, of which each one loads and a single one stores.
"""

import triton
import triton.language as tl

from ..hybrid_linear.rows import load_rows, store_rows
from .forward import fold_scores, softmax_step
from .scoring import MASS_FLOOR
from .tiles import LOG2E


@triton.jit
def in_window(slot, n, W: tl.constexpr, S: tl.constexpr):
    """The distances of a ring's slots from token n, 0 for the slot that this token takes, and which of the others hold
    a key of its window."""
    distance = (n % W - slot + W) % W
    return distance, (slot < W) & (distance > 0) & (n - distance >= S)


@triton.jit
def fold_slots(
    q, key, value, slot, seen, scale, acc, top, total,
    D: tl.constexpr, BD: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of dense rows of keys and values in the online softmax."""
    k = load_rows(key, D, slot, seen, D, BD).to(DOT)
    v = load_rows(value, D, slot, seen, D, BD).to(DOT)
    return softmax_step(q, k, v, seen[None, :], scale, acc, top, total, DOT, PRECISION)


@triton.jit
def salient_decode_kernel(
    query, key, value, real_mask, window_key, window_value, window_mass, kept_key, kept_value, kept_rank, sink_key,
    sink_value, count, scores, output, q_b, q_h, k_b, k_h, v_b, v_h, scale, age,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BR: tl.constexpr, W: tl.constexpr,
    S: tl.constexpr, K: tl.constexpr, BW: tl.constexpr, BS: tl.constexpr, BK: tl.constexpr, BA: tl.constexpr,
    BM: tl.constexpr, HAS_MASK: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (B x G); scores `(B, H, W)` float32, a scratch."""
    R: tl.constexpr = H // G
    batch, group = tl.program_id(0) // G, tl.program_id(0) % G
    b64, g64 = batch.to(tl.int64), group.to(tl.int64)
    row = b64 * G + g64
    turn, column = tl.arange(0, BR), tl.arange(0, BD)
    first_head = b64 * H + g64 * R
    output += first_head * D
    n = tl.load(count + batch).to(tl.int32)
    padded = n < 0
    if HAS_MASK:
        padded = tl.load(real_mask + batch) == 0
    if padded:
        store_rows(output, D, turn, turn < R, tl.zeros((BR, BD), tl.float32), D, BD)
        return
    scale = scale * LOG2E
    window_key += row * (W * D)
    window_value += row * (W * D)
    window_mass += row * W
    sink_key += row * (S * D)
    sink_value += row * (S * D)
    scores += first_head * W
    place = n % W

    # The token itself; q has a row per query head of the group.
    q = load_rows(query + b64 * q_b + g64 * R * q_h, q_h, turn, turn < R, D, BD).to(DOT)
    own_key = tl.load(key + b64 * k_b + g64 * k_h + column, mask=column < D, other=0.0)
    own_value = tl.load(value + b64 * v_b + g64 * v_h + column, mask=column < D, other=0.0)
    own = tl.sum(q.to(tl.float32) * own_key.to(tl.float32)[None, :], 1) * scale
    top = own
    total = tl.full((BR,), 1.0, tl.float32)
    acc = tl.zeros((BR, BD), tl.float32) + own_value.to(tl.float32)[None, :]
    if S > 0:
        sink = tl.arange(0, BS)
        acc, top, total = fold_slots(
            q, sink_key, sink_value, sink, sink < tl.minimum(n, S), scale, acc, top, total, D, BD, DOT, PRECISION
        )
    for low in range(0, W, BW):
        slot = low + tl.arange(0, BW)
        distance, seen = in_window(slot, n, W, S)
        k = load_rows(window_key, D, slot, seen, D, BD).to(DOT)
        v = load_rows(window_value, D, slot, seen, D, BD).to(DOT)
        given = tl.where(seen[None, :], tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale, float("-inf"))
        if K > 0:
            far = (turn < R)[:, None] & (seen & (distance >= W // 2))[None, :]
            tl.store(scores + turn[:, None] * W + slot[None, :], given, mask=far)
        acc, top, total = fold_scores(given, v, acc, top, total, DOT, PRECISION)

    if K > 0:
        level = top + tl.log2(total)  # of the window and the sinks alone
        kept_key += row * (K * D)
        kept_value += row * (K * D)
        kept_rank += row * K
        # The key that leaves the window, and the slot of the store that it takes, -1 for none.
        leaving = n - W
        width = tl.where(leaving >= S, D, 0)
        left_key = tl.load(window_key + place * D + column, mask=column < width, other=0.0)
        left_value = tl.load(window_value + place * D + column, mask=column < width, other=0.0)
        rank = tl.log(tl.maximum(tl.load(window_mass + place), MASS_FLOOR)) + age * leaving.to(tl.float32)
        item = tl.arange(0, BA)
        ranks = tl.load(kept_rank + item, mask=item < K, other=float("inf"))
        enters = (leaving >= S) & (rank > tl.min(ranks, 0))
        taken = tl.where(enters, tl.argmin(ranks, 0), -1)
        for low in range(0, K, BK):
            stored = low + tl.arange(0, BK)
            ranked = tl.load(kept_rank + stored, mask=stored < K, other=float("-inf")) > float("-inf")
            acc, top, total = fold_slots(
                q, kept_key, kept_value, stored, ranked & (stored != taken), scale, acc, top, total, D, BD, DOT,
                PRECISION,
            )  # fmt: skip
        last = tl.sum(q.to(tl.float32) * left_key.to(tl.float32)[None, :], 1) * scale
        last = tl.where(enters, last, float("-inf"))
        new_top = tl.maximum(top, last)
        decay, p = tl.exp2(top - new_top), tl.exp2(last - new_top)
        acc = acc * decay[:, None] + p[:, None] * left_value.to(tl.float32)[None, :]
        total = total * decay + p

        # The masses; that of the new key begins with its own share in a window of one, which has no near half.
        start = 0.0
        if W // 2 == 0:
            start = tl.sum(tl.where((turn < R) & (n >= S), tl.exp2(own - level), 0.0), 0)
        tl.debug_barrier()
        for low in range(0, W, BM):
            index = low + tl.arange(0, BM)
            back, there = in_window(index, n, W, S)
            counted = (turn < R)[:, None] & (there & (back >= W // 2))[None, :]
            share = tl.load(scores + turn[:, None] * W + index[None, :], mask=counted, other=float("-inf"))
            mass = tl.load(window_mass + index, mask=there, other=0.0) + tl.sum(tl.exp2(share - level[:, None]), 0)
            tl.debug_barrier()
            tl.store(window_mass + index, tl.where(index == place, start, mass), mask=index < W)
        entering = column < tl.where(enters, D, 0)
        tl.store(kept_key + taken * D + column, left_key.to(kept_key.dtype.element_ty), mask=entering)
        tl.store(kept_value + taken * D + column, left_value.to(kept_value.dtype.element_ty), mask=entering)
        tl.store(kept_rank + taken, rank, mask=enters)

    if S > 0:
        held = column < tl.where(n < S, D, 0)
        tl.store(sink_key + n * D + column, own_key.to(sink_key.dtype.element_ty), mask=held)
        tl.store(sink_value + n * D + column, own_value.to(sink_value.dtype.element_ty), mask=held)
    held = column < tl.where(n >= S, D, 0)
    tl.store(window_key + place * D + column, own_key.to(window_key.dtype.element_ty), mask=held)
    tl.store(window_value + place * D + column, own_value.to(window_value.dtype.element_ty), mask=held)
    store_rows(output, D, turn, turn < R, acc / total[:, None], D, BD)
