"""The definition of salient-token attention: row by row, token by token, every pair, nothing clever.

Notation: B batch, H query heads, G key/value heads, T tokens, D head dim, W window, S sinks, K kept tokens.
Sources: heavy hitters, Zhang et al. 2023, arXiv 2306.14048; STILL, arXiv 2602.02180.
"""

from typing import NamedTuple

import torch
from torch import Tensor

MASS_FLOOR = 1e-20


class State(NamedTuple):
    """The state's fields, in the order of `SalientState`; the window is a ring, slot = token index % W."""

    window_key: Tensor
    window_value: Tensor
    window_mass: Tensor
    kept_key: Tensor
    kept_value: Tensor
    kept_rank: Tensor
    sink_key: Tensor
    sink_value: Tensor
    count: Tensor  # type: ignore[assignment]  # hides tuple.count


class Known(NamedTuple):
    """The tokens of a row whose keys are at hand: place in the row `(N,)`, key `(G, N, D)`, value `(G, N, Dv)`, mass
    received so far `(G, N)`, and the rank of those that had left before this call `(G, N)`, NaN for all others."""

    place: list[int]
    key: Tensor
    value: Tensor
    mass: Tensor
    rank: Tensor


def _known(key, value, past, settings):
    """All keys at hand: what the state holds, then the new ones. What was kept has no place: it gets negative ones,
    which are not those of sinks and outside of every window."""
    window, sinks, kept = settings[:3]
    groups, length = key.shape[:2]
    start = 0 if past is None else int(past.count)
    place = list(range(start, start + length))
    mass, rank = key.new_zeros(groups, length), key.new_full((groups, length), torch.nan)
    if past is None:
        return Known(place, key, value, mass, rank), start
    ring = list(range(max(sinks, start - window, 0), start))
    first, slots = list(range(min(sinks, start))), [j % window for j in ring]
    keys = [past.kept_key, past.sink_key[:, first], past.window_key[:, slots], key]
    values = [past.kept_value, past.sink_value[:, first], past.window_value[:, slots], value]
    masses = [mass.new_zeros(groups, kept + len(first)), past.window_mass[:, slots], mass]
    ranks = [past.kept_rank, rank.new_full((groups, len(first) + len(ring)), torch.nan), rank]
    joined = (torch.cat([x.to(key) for x in parts], 1) for parts in (keys, values, masses, ranks))
    return Known([-1 - i for i in range(kept)] + first + ring + place, *joined), start


def _row(query, key, value, settings, past=None):
    """One row without padding: query (H, T, D), key (G, T, D), value (G, T, Dv); past = its state.

    Returns the output (H, T, Dv) and the new state's fields without the batch dimension.
    """
    window, sinks, kept, age_penalty, scaling = settings
    heads, length = query.shape[:2]
    groups = key.shape[0]
    known, start = _known(key, value, past, settings)
    place, mass, rank = torch.tensor(known.place, device=query.device), known.mass.clone(), known.rank.clone()
    outputs = []
    for n in range(start, start + length):
        if n - window >= sinks:  # this key leaves the window, with all the mass that it gets
            leaver = known.place.index(n - window)
            aged = age_penalty / 1000 * (n - window)
            rank[:, leaver] = mass[:, leaver].clamp(min=MASS_FLOOR).log() + aged
        near = (place >= 0) & (place <= n) & ((n - place < window) | (place < sinks))
        counted = near & (place >= sinks) & (n - place >= window // 2) & (kept > 0)
        scores = torch.einsum("grd,gnd->grn", query[:, n - start].unflatten(0, (groups, -1)), known.key) * scaling
        with torch.no_grad():
            share = scores.masked_fill(~near, -torch.inf).softmax(-1).sum(1)
            mass += share.masked_fill(~counted, 0.0)
        seen = near[None] | _best(rank, kept)
        weights = scores.masked_fill(~seen[:, None], -torch.inf).softmax(-1)
        outputs.append(torch.einsum("grn,gnd->grd", weights, known.value).flatten(0, 1))
    output = torch.stack(outputs, 1) if outputs else value.new_zeros(heads, 0, value.shape[-1])
    return output, _state(known._replace(mass=mass, rank=rank), start + length, settings)


def _best(rank, kept):
    """(G, N), bool: the `kept` highest ranks of the keys that have one."""
    chosen = torch.zeros_like(rank, dtype=torch.bool)
    ranked = rank.masked_fill(rank.isnan(), -torch.inf)
    best = ranked.topk(min(kept, rank.shape[1]), dim=-1)
    return chosen.scatter_(-1, best.indices, ~torch.isneginf(best.values))


def _state(known, count, settings):
    """The state after all these tokens."""
    window, sinks, kept = settings[:3]
    groups, dim, value_dim = known.key.shape[0], known.key.shape[2], known.value.shape[2]

    def empty(slots):
        return known.key.new_zeros(groups, slots, dim), known.value.new_zeros(groups, slots, value_dim)

    (window_key, window_value), (kept_key, kept_value), (sink_key, sink_value) = map(empty, (window, kept, sinks))
    window_mass = known.mass.new_zeros(groups, window)
    kept_rank = known.rank.new_full((groups, kept), -torch.inf)
    for i, j in enumerate(known.place):
        if 0 <= j < sinks:
            sink_key[:, j], sink_value[:, j] = known.key[:, i], known.value[:, i]
        elif j >= max(sinks, count - window):
            slot = j % window
            window_key[:, slot], window_value[:, slot] = known.key[:, i], known.value[:, i]
            window_mass[:, slot] = known.mass[:, i]
    for group, chosen in enumerate(_best(known.rank, kept)):
        places = chosen.nonzero()[:, 0]
        kept_key[group, : len(places)] = known.key[group, places]
        kept_value[group, : len(places)] = known.value[group, places]
        kept_rank[group, : len(places)] = known.rank[group, places]
    total = torch.tensor(count, dtype=torch.int64, device=known.key.device)
    return State(window_key, window_value, window_mass, kept_key, kept_value, kept_rank, sink_key, sink_value, total)


def reference(
    query,
    key,
    value,
    *,
    window=224,
    sinks=4,
    kept=220,
    age_penalty=0.6,
    scaling=None,
    attention_mask=None,
    cu_seqlens=None,
    initial_state=None,
    return_state=False,
):
    """Salient-token attention by its definition; arguments and returns of `salient_attention`."""
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    settings = (window, sinks, kept, age_penalty, query.shape[-1] ** -0.5 if scaling is None else scaling)
    batch, _, length, _ = query.shape
    rows = [(b, slice(0, length)) for b in range(batch)]
    if cu_seqlens is not None:
        bounds = cu_seqlens.tolist()
        if bounds[0] != 0 or bounds[-1] != length:
            raise ValueError(
                f"cu_seqlens must run from 0 to the {length} tokens, not from {bounds[0]} to {bounds[-1]}"
            )
        rows = [(0, slice(a, b)) for a, b in zip(bounds[:-1], bounds[1:], strict=True)]
    output = torch.zeros(*query.shape[:3], value.shape[-1], dtype=wide, device=query.device)
    states = []
    with torch.autocast(query.device.type, enabled=False):
        for b, span in rows:
            real = torch.arange(length, device=query.device)[span]
            if attention_mask is not None:
                real = real[attention_mask[b].bool()]
            q, k, v = (x[b][:, real].to(wide) for x in (query, key, value))
            past = None if initial_state is None else State._make(x[b] for x in initial_state)
            row, state = _row(q, k, v, settings, past)
            heads = torch.arange(query.shape[1], device=query.device)[:, None]
            output = output.index_put((torch.tensor(b, device=query.device), heads, real[None]), row)
            states.append(state)
    if not return_state:
        return output.to(query.dtype), None
    stacked = State(*(torch.stack(field) for field in zip(*states, strict=True)))
    raw = {name: getattr(stacked, name).to(key.dtype) for name in ("window_key", "kept_key", "sink_key")}
    raw |= {name: getattr(stacked, name).to(value.dtype) for name in ("window_value", "kept_value", "sink_value")}
    return output.to(query.dtype), stacked._replace(**raw)
