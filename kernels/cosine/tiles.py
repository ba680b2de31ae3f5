"""What the kernels of cosine attention share: where a program's tokens lie, tiles in and out, and a row's factors.

A row is a batch entry, or one sequence of a packed call; its real tokens of this call count from 0 (`place`).
"""

import triton
import triton.language as tl

from ..hybrid_linear.rows import row_span


@triton.jit
def locate(program, batch, table, base, number, start, size, length, KIND: tl.constexpr):
    """The row of a chunk's program, the chunk's place in it, the row's first token and number of tokens.

    A program beyond the last chunk of packed rows gets a row of no tokens.
    """
    if KIND == 2:
        row = tl.load(table + program)
        inside = row < number
        row = tl.minimum(row, number - 1)
        first, count = row_span(row, start, size, length, KIND)
        return row, program - tl.load(base + row), first, tl.where(inside, count, 0)
    else:
        first, count = row_span(batch, start, size, length, KIND)
        return batch, program, first, count


@triton.jit
def load_tile(pointer, stride, index, inside, offset, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Columns offset .. offset + BLOCK of rows `index`: 0 where `inside` is false and beyond column SIZE."""
    column = offset + tl.arange(0, BLOCK)
    address = pointer + index.to(tl.int64)[:, None] * stride + column[None, :]
    if SIZE % BLOCK == 0:
        return tl.load(address, mask=inside[:, None], other=0.0)
    else:
        return tl.load(address, mask=inside[:, None] & (column < SIZE)[None, :], other=0.0)


@triton.jit
def store_tile(pointer, stride, index, inside, offset, tile, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Write a tile at columns offset .. offset + BLOCK of rows `index`, where `inside` and up to column SIZE."""
    column = offset + tl.arange(0, BLOCK)
    address = pointer + index.to(tl.int64)[:, None] * stride + column[None, :]
    tile = tile.to(pointer.dtype.element_ty)
    if SIZE % BLOCK == 0:
        tl.store(address, tile, mask=inside[:, None])
    else:
        tl.store(address, tile, mask=inside[:, None] & (column < SIZE)[None, :])


@triton.jit
def load_square(pointer, offset, ROWS: tl.constexpr, SIZE: tl.constexpr, R: tl.constexpr, C: tl.constexpr):
    """The tile `(R, C)` at column `offset` of a dense matrix `(ROWS, SIZE)`, 0 outside."""
    index = tl.arange(0, R)
    column = offset + tl.arange(0, C)
    address = pointer + index[:, None] * SIZE + column[None, :]
    if ROWS == R and SIZE % C == 0:
        return tl.load(address)
    else:
        return tl.load(address, mask=(index < ROWS)[:, None] & (column < SIZE)[None, :], other=0.0)


@triton.jit
def inverse_norm(x):
    """1 / max(|x|, 1e-12) of each row of a tile."""
    x = x.to(tl.float32)
    return 1.0 / tl.maximum(tl.sqrt(tl.sum(x * x, axis=1)), 1e-12)


@triton.jit
def log_count(place, row, count, past, PAST: tl.constexpr, CAUSAL: tl.constexpr):
    """log c of each place in a row: the tokens up to and including it, or all of the row's when not causal."""
    seen = place + 1
    if PAST:
        seen = seen + tl.load(past + row).to(tl.int32)
    if not CAUSAL:
        seen = seen * 0 + count
    return tl.log(tl.maximum(seen, 1).to(tl.float32))


@triton.jit
def level_of(logarithm, exponent, head, POWER: tl.constexpr):
    """c^-s of a head where this side carries the power, else 1."""
    if POWER:
        return tl.exp(-tl.load(exponent + head).to(tl.float32) * logarithm)
    else:
        return logarithm * 0.0 + 1.0


@triton.jit
def gain_of(gain, head, GAIN: tl.constexpr):
    if GAIN:
        return tl.load(gain + head).to(tl.float32)
    else:
        return 1.0
