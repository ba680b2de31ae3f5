"""The forward kernel: a tile of queries of one head walks over the blocks up to its own by online softmax.

Each block is one step of the softmax, whose logit is its gate; the weights within the block are those of its own
softmax, so a block costs one exponential per pair of tokens. Legend: B batch, H query heads, G key heads, T tokens,
D head dim (BD rounded up), P block size, BQ queries of a tile.
"""

import triton
import triton.language as tl

from ..hybrid_linear.rows import load_rows, store_rows
from .tiles import EMPTY, LOG2E, block_is_open, locate, weigh_block


@triton.jit
def softmax_step(
    q, k_row, v_row, k_t, v_t, first, place, block, shown, lowest, stop, scale, acc, top, total,
    P: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, OWN: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One block of keys of the online softmax."""
    there = block * P + tl.arange(0, P)
    real = (there >= lowest) & (there < stop)
    k = load_rows(k_row, k_t, first + there, real, D, BD).to(DOT)
    v = load_rows(v_row, v_t, first + there, real, D, BD).to(DOT)
    weights, mass, gate, _ = weigh_block(q, k, place, block, shown, lowest, stop, scale, P, OWN, PRECISION)
    new_top = tl.maximum(top, gate)
    decay = tl.exp2(top - new_top)
    share = tl.exp2(gate - new_top)
    p = weights * (share / mass)[:, None]
    acc = tl.dot(p.to(DOT), v, acc * decay[:, None], input_precision=PRECISION)
    return acc, new_top, total * decay + share


@triton.jit
def landmark_fwd_kernel(
    query, key, value, open_blocks, offsets, output, level, table, base, start, size,
    offset, reach, number, length, scale, q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, o_b, o_h, o_t,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, P: tl.constexpr, BQ: tl.constexpr,
    KIND: tl.constexpr, OFFSETS: tl.constexpr, OPEN: tl.constexpr, SAVE: tl.constexpr, DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (tiles of queries, B x H), the longest tiles first; level `(B, H, T)` float32, log-sum-exp in base 2."""
    batch, head = tl.program_id(1) // H, tl.program_id(1) % H
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    row, tile, first, lowest, stop = locate(
        program, batch, table, base, offsets, offset, number, start, size, length, KIND, OFFSETS
    )
    begin = tile * BQ
    if begin >= stop:
        return
    scale = scale * LOG2E
    b64, h64, g64 = batch.to(tl.int64), head.to(tl.int64), (head // (H // G)).to(tl.int64)
    k_row, v_row = key + b64 * k_b + g64 * k_h, value + b64 * v_b + g64 * v_h
    place = begin + tl.arange(0, BQ)
    real = (place >= lowest) & (place < stop)
    q = load_rows(query + b64 * q_b + h64 * q_h, q_t, first + place, real, D, BD).to(DOT)
    acc = tl.zeros((BQ, BD), tl.float32)
    top = tl.full((BQ,), EMPTY, tl.float32)
    total = tl.zeros((BQ,), tl.float32)
    for block in range(0, begin // P):
        shown = block_is_open(open_blocks, row, block, reach, OPEN)
        acc, top, total = softmax_step(
            q, k_row, v_row, k_t, v_t, first, place, block, shown, lowest, stop, scale, acc, top, total,
            P, D, BD, False, DOT, PRECISION,
        )  # fmt: skip
    for block in range(begin // P, (tl.minimum(begin + BQ, stop) + P - 1) // P):
        shown = block_is_open(open_blocks, row, block, reach, OPEN)
        acc, top, total = softmax_step(
            q, k_row, v_row, k_t, v_t, first, place, block, shown, lowest, stop, scale, acc, top, total,
            P, D, BD, True, DOT, PRECISION,
        )  # fmt: skip
    some = total > 0
    total = tl.where(some, total, 1.0)
    out = output + b64 * o_b + h64 * o_h
    store_rows(out, o_t, first + place, real, acc / total[:, None], D, BD)
    if SAVE:
        stat = (b64 * H + h64) * length + first + place
        tl.store(level + stat, tl.where(some, top + tl.log2(total), 0.0), mask=real)
