"""The state's raw keys and values around the kernels: the ring before the keys, the sinks, and both after the call.

Plain tensor operations, so that gradients pass through a state. The window is a ring: slot = position in the row % W.
"""

import torch
from torch import Tensor

from .reference import State
from .rows import SPANS, Rows


def extend_keys(
    rows: Rows, window: int, state, key: Tensor, value: Tensor, features: Tensor | None, map_key: Tensor | None
):
    """Put the ring, oldest key first, before this call's keys; each row's real keys follow it directly.

    Args:
        key, value, features, map_key: of this call, `(B, heads, T, .)`; the last two may be None.

    Returns:
        The same four with W + T places.
    """
    assert rows.past is not None
    order = (rows.past[:, None] + torch.arange(window, device=key.device)) % max(window, 1)

    def extend(ring: Tensor, new: Tensor) -> Tensor:
        if rows.kind == SPANS:
            assert rows.start is not None
            place = (rows.start[:, None] + torch.arange(new.shape[2], device=new.device)).clamp(max=new.shape[2] - 1)
            new = take_slots(new, place.long())
        return torch.cat([take_slots(ring, order).to(new.dtype), new], dim=2)

    return (
        extend(state.window_key, key),
        extend(state.window_value, value),
        None if features is None else extend(state.window_features, features),
        None if map_key is None else extend(state.window_map_key, map_key),
    )


def new_sinks(rows: Rows, sinks: int, state, key: Tensor, value: Tensor) -> list[Tensor]:
    """The sinks after this call, `(B, G, S, .)`."""
    position = torch.arange(sinks, device=key.device)[None]
    sinks_of_both = ((state.sink_key, key), (state.sink_value, value))
    return [overwrite_slots(old, new, position, rows) for old, new in sinks_of_both]


def next_state(rows: Rows, window: int, sinks: int, state, tensors, kv, normalizer) -> State:
    """The state after this call.

    Args:
        state: the one before, or None. tensors: query, key, value, key features (a tensor, a map or None) and map_key
            or None of the call. kv, normalizer: the sums after the call, None without features.
    """
    query, key, value, key_features, map_key = tensors
    if kv is None:
        kv, normalizer = _no_sums(state, query, value)
    past = torch.zeros(rows.batch, dtype=torch.int64, device=query.device) if rows.past is None else rows.past
    end = past + (rows.length if rows.size is None else rows.size)
    # The newest token of slot s is the largest j < end with j % W == s; sinks stay out of the ring.
    newest = end[:, None] - 1 - (end[:, None] - 1 - torch.arange(window, device=end.device)) % max(window, 1)
    newest = newest.masked_fill(newest < sinks, -1)
    first = torch.arange(sinks, device=end.device)[None]
    rows = rows._replace(past=past)

    def slots(name: str, new: Tensor, position: Tensor, dtype: torch.dtype) -> Tensor:
        shape = (*new.shape[:2], position.shape[1], new.shape[3])
        old = new.new_zeros(shape, dtype=dtype) if state is None else getattr(state, name)
        return overwrite_slots(old, new, position, rows)

    features = None
    if key_features is None or isinstance(key_features, Tensor):
        given = key.new_zeros(*query.shape[:3], 0) if key_features is None else key_features
        features = slots("window_features", given, newest, torch.float32)
    return State(
        kv,
        normalizer,
        slots("window_key", key, newest, key.dtype),
        slots("window_value", value, newest, value.dtype),
        features,
        slots("sink_key", key, first, key.dtype),
        slots("sink_value", value, first, value.dtype),
        end,
        None if map_key is None else slots("window_map_key", map_key, newest, map_key.dtype),
    )


def _no_sums(state, query: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    if state is not None:
        return state.kv, state.normalizer
    batch, heads = query.shape[:2]
    sums = query.new_zeros(batch, heads, 0, value.shape[3], dtype=torch.float32)
    return sums, sums.new_zeros(batch, heads, 0)


def take_slots(x: Tensor, place: Tensor) -> Tensor:
    """Slots `place` `(B, slots)` of x `(B, heads, places, .)`."""
    return x.gather(2, place[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))


def overwrite_slots(old: Tensor, new: Tensor, position: Tensor, rows: Rows) -> Tensor:
    """Slots of `old` take this call's token at that position in the row, where there is one."""
    assert rows.past is not None
    position = position.expand(old.shape[0], -1)
    local = position - rows.past[:, None]
    size = rows.length if rows.size is None else rows.size[:, None]
    fresh = (local >= 0) & (local < size)
    start = 0 if rows.start is None else rows.start[:, None]
    place = (local + start).clamp(0, new.shape[2] - 1)
    return torch.where(fresh[:, None, :, None], take_slots(new, place).to(old.dtype), old)
