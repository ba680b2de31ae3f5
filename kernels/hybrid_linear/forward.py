"""Forward kernels: the linear branch's sums before each chunk, then every block of queries in one pass.

`state`: one program per (row, feature head, tile of the F x V sums) walks the row's keys once and leaves the sums
before each chunk of C queries; a key enters them when it is out of the window of all those queries, that is before
`c C - W'`, W' = W rounded up to key blocks, or W itself where the memory forgets (`decay.py`). `output`: one program
per (block of queries, head) does the window and the sinks by online softmax, scales the result by its mass, adds phi_q
times the sums and the far keys of its own chunk one by one, and divides by the shared denominator.

Legend: B batch, H query heads, G key/value heads, E feature heads (H or G), T tokens, D head dim, V value dim,
F features, W window, S sinks, C chunk. Scores are kept in base 2.
"""

import triton
import triton.language as tl

from .rows import find_block, load_columns, load_rows, row_span, store_rows

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
EMPTY = tl.constexpr(-1e30)  # stands for the maximum of no scores
MASS_LIMIT = tl.constexpr(30.0)
DENOMINATOR_FLOOR = tl.constexpr(1e-20)


@triton.jit
def hybrid_linear_state_kernel(
    feature_k, value, decay, first_kv, first_z, sums, sums_z, last_kv, last_z,
    start, size, past, base,
    length, slots, key_offset, decay_plane,
    fk_b, fk_h, fk_t, v_b, v_h, v_t,
    E: tl.constexpr, G: tl.constexpr, F: tl.constexpr, V: tl.constexpr, W: tl.constexpr, S: tl.constexpr,
    WB: tl.constexpr, C: tl.constexpr, BF: tl.constexpr, BV: tl.constexpr,
    KIND: tl.constexpr, PAST: tl.constexpr, DECAY: tl.constexpr, FINAL: tl.constexpr, DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """sums `(B E, slots, F, V)` in DOT's dtype and sums_z `(B E, slots, F)`: what precedes each chunk.

    A program's tile stands transposed, `(V, F)`: features, which are scaled and added up in registers, are its narrow
    side, and values go from memory to the product as they are.
    """
    tiles_v: tl.constexpr = (V + BV - 1) // BV
    tile_f, tile_v = tl.program_id(0) // tiles_v, tl.program_id(0) % tiles_v
    row, head = tl.program_id(1) // E, (tl.program_id(1) % E).to(tl.int64)
    batch = row * 0 if KIND == 2 else row
    slot = tl.load(base + row) if KIND == 2 else 0
    first, count = row_span(row, start, size, length, KIND)
    f, e = tile_f * BF + tl.arange(0, BF), tile_v * BV + tl.arange(0, BV)
    in_f, in_v = f < F, e < V
    group = head // (E // G)
    state = (batch * E + head).to(tl.int64)
    lowest = S + 0
    acc = tl.zeros((BV, BF), tl.float32)
    acc_z = tl.zeros((BF,), tl.float32)
    if PAST:
        seen = tl.load(past + batch).to(tl.int32)
        lowest = tl.maximum(S - seen, -tl.minimum(seen, W))
        acc = tl.load(first_kv + (state * F + f[None, :]) * V + e[:, None], in_f[None, :] & in_v[:, None], 0.0)
        acc_z = tl.load(first_z + state * F + f, in_f, 0.0)
    key_first = key_offset if PAST else first
    fk_row = feature_k + batch.to(tl.int64) * fk_b + head * fk_h + f[None, :]
    v_row = value + batch.to(tl.int64) * v_b + group * v_h + e[None, :]
    out = sums + (state * slots + slot) * (F * V) + f[None, :] * V + e[:, None]
    out_z = sums_z + (state * slots + slot) * F + f
    chunks = tl.cdiv(count, C)
    if DECAY:  # of the whole chunk, always asked for a step before it is needed
        whole = tl.load(decay + state * length + first + tl.minimum(C, count) - 1, mask=count > 0, other=0.0)
    for c in range(0, chunks):
        tl.store(out, acc.to(sums.dtype.element_ty), mask=in_f[None, :] & in_v[:, None])
        if tile_v == 0:
            tl.store(out_z, acc_z, mask=in_f)
        out += F * V
        out_z += F
        t = c * C - WB + tl.arange(0, C)
        inside = ((t >= lowest) & (t < count - W))[:, None]
        index = (key_first + t).to(tl.int64)[:, None]
        phi = tl.load(fk_row + index * fk_t, mask=inside & in_f[None, :], other=0.0)
        v = tl.load(v_row + index * v_t, mask=inside & in_v[None, :], other=0.0)
        if DECAY:  # the keys that enter at this chunk's tokens, at its end
            entry = c * C + tl.arange(0, C)
            rest = tl.load(decay + decay_plane + state * length + first + entry, mask=entry < count, other=0.0)
            phi = phi.to(tl.float32) * rest[:, None]
            acc *= tl.exp2(whole)
            acc_z *= tl.exp2(whole)
            whole = tl.load(decay + state * length + first + tl.minimum(c * C + 2 * C, count) - 1)
        acc = tl.dot(tl.trans(v.to(DOT)), phi.to(DOT), acc, input_precision=PRECISION)
        acc_z += tl.sum(phi.to(tl.float32), 0)
    if (
        FINAL
    ):  # the keys that left the window of the last token, but not of the last chunk's first one; with WB = W none
        t = chunks * C - WB + tl.arange(0, C)
        inside = ((t >= lowest) & (t < count - W))[:, None]
        index = (key_first + t).to(tl.int64)[:, None]
        phi = tl.load(fk_row + index * fk_t, mask=inside & in_f[None, :], other=0.0)
        v = tl.load(v_row + index * v_t, mask=inside & in_v[None, :], other=0.0)
        acc = tl.dot(tl.trans(v.to(DOT)), phi.to(DOT), acc, input_precision=PRECISION)
        acc_z += tl.sum(phi.to(tl.float32), 0)
        tl.store(last_kv + (state * F + f[None, :]) * V + e[:, None], acc, mask=in_f[None, :] & in_v[:, None])
        if tile_v == 0:
            tl.store(last_z + state * F + f, acc_z, mask=in_f)


@triton.jit
def softmax_step(q, k, v, seen, scale, acc, top, total, DOT: tl.constexpr, PRECISION: tl.constexpr):
    """One block of keys of an online softmax in base 2: k `(D, keys)`, v `(keys, V)`."""
    s = tl.dot(q, k, input_precision=PRECISION) * scale
    s = tl.where(seen, s, float("-inf"))
    new_top = tl.maximum(top, tl.max(s, 1))
    p = tl.exp2(s - new_top[:, None])
    decay = tl.exp2(top - new_top)
    total = total * decay + tl.sum(p, 1)
    acc = tl.dot(p.to(DOT), v, acc * decay[:, None], input_precision=PRECISION)
    return acc, new_top, total, s


@triton.jit
def track_best(best, top, s, code):
    """Which key holds the maximum so far; `code` `(keys,)` names the keys of this block."""
    here = tl.max(s, 1)
    place = tl.sum(tl.where(tl.arange(0, s.shape[1])[None, :] == tl.argmax(s, 1)[:, None], code[None, :], 0), 1)
    return tl.where(here > top, place, best)


@triton.jit
def hybrid_linear_fwd_kernel(
    query, key, value, feature_q, feature_k, sink_key, sink_value, sums, sums_z, decay, weight, shift,
    output, difference, stats, best,
    table, base, start, size, past,
    number, length, slots, key_offset, scale, plane, sk_b, sk_h, sk_t, sv_b, sv_h, sv_t,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, fq_b, fq_h, fq_t, fk_b, fk_h, fk_t,
    H: tl.constexpr, G: tl.constexpr, E: tl.constexpr, D: tl.constexpr, V: tl.constexpr, F: tl.constexpr,
    W: tl.constexpr, S: tl.constexpr, WB: tl.constexpr, C: tl.constexpr,
    BQ: tl.constexpr, BK: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, BF: tl.constexpr, BS: tl.constexpr,
    KIND: tl.constexpr, PAST: tl.constexpr, SINKS_OF_ROW: tl.constexpr, LINEAR: tl.constexpr, SHIFT: tl.constexpr,
    MAXIMUM: tl.constexpr, DECAY: tl.constexpr, SAVE: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """output, difference `(B, T, H, V)`; stats and best as in `function.Saved`."""
    batch, head = tl.program_id(1) // H, (tl.program_id(1) % H).to(tl.int64)
    chunk, slot, first, count = find_block(
        tl.program_id(0) // (C // BQ), batch, table, base, number, start, size, length, KIND
    )
    begin = chunk * C + tl.program_id(0) % (C // BQ) * BQ
    if begin >= count:
        return
    group = head // (H // G)
    lowest, seen = S + 0, 0
    KLOW: tl.constexpr = -WB if PAST else 0
    if PAST:
        seen = tl.load(past + batch).to(tl.int32)
        lowest = tl.maximum(S - seen, -tl.minimum(seen, W))
    t = begin + tl.arange(0, BQ)
    real = t < count
    b64 = batch.to(tl.int64)
    key_first = key_offset if PAST else first
    k_row = key + b64 * k_b + group * k_h + key_first * k_t.to(tl.int64)
    v_row = value + b64 * v_b + group * v_h + key_first * v_t.to(tl.int64)
    acc = tl.zeros((BQ, BV), tl.float32)
    den = tl.zeros((BQ,), tl.float32)
    stat = (b64 * H + head) * length + first + t
    if W + S > 0:
        q = load_rows(query + b64 * q_b + head * q_h, q_t, first + t, real, D, BD).to(DOT)
        top = tl.full((BQ,), EMPTY, tl.float32)
        total = tl.zeros((BQ,), tl.float32)
        code = tl.zeros((BQ,), tl.int32)
        if S > 0:
            sink_j = tl.arange(0, BS)
            given = (sink_j < S) & (sink_j < seen + count)
            sink = first + sink_j if SINKS_OF_ROW else sink_j
            sink_k = load_columns(sink_key + b64 * sk_b + group * sk_h, sk_t, sink, given, D, BD)
            sink_v = load_rows(sink_value + b64 * sv_b + group * sv_h, sv_t, sink, given, V, BV)
            shown = given[None, :] & (sink_j[None, :] <= (seen + t)[:, None])
            before = top
            acc, top, total, sink_s = softmax_step(
                q, sink_k.to(DOT), sink_v.to(DOT), shown, scale, acc, top, total, DOT, PRECISION
            )
            if MAXIMUM and SAVE:
                code = track_best(code, before, sink_s, (1 << 30) + sink_j)
        if W > 0:
            for j0 in range(tl.maximum(begin - (W + BK - 2) // BK * BK, KLOW), tl.minimum(begin + BQ, count), BK):
                j = j0 + tl.arange(0, BK)
                there = (j >= lowest) & (j < count)
                k = load_columns(k_row, k_t, j, there, D, BD)
                v = load_rows(v_row, v_t, j, there, V, BV)
                gap = (t - j0)[:, None] - tl.arange(0, BK)[None, :]
                mask = gap.to(tl.uint32, bitcast=True) < W
                if S > 0 or PAST:  # else a key before the row lies in no tile; one behind it is no query's
                    mask &= (j >= lowest)[None, :]
                before = top
                acc, top, total, s = softmax_step(
                    q, k.to(DOT), v.to(DOT), mask, scale, acc, top, total, DOT, PRECISION
                )
                if MAXIMUM and SAVE:
                    code = track_best(code, before, s, j)
        full = total > 0
        acc = acc / tl.where(full, total, 1.0)[:, None]
        level = (top + tl.log2(tl.where(full, total, 1.0))) * LN2
        if SAVE:
            tl.store(stats + stat, level, mask=real)
            soft = acc
        if LINEAR:
            r = top * LN2 if MAXIMUM else level
            tilt = tl.log(tl.load(weight + head).to(tl.float32))
            if SHIFT:
                tilt += tl.load(shift + head).to(tl.float32) * r
            tilt = tl.minimum(tl.maximum(tilt, -MASS_LIMIT), MASS_LIMIT)
            den = tl.where(full, tl.exp(level - r + tilt), 0.0)
            acc = acc * den[:, None]
            if SAVE:
                tl.store(stats + plane + stat, den, mask=real)
                if MAXIMUM:
                    tl.store(stats + 3 * plane + stat, r, mask=real)
                    tl.store(best + stat, code, mask=real)
    if LINEAR:
        if DECAY:
            decay += (b64 * E + head // (H // E)) * length + first
        acc, den = add_linear_branch(
            acc, den, feature_q + b64 * fq_b + head * fq_h, fq_t,
            feature_k + b64 * fk_b + (head // (H // E)) * fk_h + key_first * fk_t.to(tl.int64), fk_t,
            v_row, v_t,
            sums, sums_z, (b64 * E + head // (H // E)) * slots + slot + chunk, decay, t, first, real, begin, count,
            lowest, tl.maximum(chunk * C - WB, KLOW), W, V, F, BQ, BK, BV, BF, DECAY, DOT, PRECISION,
        )  # fmt: skip
        if SAVE:
            tl.store(stats + 2 * plane + stat, den, mask=real)
        acc = acc / tl.maximum(den, DENOMINATOR_FLOOR)[:, None]
        if SAVE and W + S > 0:  # in float32: where the window has nearly all the mass, it is a small difference
            place = ((b64 * length + first) * H + head) * V
            store_rows(difference + place, H * V, t, real, soft - acc, V, BV)
    store_rows(output + ((b64 * length + first) * H + head) * V, H * V, t, real, acc, V, BV)


@triton.jit
def pair_decay(decay_row, left, entry, count):
    """What is left for queries, whose sums are `left`, of keys that entered at `entry` >= 0: `(queries, keys)`.

    Anything where a key enters after the query: the caller selects.
    """
    since = tl.load(decay_row + entry, mask=entry < count, other=0.0)
    return tl.exp2(left[:, None] - since[None, :])


@triton.jit
def add_linear_branch(
    acc, den, fq_row, fq_t, fk_row, fk_t, v_row, v_t, sums, sums_z, sum_index, decay_row, t, first, real, begin,
    count, lowest, from_key, W: tl.constexpr, V: tl.constexpr, F: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr,
    BV: tl.constexpr, BF: tl.constexpr, DECAY: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add numerator and denominator of the far keys: by the sums before the chunk, then one by one."""
    f = tl.arange(0, BF)
    phi = load_rows(fq_row, fq_t, first + t, real, F, BF)
    z = tl.load(sums_z + sum_index * F + f, mask=f < F, other=0.0)
    read = tl.sum(phi.to(tl.float32) * z[None, :], 1)
    phi = phi.to(DOT)
    kv = load_rows(sums + sum_index * (F * V), V, f, f < F, V, BV)
    if DECAY:  # after the product: features are rounded once, and no second copy of them takes registers
        left = tl.load(decay_row + t, mask=real, other=0.0)
        keeps = tl.exp2(left)
        den += keeps * read
        acc += keeps[:, None] * tl.dot(phi, kv, input_precision=PRECISION)
    else:
        den += read
        acc = tl.dot(phi, kv, acc, input_precision=PRECISION)
    for j0 in range(from_key, tl.minimum(begin + BQ - W, count), BK):
        j = j0 + tl.arange(0, BK)
        there = (j >= lowest) & (j < count)
        fk = load_columns(fk_row, fk_t, j, there, F, BF).to(DOT)
        v = load_rows(v_row, v_t, j, there, V, BV).to(DOT)
        pairs = tl.dot(phi, fk, input_precision=PRECISION)
        if DECAY:
            pairs *= pair_decay(decay_row, left, j + W, count)
        # Keys that are not there have features of 0.
        pairs = tl.where((t - (j0 + W))[:, None] >= tl.arange(0, BK)[None, :], pairs, 0.0)
        den += tl.sum(pairs, 1)
        acc = tl.dot(pairs.to(DOT), v, acc, input_precision=PRECISION)
    return acc, den
