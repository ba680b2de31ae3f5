"""One-token steps of hybrid linear attention that change a fixed set of buffers in place: what a CUDA graph replays.

The buffers hold what `HybridLinearState` holds, laid out so that a step writes nothing that it also reads: the ring
has one slot more than the window, and the normaliser has two halves. The count of tokens is one tensor for all layers
of a model, advanced by the caller after a whole step.
"""

from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .op_dispatch import find_decoding
from .op_hybrid_linear import CONTRACT, hybrid_linear_attention
from .op_hybrid_linear_chunked import HybridLinearState


class DecodeBuffers(NamedTuple):
    """The state of one layer in place; HK = H, or G when a group shares its key map, R = W + 1 slots (0 when W = 0).

    Fields: kv `(B, HK, F, Dv)`; normalizer `(2, B, HK, F)`, of which half `count % 2` of a row holds; ring_key
    `(B, G, R, D)`, ring_value `(B, G, R, Dv)`, token j in slot j % R; ring_features `(B, HK, R, F)` or None; sink_key
    `(B, G, S, D)`, sink_value `(B, G, S, Dv)`; ring_map_key `(B, G, R, D)` or None.
    """

    kv: Tensor
    normalizer: Tensor
    ring_key: Tensor
    ring_value: Tensor
    ring_features: Tensor | None
    sink_key: Tensor
    sink_value: Tensor
    ring_map_key: Tensor | None = None

    @property
    def rings(self) -> tuple[Tensor | None, ...]:
        """In the order of `_windows`."""
        return (*self[2:5], self.ring_map_key)

    def load_(self, state: HybridLinearState) -> "DecodeBuffers":
        """Take a state over, which has its own count."""
        self.kv.copy_(state.kv)
        self.normalizer.copy_(state.normalizer.expand_as(self.normalizer))
        for ring, window in zip(self.rings, _windows(state), strict=True):
            if ring is not None and window is not None and ring.shape[2]:
                ring.copy_(_move_slots(window, state.count, ring.shape[2], window.shape[2]))
        self.sink_key.copy_(state.sink_key)
        self.sink_value.copy_(state.sink_value)
        return self

    def reorder_(self, rows: Tensor) -> None:
        """Row b becomes what row `rows[b]` was."""
        for x in self:
            if x is not None:
                x.copy_(x.index_select(1 if x is self.normalizer else 0, rows))

    def fill_(self, generator: torch.Generator) -> None:
        """Random values that a state may have."""
        for x in self:
            if x is not None:
                x.normal_(generator=generator)
        self.normalizer.abs_().add_(1.0)
        if self.ring_features is not None:
            self.ring_features.abs_()


def _windows(state: HybridLinearState) -> tuple[Tensor | None, ...]:
    return (*state[2:5], state.window_map_key)


def new_buffers(state: HybridLinearState, batch: int) -> DecodeBuffers:
    """Zero buffers for `batch` rows of states of this kind."""

    def zeros(x, slots=None):
        shape = (batch, *x.shape[1:]) if slots is None else (batch, x.shape[1], slots, x.shape[3])
        return x.new_zeros(shape)

    slots = state.window_key.shape[2] + 1 if state.window_key.shape[2] else 0
    normalizer = state.normalizer.new_zeros(2, batch, *state.normalizer.shape[1:])
    *rings, map_key = [None if x is None else zeros(x, slots) for x in _windows(state)]
    sinks = (zeros(state.sink_key), zeros(state.sink_value))
    return DecodeBuffers._make((zeros(state.kv), normalizer, *rings, *sinks, map_key))


def read_buffers(buffers: DecodeBuffers, count: Tensor) -> HybridLinearState:
    """A state of its own, equal to the buffers after `count` `(B,)` tokens."""
    rows = torch.arange(count.shape[0], device=count.device)
    normalizer = buffers.normalizer[count % 2, rows]
    windows: list[Any] = []
    sinks = buffers.sink_key.shape[2]
    for ring in buffers.rings:
        if ring is None or ring.shape[2] == 0:
            windows.append(None if ring is None else ring.clone())
        else:
            windows.append(_move_slots(ring, count, ring.shape[2] - 1, ring.shape[2], sinks))
    *windows, map_key = windows
    sinks_held = (buffers.sink_key.clone(), buffers.sink_value.clone())
    return HybridLinearState._make((buffers.kv.clone(), normalizer, *windows, *sinks_held, count.clone(), map_key))


def _move_slots(x: Tensor, count: Tensor, slots: int, old_slots: int, sinks: int = 0) -> Tensor:
    """The newest tokens of a ring of `old_slots`, in a ring of `slots`: `(B, heads, slots, D)`, 0 where none is."""
    last = count[:, None] - 1
    token = last - (last - torch.arange(slots, device=count.device)) % slots
    held = (token >= sinks) & (token > last - min(slots, old_slots))
    place = (token % old_slots)[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3])
    return x.gather(2, place).masked_fill(~held[:, None, :, None], 0.0)


def hybrid_linear_step_(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_features,
    key_features,
    *,
    window_weight: Tensor | None,
    log_weight: bool,
    buffers: DecodeBuffers,
    count: Tensor,
    backend: str = "auto",
    **options,
) -> Tensor:
    """One token per row, `(B, H, 1, Dv)`; arguments as in `hybrid_linear_attention`, state in the buffers.

    Args:
        log_weight: `window_weight` is its logarithm.
        count: `(B,)` int64, tokens before this one; the caller advances it.
        options: window_shift, window_reference, window, sinks, scaling, attention_mask `(B, 1)`, map_query, map_key
            and log_decay.
    """
    args = (query, key, value, query_features, key_features)
    kernel = _decode_kernel(query, query_features, key_features, backend)
    if kernel is not None:
        return kernel.decode_step_(
            *args, window_weight=window_weight, log_weight=log_weight, buffers=buffers, count=count, **options
        )
    if log_weight and window_weight is not None:
        window_weight = window_weight.exp()
    before = read_buffers(buffers, count)
    output, after = hybrid_linear_attention(
        *args, window_weight=window_weight, initial_state=before, return_state=True, backend=backend, **options
    )
    assert after is not None
    buffers.load_(after)
    return output


def _decode_kernel(query, query_features, key_features, backend: str) -> ModuleType | None:
    """The module of the decode kernel, or None where the ordinary op does the step."""
    decode = find_decoding("hybrid_linear", CONTRACT, backend, query.is_cuda)
    supported = decode is not None and decode.decode_unsupported(query, query_features, key_features) is None
    return decode if supported else None
