"""The backward kernels: scores are computed again, and with the saved log-sum-exp they give the probabilities.

`query`: a tile of queries walks over the blocks up to its own, as forward, for the gradient of its queries; it leaves
`grad . output` of each query, which `key` reads. `key`: one block of keys walks over the tiles of queries from its own
place on, of every query head of its group, for the gradients of its keys and values. Legend as in `forward.py`.
"""

import triton
import triton.language as tl

from ..hybrid_linear.rows import load_rows, store_rows
from .tiles import LOG2E, block_is_open, locate, score_gradient, weigh_block


@triton.jit
def query_step(
    q, grad, level, delta, k_row, v_row, k_t, v_t, first, place, block, shown, lowest, stop, scale, acc,
    P: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, OWN: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add one block's part to the gradient of a tile of queries."""
    there = block * P + tl.arange(0, P)
    real = (there >= lowest) & (there < stop)
    k = load_rows(k_row, k_t, first + there, real, D, BD).to(DOT)
    v = load_rows(v_row, v_t, first + there, real, D, BD).to(DOT)
    weights, mass, gate, own = weigh_block(q, k, place, block, shown, lowest, stop, scale, P, OWN, PRECISION)
    weights = weights * (1.0 / mass)[:, None]
    ds = score_gradient(weights, tl.exp2(gate - level), own, v, grad, delta, P, OWN, PRECISION)
    return tl.dot(ds.to(DOT), k, acc, input_precision=PRECISION)


@triton.jit
def landmark_bwd_query_kernel(
    query, key, value, output, grad_output, level, delta, grad_query, open_blocks, offsets, table, base, start, size,
    offset, reach, number, length, scale, q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, o_b, o_h, o_t,
    do_b, do_h, do_t, dq_b, dq_h, dq_t,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, P: tl.constexpr, BQ: tl.constexpr,
    KIND: tl.constexpr, OFFSETS: tl.constexpr, OPEN: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (tiles of queries, B x H), the longest tiles first; delta `(B, H, T)` float32 gets `grad . output`."""
    batch, head = tl.program_id(1) // H, tl.program_id(1) % H
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    row, tile, first, lowest, stop = locate(
        program, batch, table, base, offsets, offset, number, start, size, length, KIND, OFFSETS
    )
    begin = tile * BQ
    if begin >= stop:
        return
    b64, h64, g64 = batch.to(tl.int64), head.to(tl.int64), (head // (H // G)).to(tl.int64)
    k_row, v_row = key + b64 * k_b + g64 * k_h, value + b64 * v_b + g64 * v_h
    place = begin + tl.arange(0, BQ)
    real = (place >= lowest) & (place < stop)
    stat = (b64 * H + h64) * length + first + place
    grad = load_rows(grad_output + b64 * do_b + h64 * do_h, do_t, first + place, real, D, BD)
    out = load_rows(output + b64 * o_b + h64 * o_h, o_t, first + place, real, D, BD)
    drift = tl.sum(grad.to(tl.float32) * out.to(tl.float32), 1)
    tl.store(delta + stat, drift, mask=real)
    grad = grad.to(DOT)
    q = load_rows(query + b64 * q_b + h64 * q_h, q_t, first + place, real, D, BD).to(DOT)
    lse = tl.load(level + stat, mask=real, other=0.0)
    acc = tl.zeros((BQ, BD), tl.float32)
    base_2 = scale * LOG2E
    for block in range(0, begin // P):
        shown = block_is_open(open_blocks, row, block, reach, OPEN)
        acc = query_step(
            q, grad, lse, drift, k_row, v_row, k_t, v_t, first, place, block, shown, lowest, stop, base_2, acc,
            P, D, BD, False, DOT, PRECISION,
        )  # fmt: skip
    for block in range(begin // P, (tl.minimum(begin + BQ, stop) + P - 1) // P):
        shown = block_is_open(open_blocks, row, block, reach, OPEN)
        acc = query_step(
            q, grad, lse, drift, k_row, v_row, k_t, v_t, first, place, block, shown, lowest, stop, base_2, acc,
            P, D, BD, True, DOT, PRECISION,
        )  # fmt: skip
    store_rows(grad_query + b64 * dq_b + h64 * dq_h, dq_t, first + place, real, acc * scale, D, BD)


@triton.jit
def key_step(
    k, v, q_row, do_row, q_t, do_t, level, delta, first, tile, block, shown, lowest, stop, scale, grad_k, grad_v,
    P: tl.constexpr, BQ: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, OWN: tl.constexpr, DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Add one tile of queries' part to the gradients of a block of keys and values."""
    place = tile * BQ + tl.arange(0, BQ)
    real = (place >= lowest) & (place < stop)
    q = load_rows(q_row, q_t, first + place, real, D, BD).to(DOT)
    grad = load_rows(do_row, do_t, first + place, real, D, BD).to(DOT)
    lse = tl.load(level + first + place, mask=real, other=0.0)
    drift = tl.load(delta + first + place, mask=real, other=0.0)
    weights, mass, gate, own = weigh_block(q, k, place, block, shown, lowest, stop, scale, P, OWN, PRECISION)
    weights = weights * (1.0 / mass)[:, None]
    share = tl.exp2(gate - lse)
    p = (weights * share[:, None]).to(DOT)
    grad_v = tl.dot(tl.trans(p), grad, grad_v, input_precision=PRECISION)
    ds = score_gradient(weights, share, own, v, grad, drift, P, OWN, PRECISION)
    grad_k = tl.dot(tl.trans(ds.to(DOT)), q, grad_k, input_precision=PRECISION)
    return grad_k, grad_v


@triton.jit
def landmark_bwd_key_kernel(
    query, key, value, grad_output, level, delta, grad_key, grad_value, open_blocks, offsets, table, base, start, size,
    offset, reach, number, length, scale, q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, do_b, do_h, do_t,
    dk_b, dk_h, dk_t, dv_b, dv_h, dv_t,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, P: tl.constexpr, BQ: tl.constexpr,
    KIND: tl.constexpr, OFFSETS: tl.constexpr, OPEN: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (blocks of keys, B x G); a closed block meets the queries of its own block alone."""
    batch, group = tl.program_id(1) // G, tl.program_id(1) % G
    row, block, first, lowest, stop = locate(
        tl.program_id(0), batch, table, base, offsets, offset, number, start, size, length, KIND, OFFSETS
    )
    begin = block * P
    if begin >= stop:
        return
    b64, g64 = batch.to(tl.int64), group.to(tl.int64)
    there = begin + tl.arange(0, P)
    real = (there >= lowest) & (there < stop)
    k = load_rows(key + b64 * k_b + g64 * k_h, k_t, first + there, real, D, BD).to(DOT)
    v = load_rows(value + b64 * v_b + g64 * v_h, v_t, first + there, real, D, BD).to(DOT)
    grad_k = tl.zeros((P, BD), tl.float32)
    grad_v = tl.zeros((P, BD), tl.float32)
    base_2 = scale * LOG2E
    shown = block_is_open(open_blocks, row, block, reach, OPEN)
    tiles = (stop + BQ - 1) // BQ
    own_tiles = tl.minimum((begin + P + BQ - 1) // BQ, tiles)
    tiles = tl.where(shown, tiles, own_tiles)
    for turn in range(0, H // G):
        head = g64 * (H // G) + turn
        q_row, do_row = query + b64 * q_b + head * q_h, grad_output + b64 * do_b + head * do_h
        stat = (b64 * H + head) * length
        for tile in range(begin // BQ, own_tiles):
            grad_k, grad_v = key_step(
                k, v, q_row, do_row, q_t, do_t, level + stat, delta + stat, first, tile, block, shown, lowest, stop,
                base_2, grad_k, grad_v, P, BQ, D, BD, True, DOT, PRECISION,
            )  # fmt: skip
        for tile in range(own_tiles, tiles):
            grad_k, grad_v = key_step(
                k, v, q_row, do_row, q_t, do_t, level + stat, delta + stat, first, tile, block, shown, lowest, stop,
                base_2, grad_k, grad_v, P, BQ, D, BD, False, DOT, PRECISION,
            )  # fmt: skip
    store_rows(grad_key + b64 * dk_b + g64 * dk_h, dk_t, first + there, real, grad_k * scale, D, BD)
    store_rows(grad_value + b64 * dv_b + g64 * dv_h, dv_t, first + there, real, grad_v, D, BD)
