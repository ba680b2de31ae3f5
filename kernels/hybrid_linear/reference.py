"""The definition of hybrid linear attention: row by row, every pair of tokens, nothing clever.

Notation: B batch, H query heads, G key/value heads, T tokens, D head dim, F features, W window, S sinks.
Source: LoLCATs (Zhang et al. 2024, arXiv 2410.10254), section 3.3, for the window beside the linear branch under one
denominator; the reference level `logsumexp` with a learned shift, and the sinks, are this project's.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

FLOOR = 1e-12
MAGNITUDE_LIMIT = 10.0
MASS_LIMIT = 30.0
DENOMINATOR_FLOOR = 1e-20


class State(NamedTuple):
    """The state's fields, in the order of `HybridLinearState`; the window is a ring, slot = token index % W."""

    kv: Tensor
    normalizer: Tensor
    window_key: Tensor
    window_value: Tensor
    window_features: Tensor | None
    sink_key: Tensor
    sink_value: Tensor
    count: Tensor  # type: ignore[assignment]  # hides tuple.count
    window_map_key: Tensor | None = None


def features_of(x: Tensor, maps) -> Tensor:
    """Features of x `(heads_x, T, D)` under maps of as many or more heads: `(heads, T, F)`."""
    weight = maps.weight.to(x.dtype)
    x = x.repeat_interleave(weight.shape[0] // x.shape[0], dim=0)
    u = x @ weight
    if maps.bias is not None:
        u = u + maps.bias.to(x.dtype)[:, None]
    if maps.activation == "softmax":
        features = torch.cat([u.softmax(-1), (-u).softmax(-1)], -1)
    elif maps.activation == "exp":
        features = torch.cat([(u - u.amax(-1, True)).exp(), (u.amin(-1, True) - u).exp()], -1)
    elif maps.activation == "relu":
        features = u.relu()
    elif maps.activation == "elu":
        features = 1 + functional.elu(u)
    else:
        raise ValueError(f"unknown activation {maps.activation!r}")
    features = features.clamp(min=FLOOR)
    if maps.magnitude is not None:
        level = (x * maps.magnitude.to(x.dtype)[:, None]).sum(-1, keepdim=True)
        features = features * level.clamp(-MAGNITUDE_LIMIT, MAGNITUDE_LIMIT).exp()
    return features


def _row(query, key, value, features, log_decay, weight, shift, settings, past=None):
    """One row without padding: query (H, T, D), key (G, T, D), features as `_features_at` gives them, log_decay
    (heads of the key features, T) or None; past = its state.

    Returns the output (H, T, Dv) and the new state's fields without the batch dimension.
    """
    window, sinks, causal, scaling, level = settings
    heads, length = query.shape[:2]
    groups = key.shape[0]
    query_features, key_features, map_key, recompute = features
    start = 0
    positions = torch.arange(length, device=query.device)
    if past is not None:
        start = int(past.count)
        ring = torch.arange(min(max(sinks, start - window), start), start, device=query.device)
        first = torch.arange(min(sinks, start), device=query.device)
        slot = ring % window if window else ring
        key = torch.cat([past.sink_key[:, first].to(key), past.window_key[:, slot].to(key), key], 1)
        value = torch.cat([past.sink_value[:, first].to(value), past.window_value[:, slot].to(value), value], 1)
        if map_key is not None:
            unused = key.new_zeros(groups, len(first), map_key.shape[2])
            map_key = torch.cat([unused, past.window_map_key[:, slot].to(key), map_key], 1)
        if key_features is not None:
            read = past.window_key if map_key is None else past.window_map_key
            old = recompute(read[:, slot].to(key)) if recompute else past.window_features[:, slot]
            unused = key_features.new_zeros(key_features.shape[0], len(first), key_features.shape[2])
            key_features = torch.cat([unused, old.to(key_features), key_features], 1)
        positions = torch.cat([first, ring, positions + start])
    n, j = (torch.arange(length, device=query.device) + start)[:, None], positions[None]
    visible = j <= n if causal else torch.ones_like(j <= n)
    near = visible & (((n - j).abs() < window) | (j < sinks))
    repeated_key, repeated_value = (x.repeat_interleave(heads // groups, dim=0) for x in (key, value))
    scores = (scaling * query @ repeated_key.mT).masked_fill(~near, -torch.inf)
    nonempty = near.any(-1)[None, :, None]
    scores = scores.masked_fill(~nonempty, 0.0)
    softmax_output = (scores.softmax(-1) * nonempty) @ repeated_value
    if query_features is None:
        output = softmax_output
    else:
        lse = scores.logsumexp(-1, keepdim=True)
        r = lse if level == "logsumexp" else functional.pad(scores, (0, 1), value=-torch.inf).amax(-1, keepdim=True)
        tilt = weight.to(query).log()[:, None, None]
        if shift is not None:
            tilt = tilt + shift.to(query)[:, None, None] * r
        mass = (lse - r + tilt.clamp(-MASS_LIMIT, MASS_LIMIT)).exp() * nonempty
        wide_features = key_features.repeat_interleave(heads // key_features.shape[0], dim=0)
        pairs = (query_features @ wide_features.mT).masked_fill(~(visible & ~near), 0.0)
        if log_decay is not None:
            pairs = pairs * between(log_decay, n - start, j - start + window, visible & ~near).repeat_interleave(
                heads // log_decay.shape[0], dim=0
            )
        numerator, denominator = pairs @ repeated_value, pairs.sum(-1, keepdim=True)
        if past is not None:
            ratio = heads // past.kv.shape[0]
            read_features = query_features
            if log_decay is not None:
                read_features = query_features * log_decay.cumsum(1).exp()[..., None].repeat_interleave(ratio, dim=0)
            numerator = numerator + read_features @ past.kv.to(query).repeat_interleave(ratio, dim=0)
            normalizer = past.normalizer.to(query).repeat_interleave(ratio, dim=0)
            denominator = denominator + read_features @ normalizer[..., None]
        output = (mass * softmax_output + numerator) / (mass + denominator).clamp(min=DENOMINATOR_FLOOR)
    new = (key, value, key_features, map_key, log_decay)
    return output, _advance(past, start + length, *new, positions, heads, window, sinks)


def between(log_decay, n, first, seen):
    """exp of the sum of log_decay (heads, T) over the tokens first < i <= n, where a pair is seen: (heads, n, j)."""
    sums = functional.pad(log_decay.double().cumsum(1), (1, 0))
    last, first = (x.clamp(0, log_decay.shape[1]) for x in (n + 1, first + 1))
    return (sums[:, last] - sums[:, first]).masked_fill(~seen, 0.0).exp().to(log_decay.dtype)


def _advance(past, count, key, value, key_features, map_key, log_decay, positions, heads, window, sinks):
    """The state after all these tokens; key (G, N, D) are the sinks, the window and the new tokens, by position."""
    groups, dim, value_dim = key.shape[0], key.shape[2], value.shape[2]
    width = 0 if key_features is None else key_features.shape[2]
    feature_heads = heads if key_features is None else key_features.shape[0]
    fold = (positions >= sinks) & (positions < count - window)
    kv = key.new_zeros(feature_heads, width, value_dim)
    normalizer = key.new_zeros(feature_heads, width)
    if key_features is not None:
        folded_value = value[:, fold].repeat_interleave(feature_heads // groups, dim=0)
        folded = key_features[:, fold]
        old_weight = key.new_ones(feature_heads, 1, 1)
        if log_decay is not None:
            start, last = count - log_decay.shape[1], torch.tensor([log_decay.shape[1] - 1], device=key.device)
            entered = positions[fold] - start + window
            folded = folded * between(log_decay, last, entered, torch.ones_like(entered, dtype=torch.bool))[..., None]
            old_weight = log_decay.sum(1).exp()[:, None, None]
        kv, normalizer = folded.mT @ folded_value, folded.sum(1)
        if past is not None:
            kv, normalizer = kv + old_weight * past.kv.to(kv), normalizer + old_weight[..., 0] * past.normalizer.to(kv)
    window_key, window_value = key.new_zeros(groups, window, dim), value.new_zeros(groups, window, value_dim)
    window_features = key.new_zeros(feature_heads, window, width)
    window_map_key = None if map_key is None else map_key.new_zeros(groups, window, map_key.shape[2])
    sink_key, sink_value = key.new_zeros(groups, sinks, dim), value.new_zeros(groups, sinks, value_dim)
    for place, j in enumerate(positions.tolist()):
        if j < sinks:
            sink_key[:, j], sink_value[:, j] = key[:, place], value[:, place]
        elif j >= count - window:
            window_key[:, j % window], window_value[:, j % window] = key[:, place], value[:, place]
            if key_features is not None:
                window_features[:, j % window] = key_features[:, place]
            if window_map_key is not None:
                window_map_key[:, j % window] = map_key[:, place]
    total = torch.tensor(count, dtype=torch.int64, device=key.device)
    windows = (window_key, window_value, window_features, sink_key, sink_value)
    return State(kv, normalizer, *windows, total, window_map_key)


def _features_at(b, real, query, key, query_features, key_features, map_query, map_key):
    """Features of row b's real queries and keys; the keys that the map reads where they are others than the scores';
    and the function that makes features from a key when a map was given."""
    if query_features is None:
        return None, None, None, None
    if map_query is not None:
        map_query, map_key = (x[b][:, real].to(query.dtype) for x in (map_query, map_key))
    recompute = (lambda x: features_of(x, key_features)) if hasattr(key_features, "weight") else None
    phi_k = recompute(key if map_key is None else map_key) if recompute else key_features[b][:, real].to(key.dtype)
    if hasattr(query_features, "weight"):
        return features_of(query if map_query is None else map_query, query_features), phi_k, map_key, recompute
    return query_features[b][:, real].to(query.dtype), phi_k, map_key, recompute


def reference(
    query,
    key,
    value,
    query_features,
    key_features,
    *,
    window_weight=None,
    window_shift=None,
    window_reference="logsumexp",
    window=64,
    sinks=0,
    causal=True,
    scaling=None,
    attention_mask=None,
    cu_seqlens=None,
    initial_state=None,
    return_state=False,
    map_query=None,
    map_key=None,
    log_decay=None,
    backend="reference",
):
    """Hybrid linear attention by its definition; arguments and returns of `hybrid_linear_attention`."""
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    settings = (window, sinks, causal, query.shape[-1] ** -0.5 if scaling is None else scaling, window_reference)
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
        for b, span in rows:
            real = torch.arange(length, device=query.device)[span]
            if attention_mask is not None:
                real = real[attention_mask[b].bool()]
            q, k, v = (x[b][:, real].to(wide) for x in (query, key, value))
            features = _features_at(b, real, q, k, query_features, key_features, map_query, map_key)
            decay = None if log_decay is None else log_decay[b][:, real].to(wide)
            past = None if initial_state is None else State._make(None if x is None else x[b] for x in initial_state)
            row, state = _row(q, k, v, features, decay, window_weight, window_shift, settings, past)
            heads = torch.arange(query.shape[1], device=query.device)[:, None]
            output = output.index_put((torch.tensor(b, device=query.device), heads, real[None]), row)
            states.append(state)
    if not return_state:
        return output.to(query.dtype), None
    stacked = State._make(None if x[0] is None else torch.stack(x) for x in zip(*states, strict=True))
    raw = {name: getattr(stacked, name).to(key.dtype) for name in ("window_key", "sink_key")}
    raw |= {name: getattr(stacked, name).to(value.dtype) for name in ("window_value", "sink_value")}
    raw["window_features"] = None if hasattr(key_features, "weight") else stacked.window_features
    if stacked.window_map_key is not None:
        raw["window_map_key"] = stacked.window_map_key.to(map_key.dtype)
    return output.to(query.dtype), stacked._replace(**raw)
