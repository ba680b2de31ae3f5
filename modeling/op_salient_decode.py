"""One-token steps of salient-token attention that change a fixed set of buffers in place: what a CUDA graph replays.

The buffers are the fields of `SalientState` themselves: a step gives the slot of the token that leaves the window to
the new one. The count of tokens is one tensor for all layers of a model, advanced by the caller after a whole step.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .op_dispatch import find_decoding
from .op_salient import CONTRACT, check_state, salient_attention
from .op_salient_chunked import SalientState


class SalientBuffers(NamedTuple):
    """The state of one layer in place; fields as in `SalientState`, without its count."""

    window_key: Tensor
    window_value: Tensor
    window_mass: Tensor
    kept_key: Tensor
    kept_value: Tensor
    kept_rank: Tensor
    sink_key: Tensor
    sink_value: Tensor

    def load_(self, state: SalientState) -> "SalientBuffers":
        """Take a state over, which has its own count.

        Raises:
            ValueError: it is of another window, or of other sinks or kept tokens.
        """
        check_state(state, *(x.shape[2] for x in (self.window_key, self.sink_key, self.kept_key)))
        for mine, x in zip(self, state[:-1], strict=True):
            mine.copy_(x)
        return self

    def reorder_(self, rows: Tensor) -> None:
        """Row b becomes what row `rows[b]` was."""
        for x in self:
            x.copy_(x.index_select(0, rows))

    def fill_(self, generator: torch.Generator) -> None:
        """Random values that a state may have."""
        for x in self:
            x.normal_(generator=generator)
        self.window_mass.abs_()


def new_buffers(state: SalientState, batch: int) -> SalientBuffers:
    """Buffers of `batch` rows before their first token, of an empty state of one row."""
    return SalientBuffers._make(x.repeat(batch, *[1] * (x.dim() - 1)) for x in state[:-1])


def read_buffers(buffers: SalientBuffers, count: Tensor) -> SalientState:
    """A state of its own, equal to the buffers after `count` `(B,)` tokens."""
    return SalientState._make(x.clone() for x in (*buffers, count))


def salient_step_(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    buffers: SalientBuffers,
    count: Tensor,
    sinks: int,
    kept: int,
    backend: str = "auto",
    **options,
) -> Tensor:
    """One token per row, `(B, H, 1, D)`; arguments as in `salient_attention`, state in the buffers.

    Args:
        count: `(B,)` int64, tokens before this one; the caller advances it.
        options: window, age_penalty, scaling and attention_mask `(B, 1)`.
    """
    args, limits = (query, key, value), {"sinks": sinks, "kept": kept}
    options |= limits
    decode = find_decoding("salient", CONTRACT, backend, query.is_cuda)
    if decode is not None and decode.decode_unsupported(*args, **limits) is None:
        return decode.decode_step_(*args, buffers=buffers, count=count, **options)
    before = SalientState._make((*buffers, count))
    output, after = salient_attention(*args, initial_state=before, return_state=True, backend=backend, **options)
    assert after is not None
    buffers.load_(after)
    return output
