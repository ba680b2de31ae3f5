"""Packed rows: several texts that lie one after the other in a row, each of which is to be as if it were alone.

A caller says where texts start as transformers has it: by `cu_seq_lens_q` and `cu_seq_lens_k` (the bounds of all texts
in one row), by `seq_idx` (the number of each token's text), or by `position_ids` that start again. They are looked for
only where one of these was given: to read the last two on a GPU, the host waits once.
"""

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers.masking_utils import find_packed_sequence_indices
from transformers.utils import is_tracing

BOUNDS = ("cu_seq_lens_q", "cu_seq_lens_k")
SIGNS = (*BOUNDS, "seq_idx", "position_ids")
WITH_A_CACHE = (
    "several texts are packed into a row (cu_seq_lens, seq_idx or position_ids that start again), and a cache holds "
    "one text a row: leave past_key_values out and use_cache too, or give each text a row of its own"
)


@dataclass
class Packing:
    """The texts of a call of B rows and T tokens; the joined row is that of all real tokens, row after row.

    Attributes:
        cu_seqlens: `(N + 1,)` int32, where the N texts start in the joined row, and where the last one ends.
        text: `(B, T)`, number of a token's text, counted over all rows; place: `(B, T)`, a token's place in its text.
            Both are any number at padding.
        source: `(tokens,)`, where in the call's B T tokens those of the joined row stand; None where it is the call's
            only row.
    """

    cu_seqlens: Tensor
    text: Tensor
    place: Tensor
    source: Tensor | None = None

    @classmethod
    def of(cls, starts: Tensor, real: Tensor | None) -> "Packing":
        """The texts that begin at the tokens `starts`, `(B, T)`: the first real one of every row among them.

        Args:
            real: `(B, T)`, which tokens are no padding; None, all.
        """
        text = starts.flatten().cumsum(0) - 1
        if real is None:
            order = torch.arange(text.shape[0], device=text.device)
            source = None if starts.shape[0] == 1 else order
        else:
            order = real.flatten().cumsum(0) - 1
            source = real.flatten().nonzero()[:, 0]
        tokens = order[-1:] + 1
        bounds = torch.cat([order[starts.flatten()], tokens])
        place = order - bounds[text.clamp(min=0)]
        return cls(bounds.int(), text.view_as(starts), place.clamp(min=0).view_as(starts), source)

    @classmethod
    def between(cls, bounds: Tensor, tokens: int) -> "Packing":
        """The texts between these bounds of a single row without padding; nothing here waits for the host."""
        token = torch.arange(tokens, device=bounds.device)
        text = torch.searchsorted(bounds[1:].long(), token, right=True).clamp(max=bounds.shape[0] - 2)
        return cls(bounds.int(), text[None], (token - bounds[text])[None])

    def join(self, x: Tensor) -> Tensor:
        """`(B, heads, T, D)` as the joined row, `(1, heads, tokens, D)`."""
        if self.source is None:
            return x
        return x.transpose(1, 2).flatten(0, 1)[self.source].transpose(0, 1)[None]

    def split(self, x: Tensor) -> Tensor:
        """The joined row as the call has it, `(B, heads, T, D)`, zeros at padding."""
        if self.source is None:
            return x
        rows = x.new_zeros(self.text.numel(), x.shape[1], x.shape[3])
        rows = rows.index_copy(0, self.source, x[0].transpose(0, 1))
        return rows.unflatten(0, self.text.shape).transpose(1, 2)

    def rows_and_numbers(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Of each text, its row's entry of `values` `(B,)` and its number in the row: `(N,)` each."""
        start = self.cu_seqlens[:-1].long()
        row = (start if self.source is None else self.source[start]) // self.text.shape[1]
        return values[row], torch.arange(len(row), device=row.device) - torch.searchsorted(row, row)

    def same_text(self, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        """Whether two tokens are of one text, as transformers' mask functions are called."""
        return self.text[batch, query] == self.text[batch, key]

    def to(self, device, non_blocking: bool = False) -> "Packing":
        """A copy on another device, for layers that lie there."""
        moved: dict[str, Any] = {
            field.name: value.to(device, non_blocking=non_blocking)
            for field in fields(self)
            if (value := getattr(self, field.name)) is not None
        }
        return replace(self, **moved)


def through_packing(forward: Callable) -> Callable:
    """Around the forward of a causal base model: packed texts are looked for, and handed on as `packing`.

    Such a call has no cache, unless it asks for one, which is refused.
    """
    names = list(inspect.signature(forward).parameters)[1:]

    @functools.wraps(forward)
    def wrapped(self, *args, **kwargs):
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        if all(given.get(name) is None for name in SIGNS):
            return forward(self, *args, **kwargs)
        packing = find_packing(given)
        if packing is None:
            return forward(self, *args, **kwargs)
        if given.get("past_key_values") is not None or given.get("use_cache"):
            raise ValueError(WITH_A_CACHE)
        if given.get("position_ids") is None:
            given["position_ids"] = packing.place
        rest = {name: value for name, value in given.items() if name not in (*BOUNDS, "seq_idx")}
        return forward(self, **{**rest, "use_cache": False}, packing=packing)

    return wrapped


def find_packing(given: dict[str, Any]) -> Packing | None:
    """The texts of a call with these arguments of a base model's forward, or None where no row has several.

    Raises:
        ValueError: bounds that do not fit the call.
    """
    inputs = given.get("input_ids") if given.get("inputs_embeds") is None else given["inputs_embeds"]
    if inputs is None or inputs.shape[1] < 2:
        return None
    (batch, tokens), mask = inputs.shape[:2], given.get("attention_mask")
    cache = given.get("past_key_values")
    real = None if mask is None else check_mask(mask, batch, tokens, cache)
    bounds = _bounds(given, batch, tokens)
    if bounds is not None:
        if bounds.shape[0] <= 2:
            return None
        packing = Packing.between(bounds.to(inputs.device), tokens)
        return packing if real is None else _by_number(packing.text, real)
    if (number := given.get("seq_idx")) is not None:
        return _by_number(number.to(inputs.device).expand(batch, -1), real)
    position = given["position_ids"]
    if position.dim() != 2 or position.shape[1] != tokens:
        return None
    return _by_position(position.expand(batch, -1), real, cache is not None)


def _bounds(given: dict[str, Any], batch: int, tokens: int) -> Tensor | None:
    """`cu_seq_lens` where it was given, checked as far as no GPU must be asked."""
    both = [given[name] for name in BOUNDS if given.get(name) is not None]
    if not both:
        return None
    bounds = both[0]
    if batch != 1:
        raise ValueError(f"cu_seq_lens_q and cu_seq_lens_k bound the texts of one row, and the call has {batch}")
    if bounds.device.type == "cpu" and not is_tracing(bounds):
        if bounds[0] != 0 or bounds[-1] != tokens or bool((bounds.diff() < 0).any()):
            raise ValueError(f"cu_seq_lens_q must rise from 0 to the {tokens} tokens of the call: {bounds.tolist()}")
        if not all(torch.equal(bounds, x) for x in both):
            raise ValueError("cu_seq_lens_q and cu_seq_lens_k differ, but queries and keys are of the same texts")
    return bounds


@torch.compiler.disable  # what follows depends on the numbers: a compiled model leaves its graph for it
def _by_number(number: Tensor, real: Tensor | None) -> Packing | None:
    """By the number of each token's text, `(B, T)`."""
    if is_tracing(number):
        return None
    return _from(real, lambda last: number != number.gather(1, last), number)


@torch.compiler.disable
def _by_position(position: Tensor, real: Tensor | None, cached: bool) -> Packing | None:
    """By each token's position, `(B, T)`. Without a mask it is transformers' own test, which sees a new text wherever
    a position is not one more than the last. With one, or with a cache, where positions may leave out padding or
    tokens that were dropped, a new text is where they do not rise from one real token to the next, or are 0: behind
    padding on the right `generate` counts on from 0, within a text."""
    if is_tracing(position):
        return None
    if real is None and not cached:
        number = find_packed_sequence_indices(position)
        return None if number is None else _by_number(number, None)
    token = torch.arange(position.shape[1], device=position.device)
    return _from(
        real, lambda last: (position <= position.gather(1, last)) & ((last == token - 1) | (position == 0)), position
    )


def _from(real: Tensor | None, differs: Callable[[Tensor], Tensor], like: Tensor) -> Packing | None:
    """The texts that start where a real token `differs` from the real one before it, whose place `(B, T)` it is given.

    None where every row is one text.
    """
    token = torch.arange(like.shape[1], device=like.device).expand_as(like)
    newest = token if real is None else torch.where(real, token, -1).cummax(1).values
    last = functional.pad(newest[:, :-1], (1, 0), value=-1)
    again = (last >= 0) & differs(last.clamp(min=0))
    starts = (last < 0) | again
    if real is not None:
        starts, again = starts & real, again & real
    return Packing.of(starts, real) if bool(again.any()) else None


def check_mask(mask: Tensor, batch: int, tokens: int, cache: Any = None) -> Tensor:
    """The columns of a call's tokens of an attention mask, bool; batch and tokens of the call.

    Raises:
        ValueError: it is not a mask of the call's tokens, or with a cache of those in it and the call's.
    """
    if mask.dim() != 2:
        raise ValueError("a converted model takes a 2-dimensional attention_mask (batch, tokens), 1 = real token")
    whole = tokens if cache is None else cache.get_seq_length() + tokens
    if mask.shape[0] != batch or (mask.shape[1] != tokens and mask.shape[1] != whole):
        lengths = str(tokens) if whole == tokens else f"{tokens} or {whole}"
        raise ValueError(
            f"attention_mask is {tuple(mask.shape)}, but this call's must be ({batch}, {lengths}): one column for "
            "each token of the call, or with a cache for each token so far"
        )
    return mask[:, -tokens:].bool()


def real_positions(attention_mask: Tensor | None, length: int, cache: Any, device) -> Tensor:
    """Positions of this call's tokens, counted over real tokens: padding must not shift what follows positions.

    A mask that does not cover the tokens before the call leaves these to the states in the cache, which know how many
    were real.
    """
    past = 0 if cache is None else cache.get_seq_length()
    if attention_mask is not None and attention_mask.shape[1] == past + length:
        return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -length:]
    before = None if cache is None else counted(cache)
    if attention_mask is None:
        new = torch.arange(length, device=device)[None]
    else:
        new = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
    return new + (past if before is None else before.to(device)[:, None])


def counted(cache: Any) -> Tensor | None:
    """Real tokens of each row so far, `(B,)`, as the first state that there is knows them."""
    for layer in cache.layers:
        count = getattr(getattr(layer, "state", None), "count", None)
        if isinstance(count, Tensor):
            return count
    return None
