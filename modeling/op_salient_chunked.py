"""The chunked PyTorch path of salient-token attention: time and memory linear in T, on CPU and GPU, under autograd.

Rows are brought to right padding. Blocks of queries run in order; the store of kept keys is handed from one to the
next. While block [p, p + C) of a call runs, just the keys at the places [p, p + C) of the window leave it, one at each
query, so that a block meets three kinds of key: the sinks, W + C places of the window, and the store as it was before
the block. When a key drops out is known from ranks alone, by counting.

Legend as in `op_salient.py`; C queries of a block. Place p of a call's keys holds token count - W + p.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from .op_rows import Rows, overwrite_slots, take_slots

BLOCK = 512
MASS_FLOOR = 1e-20


class SalientState(NamedTuple):
    """What a sequence leaves behind; batch first.

    Fields: window_key `(B, G, W, D)`, window_value `(B, G, W, D)`, the keys j >= S of the last W, as a ring: slot =
    j % W; window_mass `(B, G, W)`, what each of them has received so far, float32 (float64 for float64 input);
    kept_key `(B, G, K, D)`, kept_value `(B, G, K, D)`, in no order; kept_rank `(B, G, K)`, float32 (float64), -inf
    where a slot is empty; sink_key `(B, G, S, D)`, sink_value `(B, G, S, D)`; count `(B,)` int64, the real tokens so
    far. Keys and values not yet written are 0.
    """

    window_key: Tensor
    window_value: Tensor
    window_mass: Tensor
    kept_key: Tensor
    kept_value: Tensor
    kept_rank: Tensor
    sink_key: Tensor
    sink_value: Tensor
    count: Tensor  # type: ignore[assignment]  # hides tuple.count


class Settings(NamedTuple):
    window: int
    sinks: int
    kept: int
    age_penalty: float
    scaling: float


class Store(NamedTuple):
    """The kept keys between two blocks: `(B, G, K, D)`, `(B, G, K, D)`, `(B, G, K)`."""

    key: Tensor
    value: Tensor
    rank: Tensor


class Keys(NamedTuple):
    """All keys of a call by place, `(B, G, W + T, D)`; mass `(B, G, W + T)`, complete for the places whose keys
    have left; index `(B, W + T)` of each token, and whether it is there and no sink; the sinks."""

    key: Tensor
    value: Tensor
    mass: Tensor
    index: Tensor  # type: ignore[assignment]  # hides tuple.index
    real: Tensor
    sink_key: Tensor
    sink_value: Tensor


def run_salient(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    window: int,
    sinks: int,
    kept: int,
    age_penalty: float,
    scaling: float | None = None,
    attention_mask: Tensor | None = None,
    initial_state: SalientState | None = None,
    return_state: bool = False,
) -> tuple[Tensor, SalientState | None]:
    """Run rows that may be padded; the arguments are those of `salient_attention`."""
    settings = Settings(window, sinks, kept, age_penalty, query.shape[-1] ** -0.5 if scaling is None else scaling)
    with torch.autocast(query.device.type, enabled=False):
        rows = Rows(attention_mask, query)
        query, key, value = (rows.compact(x) for x in (query, key, value))
        state = empty_state(query, key, value, settings) if initial_state is None else initial_state
        end = state.count + rows.lengths
        keys = _keys(key, value, state, end, settings)
        store = Store(state.kept_key.to(key.dtype), state.kept_value.to(value.dtype), state.kept_rank)
        outputs = []
        for start in range(0, query.shape[2], BLOCK):
            output, store = _block(query[:, :, start : start + BLOCK], start, keys, store, end, settings)
            outputs.append(output)
        after = _advance(key, value, keys, store, state, end, settings) if return_state else None
    return rows.restore(torch.cat(outputs, dim=2)), after


def empty_state(query: Tensor, key: Tensor, value: Tensor, settings: Settings) -> SalientState:
    """The state before the first token."""
    batch, groups = key.shape[:2]
    dtype = torch.promote_types(query.dtype, torch.float32)

    def zeros(x, slots):
        return x.new_zeros(batch, groups, slots, x.shape[-1])

    window, sinks, kept = settings[:3]
    return SalientState(
        window_key=zeros(key, window),
        window_value=zeros(value, window),
        window_mass=key.new_zeros(batch, groups, window, dtype=dtype),
        kept_key=zeros(key, kept),
        kept_value=zeros(value, kept),
        kept_rank=key.new_full((batch, groups, kept), -torch.inf, dtype=dtype),
        sink_key=zeros(key, sinks),
        sink_value=zeros(value, sinks),
        count=torch.zeros(batch, dtype=torch.int64, device=key.device),
    )


def _keys(key: Tensor, value: Tensor, state: SalientState, end: Tensor, settings: Settings) -> Keys:
    window, sinks = settings.window, settings.sinks
    count, tokens = state.count, key.shape[2]
    order = (count[:, None] + torch.arange(window, device=key.device)) % window
    old_mass = state.window_mass.gather(2, order[:, None].expand_as(state.window_mass))
    index = count[:, None] - window + torch.arange(window + tokens, device=key.device)
    places = torch.arange(sinks, device=key.device)
    return Keys(
        torch.cat([take_slots(state.window_key, order).to(key.dtype), key], dim=2),
        torch.cat([take_slots(state.window_value, order).to(value.dtype), value], dim=2),
        functional.pad(old_mass, (0, tokens)),
        index,
        (index >= sinks) & (index < end[:, None]),
        overwrite_slots(state.sink_key, key, places, count, end),
        overwrite_slots(state.sink_value, value, places, count, end),
    )


def _block(query: Tensor, start: int, keys: Keys, store: Store, end: Tensor, settings: Settings):
    """A block's output `(B, H, C, D)`, and the store after it; adds to `keys.mass`."""
    window, sinks, kept = settings.window, settings.sinks, settings.kept
    size, groups = query.shape[2], keys.key.shape[1]
    near = slice(start, start + window + size)
    key, value = keys.key[:, :, near], keys.value[:, :, near]
    row = keys.index[:, start + window : start + window + size, None]  # (B, C, 1), each query's token
    distance = row - keys.index[:, None, near]
    asked = row < end[:, None, None]  # padding asks nothing
    inside = keys.real[:, None, near] & (distance >= 0) & (distance < window) & asked
    first = (torch.arange(sinks, device=query.device) <= row) & asked
    leaves = keys.index[:, start : start + size, None] + window  # of each leaving key, its first query outside
    visible = torch.cat([first, inside], dim=-1)[:, None].expand(-1, groups, -1, -1)
    parts_key, parts_value = [keys.sink_key, key], [keys.sink_value, value]
    if kept:
        with torch.no_grad():
            _receive(query, torch.cat(parts_key, dim=2), visible, distance, keys.mass[:, :, near], settings)
            rank, until, after = _choose(keys, start, size, store, end, settings)
            token = keys.index[:, start + window : start + window + size]
            seen = token[:, None, :, None] < until[:, :, None]  # (B, G, C, K + C)
            seen[..., kept:] &= (leaves.mT <= row)[:, None]
            visible = torch.cat([seen[..., :kept], visible], dim=-1)
            visible[..., kept + sinks : kept + sinks + size] |= seen[..., kept:]
        parts_key, parts_value = [store.key, *parts_key], [store.value, *parts_value]
        store = Store(
            _moved(store.key, keys.key[:, :, start : start + size], after, rank),
            _moved(store.value, keys.value[:, :, start : start + size], after, rank),
            rank,
        )
    output = _attend(query, torch.cat(parts_key, dim=2), torch.cat(parts_value, dim=2), visible, settings.scaling)
    return output, store


def _moved(stored: Tensor, leaving: Tensor, after: Tensor, rank: Tensor) -> Tensor:
    """What is stored after a block, of what was and what leaves: `after` `(B, G, K)` are places in both together; 0
    in slots without a rank."""
    moved = torch.cat([stored, leaving], dim=2).gather(2, after[..., None].expand_as(stored))
    return moved.masked_fill(torch.isneginf(rank)[..., None], 0.0)


def _receive(query: Tensor, key: Tensor, visible: Tensor, distance: Tensor, mass: Tensor, settings: Settings) -> None:
    """Add what the block's queries give to the keys of the far half of their window to `mass` `(B, G, W + C)`."""
    groups, dtype = key.shape[1], mass.dtype
    grouped = query.unflatten(1, (groups, -1)).to(dtype) * settings.scaling  # (B, G, R, C, D)
    scores = grouped @ key.to(dtype)[:, :, None].mT
    weights = scores.masked_fill(~visible[:, :, None], -torch.inf).softmax(-1)[..., settings.sinks :]
    far = visible[..., settings.sinks :] & (distance >= settings.window // 2)[:, None]
    mass += weights.masked_fill(~far[:, :, None], 0.0).sum((2, 3))


def _choose(keys: Keys, start: int, size: int, store: Store, end: Tensor, settings: Settings):
    """Who stays: ranks `(B, G, K)` after the block; the first token that no longer sees each of the K stored and the C
    leaving keys, `(B, G, K + C)`; and which of these are stored after the block, `(B, G, K)`."""
    kept, window = settings.kept, settings.window
    index = keys.index[:, start : start + size]
    gone = keys.real[:, start : start + size] & (index + window < end[:, None])
    rank = keys.mass[:, :, start : start + size].clamp(min=MASS_FLOOR).log()
    rank = rank + settings.age_penalty / 1000 * index[:, None].to(rank.dtype)
    rank = rank.masked_fill(~gone[:, None], -torch.inf)
    ranks = torch.cat([store.rank, rank], dim=2)
    above = rank[..., None, :] > ranks[..., None]  # (B, G, K + C, C)
    stored = (store.rank[..., None, :] > ranks[..., None]).sum(-1, keepdim=True)
    full = above.cumsum(-1, dtype=torch.int32) + stored >= kept
    full[..., kept:, :] &= torch.ones_like(full[0, 0, kept:]).triu()
    dropped = torch.where(full.any(-1), full.byte().argmax(-1), size)
    empty = torch.isneginf(ranks)
    until = (index[:, :1] + window)[:, None] + dropped
    until = torch.where(dropped < size, until, torch.iinfo(until.dtype).max).masked_fill(empty, -1)
    best = ranks.topk(kept, dim=-1)
    return best.values, until, best.indices


def _attend(query: Tensor, key: Tensor, value: Tensor, visible: Tensor, scaling: float) -> Tensor:
    """Softmax over the visible pairs `(B, G, C, N)`; a query that sees nothing, which is padding, sees the last key,
    for some kernels of torch give NaN where there is none."""
    blind = ~visible.any(-1, keepdim=True)
    visible = torch.cat([visible[..., :-1], visible[..., -1:] | blind], dim=-1)
    ratio = query.shape[1] // key.shape[1]
    key, value, visible = (x.repeat_interleave(ratio, dim=1) for x in (key, value, visible))
    return functional.scaled_dot_product_attention(query, key, value, attn_mask=visible, scale=scaling)


def _advance(key, value, keys: Keys, store: Store, state: SalientState, end: Tensor, settings: Settings):
    """The state after a call."""
    window, count = settings.window, state.count
    newest = end[:, None] - 1 - (end[:, None] - 1 - torch.arange(window, device=end.device)) % window
    fresh = newest.masked_fill(newest < settings.sinks, -1)
    place = (newest - count[:, None] + window)[:, None].expand(-1, key.shape[1], -1)
    mass = keys.mass.gather(2, place).masked_fill((fresh < 0)[:, None], 0.0)
    return SalientState(
        overwrite_slots(state.window_key, key, fresh, count, end),
        overwrite_slots(state.window_value, value, fresh, count, end),
        mass,
        store.key.to(state.kept_key.dtype),
        store.value.to(state.kept_value.dtype),
        store.rank,
        keys.sink_key,
        keys.sink_value,
        end,
    )
