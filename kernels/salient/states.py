"""The state's keys and values around the kernels: before those of a call, and what is left after it.

Plain tensor operations, so that gradients pass through a state. The window is a ring: slot = token index % W.
"""

import torch
from torch import Tensor

from ..hybrid_linear.states import extend_keys, new_sinks, overwrite_slots
from .function import Call, Choice
from .reference import State


def with_state(call: Call, state, key: Tensor, value: Tensor):
    """Put the kept slots, the sinks as they are after this call, and the ring, oldest key first, before the keys.

    Returns:
        Key and value `(B, G, K + S + W + T, D)`; the ring's masses `(B, G, W)` in that order; the slots' ranks.
    """
    rows, window = call.rows, call.window
    near_key, near_value, *_ = extend_keys(rows, window, state, key, value, None, None)
    sink_key, sink_value = new_sinks(rows, call.sinks, state, key, value)
    held_key = torch.cat([state.kept_key.to(key.dtype), sink_key.to(key.dtype), near_key], dim=2)
    held_value = torch.cat([state.kept_value.to(value.dtype), sink_value.to(value.dtype), near_value], dim=2)
    order = (state.count[:, None] + torch.arange(window, device=key.device)) % window
    old_mass = state.window_mass.gather(2, order[:, None].expand_as(state.window_mass))
    return (held_key, held_value), old_mass, state.kept_rank


def next_state(call: Call, state, key: Tensor, value: Tensor, held, choice: Choice | None) -> State:
    """The state after this call.

    Args:
        state: the one before, or None. key, value: of the call. held: those that the kernels read. choice: None where
            no tokens are kept.
    """
    rows, window, sinks = call.rows, call.window, call.sinks
    past = torch.zeros(rows.batch, dtype=torch.int64, device=key.device) if rows.past is None else rows.past
    end = past + (rows.length if rows.size is None else rows.size)
    # The newest token of slot s is the largest j < end with j % W == s; sinks stay out of the ring.
    newest = end[:, None] - 1 - (end[:, None] - 1 - torch.arange(window, device=end.device)) % window
    newest = newest.masked_fill(newest < sinks, -1)
    first = torch.arange(sinks, device=end.device)[None]
    rows = rows._replace(past=past)

    def slots(name: str, new: Tensor, position: Tensor) -> Tensor:
        old = None if state is None else getattr(state, name)
        shape = (*new.shape[:2], position.shape[1], new.shape[3])
        return overwrite_slots(new.new_zeros(shape) if old is None else old, new, position, rows)

    kept_key, kept_value, kept_rank = _kept(call, state, key, value, held, choice)
    return State(
        slots("window_key", key, newest),
        slots("window_value", value, newest),
        _window_mass(call, state, key, newest, past, choice),
        kept_key,
        kept_value,
        kept_rank,
        slots("sink_key", key, first),
        slots("sink_value", value, first),
        end,
    )


def _window_mass(call: Call, state, key: Tensor, newest: Tensor, past: Tensor, choice: Choice | None) -> Tensor:
    """What the ring's keys `newest` `(B, W)` have received so far."""
    shape = (*key.shape[:2], call.window)
    if choice is None:
        return key.new_zeros(shape, dtype=torch.float32)
    origin = 0 if state is None else call.kept + call.sinks + call.window
    place = (newest - past[:, None] + origin).clamp(0, choice.mass.shape[2] - 1)[:, None].expand(shape)
    return choice.mass.gather(2, place).masked_fill((newest < 0)[:, None], 0.0)


def _kept(call: Call, state, key: Tensor, value: Tensor, held, choice: Choice | None) -> list[Tensor]:
    """Keys, values and ranks of the kept tokens."""
    if choice is None:
        none = [x.new_zeros(*x.shape[:2], 0, x.shape[3]) for x in (key, value)]
        return [*none, key.new_zeros(*key.shape[:2], 0, dtype=torch.float32)]
    last = choice.lists[:, :, -1].long()  # (B, G, K)
    place, empty = last.clamp(min=0), last < 0
    dtypes = (key.dtype, value.dtype) if state is None else (state.kept_key.dtype, state.kept_value.dtype)
    kept = []
    for x, dtype in zip(held, dtypes, strict=True):
        found = x.gather(2, place[..., None].expand(-1, -1, -1, x.shape[3]))
        kept.append(found.masked_fill(empty[..., None], 0.0).to(dtype))
    return [*kept, choice.rank.gather(2, place).masked_fill(empty, -torch.inf)]
