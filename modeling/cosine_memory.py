"""What the cache of cosine attention holds: one copy of the window that both branches' ops go on from.

Legend as in `op_cosine.py`.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .op_cosine import CosineState
from .op_hybrid_linear import HybridLinearState
from .op_rows import Rows


class CosineMemory(NamedTuple):
    """What a cache layer holds: a `CosineState` whose keys are the softmax branch's, rotated and before any map.

    window_direction: `(B, G, W, D)`, of window_key's slots, what the cosine reads of their keys, before any map; None
    where that is the keys themselves, and in the arm that is the window alone.
    """

    kv: Tensor
    window_key: Tensor
    window_value: Tensor
    sink_key: Tensor
    sink_value: Tensor
    count: Tensor  # type: ignore[assignment]  # hides tuple.count
    mass: Tensor | None = None
    window_direction: Tensor | None = None


def next_window(
    past: CosineMemory | None, key: Tensor, padding_mask: Tensor | None, window: int, sinks: int
) -> Tensor:
    """The keys `(B, G, W, D)` of the window after a call, in the ring of the ops: slot = index % W, without sinks."""
    rows = Rows(padding_mask, key)
    start = torch.zeros_like(rows.lengths) if past is None else past.count
    end = (start + rows.lengths)[:, None]
    index = end - 1 - (end - 1 - torch.arange(window, device=key.device)) % max(window, 1)  # the newest of each slot
    fresh = (index >= start[:, None]) & (index >= sinks)
    if past is None:
        held = key.new_zeros(*key.shape[:2], window, key.shape[3])
    else:
        assert past.window_direction is not None, "an arm goes on with its own state"
        held = past.window_direction
    if key.shape[2] == 0:
        return held
    place = (index - start[:, None]).clamp(min=0)[:, None, :, None].expand_as(held)
    return torch.where(fresh[:, None, :, None], rows.compact(key).gather(2, place).to(held.dtype), held)


def as_softmax(state: CosineMemory, heads: int) -> HybridLinearState:
    """The state of the softmax branch: the rings, and sums of no features."""
    batch, _, window, _ = state.window_key.shape
    nothing = state.kv.new_zeros(batch, heads, 0, state.kv.shape[-1])
    features = state.kv.new_zeros(batch, heads, window, 0)
    rings = (state.window_key, state.window_value, features, state.sink_key, state.sink_value)
    return HybridLinearState(nothing, nothing[..., 0], *rings, state.count)


def joined(
    key, value, near: HybridLinearState | None, far: CosineState | None, directions: Tensor | None
) -> CosineMemory:
    """The cache's state: raw keys and values of the softmax branch, sums of the cosine branch, and what it reads."""
    mass = None if far is None else far.mass
    if near is None:
        assert far is not None
        empty_key, empty_value = (x.new_zeros(x.shape[0], x.shape[1], 0, x.shape[3]) for x in (key, value))
        return CosineMemory(far.kv, empty_key, empty_value, empty_key, empty_value, far.count, mass, directions)
    rings = (near.window_key, near.window_value, near.sink_key, near.sink_value)
    kv = near.kv if far is None else far.kv
    return CosineMemory(kv, *rings, near.count, mass, directions)
