"""How the linear branch of hybrid linear attention forgets, for the chunked path.

A key enters the memory when it leaves the window: token n first multiplies the memory by `exp(log_decay_n)`, then adds
key n - W at weight 1, then reads. Weights are sums of logarithms over the tokens between, taken inside one tile, so
that no exponential is of a positive number and nothing large cancels.

Legend as in `op_hybrid_linear.py`; HK heads of the key features, n chunks, C tokens of a chunk.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional


class ChunkDecay(NamedTuple):
    """The weights of one pass over chunks: of a key at a query of its chunk, of the memory before the chunk at a
    query, of a key at the chunk's end, and of what was there at the start of chunk p at the start of chunk c.

    Fields: pairs `(B, HK, n, C, C)`, key p being the one that enters at token p; read `(B, HK, n, C)`; kept
    `(B, HK, n, C)`; across `(B, HK, n, n)`, 0 where p > c.
    """

    pairs: Tensor
    read: Tensor
    kept: Tensor
    across: Tensor


def chunk_decay(log_decay: Tensor) -> ChunkDecay:
    """The weights for log_decay `(B, HK, n, C)`, 0 at padding."""
    sums = log_decay.cumsum(-1)
    pairs = (sums[..., :, None] - sums[..., None, :]).clamp(max=0.0).exp()
    whole = sums[..., -1]
    count = whole.shape[-1]
    # Row c, column p: the sum over the chunks p <= k < c, added up without a difference of long sums.
    order = torch.arange(count, device=whole.device)
    between = whole[..., None].expand(*whole.shape, count).masked_fill(order[:, None] < order, 0.0).cumsum(-2)
    between = functional.pad(between[..., :-1, :], (0, 0, 1, 0)).exp()
    return ChunkDecay(pairs, sums.exp(), after(log_decay).exp(), between.masked_fill(order[:, None] < order, 0.0))


def after(log_decay: Tensor) -> Tensor:
    """The sum over what comes after each place of the last axis."""
    return functional.pad(log_decay[..., 1:], (0, 1)).flip(-1).cumsum(-1).flip(-1)


def after_entry(log_decay: Tensor, places: int) -> Tensor:
    """What is left at a segment's end of the keys at its `places`, of which place p enters at token p, and those past
    the tokens not yet: log_decay `(B, HK, T, 1)` -> `(B, HK, places, 1)`."""
    kept = after(log_decay[..., 0]).exp()[..., None]
    return functional.pad(kept, (0, 0, 0, places - kept.shape[2]))


def sums_at_starts(across: Tensor, first: Tensor, sums: Tensor) -> Tensor:
    """The memory at the start of each chunk, `(B, HK, n, ...)`.

    Args:
        across: as in `ChunkDecay`.
        first: `(B, HK, 1, ...)`, the memory before the first chunk.
        sums: `(B, HK, n, ...)`, what each chunk adds, at its end.
    """
    parts = torch.cat([first.expand_as(sums[:, :, :1]), sums[:, :, :-1]], dim=2)
    return (across @ parts.flatten(3)).view_as(parts)


def per_head(weight: Tensor, heads: int) -> Tensor:
    """Weights `(B, HK, ...)` for each of `heads` query heads."""
    return weight.repeat_interleave(heads // weight.shape[1], dim=1)
