"""Hybrid linear attention: a softmax window with sinks and a linear branch under one denominator.

The public function and its state; the chunked PyTorch path is in `op_hybrid_linear_chunked.py`.

Legend: B batch, H query heads, G key/value heads, R = H / G, T tokens, D head dim, Dv value dim, F features,
W window, S sinks, C chunk. Tensors are `(B, H|G, T, D)`.

Source: LoLCATs (Zhang et al. 2024, arXiv 2410.10254), section 3.3, gives the shared denominator and the `max` level;
the `logsumexp` level with a learned shift per head is this project's. Feature maps: Hedgehog (Zhang et al. 2024,
arXiv 2402.04347) for `softmax` and `exp`, T2R (Kasai et al. 2021, arXiv 2103.13076) for `relu`.
"""

from torch import Tensor

from .feature_maps import FeatureMapWeights
from .op_dispatch import check_heads, choose_backend
from .op_hybrid_linear_chunked import HybridLinearState, run_rows
from .op_rows import check_rows, over_rows

CONTRACT = 2
"""1 has no map_query, map_key and log_decay, and no window_map_key in the state: what None means in each."""

PER_TOKEN = ("map_query", "map_key", "log_decay")

__all__ = ["CONTRACT", "FeatureMapWeights", "HybridLinearState", "hybrid_linear_attention", "linear_share"]


def hybrid_linear_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_features: Tensor | FeatureMapWeights | None,
    key_features: Tensor | FeatureMapWeights | None,
    *,
    window_weight: Tensor | None = None,
    window_shift: Tensor | None = None,
    window_reference: str = "logsumexp",
    window: int = 64,
    sinks: int = 0,
    causal: bool = True,
    scaling: float | None = None,
    attention_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    initial_state: HybridLinearState | None = None,
    return_state: bool = False,
    map_query: Tensor | None = None,
    map_key: Tensor | None = None,
    log_decay: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, HybridLinearState | None]:
    """Attend by softmax to the window and the sinks, by features to every other visible key, one denominator.

    `y_n = (m_n o_n + phi_q(n) . sum_L phi_k(j) v_j) / max(m_n + phi_q(n) . sum_L phi_k(j), 1e-20)`, where o_n is the
    softmax attention over the window and sinks, `m_n = exp(lse_n - r_n + clamp(log weight + shift r_n, -30, 30))`
    its mass and r_n the log-sum-exp or the maximum of its scores. Both features None: the softmax branch alone.
    With log_decay the memory forgets: token n multiplies it by `exp(log_decay_n)`, then adds key n - W, which leaves
    the window, at weight 1, then reads; sinks never enter.

    Args:
        query: `(B, H, T, D)`, after RoPE, unscaled.
        key, value: `(B, G, T, D)`, `(B, G, T, Dv)`, never repeated.
        query_features: `(B, H, T, F)`, all >= 0, or the map that gives them.
        key_features: `(B, H|G, T, F)`, all >= 0, or the map that gives them.
        window_weight: `(H,)`, > 0; may be None without features, or without window and sinks.
        window_shift: `(H,)` or None, which is 0.
        window_reference: `logsumexp` or `max`.
        window: tokens in the softmax window, the query itself included; 0 is none.
        sinks: first tokens of a row that always belong to the softmax branch.
        causal: False sees every real key; W(n) is then |n - j| < window.
        scaling: of the softmax scores; default `D**-0.5`.
        attention_mask: `(B, T)` of this call's tokens, 1 = real; padding may lie anywhere.
        cu_seqlens: `(N + 1,)` int32, B = 1: N packed sequences, each a row of its own.
        initial_state: state of an earlier call on the same rows.
        return_state: also return the state after this call.
        map_query, map_key: `(B, H, T, D)`, `(B, G, T, D)`, together or not at all: what the maps read in place of
            query and key, such as the projections before RoPE.
        log_decay: `(B, H|G, T)`, as many heads as the key features; finite, <= 0; causal only.
        backend: `auto`, `reference`, `chunked` or `triton`.

    Returns:
        Output `(B, H, T, Dv)` in the query's dtype, 0 at padding; the state, or None.

    Raises:
        ValueError: contradictory arguments, or a backend that cannot do the call.
    """
    _check(query, key, query_features, key_features, window_weight, window_reference, window, sinks)
    _check_maps(query, key, (query_features, key_features), map_query, map_key, initial_state)
    _check_decay(query, key, key_features, log_decay, causal)
    check_rows(query, causal, attention_mask, cu_seqlens, stateful=initial_state is not None or return_state)
    args = (query, key, value, query_features, key_features)
    options = {
        "window_weight": window_weight,
        "window_shift": window_shift,
        "window_reference": window_reference,
        "window": window,
        "sinks": sinks,
        "causal": causal,
        "scaling": scaling,
        "attention_mask": attention_mask,
        "cu_seqlens": cu_seqlens,
        "initial_state": initial_state,
        "return_state": return_state,
        "map_query": map_query,
        "map_key": map_key,
        "log_decay": log_decay,
    }
    run = choose_backend("hybrid_linear", CONTRACT, backend, query.is_cuda, args, options)
    if run:
        output, state = run(*args, **options)
    else:
        per_token = tuple(options.pop(name) for name in PER_TOKEN)
        output, state = over_rows(_chunked, (*args, *per_token), options)
    return output, None if state is None else HybridLinearState(*state)


def linear_share(query: Tensor, key: Tensor, value: Tensor, query_features, key_features, **options) -> Tensor:
    """The linear branch's share of the shared denominator, by the chunked path: `(B, H, T)` in [0, 1].

    Args: those of `hybrid_linear_attention`, without state, packing and backend; features are required.
    """
    branches, restore, _ = run_rows(query, key, value, query_features, key_features, **options)
    return restore(branches.linear_share())[..., 0]


def _check(query, key, query_features, key_features, window_weight, window_reference, window, sinks):
    check_heads(query, key)
    if (query_features is None) != (key_features is None):
        raise ValueError("give features for both query and key, or for neither (the softmax branch alone)")
    if query_features is not None and window_weight is None and window + sinks:
        raise ValueError("window_weight is needed to weigh the softmax window against the linear branch")
    if window_reference not in ("logsumexp", "max"):
        raise ValueError(f"unknown window_reference {window_reference!r}: use logsumexp or max")
    if window < 0 or sinks < 0:
        raise ValueError(f"window and sinks must be at least 0, not {window} and {sinks}")


def _check_maps(query, key, features, map_query, map_key, state):
    if (map_query is None) != (map_key is None):
        raise ValueError("give both map_query and map_key, or neither (the maps read query and key)")
    if map_query is not None:
        if any(x is None or isinstance(x, Tensor) for x in features):
            raise ValueError("map_query and map_key are what feature maps read: give both features as maps")
        for name, x, like in (("map_query", map_query, query), ("map_key", map_key, key)):
            if x.shape[:3] != like.shape[:3]:
                expected = (*like.shape[:3], x.shape[-1])
                raise ValueError(f"{name} is {tuple(x.shape)}, but its heads and tokens must be those of {expected}")
    if state is not None and (state.window_map_key is None) != (map_key is None):
        held = "no keys" if state.window_map_key is None else "keys"
        raise ValueError(f"the state holds {held} of map_key: give map_key in every call of a sequence, or in none")


def _check_decay(query, key, key_features, log_decay, causal):
    if log_decay is None:
        return
    if not causal:
        raise ValueError("log_decay needs causal=True: a bidirectional row has no memory that could forget")
    if key_features is None:
        raise ValueError("log_decay needs features: the softmax branch forgets nothing")
    heads = (key_features if isinstance(key_features, Tensor) else key_features.weight[None]).shape[1]
    expected = (query.shape[0], heads, query.shape[2])
    if log_decay.shape != expected:
        found = tuple(log_decay.shape)
        raise ValueError(f"log_decay is {found}, but there is one for each key feature head and token: {expected}")


def _chunked(query, key, value, query_features, key_features, *per_token, **options):
    options |= zip(PER_TOKEN, per_token, strict=True)
    branches, restore, state = run_rows(query, key, value, query_features, key_features, **options)
    return restore(branches.join()), state
