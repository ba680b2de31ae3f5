"""The chunked PyTorch path of cosine attention: linear memory in T, on CPU and GPU, under autograd.

It is the linear branch of `op_hybrid_linear_chunked.py` with the unit vectors N(q), N(k) for features, its denominator
unused and its softmax branch off; what is added here is the scale, on the query's or on the key's side, with the mass
of a memory that forgets. A bidirectional row without a window needs no chunks: all its queries meet the same keys.

Legend as in `op_cosine.py`; R = H / G.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from .op_hybrid_linear_chunked import (
    CHUNK,
    SEGMENT,
    Features,
    HybridLinearState,
    Inputs,
    Settings,
    run_bidirectional,
    run_causal,
)
from .op_hybrid_linear_decay import chunk_decay, per_head, sums_at_starts
from .op_rows import Rows

NORM_FLOOR = 1e-12


class CosineState(NamedTuple):
    """What a causal sequence leaves behind; batch first, the sum in float32 (float64 for float64 input).

    Fields: kv `(B, G, Dk, Dv)`, the sum of N(k_j) v_j^T over the keys S <= j < count - W, decayed, or
    `(B, H, Dk, Dv)`, each term times c_j^-s, when the scale is on the key's side; window_key `(B, G, W, Dk)`,
    window_value `(B, G, W, Dv)`, the keys j >= S of the last W, as a ring: slot = j % W; sink_key `(B, G, S, Dk)`,
    sink_value `(B, G, S, Dv)`; count `(B,)` int64, the real tokens so far; mass `(B, G)`, the sum of the weights of
    kv's keys, where the memory forgets and the scale is on the query's side, else None. Slots not yet written are 0.
    """

    kv: Tensor
    window_key: Tensor
    window_value: Tensor
    sink_key: Tensor
    sink_value: Tensor
    count: Tensor  # type: ignore[assignment]  # hides tuple.count
    mass: Tensor | None = None


def run_cosine(
    query,
    key,
    value,
    log_decay=None,
    *,
    exponent,
    gain=None,
    causal=True,
    scale_side="query",
    window=0,
    sinks=0,
    attention_mask=None,
    initial_state=None,
    return_state=False,
):
    """Run rows that may be padded, of at least one token; the arguments are those of `cosine_attention`.

    Returns:
        The output `(B, H, T, Dv)`, in float32 at least, and the state or None.
    """
    dtype = torch.promote_types(query.dtype, torch.float32)
    heads, groups, dim = query.shape[1], key.shape[1], query.shape[-1]
    with torch.autocast(query.device.type, enabled=False):
        rate = exponent.to(dtype)[:, None]
        key_side = causal and scale_side == "key"

        def key_features(x: Tensor, place: Tensor) -> Tensor:
            units = unit(x)
            if not key_side:
                return units
            return units.repeat_interleave(heads // groups, 1) * power(place + 1, rate)

        def query_features(x: Tensor, _: Tensor) -> Tensor:
            return unit(x)

        maps = Features(heads, dim, query_features), Features(heads if key_side else groups, dim, key_features)
        settings = Settings(window, sinks, 1.0, "logsumexp", None, None, *maps, softmax=False)
        rows = Rows(attention_mask, query)
        decay = None if log_decay is None else log_decay.to(dtype)[..., None]
        inputs = Inputs(query, key, value, None, None, log_decay=decay).map(rows.compact)
        state = mass = None
        if causal:
            past = None if initial_state is None else _as_hybrid(initial_state)
            branches, state = run_causal(inputs, rows.lengths, past, return_state, dtype, settings)
            output = branches.numerator
        elif window:
            output = run_bidirectional(inputs, rows.lengths, dtype, settings).numerator
        else:
            output = sum_over_row(inputs.query.to(dtype), inputs.key.to(dtype), inputs.value.to(dtype), sinks)
        if not key_side:
            decay = None if inputs.log_decay is None else inputs.log_decay[..., 0]
            seen = seen_keys(rows.lengths, query.shape[2], (window, sinks, causal), decay, initial_state)
            mass = None if decay is None else seen[..., -1]
            output = output * power(seen, rate)
        if gain is not None:
            output = output * gain.to(dtype)[:, None, None]
        output = rows.restore(output)
    return output, None if state is None else _as_cosine(state, mass)


def unit(x: Tensor) -> Tensor:
    """N(x) along the last axis; where x is 0 so is its gradient, which 1 / 1e-12 would be no help in."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x / norm.clamp(min=NORM_FLOOR).masked_fill(norm == 0, torch.inf)


def sum_over_row(query: Tensor, key: Tensor, value: Tensor, sinks: int) -> Tensor:
    """Every query against all keys but the sinks, in the cheaper order of the two products: `(B, H, T, Dv)`.

    The order by pairs, `(N(q) N(k)^T) v`, is the cheaper one only up to T <= 2 min(Dk, Dv), so that memory is linear
    in T in both. Keys of padding must be 0, which leaves them out.
    """
    groups, length, dim = key.shape[1:]
    ratio, value_dim = query.shape[1] // groups, value.shape[-1]
    key, value = unit(key[:, :, sinks:]), value[:, :, sinks:]
    folded = unit(query).unflatten(1, (groups, ratio)).flatten(2, 3)  # the R query heads of a group in a row
    if ratio * length * (dim + value_dim) <= (ratio + 1) * dim * value_dim:
        output = (folded @ key.mT) @ value
    else:
        output = folded @ (key.mT @ value)
    return output.unflatten(2, (ratio, length)).flatten(1, 2)


def seen_keys(lengths: Tensor, tokens: int, form: tuple[int, int, bool], log_decay=None, state=None) -> Tensor:
    """What a query's scale counts, for rows of real tokens in front: |L(n)|, or the weight of what is remembered.

    Args:
        lengths: `(B,)` real tokens, of `tokens` places.
        form: window, sinks, causal.
        log_decay: `(B, G, T)` or None. state: before the first token, or None.

    Returns:
        `(B, T)`, with log_decay `(B, G, T)`.
    """
    window, sinks, causal = form
    place = torch.arange(tokens, device=lengths.device).expand(len(lengths), -1)
    real = place < lengths[:, None]
    if state is not None:
        place = place + state.count[:, None]
    if log_decay is None:
        return far_keys(place, lengths, window, sinks, causal)
    return remembered(log_decay, real & (place >= window + sinks), None if state is None else state.mass)


def far_keys(place: Tensor, lengths: Tensor, window: int, sinks: int, causal: bool) -> Tensor:
    """|L(n)| of the queries at `place` `(B, T)` in rows of `lengths` `(B,)` tokens."""
    before = (place + 1 - window - sinks).clamp(min=0)
    if causal:
        return before
    lengths = lengths[:, None]
    if window == 0:
        return (lengths - sinks).clamp(min=0).expand_as(place)
    return before + (lengths - (place + window).clamp(min=sinks)).clamp(min=0)


def remembered(log_decay: Tensor, enters: Tensor, before: Tensor | None = None) -> Tensor:
    """What the keys in a memory that forgets weigh together, read at each token: `(B, G, T)`.

    Args:
        log_decay: `(B, G, T)`, 0 at padding.
        enters: `(B, T)`, whether a key enters with the token, at weight 1.
        before: `(B, G)`, what the memory weighs before the first token; None is 0.
    """
    parts = []
    mass = torch.zeros_like(log_decay[..., 0]) if before is None else before.to(log_decay.dtype)
    for start in range(0, log_decay.shape[2], SEGMENT):
        decay, entered = (x[..., start : start + SEGMENT] for x in (log_decay, enters))
        length = decay.shape[2]
        size = min(CHUNK, length)
        weights = chunk_decay(functional.pad(decay, (0, -length % size)).unflatten(2, (-1, size)))
        entered = functional.pad(entered, (0, -length % size)).unflatten(1, (-1, size))[:, None].to(decay.dtype)
        added = (weights.kept * entered).sum(-1, keepdim=True)
        at_start = sums_at_starts(weights.across, mass[..., None, None], added)
        inside = (weights.pairs.tril() * entered[..., None, :]).sum(-1)
        parts.append((inside + weights.read * at_start).flatten(2, 3)[..., :length])
        mass = parts[-1][..., -1]
    return torch.cat(parts, dim=2)


def power(count: Tensor, rate: Tensor) -> Tensor:
    """`max(count, 1)^-rate`: count `(B, T)` or `(B, G, T)`, rate `(H, 1)` -> `(B, H, T, 1)`."""
    level = count.clamp(min=1).to(rate.dtype).log()
    level = level[:, None] if level.dim() == 2 else per_head(level, rate.shape[0])
    return (-rate * level).exp()[..., None]


def _as_hybrid(state) -> HybridLinearState:
    normalizer = torch.zeros_like(state.kv[..., 0])
    ring = (state.window_key, state.window_value, None, state.sink_key, state.sink_value)
    return HybridLinearState(state.kv, normalizer, *ring, state.count)


def _as_cosine(state: HybridLinearState, mass: Tensor | None) -> CosineState:
    ring = (state.window_key, state.window_value, state.sink_key, state.sink_value)
    return CosineState(state.kv, *ring, state.count, mass)
