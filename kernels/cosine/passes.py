"""The three kernels of cosine attention; forward and backward are both made of them (README.md has the formulas).

Each token has a vector x (key or query) of width DX, a vector y of width DY (value or output gradient), and a factor
f = gain c^-s / |x| (what of it applies to its side). With f inside the sums, two sides look alike:

    sums      S = sum over tokens of x (f y)^T, before each chunk of CHUNK tokens, from either end of the row
    apply     out_m = f_m (x_m S + sum over the chunk's tokens j that m meets of (x_m . x_j) f_j y_j)
    project   du_m = S y_m + sum over the same j of (y_m . y_j) f_j x_j, then through x / |x| to the gradient of x_m

Programs of a head p read head (p LOOP + r) // DIVISOR of the other side for r = 0 .. LOOP - 1, which covers both ways
of sharing a key head among query heads.
"""

import triton
import triton.language as tl

from ..hybrid_linear.rows import row_span
from .tiles import gain_of, inverse_norm, level_of, load_square, load_tile, locate, log_count, store_tile


@triton.jit
def cosine_sums_kernel(
    x, y, exponent, gain, initial, factor, snapshots, total, start, size, past, base,
    x_batch, x_head, x_token, y_batch, y_head, y_token, length, slots, segments,
    DX: tl.constexpr, DY: tl.constexpr, BLOCK_X: tl.constexpr, BLOCK_Y: tl.constexpr, CHUNK: tl.constexpr,
    LOOP: tl.constexpr, X_DIVISOR: tl.constexpr, KIND: tl.constexpr, CAUSAL: tl.constexpr, REVERSE: tl.constexpr,
    POWER: tl.constexpr, GAIN: tl.constexpr, PAST: tl.constexpr, INITIAL: tl.constexpr, TOTAL: tl.constexpr,
    DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (blocks of DY x segments, heads of the sums, rows).

    Causal, one segment: `snapshots` `(B, heads, slots, DX, DY)` gets the sum before each chunk (after it in the row,
    when REVERSE), `total` `(B, heads, DX, DY)` the last one. Not causal: `total` `(rows, heads, segments, DX, DY)`
    gets each segment's own sum. `factor` `(B, heads LOOP, T)` gets f, for the local pairs of the other kernels.
    """
    BLOCKS: tl.constexpr = (DY + BLOCK_Y - 1) // BLOCK_Y
    segment = tl.program_id(0) // BLOCKS
    offset = (tl.program_id(0) % BLOCKS) * BLOCK_Y
    head, row = tl.program_id(1), tl.program_id(2)
    heads = tl.num_programs(1)
    first, count = row_span(row, start, size, length, KIND)
    if KIND == 2:
        batch = tl.zeros((), tl.int64)
        slot = tl.load(base + row)
    else:
        batch = row.to(tl.int64)
        slot = 0
    x += batch * x_batch
    y += batch * y_batch
    factor += batch * heads * LOOP * length + first
    snapshots += ((batch * heads + head) * slots + slot) * (DX * DY)
    rank = tl.arange(0, BLOCK_X)
    inside_rank = rank < DX
    if INITIAL:
        first_sum = initial + (batch * heads + head) * (DX * DY)
        sums = load_tile(first_sum, DY, rank, inside_rank, offset, DY, BLOCK_Y).to(tl.float32)
    else:
        sums = tl.zeros((BLOCK_X, BLOCK_Y), tl.float32)
    chunks = tl.cdiv(count, CHUNK)
    share = tl.cdiv(chunks, segments)
    for step in range(segment * share * LOOP, tl.minimum((segment + 1) * share, chunks) * LOOP):
        chunk = step // LOOP
        turn = head * LOOP + step % LOOP
        if REVERSE:
            chunk = chunks - 1 - chunk
        if CAUSAL:
            fresh = inside_rank
            if LOOP > 1:  # the chunk's first head
                fresh = inside_rank & (rank * 0 + step % LOOP == 0)
            place_of = snapshots + chunk.to(tl.int64) * (DX * DY)
            store_tile(place_of, DY, rank, fresh, offset, sums, DY, BLOCK_Y)
        place = chunk * CHUNK + tl.arange(0, CHUNK)
        inside = place < count
        source = (turn // X_DIVISOR).to(tl.int64)
        x_tile = load_tile(x + source * x_head, x_token, first + place, inside, 0, DX, BLOCK_X)
        y_tile = load_tile(y + source * y_head, y_token, first + place, inside, offset, DY, BLOCK_Y)
        level = level_of(log_count(place, row, count, past, PAST, CAUSAL), exponent, turn, POWER)
        f = inverse_norm(x_tile) * level * gain_of(gain, turn, GAIN)
        tl.store(factor + turn.to(tl.int64) * length + place, f, mask=inside & (place * 0 + offset == 0))
        weighted = (y_tile.to(tl.float32) * f[:, None]).to(DTYPE)
        sums = tl.dot(tl.trans(x_tile.to(DTYPE)), weighted, sums, input_precision=PRECISION)
    if TOTAL:
        target = total + ((row.to(tl.int64) * heads + head) * segments + segment) * (DX * DY)
        store_tile(target, DY, rank, inside_rank, offset, sums, DY, BLOCK_Y)


@triton.jit
def cosine_apply_kernel(
    x, other_x, other_y, factor, snapshots, out, exponent, gain,
    start, size, past, table, base,
    x_batch, x_head, x_token, ox_batch, ox_head, ox_token, oy_batch, oy_head, oy_token,
    out_batch, out_head, out_token, number, length, slots,
    DX: tl.constexpr, DY: tl.constexpr, BLOCK_X: tl.constexpr, BLOCK_Y: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, LOOP: tl.constexpr, X_DIVISOR: tl.constexpr,
    O_DIVISOR: tl.constexpr, S_DIVISOR: tl.constexpr, KIND: tl.constexpr, CAUSAL: tl.constexpr, AFTER: tl.constexpr,
    POWER: tl.constexpr, GAIN: tl.constexpr, PAST: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (heads, chunks x parts of BLOCK_M tokens x blocks of DY, B); AFTER: a token meets those after it."""
    BLOCKS: tl.constexpr = (DY + BLOCK_Y - 1) // BLOCK_Y
    PARTS: tl.constexpr = CHUNK // BLOCK_M
    head, batch = tl.program_id(0), tl.program_id(2).to(tl.int64)
    heads = tl.num_programs(0)
    offset = (tl.program_id(1) % BLOCKS) * BLOCK_Y
    part = tl.program_id(1) // BLOCKS % PARTS
    program = tl.program_id(1) // (BLOCKS * PARTS)
    row, chunk, first, count = locate(program, batch, table, base, number, start, size, length, KIND)
    place = chunk * CHUNK + part * BLOCK_M + tl.arange(0, BLOCK_M)
    if chunk * CHUNK + part * BLOCK_M >= count:
        return
    inside = place < count
    x += batch * x_batch + (head // X_DIVISOR).to(tl.int64) * x_head
    x_tile = load_tile(x, x_token, first + place, inside, 0, DX, BLOCK_X)
    if CAUSAL:
        slot = (batch * (heads // S_DIVISOR) + head // S_DIVISOR) * slots + program
    else:
        slot = row.to(tl.int64) * (heads // S_DIVISOR) + head // S_DIVISOR
    snapshots += slot * (DX * DY)
    sums = load_square(snapshots, offset, DX, DY, BLOCK_X, BLOCK_Y).to(DTYPE)
    level = level_of(log_count(place, row, count, past, PAST, CAUSAL), exponent, head, POWER)
    own_factor = inverse_norm(x_tile) * level * gain_of(gain, head, GAIN)
    operand = x_tile.to(DTYPE)
    result = tl.dot(operand, sums, input_precision=PRECISION)
    if CAUSAL:
        other_x += batch * ox_batch
        other_y += batch * oy_batch
        factor += batch * (heads * LOOP // S_DIVISOR) * length + first
        # The tokens that this part meets in its chunk: its own and those before it (after it).
        lowest = AFTER * part * BLOCK_M
        blocks = ((1 - AFTER) * (part + 1) * BLOCK_M + AFTER * (CHUNK - part * BLOCK_M)) // BLOCK_N
        for step in range(blocks * LOOP):
            turn = head * LOOP + step // blocks
            source = (turn // O_DIVISOR).to(tl.int64)
            other = chunk * CHUNK + lowest + (step % blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
            met = other < count
            ox_tile = load_tile(other_x + source * ox_head, ox_token, first + other, met, 0, DX, BLOCK_X)
            oy_tile = load_tile(other_y + source * oy_head, oy_token, first + other, met, offset, DY, BLOCK_Y)
            f = tl.load(factor + (turn // S_DIVISOR).to(tl.int64) * length + other, mask=met, other=0.0)
            pairs = tl.dot(operand, tl.trans(ox_tile.to(DTYPE)), input_precision=PRECISION)
            order = (other[None, :] >= place[:, None]) if AFTER else (other[None, :] <= place[:, None])
            pairs = tl.where(order, pairs * f[None, :], 0.0).to(DTYPE)
            result = tl.dot(pairs, oy_tile.to(DTYPE), result, input_precision=PRECISION)
    result *= own_factor[:, None]
    out += batch * out_batch + head.to(tl.int64) * out_head
    store_tile(out, out_token, first + place, inside, offset, result, DY, BLOCK_Y)


@triton.jit
def cosine_project_kernel(
    x, y, other_x, other_y, factor, snapshots, out, partial, exponent, gain,
    start, size, past, table, base,
    x_batch, x_head, x_token, y_batch, y_head, y_token, ox_batch, ox_head, ox_token, oy_batch, oy_head, oy_token,
    out_batch, out_head, out_token, number, length, slots,
    DX: tl.constexpr, DY: tl.constexpr, BLOCK_X: tl.constexpr, BLOCK_Y: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, LOOP: tl.constexpr, X_DIVISOR: tl.constexpr,
    O_DIVISOR: tl.constexpr, S_DIVISOR: tl.constexpr, KIND: tl.constexpr, CAUSAL: tl.constexpr, AFTER: tl.constexpr,
    POWER: tl.constexpr, GAIN: tl.constexpr, PAST: tl.constexpr, PARTIAL: tl.constexpr,
    DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (heads, chunks x parts of BLOCK_M tokens, B); `partial` `(2, heads, B, programs)`: exponent, gain."""
    BLOCKS: tl.constexpr = (DY + BLOCK_Y - 1) // BLOCK_Y
    PARTS: tl.constexpr = CHUNK // BLOCK_M
    head, batch = tl.program_id(0), tl.program_id(2).to(tl.int64)
    heads = tl.num_programs(0)
    part = tl.program_id(1) % PARTS
    program = tl.program_id(1) // PARTS
    row, chunk, first, count = locate(program, batch, table, base, number, start, size, length, KIND)
    place = chunk * CHUNK + part * BLOCK_M + tl.arange(0, BLOCK_M)
    if chunk * CHUNK + part * BLOCK_M >= count:
        return
    inside = place < count
    y += batch * y_batch + (head // X_DIVISOR).to(tl.int64) * y_head
    if CAUSAL:
        slot = (batch * (heads // S_DIVISOR) + head // S_DIVISOR) * slots + program
    else:
        slot = row.to(tl.int64) * (heads // S_DIVISOR) + head // S_DIVISOR
    snapshots += slot * (DX * DY)
    result = tl.zeros((BLOCK_M, BLOCK_X), tl.float32)
    for block in tl.static_range(BLOCKS):
        y_tile = load_tile(y, y_token, first + place, inside, block * BLOCK_Y, DY, BLOCK_Y).to(DTYPE)
        sums = load_square(snapshots, block * BLOCK_Y, DX, DY, BLOCK_X, BLOCK_Y).to(DTYPE)
        result = tl.dot(y_tile, tl.trans(sums), result, input_precision=PRECISION)
    if CAUSAL:
        other_x += batch * ox_batch
        other_y += batch * oy_batch
        factor += batch * (heads * LOOP // S_DIVISOR) * length + first
        lowest = AFTER * part * BLOCK_M
        blocks = ((1 - AFTER) * (part + 1) * BLOCK_M + AFTER * (CHUNK - part * BLOCK_M)) // BLOCK_N
        for step in range(blocks * LOOP):
            turn = head * LOOP + step // blocks
            source = (turn // O_DIVISOR).to(tl.int64)
            other = chunk * CHUNK + lowest + (step % blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
            met = other < count
            f = tl.load(factor + (turn // S_DIVISOR).to(tl.int64) * length + other, mask=met, other=0.0)
            pairs = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            for block in tl.static_range(BLOCKS):
                if BLOCKS > 1:
                    y_tile = load_tile(y, y_token, first + place, inside, block * BLOCK_Y, DY, BLOCK_Y).to(DTYPE)
                source_y = other_y + source * oy_head
                oy_tile = load_tile(source_y, oy_token, first + other, met, block * BLOCK_Y, DY, BLOCK_Y)
                pairs = tl.dot(y_tile, tl.trans(oy_tile.to(DTYPE)), pairs, input_precision=PRECISION)
            order = (other[None, :] >= place[:, None]) if AFTER else (other[None, :] <= place[:, None])
            pairs = tl.where(order, pairs * f[None, :], 0.0).to(DTYPE)
            ox_tile = load_tile(other_x + source * ox_head, ox_token, first + other, met, 0, DX, BLOCK_X)
            result = tl.dot(pairs, ox_tile.to(DTYPE), result, input_precision=PRECISION)
    x += batch * x_batch + (head // X_DIVISOR).to(tl.int64) * x_head
    x_tile = load_tile(x, x_token, first + place, inside, 0, DX, BLOCK_X).to(tl.float32)
    r = inverse_norm(x_tile)
    logarithm = log_count(place, row, count, past, PAST, CAUSAL)
    level = level_of(logarithm, exponent, head, POWER)
    weight = level * gain_of(gain, head, GAIN)
    along = r * tl.sum(x_tile * result, axis=1)  # <x / |x|, du> before the weight
    # Below the floor of the norm, x / 1e-12 has no projection.
    bend = tl.where(r < 9.99999e11, r * along, 0.0)
    slope = tl.where(tl.sum(x_tile * x_tile, axis=1) > 0.0, weight * r, 0.0)  # a zero vector has a zero gradient
    gradient = (result - x_tile * bend[:, None]) * slope[:, None]
    out += batch * out_batch + head.to(tl.int64) * out_head
    store_tile(out, out_token, first + place, inside, 0, gradient, DX, BLOCK_X)
    if PARTIAL:
        along = tl.where(inside, along, 0.0)
        programs = tl.num_programs(1)
        target = partial + (head * tl.num_programs(2) + batch) * programs + tl.program_id(1)
        if POWER:
            tl.store(target, tl.sum(-logarithm * weight * along))
        else:
            tl.store(target, 0.0)
        tl.store(target + heads * tl.num_programs(2) * programs, tl.sum(level * along))
