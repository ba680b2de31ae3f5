"""The Triton kernel of a one-token step: from query and key to output and state, one program per head and row.

A program owns one state head of one row and a block of value dimensions. It holds the head's sums `[F, Dv block]` in
registers, folds the key that leaves the window into them, reads them with every query head that shares them, and adds
the softmax over window and sinks. No program reads what another writes; `decode.py` says why.

Conditions that hold for a whole program bound a range (`d < tl.where(ok, D, 0)`): Triton's interpreter gives a scalar
mask the wrong type when it is spread over a vector.

Legend as in `decode.py`.
"""

import triton
import triton.language as tl


@triton.jit
def _features(
    x,
    ok,
    given,
    weight,
    bias,
    magnitude,
    row,
    row_ok,
    D: tl.constexpr,
    D2: tl.constexpr,
    WIDTH: tl.constexpr,
    F2: tl.constexpr,
    HALVES: tl.constexpr,
    ACTIVATION: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_MAGNITUDE: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Features of one token, `[HALVES * F2]`, at the places `row` and 0 elsewhere; x, given point at its vectors."""
    if ACTIVATION == 0:
        phi = tl.load(given + row, mask=row_ok, other=0.0).to(tl.float32)
    else:
        BOTH: tl.constexpr = ACTIVATION <= 2
        N: tl.constexpr = F2 if BOTH else HALVES * F2
        f: tl.constexpr = WIDTH if BOTH else HALVES * WIDTH
        if BOTH:
            column = tl.arange(0, N)
            column_ok = column < WIDTH
        else:
            column = row
            column_ok = row_ok
        u = tl.zeros((N,), tl.float32)
        level = tl.zeros((BLOCK_D,), tl.float32)
        for start in tl.static_range(0, D2, BLOCK_D):
            d = start + tl.arange(0, BLOCK_D)
            x_part = tl.load(x + d, mask=d < tl.where(ok, D, 0), other=0.0).to(tl.float32)
            w = tl.load(weight + d[:, None] * f + column[None], mask=(d < D)[:, None] & column_ok[None], other=0.0)
            u += tl.sum(x_part[:, None] * w.to(tl.float32), 0)
            if HAS_MAGNITUDE:
                level += x_part * tl.load(magnitude + d, mask=d < D, other=0.0).to(tl.float32)
        if HAS_BIAS:
            u += tl.load(bias + column, mask=column_ok, other=0.0).to(tl.float32)
        if BOTH:
            sign = 1.0 - 2.0 * tl.arange(0, 2).to(tl.float32)
            both = tl.where(column_ok[None], sign[:, None] * u[None], float("-inf"))
            both = tl.exp(both - tl.max(both, 1)[:, None])
            if ACTIVATION == 1:
                both = both / tl.sum(both, 1)[:, None]
            phi = tl.reshape(both, (2 * F2,))
        elif ACTIVATION == 3:
            phi = tl.maximum(u, 0.0)
        else:
            phi = tl.where(u > 0, 1.0 + u, tl.exp(tl.minimum(u, 0.0)))
        phi = tl.maximum(phi, 1e-12)
        if HAS_MAGNITUDE:
            phi = phi * tl.exp(tl.minimum(tl.maximum(tl.sum(level, 0), -10.0), 10.0))
    return tl.where(row_ok, tl.where(ok, phi, 0.0), 0.0)


@triton.jit
def _absorb(query, keys, values, place, ok, d, dv, scaling, top, total, output, D: tl.constexpr, DV: tl.constexpr):
    """Take the keys at `place` into a running softmax: its maximum, its sum and its weighted values."""
    mask = ok[:, None] & (d < D)[None]
    key = tl.load(keys + place[:, None] * D + d[None], mask=mask, other=0.0).to(tl.float32)
    score = tl.where(ok, tl.sum(key * query[None], 1) * scaling, float("-inf"))
    mask = ok[:, None] & (dv < DV)[None]
    value = tl.load(values + place[:, None] * DV + dv[None], mask=mask, other=0.0).to(tl.float32)
    higher = tl.maximum(top, tl.max(score, 0))
    weight = tl.exp(score - higher)
    rescale = tl.exp(top - higher)
    return higher, total * rescale + tl.sum(weight, 0), output * rescale + tl.sum(weight[:, None] * value, 0)


@triton.jit
def _mass(top, total, head, window_weight, window_shift, MAXIMUM, HAS_SHIFT, LOG_WEIGHT):
    """The softmax branch's mass, 0 when it has no key."""
    lse = top + tl.log(tl.maximum(total, 1e-37))
    level = top if MAXIMUM else lse
    tilt = tl.load(window_weight + head).to(tl.float32)
    if not LOG_WEIGHT:
        tilt = tl.log(tilt)
    if HAS_SHIFT:
        tilt += tl.load(window_shift + head).to(tl.float32) * level
    mass = tl.exp(lse - level + tl.minimum(tl.maximum(tilt, -30.0), 30.0))
    return tl.where(total > 0, mass, 0.0)


@triton.jit
def _copy_slots(
    old, new, fresh, place, slots, LENGTH: tl.constexpr, BLOCK: tl.constexpr, first, stop, N: tl.constexpr
):
    """Copy `slots` vectors of LENGTH, their elements first .. stop, with `fresh` in slot `place` (none if < 0)."""
    i = first + tl.arange(0, N)
    last = tl.minimum(stop, LENGTH)
    inside = i < last
    replacement = tl.load(fresh + i, mask=i < tl.where(place >= 0, last, 0), other=0.0)
    for start in range(0, slots, BLOCK):
        slot = start + tl.arange(0, BLOCK)
        at = slot[:, None] * LENGTH + i[None]
        mask = (slot < slots)[:, None] & inside[None]
        kept = tl.load(old + at, mask=mask, other=0.0)
        tl.store(new + at, tl.where((slot == place)[:, None], replacement[None].to(kept.dtype), kept), mask=mask)


@triton.jit
def hybrid_linear_decode_kernel(
    query,
    key,
    value,
    query_given,
    key_given,
    map_query,
    map_key,
    log_decay,
    query_weight,
    query_bias,
    query_magnitude,
    key_weight,
    key_bias,
    key_magnitude,
    window_weight,
    window_shift,
    real_mask,
    kv,
    normalizer,
    ring_key,
    ring_value,
    ring_features,
    sink_key,
    sink_value,
    count,
    ring_map_key,
    new_kv,
    new_normalizer,
    new_ring_key,
    new_ring_value,
    new_ring_features,
    new_sink_key,
    new_sink_value,
    new_count,
    new_ring_map_key,
    output,
    query_stride_b,
    query_stride_h,
    key_stride_b,
    key_stride_h,
    value_stride_b,
    value_stride_h,
    query_given_stride_b,
    query_given_stride_h,
    key_given_stride_b,
    key_given_stride_h,
    map_query_stride_b,
    map_query_stride_h,
    map_key_stride_b,
    map_key_stride_h,
    log_decay_stride_b,
    log_decay_stride_h,
    mask_stride,
    normalizer_half,
    scaling,
    batch,
    H: tl.constexpr,
    G: tl.constexpr,
    HK: tl.constexpr,
    D: tl.constexpr,
    D2: tl.constexpr,
    DM: tl.constexpr,
    DM2: tl.constexpr,
    DV: tl.constexpr,
    W: tl.constexpr,
    S: tl.constexpr,
    WIDTH: tl.constexpr,
    F2: tl.constexpr,
    HALVES: tl.constexpr,
    QUERY_ACTIVATION: tl.constexpr,
    KEY_ACTIVATION: tl.constexpr,
    QUERY_BIAS: tl.constexpr,
    KEY_BIAS: tl.constexpr,
    QUERY_MAGNITUDE: tl.constexpr,
    KEY_MAGNITUDE: tl.constexpr,
    HAS_SHIFT: tl.constexpr,
    HAS_MASK: tl.constexpr,
    MAPPED: tl.constexpr,
    DECAY: tl.constexpr,
    LOG_WEIGHT: tl.constexpr,
    MAXIMUM: tl.constexpr,
    IN_PLACE: tl.constexpr,
    INNER: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    SPLITS: tl.constexpr = (DV + BLOCK_DV - 1) // BLOCK_DV
    RATIO: tl.constexpr = H // HK  # query heads that share this program's sums
    RING: tl.constexpr = W + 1 if IN_PLACE else W
    F: tl.constexpr = HALVES * WIDTH
    split = tl.program_id(0) % SPLITS
    place = tl.program_id(0) // SPLITS
    hk = (
        place // (batch * INNER) * INNER + place % INNER
    )  # INNER heads of a row, then its other rows, then other heads
    b = (place // INNER % batch).to(tl.int64)
    g = hk // (HK // G)
    state_head, group = b * HK + hk, b * G + g

    t64 = tl.load(count + b)  # this token's index in its row
    t = t64.to(tl.int32)
    real = t >= 0
    if HAS_MASK:
        real = tl.load(real_mask + b * mask_stride) != 0
    leaving = t - W  # the token that leaves the window now; the new one itself when there is no window
    folds = real & (leaving >= S)
    d = tl.arange(0, D2)
    dv = split * BLOCK_DV + tl.arange(0, BLOCK_DV)
    key += b * key_stride_b + g * key_stride_h
    value += b * value_stride_b + g * value_stride_h
    ring_key += group * (RING * D)
    ring_value += group * (RING * DV)
    sink_key += group * (S * D)
    sink_value += group * (S * DV)
    if F > 0:
        # Rows of the sums in the order of the features, each half of a signed map padded to a power of 2.
        r = tl.arange(0, HALVES * F2)
        row = r // F2 * WIDTH + r % F2
        row_ok = r % F2 < WIDTH
        at = row[:, None] * DV + dv[None]
        at_ok = row_ok[:, None] & (dv < DV)[None]
        half = (t64 % 2) * normalizer_half if IN_PLACE else 0
        sums = tl.load(kv + state_head * (F * DV) + at, mask=at_ok, other=0.0, cache_modifier=".cg")
        norm = tl.load(normalizer + half + state_head * F + row, mask=row_ok, other=0.0)
        if DECAY:
            forget = tl.load(log_decay + b * log_decay_stride_b + hk * log_decay_stride_h).to(tl.float32)
            forget = tl.where(real, tl.exp(forget), 1.0)
            sums *= forget
            norm *= forget
        key_given += b * key_given_stride_b + hk * key_given_stride_h
        left_key, left_value, left_features = key, value, key_given
        if MAPPED:
            map_key += b * map_key_stride_b + g * map_key_stride_h
            ring_map_key += group * (RING * DM)
            left_key = map_key
        if W > 0:
            slot = (leaving + RING) % RING
            left_key, left_value = ring_map_key + slot * DM if MAPPED else ring_key + slot * D, ring_value + slot * DV
            if KEY_ACTIVATION == 0:
                left_features = ring_features + (state_head * RING + slot) * F
        phi = _features(
            left_key,
            folds,
            left_features,
            key_weight + hk * (DM * (F if KEY_ACTIVATION > 2 else WIDTH)),
            key_bias + hk * (F if KEY_ACTIVATION > 2 else WIDTH),
            key_magnitude + hk * DM,
            row,
            row_ok,
            DM,
            DM2,
            WIDTH,
            F2,
            HALVES,
            KEY_ACTIVATION,
            KEY_BIAS,
            KEY_MAGNITUDE,
            BLOCK_D,
        )
        sums += (
            phi[:, None] * tl.load(left_value + dv, mask=dv < tl.where(folds, DV, 0), other=0.0).to(tl.float32)[None]
        )
        norm += phi
        tl.store(new_kv + state_head * (F * DV) + at, sums, mask=at_ok)
        if split == 0:
            half = ((t64 + 1) % 2) * normalizer_half if IN_PLACE else 0
            write = tl.where(real, WIDTH, 0) if IN_PLACE else WIDTH
            tl.store(new_normalizer + half + state_head * F + row, norm, mask=r % F2 < write)

    own_key = tl.load(key + d, mask=d < tl.where(real, D, 0), other=0.0).to(tl.float32)
    own_value = tl.load(value + dv, mask=dv < tl.where(real, DV, 0), other=0.0).to(tl.float32)
    own = t < (S if W == 0 else 2147483647)  # the new token belongs to the softmax branch
    for i in range(RATIO):
        h = hk * RATIO + i
        q = query + b * query_stride_b + h * query_stride_h
        if W + S > 0:
            x = tl.load(q + d, mask=d < tl.where(real, D, 0), other=0.0).to(tl.float32)
            top = tl.where(own, tl.sum(x * own_key, 0) * scaling, -1e30)
            total = tl.where(own, 1.0, 0.0)
            soft = tl.where(own, own_value, 0.0)
            for start in range(0, W - 1, BLOCK_W):
                age = start + 1 + tl.arange(0, BLOCK_W)
                j = t - age
                slots = (j + RING) % RING
                ok = (age < W) & (j >= S)
                top, total, soft = _absorb(x, ring_key, ring_value, slots, ok, d, dv, scaling, top, total, soft, D, DV)
            for start in range(0, S, BLOCK_S):
                j = start + tl.arange(0, BLOCK_S)
                ok = (j < S) & (j < t)
                top, total, soft = _absorb(x, sink_key, sink_value, j, ok, d, dv, scaling, top, total, soft, D, DV)
            y = soft / tl.where(total > 0, total, 1.0)
        if F > 0:
            phi = _features(
                map_query + b * map_query_stride_b + h * map_query_stride_h if MAPPED else q,
                real,
                query_given + b * query_given_stride_b + h * query_given_stride_h,
                query_weight + h * (DM * (F if QUERY_ACTIVATION > 2 else WIDTH)),
                query_bias + h * (F if QUERY_ACTIVATION > 2 else WIDTH),
                query_magnitude + h * DM,
                row,
                row_ok,
                DM,
                DM2,
                WIDTH,
                F2,
                HALVES,
                QUERY_ACTIVATION,
                QUERY_BIAS,
                QUERY_MAGNITUDE,
                BLOCK_D,
            )
            numerator = tl.sum(phi[:, None] * sums, 0)
            denominator = tl.sum(phi * norm, 0)
            if W + S > 0:
                mass = _mass(top, total, h, window_weight, window_shift, MAXIMUM, HAS_SHIFT, LOG_WEIGHT)
                numerator += mass * y
                denominator += mass
            y = numerator / tl.maximum(denominator, 1e-20)
        tl.store(output + (b * H + h) * DV + dv, tl.where(real, y, 0.0), mask=dv < DV)

    # What raw keys, values and features become: one program of a group writes them.
    first, stop = split * BLOCK_DV, (split + 1) * BLOCK_DV
    ring_place = tl.where(real & (t >= S), t % RING if RING > 0 else 0, -1)
    sink_place = tl.where(real & (t < S), t, -1)
    leads = hk % (HK // G) == 0
    if IN_PLACE:
        if leads:
            if W > 0:
                keep = tl.where(ring_place >= 0, 1, 0)
                tl.store(ring_value + ring_place * DV + dv, own_value, mask=dv < keep * DV)
                if split == 0:
                    tl.store(ring_key + ring_place * D + d, own_key, mask=d < keep * D)
                    if MAPPED:
                        dm = tl.arange(0, DM2)
                        own_map_key = tl.load(map_key + dm, mask=dm < keep * DM, other=0.0)
                        tl.store(ring_map_key + ring_place * DM + dm, own_map_key, mask=dm < keep * DM)
            if S > 0:
                keep = tl.where(sink_place >= 0, 1, 0)
                tl.store(sink_value + sink_place * DV + dv, own_value, mask=dv < keep * DV)
                if split == 0:
                    tl.store(sink_key + sink_place * D + d, own_key, mask=d < keep * D)
        if F > 0:
            if (KEY_ACTIVATION == 0) & (W > 0):
                if split == 0:
                    keep = r % F2 < tl.where(ring_place >= 0, WIDTH, 0)
                    phi = tl.load(key_given + row, mask=keep, other=0.0)
                    tl.store(ring_features + (state_head * RING + ring_place) * F + row, phi, mask=keep)
    else:
        if leads:
            new_ring_value += group * (W * DV)
            new_sink_value += group * (S * DV)
            _copy_slots(ring_value, new_ring_value, value, ring_place, W, DV, BLOCK_W, first, stop, BLOCK_DV)
            _copy_slots(sink_value, new_sink_value, value, sink_place, S, DV, BLOCK_S, first, stop, BLOCK_DV)
            if split == 0:
                new_ring_key += group * (W * D)
                new_sink_key += group * (S * D)
                _copy_slots(ring_key, new_ring_key, key, ring_place, W, D, BLOCK_W, 0, D, D2)
                _copy_slots(sink_key, new_sink_key, key, sink_place, S, D, BLOCK_S, 0, D, D2)
                if MAPPED:
                    new_ring_map_key += group * (W * DM)
                    _copy_slots(ring_map_key, new_ring_map_key, map_key, ring_place, W, DM, BLOCK_W, 0, DM, DM2)
        if F > 0:
            if KEY_ACTIVATION == 0:
                if split == 0:
                    ring_features += state_head * (W * F)
                    new_ring_features += state_head * (W * F)
                    _copy_slots(ring_features, new_ring_features, key_given, ring_place, W, F, 16, 0, F, HALVES * F2)
        if (hk == 0) & (split == 0):
            tl.store(new_count + b, t64 + tl.where(real, 1, 0))
