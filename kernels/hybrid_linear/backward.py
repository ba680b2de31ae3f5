"""Backward kernels: scores are computed again from the saved log-sum-exp; no product of T x T ever lies in memory.

With y = (m o + N) / den, N = phi_q . sum phi_k v, Z its normaliser part and den = m + Z:

    d phi_q = (dy . S^T) / den - (dy . y) z / den        S, z: the far keys' sums
    dm      = dy . (o - y) / den                        o - y is saved: near 1 the mass leaves little of it
    ds_nj   = p_nj (a dy_n . v_j + b_n)                  a = m / den, b = dlse - a dy . o

`query` writes the gradients of queries and their features, and per row a, b, 1 / den and d den; `reverse` leaves, for
each chunk, the sums of phi_q (dy / den) over the later chunks' queries; `key` writes the gradients of keys, values and
key features from these and from the queries near them. Sink keys are seen by all queries: each block of queries leaves
its part, and the parts are added up. Legend as in `forward.py`.
"""

import triton
import triton.language as tl

from .forward import DENOMINATOR_FLOOR, LOG2E, MASS_LIMIT, pair_decay
from .rows import find_block, load_rows, row_span, store_rows


@triton.jit
def row_terms(
    output, difference, place, stride, grad_row, grad_t, stats, plane, weight, shift, head, stat, index, grad_index,
    real, V: tl.constexpr, BV: tl.constexpr, SPAN: tl.constexpr, LINEAR: tl.constexpr, SHIFT: tl.constexpr,
    MAXIMUM: tl.constexpr,
):  # fmt: skip
    """Per query: dy, share a, offset b, 1 / den, d den, d max, d log weight and d shift before their sum, and
    phi_q . d phi_q, what a common factor of all far keys gets: the opposite of what one of the mass gets."""
    grad = load_rows(grad_row, grad_t, grad_index, real, V, BV)
    y = load_rows(output + place, stride, index, real, V, BV)
    delta = tl.sum(grad.to(tl.float32) * y.to(tl.float32), 1)
    zero = tl.zeros_like(delta)
    share, offset = zero + 1, -delta
    inverse, grad_den, grad_top, grad_weight, grad_shift, grad_factor = zero, zero, zero, zero, zero, zero
    if LINEAR:
        den = tl.load(stats + 2 * plane + stat, mask=real, other=1.0)
        inverse = 1.0 / tl.maximum(den, DENOMINATOR_FLOOR)
        grad_den = tl.where(den >= DENOMINATOR_FLOOR, -delta * inverse, 0.0)
        share, offset = zero, zero
        if SPAN:
            m = tl.load(stats + plane + stat, mask=real, other=0.0)
            apart = load_rows(difference + place, stride, index, real, V, BV)
            gap = tl.sum(grad.to(tl.float32) * apart.to(tl.float32), 1)  # dy . (o - y)
            share = m * inverse
            grad_log_mass = share * gap
            level = tl.load(stats + stat, mask=real, other=0.0)
            r, factor = level, zero
            tilt = zero + tl.log(tl.load(weight + head).to(tl.float32))
            if MAXIMUM:
                r = tl.load(stats + 3 * plane + stat, mask=real, other=0.0)
            if SHIFT:
                factor = zero + tl.load(shift + head).to(tl.float32)
                tilt += factor * r
            inside = (tl.abs(tilt) <= MASS_LIMIT) & (m > 0)
            grad_weight = tl.where(inside, grad_log_mass, 0.0)
            grad_shift = grad_weight * tl.where(m > 0, r, 0.0)
            if MAXIMUM:
                grad_level = grad_log_mass
                grad_top = factor * grad_weight - grad_log_mass
            else:
                grad_level = factor * grad_weight
            offset = grad_level - share * (gap + delta)
            grad_factor = -grad_log_mass
        grad_factor = tl.where(den >= DENOMINATOR_FLOOR, grad_factor, delta)
    return grad, share, offset, inverse, grad_den, grad_top, grad_weight, grad_shift, grad_factor


@triton.jit
def hybrid_linear_bwd_query_kernel(
    query, key, value, feature_k, sink_key, sink_value, sums, sums_z, decay, weight, shift,
    output, difference, grad_output, stats, best,
    grad_query, grad_feature, terms, part_weight, part_sink_key, part_sink_value,
    table, base, start, size, past,
    number, length, slots, key_offset, scale, scaling, plane, sk_b, sk_h, sk_t, sv_b, sv_h, sv_t,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, fk_b, fk_h, fk_t, go_b, go_h, go_t,
    H: tl.constexpr, G: tl.constexpr, E: tl.constexpr, D: tl.constexpr, V: tl.constexpr, F: tl.constexpr,
    W: tl.constexpr, S: tl.constexpr, WB: tl.constexpr, C: tl.constexpr,
    BQ: tl.constexpr, BK: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, BF: tl.constexpr, BS: tl.constexpr,
    KIND: tl.constexpr, PAST: tl.constexpr, SINKS_OF_ROW: tl.constexpr, LINEAR: tl.constexpr, SHIFT: tl.constexpr,
    MAXIMUM: tl.constexpr, DECAY: tl.constexpr, INPUTS: tl.constexpr, FEATURES: tl.constexpr, DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """grad_query, grad_feature `(B, T, H, D | F)`; terms: planes of `(B, H, T)`, a, b, 1 / den, d den, then where they
    are needed d max and phi_q . d phi_q."""
    batch, head = tl.program_id(1) // H, (tl.program_id(1) % H).to(tl.int64)
    chunk, slot, first, count = find_block(
        tl.program_id(0) // (C // BQ), batch, table, base, number, start, size, length, KIND
    )
    begin = chunk * C + tl.program_id(0) % (C // BQ) * BQ
    part = tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    sink_row = tl.arange(0, BS)
    if begin >= count:  # a block beyond its row has no part in the sums
        if LINEAR and W + S > 0:
            tl.store(part_weight + 2 * part + tl.arange(0, 2), tl.zeros((2,), tl.float32))
        if INPUTS and S > 0:
            nothing = tl.zeros((BS, BD), tl.float32)
            store_rows(part_sink_key + part * (S * D), D, sink_row, sink_row < S, nothing, D, BD)
            nothing_v = tl.zeros((BS, BV), tl.float32)
            store_rows(part_sink_value + part * (S * V), V, sink_row, sink_row < S, nothing_v, V, BV)
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
    stat = (b64 * H + head) * length + first + t
    place = ((b64 * length + first) * H + head).to(tl.int64)
    key_first = key_offset if PAST else first
    v_row = value + b64 * v_b + group * v_h + key_first * v_t.to(tl.int64)
    grad, share, offset, inverse, grad_den, grad_top, grad_weight, grad_shift, grad_factor = row_terms(
        output, difference, place * V, H * V, grad_output + b64 * go_b + head * go_h, go_t,
        stats, plane, weight, shift, head, stat, t, first + t, real, V, BV, W + S > 0, LINEAR, SHIFT,
        MAXIMUM,
    )  # fmt: skip
    tl.store(terms + stat, share, mask=real)
    tl.store(terms + plane + stat, offset, mask=real)
    if LINEAR:
        tl.store(terms + 2 * plane + stat, inverse, mask=real)
        tl.store(terms + 3 * plane + stat, grad_den, mask=real)
        if DECAY:
            tl.store(terms + (5 if MAXIMUM else 4) * plane + stat, grad_factor, mask=real)
        if W + S > 0:
            total = tl.sum(tl.where(real, grad_weight, 0.0), 0) / tl.load(weight + head).to(tl.float32)
            tl.store(part_weight + 2 * part, total)
            tl.store(part_weight + 2 * part + 1, tl.sum(tl.where(real, grad_shift, 0.0), 0))
            if MAXIMUM:
                tl.store(terms + 4 * plane + stat, grad_top, mask=real)
    grad = grad.to(DOT)
    if INPUTS and W + S > 0:
        q = load_rows(query + b64 * q_b + head * q_h, q_t, first + t, real, D, BD).to(DOT)
        level = tl.load(stats + stat, mask=real, other=0.0) * LOG2E
        winner = tl.zeros((BQ,), tl.int32)
        if MAXIMUM and LINEAR:
            winner = tl.load(best + stat, mask=real, other=0)
        acc = tl.zeros((BQ, BD), tl.float32)
        if S > 0:
            sink_j = tl.arange(0, BS)
            given = (sink_j < S) & (sink_j < seen + count)
            sink = first + sink_j if SINKS_OF_ROW else sink_j
            sink_k = load_rows(sink_key + b64 * sk_b + group * sk_h, sk_t, sink, given, D, BD)
            sink_v = load_rows(sink_value + b64 * sv_b + group * sv_h, sv_t, sink, given, V, BV)
            shown = given[None, :] & (sink_j[None, :] <= (seen + t)[:, None]) & real[:, None]
            sink_k = sink_k.to(DOT)
            sink_s = tl.dot(q, tl.trans(sink_k), input_precision=PRECISION) * scale - level[:, None]
            sink_p = tl.where(shown, tl.exp2(sink_s), 0.0)
            sink_dp = tl.dot(grad, tl.trans(sink_v.to(DOT)), input_precision=PRECISION)
            sink_ds = sink_p * (sink_dp * share[:, None] + offset[:, None])
            if MAXIMUM and LINEAR:
                sink_ds += tl.where(shown & (winner[:, None] == (1 << 30) + sink_j[None, :]), grad_top[:, None], 0.0)
            sink_ds = (sink_ds * scaling).to(DOT)
            acc = tl.dot(sink_ds, sink_k, acc, input_precision=PRECISION)
            part_k = tl.dot(tl.trans(sink_ds), q, input_precision=PRECISION)
            store_rows(part_sink_key + part * (S * D), D, sink_row, sink_row < S, part_k, D, BD)
            part_v = tl.dot(tl.trans((sink_p * share[:, None]).to(DOT)), grad, input_precision=PRECISION)
            store_rows(part_sink_value + part * (S * V), V, sink_row, sink_row < S, part_v, V, BV)
        if W > 0:
            k_row = key + b64 * k_b + group * k_h + key_first * k_t.to(tl.int64)
            for j0 in range(tl.maximum(begin - (W + BK - 2) // BK * BK, KLOW), tl.minimum(begin + BQ, count), BK):
                j = j0 + tl.arange(0, BK)
                there = (j >= lowest) & (j < count)
                k = load_rows(k_row, k_t, j, there, D, BD).to(DOT)
                v = load_rows(v_row, v_t, j, there, V, BV).to(DOT)
                gap = t[:, None] - j[None, :]
                mask = there[None, :] & (gap >= 0) & (gap < W)
                s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale - level[:, None]
                p = tl.where(mask, tl.exp2(s), 0.0)
                ds = p * (tl.dot(grad, tl.trans(v), input_precision=PRECISION) * share[:, None] + offset[:, None])
                if MAXIMUM and LINEAR:
                    ds += tl.where(mask & (winner[:, None] == j[None, :]), grad_top[:, None], 0.0)
                acc = tl.dot((ds * scaling).to(DOT), k, acc, input_precision=PRECISION)
        store_rows(grad_query + place * D, H * D, t, real, acc, D, BD)
    if LINEAR and FEATURES:
        f = tl.arange(0, BF)
        sum_index = (b64 * E + head // (H // E)) * slots + slot + chunk
        kv = load_rows(sums + sum_index * (F * V), V, f, f < F, V, BV)
        z = tl.load(sums_z + sum_index * F + f, mask=f < F, other=0.0)
        acc_f = (
            tl.dot(grad, tl.trans(kv), input_precision=PRECISION) * inverse[:, None] + grad_den[:, None] * z[None, :]
        )
        if DECAY:
            decay += (b64 * E + head // (H // E)) * length + first
            left = tl.load(decay + t, mask=real, other=0.0)
            acc_f *= tl.exp2(left)[:, None]
        fk_row = feature_k + b64 * fk_b + (head // (H // E)) * fk_h + key_first * fk_t.to(tl.int64)
        for j0 in range(tl.maximum(chunk * C - WB, KLOW), tl.minimum(begin + BQ - W, count), BK):
            j = j0 + tl.arange(0, BK)
            there = (j >= lowest) & (j < count)
            v = load_rows(v_row, v_t, j, there, V, BV).to(DOT)
            fk = load_rows(fk_row, fk_t, j, there, F, BF).to(DOT)
            g = tl.dot(grad, tl.trans(v), input_precision=PRECISION) * inverse[:, None] + grad_den[:, None]
            if DECAY:
                g *= pair_decay(decay, left, j + W, count)
            g = tl.where(there[None, :] & (t[:, None] - j[None, :] >= W), g, 0.0)
            acc_f = tl.dot(g.to(DOT), fk, acc_f, input_precision=PRECISION)
        store_rows(grad_feature + place * F, H * F, t, real, acc_f, F, BF)


@triton.jit
def hybrid_linear_bwd_reverse_kernel(
    feature_q, grad_output, terms, sums, sums_z, first_kv, first_z,
    decay, before, before_z, last_kv, last_z, across,
    start, size, base,
    length, slots, plane, states, fq_b, fq_h, fq_t, go_b, go_h, go_t,
    H: tl.constexpr, E: tl.constexpr, F: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BF: tl.constexpr,
    BV: tl.constexpr, KIND: tl.constexpr, PAST: tl.constexpr, DECAY: tl.constexpr, LAST: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """sums `(B H, slots, F, V)` and sums_z `(B H, slots, F)`: what the queries after each chunk send back.

    Of a memory that forgets, the state after the last token sends too (last_kv, last_z, its gradients), and `across`
    `(tiles of V, B H, slots, F)` gets the products with the sums before the next chunk (before, before_z).
    """
    tiles_v: tl.constexpr = (V + BV - 1) // BV
    tile_f, tile_v = tl.program_id(0) // tiles_v, tl.program_id(0) % tiles_v
    row, head = tl.program_id(1) // H, (tl.program_id(1) % H).to(tl.int64)
    batch = row * 0 if KIND == 2 else row
    slot = tl.load(base + row) if KIND == 2 else 0
    first, count = row_span(row, start, size, length, KIND)
    f, e = tile_f * BF + tl.arange(0, BF), tile_v * BV + tl.arange(0, BV)
    in_f, in_v = f < F, e < V
    b64 = batch.to(tl.int64)
    state = b64 * H + head
    acc = tl.zeros((BV, BF), tl.float32)
    acc_z = tl.zeros((BF,), tl.float32)
    fq_row = feature_q + b64 * fq_b + head * fq_h + f[None, :]
    go_row = grad_output + b64 * go_b + head * go_h + e[None, :]
    chunks = tl.cdiv(count, C)
    if DECAY:
        memory = b64 * E + head // (H // E)
        decay += memory * length + first
        held = tl.zeros((BV, BF), before.dtype.element_ty)  # no sums lie behind the last chunk
        held_z = tl.zeros((BF,), tl.float32)
        whole = tl.load(decay + count - 1, mask=count > 0, other=0.0)
        if LAST:  # query heads that share a state: one of them sends its gradient
            sends = tl.where(head % (H // E) == 0, 1.0, 0.0)
            acc = tl.load(last_kv + (memory * F + f[None, :]) * V + e[:, None], in_f[None, :] & in_v[:, None], 0.0)
            acc *= sends
            acc_z = tl.load(last_z + memory * F + f, in_f, 0.0) * sends
    for i in range(0, chunks):
        c = chunks - 1 - i
        slot_index = state * slots + slot + c
        tl.store(
            sums + slot_index * (F * V) + f[None, :] * V + e[:, None],
            acc.to(sums.dtype.element_ty),
            mask=in_f[None, :] & in_v[:, None],
        )
        if tile_v == 0:
            tl.store(sums_z + slot_index * F + f, acc_z, mask=in_f)
        if DECAY:
            product = tl.sum(acc * held.to(tl.float32), 0)
            if tile_v == 0:
                product += acc_z * held_z
            place = ((tile_v * states + state) * slots + slot + c) * F + f
            tl.store(across + place, product, mask=in_f)
            # Those before this chunk are what the next step needs: asked for here, they come beside its other loads.
            held_index = memory * slots + slot + c
            held = tl.load(
                before + held_index * (F * V) + f[None, :] * V + e[:, None], in_f[None, :] & in_v[:, None], 0.0
            )
            held_z = tl.load(before_z + held_index * F + f, in_f, 0.0)
        t = c * C + tl.arange(0, C)
        real = t < count
        index = (first + t).to(tl.int64)[:, None]
        phi = tl.load(fq_row + index * fq_t, mask=real[:, None] & in_f[None, :], other=0.0)
        grad = tl.load(go_row + index * go_t, mask=real[:, None] & in_v[None, :], other=0.0)
        stat = state * length + first + t
        inverse = tl.load(terms + 2 * plane + stat, mask=real, other=0.0)
        grad_den = tl.load(terms + 3 * plane + stat, mask=real, other=0.0)
        if DECAY:
            left = tl.exp2(tl.load(decay + t, mask=real, other=0.0))
            inverse *= left
            grad_den *= left
            acc *= tl.exp2(whole)
            acc_z *= tl.exp2(whole)
            whole = tl.load(decay + tl.maximum(c * C - 1, 0))
        phi = phi.to(tl.float32)
        acc = tl.dot(tl.trans(grad.to(DOT)), (phi * inverse[:, None]).to(DOT), acc, input_precision=PRECISION)
        acc_z += tl.sum(phi * grad_den[:, None], 0)
    if PAST:
        tl.store(first_kv + (state * F + f[None, :]) * V + e[:, None], acc, mask=in_f[None, :] & in_v[:, None])
        if tile_v == 0:
            tl.store(first_z + state * F + f, acc_z, mask=in_f)


@triton.jit
def hybrid_linear_bwd_key_kernel(
    query, key, value, feature_q, feature_k, grad_output, terms, stats, best, sums, sums_z, last_kv, last_z, decay,
    grad_key, grad_value, grad_feature, key_terms,
    table, base, query_base, start, size, past,
    number, length, slots, key_offset, key_length, scale, scaling, plane, decay_plane,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, fq_b, fq_h, fq_t, fk_b, fk_h, fk_t, go_b, go_h, go_t,
    H: tl.constexpr, G: tl.constexpr, E: tl.constexpr, D: tl.constexpr, V: tl.constexpr, F: tl.constexpr,
    W: tl.constexpr, S: tl.constexpr, WB: tl.constexpr, C: tl.constexpr,
    BN: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, BF: tl.constexpr,
    KIND: tl.constexpr, PAST: tl.constexpr, LAST: tl.constexpr, LINEAR: tl.constexpr, MAXIMUM: tl.constexpr,
    DECAY: tl.constexpr, INPUTS: tl.constexpr, FEATURES: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients per query head: grad_key, grad_value, grad_feature `(B, T', H, D | V | F)`, T' with the ring; of a
    memory that forgets key_terms `(B, H, T')`, phi_k . d phi_k."""
    batch, head = tl.program_id(1) // H, (tl.program_id(1) % H).to(tl.int64)
    chunk, slot, first, count = find_block(
        tl.program_id(0) // (C // BN), batch, table, base, number, start, size, length, KIND
    )
    begin = chunk * C - WB + tl.program_id(0) % (C // BN) * BN
    if begin >= count:
        return
    if KIND == 2:  # the sums are numbered by blocks of queries, of which a row has fewer
        row = tl.minimum(tl.load(table + tl.program_id(0) // (C // BN)), number - 1)
        slot = tl.load(query_base + row)
    group = head // (H // G)
    b64 = batch.to(tl.int64)
    lowest = S + 0
    if PAST:
        seen = tl.load(past + batch).to(tl.int32)
        lowest = tl.maximum(S - seen, -tl.minimum(seen, W))
    j = begin + tl.arange(0, BN)
    valid = (j >= lowest) & (j < count)
    exists = (j >= (-W if PAST else 0)) & (j < count)
    key_first = key_offset if PAST else first
    place = (b64 * key_length + key_first) * H + head
    q_row = query + b64 * q_b + head * q_h + first * q_t.to(tl.int64)
    go_row = grad_output + b64 * go_b + head * go_h + first * go_t.to(tl.int64)
    fq_row = feature_q
    if LINEAR:
        fq_row += b64 * fq_b + head * fq_h + first * fq_t.to(tl.int64)
    stat = (b64 * H + head) * length + first
    v = load_rows(value + b64 * v_b + group * v_h, v_t, key_first + j, valid, V, BV).to(DOT)
    f = tl.arange(0, BF)
    end = tl.minimum((chunk + 1) * C, count)
    later = (chunk + 1) * C < count
    if DECAY:
        if LAST:  # which the sums hold
            later = chunk * C < count
        decay += (b64 * E + head // (H // E)) * length + first
        entry = j + W
        enters = valid & (entry < count)
        since = tl.load(decay + entry, mask=enters, other=0.0)
        kept = tl.load(decay + decay_plane + entry, mask=enters, other=0.0)
    sum_index = (b64 * H + head) * slots + slot + chunk
    folded = valid & (j < count - W)
    last_index = b64 * E + head // (H // E)
    sends_last = head % (H // E) == 0  # query heads that share a state: one of them adds its gradient
    if LINEAR and FEATURES:
        acc = tl.zeros((BN, BF), tl.float32)
        if later:
            kv = load_rows(sums + sum_index * (F * V), V, f, f < F, V, BV)
            z = tl.load(sums_z + sum_index * F + f, mask=f < F, other=0.0)
            acc = tl.dot(v, tl.trans(kv), acc, input_precision=PRECISION) + z[None, :]
            if DECAY:
                acc *= kept[:, None]
        if LAST and not DECAY:
            kv = load_rows(last_kv + last_index * (F * V), V, f, f < F, V, BV).to(DOT)
            z = tl.load(last_z + last_index * F + f, mask=f < F, other=0.0)
            sent = tl.dot(v, tl.trans(kv), input_precision=PRECISION) + z[None, :]
            acc += tl.where(folded[:, None] & sends_last, sent, 0.0)
        for i0 in range(tl.maximum(begin + W // BM * BM, 0), end, BM):
            i = i0 + tl.arange(0, BM)
            real = i < end
            grad = load_rows(go_row, go_t, i, real, V, BV).to(DOT)
            phi = load_rows(fq_row, fq_t, i, real, F, BF).to(DOT)
            inverse = tl.load(terms + 2 * plane + stat + i, mask=real, other=0.0)
            grad_den = tl.load(terms + 3 * plane + stat + i, mask=real, other=0.0)
            g = tl.dot(v, tl.trans(grad), input_precision=PRECISION) * inverse[None, :] + grad_den[None, :]
            if DECAY:
                left = tl.load(decay + i, mask=real, other=float("-inf"))
                g *= tl.exp2(left[None, :] - since[:, None])
            g = tl.where(i[None, :] - j[:, None] >= W, g, 0.0)
            acc = tl.dot(g.to(DOT), phi, acc, input_precision=PRECISION)
        acc = tl.where(valid[:, None], acc, 0.0)
        store_rows(grad_feature + place * F, H * F, j, exists, acc, F, BF)
        if DECAY:
            fk = load_rows(feature_k + b64 * fk_b + (head // (H // E)) * fk_h, fk_t, key_first + j, valid, F, BF)
            key_place = (b64 * H + head) * key_length + key_first + j
            tl.store(key_terms + key_place, tl.sum(acc * fk.to(tl.float32), 1), mask=exists)
    if INPUTS:
        acc_v = tl.zeros((BN, BV), tl.float32)
        if W > 0:
            k = load_rows(key + b64 * k_b + group * k_h, k_t, key_first + j, valid, D, BD).to(DOT)
            acc_k = tl.zeros((BN, BD), tl.float32)
            for i0 in range(tl.maximum(begin, 0), tl.minimum(begin + BN + W - 1, count), BM):
                i = i0 + tl.arange(0, BM)
                real = i < count
                q = load_rows(q_row, q_t, i, real, D, BD).to(DOT)
                grad = load_rows(go_row, go_t, i, real, V, BV).to(DOT)
                level = tl.load(stats + stat + i, mask=real, other=0.0) * LOG2E
                share = tl.load(terms + stat + i, mask=real, other=0.0)
                offset = tl.load(terms + plane + stat + i, mask=real, other=0.0)
                gap = i[None, :] - j[:, None]
                mask = valid[:, None] & real[None, :] & (gap >= 0) & (gap < W)
                s = tl.dot(k, tl.trans(q), input_precision=PRECISION) * scale - level[None, :]
                p = tl.where(mask, tl.exp2(s), 0.0)
                ds = p * (tl.dot(v, tl.trans(grad), input_precision=PRECISION) * share[None, :] + offset[None, :])
                if MAXIMUM and LINEAR:
                    winner = tl.load(best + stat + i, mask=real, other=0)
                    grad_top = tl.load(terms + 4 * plane + stat + i, mask=real, other=0.0)
                    ds += tl.where(mask & (winner[None, :] == j[:, None]), grad_top[None, :], 0.0)
                acc_v = tl.dot((p * share[None, :]).to(DOT), grad, acc_v, input_precision=PRECISION)
                acc_k = tl.dot((ds * scaling).to(DOT), q, acc_k, input_precision=PRECISION)
            store_rows(grad_key + place * D, H * D, j, exists, acc_k, D, BD)
        if LINEAR:
            fk_row = feature_k + b64 * fk_b + (head // (H // E)) * fk_h
            fk = load_rows(fk_row, fk_t, key_first + j, valid, F, BF).to(DOT)
            if later:
                kv = load_rows(sums + sum_index * (F * V), V, f, f < F, V, BV)
                sender = (fk.to(tl.float32) * kept[:, None]).to(DOT) if DECAY else fk
                acc_v = tl.dot(sender, kv, acc_v, input_precision=PRECISION)
            if LAST and not DECAY:
                kv = load_rows(last_kv + last_index * (F * V), V, f, f < F, V, BV).to(DOT)
                sent = tl.dot(fk, kv, input_precision=PRECISION)
                acc_v += tl.where(folded[:, None] & sends_last, sent, 0.0)
            for i0 in range(tl.maximum(begin + W // BM * BM, 0), end, BM):
                i = i0 + tl.arange(0, BM)
                real = i < end
                grad = load_rows(go_row, go_t, i, real, V, BV).to(DOT)
                phi = load_rows(fq_row, fq_t, i, real, F, BF).to(DOT)
                inverse = tl.load(terms + 2 * plane + stat + i, mask=real, other=0.0)
                pairs = tl.dot(fk, tl.trans(phi), input_precision=PRECISION) * inverse[None, :]
                if DECAY:
                    left = tl.load(decay + i, mask=real, other=float("-inf"))
                    pairs *= tl.exp2(left[None, :] - since[:, None])
                pairs = tl.where(i[None, :] - j[:, None] >= W, pairs, 0.0)
                acc_v = tl.dot(pairs.to(DOT), grad, acc_v, input_precision=PRECISION)
        store_rows(grad_value + place * V, H * V, j, exists, acc_v, V, BV)
