"""The grouped softmax over all blocks in PyTorch: tiles of query blocks, linear memory in T forward and backward.

Legend as in `op_landmark.py`. Rows are put on a grid of blocks first, so that a tile is whole blocks of every row.
"""

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from .compiled import for_training

HIDDEN = -1e30  # a logit of nothing; finite, since infinities give NaN in gradients
TILE_ELEMENTS = 2**25  # scores that a tile may hold


def run_landmark(query, key, value, *, block_size, offset, scaling, attention_mask, cu_seqlens, open_blocks=None):
    """`landmark_attention` without its checks."""
    dtype, heads = query.dtype, query.shape[1]
    if query.shape[2] == 0:
        return query, None
    if cu_seqlens is not None:
        rows, attention_mask = packed_rows(cu_seqlens, query.device)
        output, _ = run_landmark(
            *(_take(x[0], rows).transpose(0, 1) for x in (query, key, value)),
            block_size=block_size, offset=offset, scaling=scaling, attention_mask=attention_mask, cu_seqlens=None,
            open_blocks=open_blocks,
        )  # fmt: skip
        return output.transpose(0, 1)[:, attention_mask][None], None
    grid = Grid(query, block_size, offset, attention_mask)
    blocks = [grid.spread(x).unflatten(2, (-1, block_size)) for x in (query, key, value)]
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    groups = key.shape[1]
    blocks[0] = blocks[0].unflatten(1, (groups, heads // groups))
    outputs, count = [], blocks[0].shape[3]
    is_open = None if open_blocks is None else _fit(open_blocks.to(query.device), count)
    start = 0
    while start < count:
        stop = _tile_end(start, count, query.shape[0] * heads * block_size**2)
        tile = (
            blocks[0][:, :, :, start:stop], blocks[1][:, :, :stop], blocks[2][:, :, :stop], grid.real[:, :stop],
            None if is_open is None else is_open[:, :stop],
        )  # fmt: skip
        if torch.is_grad_enabled() and query.requires_grad and count > stop - start:
            outputs.append(checkpoint(for_training(_attend), *tile, scaling, use_reentrant=False))
        else:
            outputs.append(for_training(_attend)(*tile, scaling))
        start = stop
    output = torch.cat(outputs, dim=3).flatten(1, 2).flatten(2, 3)
    return grid.collect(output).to(dtype), None


def packed_rows(cu_seqlens: Tensor, device) -> tuple[Tensor, Tensor]:
    """Packed sequences as rows: token of each place `(N, L)`, and which places are real."""
    starts, lengths = cu_seqlens[:-1].long().to(device), cu_seqlens.diff().long().to(device)
    place = torch.arange(int(lengths.max()), device=device)
    real = place < lengths[:, None]
    return torch.where(real, starts[:, None] + place, 0), real


def _take(x: Tensor, rows: Tensor) -> Tensor:
    """`(H, T, D)` to `(H, N, L, D)`."""
    return x[:, rows]


def _fit(open_blocks: Tensor, count: int) -> Tensor:
    """`(B, count)`: without the blocks beyond, and what it does not reach open."""
    return functional.pad(open_blocks[:, :count], (0, max(0, count - open_blocks.shape[1])), value=True)


def _tile_end(start: int, count: int, elements: int) -> int:
    """Blocks of queries from `start` on, such that their scores with all keys before their end fit."""
    stop = start + 1
    while stop < count and (stop + 1 - start) * (stop + 1) * elements <= TILE_ELEMENTS:
        stop += 1
    return stop


class Grid:
    """Where the tokens of each row stand among its blocks.

    Args:
        like: `(B, H, T, D)`, for sizes. others: as in `landmark_attention`.

    Attributes:
        real: `(B, blocks, P)`, places that hold a token.
        number: None, for blocks that count from 0.
    """

    number: Tensor | None = None

    def __init__(self, like: Tensor, block_size: int, offset: int | Tensor, attention_mask: Tensor | None):
        (batch, _, length, _), device = like.shape, like.device
        self.length = length
        longest = length + (offset if isinstance(offset, int) else block_size - 1)
        places = -(-longest // block_size) * block_size
        self.simple = attention_mask is None and isinstance(offset, int) and offset == 0
        if self.simple:
            self.pad = places - length
            real = torch.arange(places, device=device) < length
            self.real = real.expand(batch, -1).unflatten(1, (-1, block_size))
            return
        if attention_mask is None:
            mask = torch.ones(batch, length, dtype=torch.bool, device=device)
        else:
            mask = attention_mask.bool()
        if isinstance(offset, Tensor):
            offset = offset.to(device)[:, None]
        self.mask = mask
        self.place = torch.where(mask, mask.long().cumsum(1) - 1 + offset, places)
        token = torch.full((batch, places + 1), length, device=device)
        token.scatter_(1, self.place, torch.arange(length, device=device).expand(batch, -1).contiguous())
        self.token = token[:, :places]
        self.real = (self.token < length).unflatten(1, (-1, block_size))

    def spread(self, x: Tensor) -> Tensor:
        """`(B, H, T, D)` to `(B, H, blocks * P, D)`, zeros where no token is."""
        if self.simple:
            return functional.pad(x, (0, 0, 0, self.pad))
        return _along(functional.pad(x, (0, 0, 0, 1)), self.token)

    def collect(self, x: Tensor) -> Tensor:
        """Back to the tokens, zeros at padding."""
        if self.simple:
            return x[:, :, : self.length]
        taken = _along(x, self.place.clamp(max=x.shape[2] - 1))
        return taken.masked_fill(~self.mask[:, None, :, None], 0.0)


class TextGrid(Grid):
    """The grid of packed texts, each of which starts a block; on a GPU the host waits for the number of blocks.

    Args:
        position: `(T,)`, a token's place in its text.

    Attributes:
        number: `(blocks,)`, of each block in its text.
    """

    def __init__(self, position: Tensor, block_size: int):
        self.length, self.simple = position.shape[0], False
        begins = position % block_size == 0
        self.number = position[begins] // block_size
        places = self.number.shape[0] * block_size
        self.mask = torch.ones_like(begins)[None]
        self.place = ((begins.cumsum(0) - 1) * block_size + position % block_size)[None]
        token = torch.full((1, places), self.length, device=position.device)
        self.token = token.scatter_(1, self.place, torch.arange(self.length, device=position.device)[None])
        self.real = (self.token < self.length).unflatten(1, (-1, block_size))


def _along(x: Tensor, index: Tensor) -> Tensor:
    """`x[b, h, index[b, i]]`."""
    return x.gather(2, index[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))


def _attend(query, key, value, real, is_open, scaling):
    """The last blocks of queries over all keys.

    Args:
        query: `(B, G, H/G, u, P, D)`, the last u of N blocks; key, value: `(B, G, N, P, D)`; real: `(B, N, P)`.
        is_open: `(B, N)`, blocks that later ones read; None, all.

    Returns:
        `(B, G, H/G, u, P, D)`, float32 at least.
    """
    u, size = query.shape[3:5]
    blocks = key.shape[2]
    scores = product(query.flatten(3, 4), key.flatten(2, 3)[:, :, None].transpose(-1, -2)) * scaling
    scores = scores.unflatten(-1, (blocks, size)).unflatten(3, (u, size))  # (B, G, H/G, u, P, N, P)
    own = torch.arange(blocks - u, blocks, device=query.device)[:, None]
    number = torch.arange(blocks, device=query.device)
    earlier = (number < own)[:, None, :, None]  # (u, 1, N, 1)
    if is_open is not None:
        earlier = earlier & is_open[:, None, None, None, None, :, None]  # (B, 1, 1, u, 1, N, 1)
    place = torch.arange(size, device=query.device)
    local = (number == own)[:, None, :, None] & (place[:-1] <= place[:, None])[:, None]  # (u, P, N, F)
    tokens = real[:, None, None, None, None, :, :-1]
    inner = scores[..., :-1].masked_fill(~tokens, HIDDEN)
    gate = scores[..., -1] - inner.logsumexp(-1)  # of an earlier block, whose landmark is there
    logits = torch.where(earlier, inner + gate[..., None], inner)
    logits = logits.masked_fill(~(tokens & (earlier | local)), HIDDEN).flatten(-2)
    return weighted(logits, value[:, :, None, :, :-1].flatten(3, 4)[:, :, :, None])


def product(left: Tensor, right: Tensor) -> Tensor:
    """`left @ right`, in float32 at least: a product of bfloat16 tensors would round its result to bfloat16."""
    wide = torch.promote_types(torch.promote_types(left.dtype, right.dtype), torch.float32)
    return left.to(wide) @ right.to(wide)


def weighted(logits: Tensor, value: Tensor) -> Tensor:
    """`softmax(logits) @ value`, in which hidden logits have no weight; 0 where all are hidden."""
    weights = (logits - logits.amax(-1, keepdim=True)).exp() * (logits > HIDDEN / 2)
    total = weights.sum(-1, keepdim=True)
    return product(weights, value) / total.clamp(min=1e-20)
