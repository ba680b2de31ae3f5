"""The chunked PyTorch path of cosine attention: linear memory in T, on CPU and GPU, under autograd.

It is the linear branch of `op_hybrid_linear_chunked.py` with the unit vectors N(q), N(k) for features, its denominator
unused and its softmax branch off; what is added here is the scale, on the query's or on the key's side. A
bidirectional row without a window needs no chunks: all its queries meet the same keys.

Legend as in `op_cosine.py`; R = H / G.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .op_hybrid_linear_chunked import (
    Features,
    HybridLinearState,
    Inputs,
    Settings,
    run_bidirectional,
    run_causal,
)
from .op_rows import Rows

NORM_FLOOR = 1e-12


class CosineState(NamedTuple):
    """What a causal sequence leaves behind; batch first, the sum in float32 (float64 for float64 input).

    Fields: kv `(B, G, Dk, Dv)`, the sum of N(k_j) v_j^T over the keys S <= j < count - W, or `(B, H, Dk, Dv)`, each
    term times c_j^-s, when the scale is on the key's side; window_key `(B, G, W, Dk)`, window_value `(B, G, W, Dv)`,
    the keys j >= S of the last W, as a ring: slot = j % W; sink_key `(B, G, S, Dk)`, sink_value `(B, G, S, Dv)`;
    count `(B,)` int64, the real tokens so far. Slots not yet written are 0.
    """

    kv: Tensor
    window_key: Tensor
    window_value: Tensor
    sink_key: Tensor
    sink_value: Tensor
    count: Tensor  # type: ignore[assignment]  # hides tuple.count


def run_cosine(
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
        inputs = Inputs(query, key, value, None, None).map(rows.compact)
        state = None
        if causal:
            past = None if initial_state is None else _as_hybrid(initial_state)
            branches, state = run_causal(inputs, rows.lengths, past, return_state, dtype, settings)
            output = branches.numerator
        elif window:
            output = run_bidirectional(inputs, rows.lengths, dtype, settings).numerator
        else:
            output = sum_over_row(inputs.query.to(dtype), inputs.key.to(dtype), inputs.value.to(dtype), sinks)
        if not key_side:
            place = torch.arange(query.shape[2], device=query.device).expand(query.shape[0], -1)
            if initial_state is not None:
                place = place + initial_state.count[:, None]
            output = output * power(far_keys(place, rows.lengths, window, sinks, causal), rate)
        if gain is not None:
            output = output * gain.to(dtype)[:, None, None]
        output = rows.restore(output)
    return output, None if state is None else _as_cosine(state)


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


def far_keys(place: Tensor, lengths: Tensor, window: int, sinks: int, causal: bool) -> Tensor:
    """|L(n)| of the queries at `place` `(B, T)` in rows of `lengths` `(B,)` tokens."""
    before = (place + 1 - window - sinks).clamp(min=0)
    if causal:
        return before
    lengths = lengths[:, None]
    if window == 0:
        return (lengths - sinks).clamp(min=0).expand_as(place)
    return before + (lengths - (place + window).clamp(min=sinks)).clamp(min=0)


def power(count: Tensor, rate: Tensor) -> Tensor:
    """`max(count, 1)^-rate`: count `(B, T)`, rate `(H, 1)` -> `(B, H, T, 1)`."""
    level = count.clamp(min=1).to(rate.dtype).log()
    return (-rate * level[:, None]).exp()[..., None]


def _as_hybrid(state) -> HybridLinearState:
    normalizer = torch.zeros_like(state.kv[..., 0])
    ring = (state.window_key, state.window_value, None, state.sink_key, state.sink_value)
    return HybridLinearState(state.kv, normalizer, *ring, state.count)


def _as_cosine(state: HybridLinearState) -> CosineState:
    ring = (state.window_key, state.window_value, state.sink_key, state.sink_value)
    return CosineState(state.kv, *ring, state.count)
