"""Where a call's rows lie: plain batches, padded batches and packed sequences, without asking the GPU for a number.

A row is a batch entry, or one sequence of a packed call. Padding may lie anywhere: `compacted` puts a row's real
tokens in front of it, since kernels read them side by side. Kernels count a row's tokens of this call from 0 (`t`);
with a state the row's ring of W older keys stands before them, at t = -W .. -1, and the position in the row is
t + past.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

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
    """Describe the rows of a call (arguments of the public function, compacted; past is the state's count)."""
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


class _Reorder(torch.autograd.Function):
    """Tokens in another order; gradients come back by the inverse one, a copy and no sum."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return _ordered(x, order)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return _ordered(gradients[0], *ctx.saved_tensors), None, None


def _ordered(x: Tensor, order: Tensor) -> Tensor:
    """Tokens `order` `(B, T)` of x `(B, heads, T, D)`, copied with all heads of a token side by side."""
    batch = torch.arange(x.shape[0], device=x.device)[:, None]
    return x.transpose(1, 2)[batch, order].transpose(1, 2)


def compacted(attention_mask: Tensor | None, *tensors: Any) -> tuple[Tensor | None, tuple, Callable]:
    """Real tokens in front of the padding, in their order: what a stable sort of the mask gives.

    Whether a mask has gaps is not asked, for that would stop the host: every masked call of several tokens is copied.

    Args:
        attention_mask: `(B, T)`, 1 = real, or None. tensors: `(B, heads, T, .)`; what is no tensor stays as it is.

    Returns:
        The mask and the tensors in that order, and the function that brings an output back.
    """
    if attention_mask is None or attention_mask.shape[1] == 1:
        return attention_mask, tensors, lambda x: x
    mask = attention_mask.bool()
    token, before = torch.arange(mask.shape[1], device=mask.device), mask.cumsum(1)
    place = torch.where(mask, before - 1, before[:, -1:] + token - before)
    source = torch.empty_like(place).scatter_(1, place, token.expand_as(place))
    moved = tuple(_Reorder.apply(x, source, place) if isinstance(x, Tensor) else x for x in tensors)
    return token < before[:, -1:], moved, lambda x: _Reorder.apply(x, place, source)


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
