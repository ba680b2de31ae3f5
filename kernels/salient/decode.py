"""One token of salient-token attention per row, state included, in one launch.

A program owns all that it reads and writes: one key head of a row, with the window, sinks and store of this head and
the query heads that share it. In the ring, the new token takes the slot of the one that leaves; the program reads that
one first. Legend as in `decode_kernel.py`.
"""

import functools
from typing import Any

import torch
from torch import Tensor

from ..launching import dense, dense_rows, launch, next_power_of_2, tile_side, triton_type
from ..triton_support import common_dtype, product_precision, unavailable
from .decode_kernel import salient_decode_kernel
from .reference import State

WIDEST = 128
MOST_KEPT = 1024  # a list is held in registers
MOST_SINKS = 128  # a tile of keys
TILE_BYTES = 16384  # of a tile of keys; one of values is as large
LONGEST_TILE = 128  # keys of a tile
MASS_TILE = 1024  # elements of the tile of scores that masses are summed from


def decode_unsupported(query: Tensor, key: Tensor, value: Tensor, *, sinks: int, kept: int) -> str | None:
    """Say why no kernel here can do a call, or None when one can; what those of longer calls ask for too."""
    reason = unavailable(query, key, value)
    if reason is not None:
        return reason
    if query.shape[-1] > WIDEST:
        return f"its Triton kernels hold a head dimension of at most {WIDEST}, this call has {query.shape[-1]}"
    if sinks > MOST_SINKS or kept > MOST_KEPT:
        return (
            f"its Triton kernels hold at most {MOST_SINKS} sinks and {MOST_KEPT} kept tokens, this call has {sinks} "
            f"and {kept}"
        )
    return None


def decode_step(
    query: Tensor, key: Tensor, value: Tensor, *, attention_mask: Tensor | None, state, **settings: Any
) -> tuple[Tensor, State]:
    """One token per row from an old state to a new one.

    Args: those of `decode_step_`, but
        state: fields of `SalientState`; not changed.

    Returns:
        Output `(B, H, 1, D)` in the query's dtype, and the new state's fields.
    """
    *buffers, count = (x.clone(memory_format=torch.contiguous_format) for x in state)
    output = decode_step_(query, key, value, attention_mask=attention_mask, buffers=buffers, count=count, **settings)
    count += 1 if attention_mask is None else attention_mask[:, 0] != 0
    return output, State._make((*buffers, count))


def decode_step_(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    window: int,
    sinks: int,
    kept: int,
    age_penalty: float,
    scaling: float | None,
    attention_mask: Tensor | None,
    buffers,
    count: Tensor,
) -> Tensor:
    """One token per row that changes the buffers in place, in one launch; CUDA graphs replay it.

    Args:
        query: `(B, H, 1, D)`; key, value `(B, G, 1, D)`.
        window, sinks, kept, age_penalty, scaling: as in `salient_attention`.
        attention_mask: `(B, 1)`, 0 leaves the row's state as it is and gives 0.
        buffers: contiguous, the fields of `SalientState` but for the count.
        count: `(B,)` int64, each row's tokens before this one; the caller advances it.

    Returns:
        Output `(B, H, 1, D)` in the query's dtype.
    """
    batch, heads, _, dim = query.shape
    groups = key.shape[1]
    constants = _constants(common_dtype(query, key, value), heads, groups, dim, window, sinks, kept)
    query, key, value = map(dense_rows, (query, key, value))
    mask = None
    if attention_mask is not None:
        mask = dense(attention_mask if attention_mask.dtype == torch.bool else attention_mask != 0).view(torch.uint8)
    output = torch.empty(batch, heads, 1, dim, dtype=query.dtype, device=query.device)
    # What the queries make of the window's keys, until it is known how much each has received.
    scores = torch.empty(batch, heads, window if kept else 0, dtype=torch.float32, device=query.device)
    launch(
        salient_decode_kernel,
        (batch * groups,),
        (query, key, value, count if mask is None else mask, *buffers, count, scores, output),
        (
            *(step for x in (query, key, value) for step in x.stride()[:2]),
            dim**-0.5 if scaling is None else scaling,
            age_penalty / 1000,
        ),
        {"HAS_MASK": mask is not None},
        warps=4,  # with eight and products of 16 columns (the sinks' tile) Triton 3.6 gives wrong results on an H100
        stages=3,
        shared=constants,
    )
    return output


@functools.lru_cache(maxsize=256)
def _constants(dtype: torch.dtype, heads, groups, dim, window, sinks, kept) -> dict[str, Any]:
    """What the kernel is compiled for."""
    dot, precision = product_precision(dtype)
    side, rows = tile_side(dim), tile_side(heads // groups)
    most = max(16, min(LONGEST_TILE, TILE_BYTES // (side * dot.itemsize)))
    return {
        "H": heads, "G": groups, "D": dim, "BD": side, "BR": rows, "W": window, "S": sinks, "K": kept,
        "BW": min(tile_side(window), most), "BS": tile_side(sinks), "BK": min(tile_side(kept), most),
        "BA": next_power_of_2(max(kept, 1)), "BM": min(tile_side(window), max(16, MASS_TILE // rows)),
        "DOT": triton_type(dot), "PRECISION": precision,
    }  # fmt: skip
