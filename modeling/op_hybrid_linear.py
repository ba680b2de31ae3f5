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
from .op_hybrid_linear_chunked import HybridLinearState, check_rows, over_rows, run_rows

CONTRACT = 1

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
    backend: str = "auto",
) -> tuple[Tensor, HybridLinearState | None]:
    """Attend by softmax to the window and the sinks, by features to every other visible key, one denominator.

    `y_n = (m_n o_n + phi_q(n) . sum_L phi_k(j) v_j) / max(m_n + phi_q(n) . sum_L phi_k(j), 1e-20)`, where o_n is the
    softmax attention over the window and sinks, `m_n = exp(lse_n - r_n + clamp(log weight + shift r_n, -30, 30))`
    its mass and r_n the log-sum-exp or the maximum of its scores. Both features None: the softmax branch alone.

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
        backend: `auto`, `reference`, `chunked` or `triton`.

    Returns:
        Output `(B, H, T, Dv)` in the query's dtype, 0 at padding; the state, or None.

    Raises:
        ValueError: contradictory arguments, or a backend that cannot do the call.
    """
    _check(query, key, query_features, key_features, window_weight, window_reference, window, sinks)
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
    }
    run = choose_backend("hybrid_linear", CONTRACT, backend, query.is_cuda, args, options)
    output, state = run(*args, **options) if run else over_rows(_chunked, args, options)
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


def _chunked(query, key, value, query_features, key_features, **options):
    branches, restore, state = run_rows(query, key, value, query_features, key_features, **options)
    return restore(branches.join()), state
