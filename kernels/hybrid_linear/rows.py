"""Where a call's rows lie: plain batches, padded batches and packed sequences, without asking the GPU for a number.

A row is a batch entry, or one sequence of a packed call. Kernels count a row's tokens of this call from 0 (`t`); with
a state the row's ring of W older keys stands before them, at t = -W .. -1, and the position in the row is t + past.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launching import cdiv

PLAIN, SPANS, PACKED = 0, 1, 2


class Rows(NamedTuple):
    """What the kernels need to find a row's tokens; unused tensors are None.

    Fields: kind, one of PLAIN, SPANS, PACKED; batch, rows of the tensors; number, rows in all; length, tokens of the
    call; start `(B,)` int32 with size `(B,)` int32 for SPANS, `(N + 1,)` sequence bounds for PACKED; past `(B,)` int64
    tokens of each row before this call, with a state.
    """

    kind: int
    batch: int
    number: int
    length: int
    start: Tensor | None
    size: Tensor | None
    past: Tensor | None


class Blocks(NamedTuple):
    """How programs spread over the rows.

    Fields: total, the blocks of each row, or of all rows together when packed; row `(total,)` int32, the row of each
    block, and base `(N,)` int32, the first block of each row, both None unless packed.
    """

    total: int
    row: Tensor | None
    base: Tensor | None


def make_rows(query: Tensor, attention_mask: Tensor | None, cu_seqlens: Tensor | None, past: Tensor | None) -> Rows:
    """Describe the rows of a call (arguments of the public function; past is the state's count)."""
    batch, _, length, _ = query.shape
    past = None if past is None else past.contiguous()
    if cu_seqlens is not None:
        bounds = cu_seqlens.to(device=query.device, dtype=torch.int32).contiguous()
        return Rows(PACKED, 1, bounds.shape[0] - 1, length, bounds, None, None)
    if attention_mask is None:
        return Rows(PLAIN, batch, batch, length, None, None, past)
    mask = attention_mask.bool()
    start, size = mask.to(torch.int8).argmax(1).to(torch.int32), mask.sum(1, dtype=torch.int32)
    return Rows(SPANS, batch, batch, length, start, size, past)


def make_blocks(rows: Rows, block: int, extra: int = 0) -> Blocks:
    """Cut every row, lengthened by `extra` tokens, into blocks."""
    if rows.kind != PACKED:
        return Blocks(cdiv(rows.length + extra, block), None, None)
    assert rows.start is not None
    sizes = (rows.start[1:] - rows.start[:-1] + (extra + block - 1)).div(block, rounding_mode="floor")
    ends = sizes.cumsum(0, dtype=torch.int32)
    total = rows.length // block + rows.number * (1 + cdiv(extra, block))  # at least the sum, known without waiting
    places = torch.arange(total, device=ends.device, dtype=torch.int32)
    return Blocks(total, torch.searchsorted(ends, places, right=True, out_int32=True), ends - sizes)


@triton.jit
def row_span(row, start, size, length, KIND: tl.constexpr):
    """First token and number of tokens of a row."""
    if KIND == 0:
        first, count = 0, length
    elif KIND == 1:
        first = tl.load(start + row)
        count = tl.load(size + row)
    else:
        first = tl.load(start + row)
        count = tl.load(start + row + 1) - first
    return first, count


@triton.jit
def find_block(program, batch, table, base, number, start, size, length, KIND: tl.constexpr):
    """The block of a program: its place in the row, the row's first block, first token and number of tokens.

    A program beyond the last block of packed rows gets a row of no tokens.
    """
    if KIND == 2:
        row = tl.load(table + program)
        inside = row < number
        row = tl.minimum(row, number - 1)
        slot = tl.load(base + row)
        first, count = row_span(row, start, size, length, KIND)
        return program - slot, slot, first, tl.where(inside, count, 0)
    else:
        first, count = row_span(batch, start, size, length, KIND)
        return program, 0, first, count


@triton.jit
def load_rows(pointer, stride, index, inside, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """A tile `(rows, BLOCK)` of rows `index`, 0 where `inside` is false and beyond SIZE."""
    column = tl.arange(0, BLOCK)
    address = pointer + index.to(tl.int64)[:, None] * stride + column[None, :]
    if SIZE == BLOCK:
        return tl.load(address, mask=inside[:, None], other=0.0)
    else:
        return tl.load(address, mask=inside[:, None] & (column < SIZE)[None, :], other=0.0)


@triton.jit
def load_columns(pointer, stride, index, inside, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """The same tile transposed, `(BLOCK, rows)`."""
    column = tl.arange(0, BLOCK)
    address = pointer + index.to(tl.int64)[None, :] * stride + column[:, None]
    if SIZE == BLOCK:
        return tl.load(address, mask=inside[None, :], other=0.0)
    else:
        return tl.load(address, mask=inside[None, :] & (column < SIZE)[:, None], other=0.0)


@triton.jit
def store_rows(pointer, stride, index, inside, tile, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Write a tile `(rows, BLOCK)` at rows `index` where `inside`, up to column SIZE."""
    column = tl.arange(0, BLOCK)
    address = pointer + index.to(tl.int64)[:, None] * stride + column[None, :]
    if SIZE == BLOCK:
        tl.store(address, tile.to(pointer.dtype.element_ty), mask=inside[:, None])
    else:
        tl.store(address, tile.to(pointer.dtype.element_ty), mask=inside[:, None] & (column < SIZE)[None, :])
