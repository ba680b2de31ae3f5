"""The definition of cosine attention: row by row, every pair of tokens, nothing clever.

Notation: B batch, H query heads, G key/value heads, T tokens, Dk query/key width, Dv value width, W window, S sinks.
Source: Cottention (Mongaras et al. 2024, arXiv 2409.18747), whose causal form scales on the key's side; the query's
side, the gain and the window are this project's.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ..hybrid_linear.reference import between

NORM_FLOOR = 1e-12


class State(NamedTuple):
    """The state's fields, in the order of `CosineState`; the window is a ring, slot = token index % W."""

    kv: Tensor
    window_key: Tensor
    window_value: Tensor
    sink_key: Tensor
    sink_value: Tensor
    count: Tensor  # type: ignore[assignment]  # hides tuple.count
    mass: Tensor | None = None


def unit(x: Tensor) -> Tensor:
    """N(x) along the last axis; a zero vector has a zero gradient."""
    norm = x.norm(dim=-1, keepdim=True)
    return x / norm.clamp(min=NORM_FLOOR).masked_fill(norm == 0, torch.inf)


def _row(query, key, value, log_decay, exponent, gain, settings, past=None):
    """One row without padding: query (H, T, Dk), key (G, T, Dk), value (G, T, Dv), log_decay (G, T), on the key's side
    (H, T), or None; past = its state.

    Returns the output (H, T, Dv) and the new state's fields without the batch dimension.
    """
    window, sinks, causal, key_side = settings
    heads, length = query.shape[:2]
    ratio = heads // key.shape[0]
    start = 0
    positions = torch.arange(length, device=query.device)
    if past is not None:
        start = int(past.count)
        ring = torch.arange(min(max(sinks, start - window), start), start, device=query.device)
        first = torch.arange(min(sinks, start), device=query.device)
        slot = ring % window if window else ring
        key = torch.cat([past.sink_key[:, first].to(key), past.window_key[:, slot].to(key), key], 1)
        value = torch.cat([past.sink_value[:, first].to(value), past.window_value[:, slot].to(value), value], 1)
        positions = torch.cat([first, ring, positions + start])
    n, j = (torch.arange(length, device=query.device) + start)[:, None], positions[None]
    visible = j <= n if causal else torch.ones_like(j <= n)
    far = visible & ((n - j).abs() >= window) & (j >= sinks)
    features = unit(key)
    if key_side:
        scale = (positions + 1).to(query) ** -exponent[:, None]
        features = features.repeat_interleave(ratio, dim=0) * scale[..., None]
    repeats = heads // features.shape[0]
    # What a pair weighs, and what the keys that only the state holds, which are far from every query of this call.
    weights, kept = far[None].to(query), query.new_ones(1, length)
    if log_decay is not None:
        weights, kept = between(log_decay, n - start, j - start + window, far) * far, log_decay.cumsum(1).exp()
    cosines = unit(query) @ features.repeat_interleave(repeats, dim=0).mT * _per_head(weights, heads)
    output = cosines @ value.repeat_interleave(ratio, dim=0)
    if past is not None:
        read = unit(query) * _per_head(kept, heads)[..., None]
        output = output + read @ past.kv.to(query).repeat_interleave(repeats, dim=0)
    mass = None
    if not key_side:
        inside = 0.0
        if past is not None:
            inside = max(start - window - sinks, 0) if past.mass is None else past.mass.to(query)[:, None]
        seen = weights.sum(-1) + inside * kept
        output = output * _per_head(seen.clamp(min=1), heads)[..., None] ** -exponent[:, None, None]
        if log_decay is not None:
            mass = _last(seen, past)
    if gain is not None:
        output = output * gain[:, None, None]
    state = _advance(past, start + length, key, value, features, log_decay, positions, window, sinks)
    return output, state._replace(mass=mass)


def _per_head(x, heads):
    """x (1 | G | H, ...) for each query head."""
    return x.repeat_interleave(heads // x.shape[0], dim=0)


def _last(seen, past):
    """The mass after these tokens, of which there may be none: (G,)."""
    if seen.shape[1]:
        return seen[:, -1]
    return seen.new_zeros(seen.shape[0]) if past is None else past.mass.to(seen)


def _advance(past, count, key, value, features, log_decay, positions, window, sinks):
    """The state after all these tokens; key (G, N, Dk) are the sinks, the window and the new tokens, by position."""
    groups, dim, value_dim = key.shape[0], key.shape[2], value.shape[2]
    fold = (positions >= sinks) & (positions < count - window)
    folded, old_weight = features[:, fold], 1.0
    if log_decay is not None:
        tokens = log_decay.shape[1]
        entered = positions[fold] - (count - tokens) + window
        last = torch.tensor([tokens - 1], device=key.device)
        folded = folded * between(log_decay, last, entered, torch.ones_like(entered, dtype=torch.bool))[..., None]
        old_weight = log_decay.sum(1).exp()[:, None, None]
    kv = folded.mT @ value[:, fold].repeat_interleave(features.shape[0] // groups, dim=0)
    if past is not None:
        kv = kv + old_weight * past.kv.to(kv)
    window_key, window_value = key.new_zeros(groups, window, dim), value.new_zeros(groups, window, value_dim)
    sink_key, sink_value = key.new_zeros(groups, sinks, dim), value.new_zeros(groups, sinks, value_dim)
    for place, j in enumerate(positions.tolist()):
        if j < sinks:
            sink_key[:, j], sink_value[:, j] = key[:, place], value[:, place]
        elif j >= count - window:
            window_key[:, j % window], window_value[:, j % window] = key[:, place], value[:, place]
    total = torch.tensor(count, dtype=torch.int64, device=key.device)
    return State(kv, window_key, window_value, sink_key, sink_value, total)


def reference(
    query,
    key,
    value,
    *,
    exponent,
    gain=None,
    causal=True,
    scale_side="query",
    window=0,
    sinks=0,
    attention_mask=None,
    cu_seqlens=None,
    initial_state=None,
    return_state=False,
    log_decay=None,
):
    """Cosine attention by its definition; arguments and returns of `cosine_attention`."""
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    settings = (window, sinks, causal, causal and scale_side == "key")
    batch, _, length, _ = query.shape
    if cu_seqlens is not None:
        bounds = cu_seqlens.tolist()
        if bounds[0] != 0 or bounds[-1] != length:
            raise ValueError(
                f"cu_seqlens must run from 0 to the {length} tokens, not from {bounds[0]} to {bounds[-1]}"
            )
        rows = [(0, slice(a, b)) for a, b in zip(bounds[:-1], bounds[1:], strict=True)]
    else:
        rows = [(b, slice(0, length)) for b in range(batch)]
    output = torch.zeros(*query.shape[:3], value.shape[-1], dtype=wide, device=query.device)
    states = []
    with torch.autocast(query.device.type, enabled=False):
        mix = (exponent.to(wide), None if gain is None else gain.to(wide))
        for b, span in rows:
            real = torch.arange(length, device=query.device)[span]
            if attention_mask is not None:
                real = real[attention_mask[b].bool()]
            q, k, v = (x[b][:, real].to(wide) for x in (query, key, value))
            decay = None if log_decay is None else log_decay[b][:, real].to(wide)
            past = None if initial_state is None else State._make(None if x is None else x[b] for x in initial_state)
            row, state = _row(q, k, v, decay, *mix, settings, past)
            heads = torch.arange(query.shape[1], device=query.device)[:, None]
            output = output.index_put((torch.tensor(b, device=query.device), heads, real[None]), row)
            states.append(state)
    if not return_state:
        return output.to(query.dtype), None
    stacked = State._make(None if x[0] is None else torch.stack(x) for x in zip(*states, strict=True))
    raw = {name: getattr(stacked, name).to(key.dtype) for name in ("window_key", "sink_key")}
    raw |= {name: getattr(stacked, name).to(value.dtype) for name in ("window_value", "sink_value")}
    return output.to(query.dtype), stacked._replace(**raw)
