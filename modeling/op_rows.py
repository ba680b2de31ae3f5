"""The rows of a call, which every op's PyTorch path shares: padding that lies anywhere, and several texts in one row.

Legend as in `op_hybrid_linear.py`.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


class Rows:
    """The padding of a batch, wherever it lies: moves each row's real tokens to the front, in their order, and zeroes
    the rest, and back."""

    def __init__(self, attention_mask: Tensor | None, query: Tensor):
        length = query.shape[2]
        self.mask = None if attention_mask is None else attention_mask.bool()
        if self.mask is None:
            self.lengths = torch.full((query.shape[0],), length, dtype=torch.int64, device=query.device)
            return
        source, place = front_order(self.mask)
        self.lengths = self.mask.sum(1)
        self.source, self.origin = source[:, None, :, None], place[:, None, :, None]

    def compact(self, x: Tensor) -> Tensor:
        if self.mask is None:
            return x
        x = x.masked_fill(~self.mask[:, None, :, None], 0.0)
        return x.gather(2, self.source.expand_as(x))

    def restore(self, x: Tensor) -> Tensor:
        if self.mask is None:
            return x
        x = x.gather(2, self.origin.expand_as(x))
        return x.masked_fill(~self.mask[:, None, :, None], 0.0)


def front_order(mask: Tensor) -> tuple[Tensor, Tensor]:
    """The order that puts each row's real tokens in front of its padding, both in their own order, as a stable sort of
    the mask does: which token comes to a place, and which place a token comes to, `(B, T)` each."""
    token = torch.arange(mask.shape[1], device=mask.device)
    before = mask.cumsum(1)  # real tokens up to and including each
    place = torch.where(mask, before - 1, before[:, -1:] + token - before)
    return torch.empty_like(place).scatter_(1, place, token.expand_as(place)), place


def check_rows(query: Tensor, causal: bool, attention_mask, cu_seqlens, stateful: bool) -> None:
    """Refuse arguments that contradict each other; stateful calls take or return a state."""
    if stateful and not causal:
        raise ValueError("initial_state and return_state need causal=True: a bidirectional row has no running state")
    if cu_seqlens is not None and (stateful or attention_mask is not None or query.shape[0] != 1):
        raise ValueError(
            "cu_seqlens needs batch size 1 and goes with no attention_mask, initial_state or return_state"
        )
    expected = (query.shape[0], query.shape[2])
    if attention_mask is not None and attention_mask.shape != expected:
        raise ValueError(
            f"attention_mask is {tuple(attention_mask.shape)}, but it covers this call's {expected[1]} tokens alone, "
            f"in each of {expected[0]} rows: give {expected}"
        )


def over_rows(run: Callable, inputs: Sequence, options: dict):
    """`run(*inputs, **options)`, which needs tokens and knows no packing, for any call.

    Args:
        run: returns output `(B, H, T, Dv)` and state.
        inputs: query first; what is no tensor serves all sequences.
        options: `cu_seqlens` and what `run` takes.

    Returns:
        Output in the query's dtype, and the state.
    """
    query, options = inputs[0], dict(options)
    cu_seqlens = options.pop("cu_seqlens")

    def change(function) -> list:
        return [function(x) if isinstance(x, Tensor) else x for x in inputs]

    if query.shape[2] == 0:  # as a single padded token: no output, and the state stays as it was
        options["attention_mask"] = query.new_zeros(query.shape[0], 1, dtype=torch.bool)
        inputs = change(lambda x: x.new_zeros(*x.shape[:2], 1, *x.shape[3:]))
        output, state = run(*inputs, **options)
        return output[:, :, :0].to(query.dtype), state
    if cu_seqlens is None:
        output, state = run(*inputs, **options)
        return output.to(query.dtype), state
    bounds = cu_seqlens.tolist()
    if bounds[0] != 0 or bounds[-1] != query.shape[2]:
        raise ValueError(
            f"cu_seqlens must run from 0 to the {query.shape[2]} tokens, not from {bounds[0]} to {bounds[-1]}"
        )
    spans = [slice(a, b) for a, b in zip(bounds[:-1], bounds[1:], strict=True) if a < b]
    outputs = [run(*change(lambda x, span=span: x[:, :, span]), **options)[0] for span in spans]
    return torch.cat(outputs, dim=2).to(query.dtype), None


def take_slots(x: Tensor, order: Tensor) -> Tensor:
    """Reorder the slots of x `(B, heads, slots, D)` by order `(B, slots)`."""
    return x.gather(2, order[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))


def overwrite_slots(old: Tensor, new: Tensor, index: Tensor, count: Tensor, end: Tensor) -> Tensor:
    """Slots of `old` `(B, heads, slots, D)` take this call's token of that index, `(slots,)` or `(B, slots)`."""
    index = index.expand(old.shape[0], -1)
    fresh = (index >= count[:, None]) & (index < end[:, None])
    place = (index - count[:, None]).clamp(0, new.shape[2] - 1)
    return torch.where(fresh[:, None, :, None], take_slots(new, place).to(old.dtype), old)
