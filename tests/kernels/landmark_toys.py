"""Small inputs of the landmark ops: random tokens, rotary tables, and sequences laid out in blocks.

Legend: B batch, H query heads, G key/value heads, T tokens, D head dim, P block size, U blocks of a call, N stored
blocks, M positions of a table.
"""

from typing import NamedTuple

import torch

BASE = 40.0  # of the rotary frequencies: at D = 6 the slowest pair turns by 0.09 a token, the fastest by 1


class Blocks(NamedTuple):
    """Stored blocks, in the fields of `LandmarkBlocks`."""

    key: torch.Tensor
    value: torch.Tensor
    landmark: torch.Tensor
    index: torch.Tensor  # type: ignore[assignment]  # hides tuple.index


def draw(length, *, batch=2, heads=4, groups=2, dim=6, dtype=torch.float64, seed=0):
    """Queries, keys and values of whole sequences, not rotated; spread so that softmaxes are far from uniform."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(batch, count, length, dim) for count in (heads, groups, groups)]
    return [2 * torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes]


def rotary_tables(length, dim=6, factor=1.0, dtype=torch.float64):
    """Cosines and sines `(M, D)` of positions 0 to M - 1 with a common factor, as transformers' modules give them."""
    frequency = BASE ** (-2 * torch.arange(dim // 2, dtype=dtype) / dim)
    angle = torch.arange(length, dtype=dtype)[:, None] * torch.cat([frequency, frequency])
    return factor * angle.cos(), factor * angle.sin()


def rotate(x, cos, sin, positions=None):
    """Rotate `(..., T, D)` to its positions; without any, to 0, 1, ...; without tables, not at all."""
    if cos is None:
        return x
    positions = torch.arange(x.shape[-2]) if positions is None else positions
    left, right = x.chunk(2, -1)
    return x * cos[positions] + torch.cat([-right, left], -1) * sin[positions]


def by_place(key, block_size, cos=None, sin=None):
    """Keys `(..., T, D)` of a sequence from its start, rotated by their places in their blocks."""
    return rotate(key, cos, sin, torch.arange(key.shape[-2]) % block_size)


def blocks_of(key, value, block_size, cos=None, sin=None, *, lengths=None):
    """The complete blocks of sequences `(B, G, T, D)`, block i in slot i; a shorter row leaves NaN and index -1."""
    batch, _, length, _ = key.shape
    lengths = [length] * batch if lengths is None else lengths
    first = torch.zeros(batch, dtype=torch.int64)
    count = max(lengths) // block_size
    stored = [n // block_size * block_size for n in lengths]
    keys, values = local_of(key, value, block_size, first, count, cos, sin, lengths=stored)
    index = torch.arange(count).expand(batch, count)
    index = index.where(index < torch.tensor(lengths)[:, None] // block_size, -1)
    return Blocks(keys, values, keys[..., -1, :].clone(), index)


def local_of(key, value, block_size, first, count, cos=None, sin=None, *, lengths=None):
    """Keys and values `(B, G, U, P, D)` of blocks `first` to `first + count` of each row; NaN past its length."""
    batch, groups, length, _ = key.shape
    lengths = [length] * batch if lengths is None else lengths
    sides = []
    for x in (by_place(key, block_size, cos, sin), value):
        rows = []
        for b in range(batch):
            start = int(first[b]) * block_size
            real = x[b, :, start : min(lengths[b], start + count * block_size)]
            absent = x.new_full((groups, count * block_size - real.shape[1], x.shape[-1]), torch.nan)
            rows.append(torch.cat([real, absent], 1).unflatten(1, (count, block_size)))
        sides.append(torch.stack(rows))
    return sides


def shuffled(blocks, seed=0, spare=2):
    """The same blocks in other slots, another order in each row, with empty slots among them."""
    generator = torch.Generator().manual_seed(seed)
    batch, count = blocks.index.shape
    order = torch.stack([torch.randperm(count + spare, generator=generator) for _ in range(batch)])

    def move(x, empty, dim):
        shape = [*x.shape[:dim], spare, *x.shape[dim + 1 :]]
        x = torch.cat([x, x.new_full(shape, empty)], dim)
        return torch.stack([row.index_select(dim - 1, places) for row, places in zip(x, order, strict=True)])

    return Blocks(*(move(x, torch.nan, 2) for x in blocks[:3]), move(blocks.index, -1, 1))


def retrieval_call(inputs, block_size, rotary=None, *, spans=None, side="right"):
    """A call of the retrieval op on some tokens of whole sequences, whose complete blocks are all stored.

    Args:
        inputs: queries, keys and values of the sequences, not rotated.
        rotary: `(cos, sin)`, or None.
        spans: each row's first token of this call and the end; all tokens without it.
        side: where shorter rows have their padding, which holds NaN.

    Returns:
        `(query, key, value, blocks)` and the options `position`, `first` and `rotary`.
    """
    query, key, value = inputs
    spans = [(0, query.shape[2])] * query.shape[0] if spans is None else spans
    tables = (None, None) if rotary is None else rotary
    width = max(stop - start for start, stop in spans)
    positions, queries = [], []
    for row, (start, stop) in zip(query, spans, strict=True):
        absent = width - (stop - start)
        parts = [torch.arange(start, stop), torch.full((absent,), -1)]
        pieces = [row[:, start:stop], row.new_full((row.shape[0], absent, row.shape[2]), torch.nan)]
        order = 1 if side == "right" else -1
        positions.append(torch.cat(parts[::order]))
        queries.append(torch.cat(pieces[::order], 1))
    first = torch.tensor([start // block_size for start, _ in spans])
    count = max(-(-stop // block_size) - start // block_size for start, stop in spans)
    lengths = [stop for _, stop in spans]
    local = local_of(key, value, block_size, first, count, *tables, lengths=lengths)
    blocks = blocks_of(key, value, block_size, *tables, lengths=lengths)
    options = {"position": torch.stack(positions), "first": first, "rotary": rotary}
    return (torch.stack(queries), *local, blocks), options
