"""Cosine attention: signed weights <N(q), N(k)>, scaled by a learned power of the number of keys.

The public function and its checks; the state and the chunked PyTorch path are in `op_cosine_chunked.py`.

Legend: B batch, H query heads, G key/value heads, T tokens, Dk query/key width, Dv value width, W window, S sinks,
N(x) = x / max(|x|, 1e-12), with a zero gradient where x is 0. Tensors are `(B, H|G, T, Dk|Dv)`.

Source: Cottention (Mongaras et al. 2024, arXiv 2409.18747), which scales on the key's side in its causal form. The
query's side (a state per key head serves all its query heads), the gain, and the window left to a softmax branch are
this project's.
"""

from torch import Tensor

from .op_cosine_chunked import CosineState, run_cosine
from .op_dispatch import check_heads, choose_backend
from .op_rows import check_rows, over_rows

CONTRACT = 2
"""1 has no log_decay, and no mass in the state: what None means in each."""

__all__ = ["CONTRACT", "CosineState", "cosine_attention"]


def cosine_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    exponent: Tensor,
    gain: Tensor | None = None,
    causal: bool = True,
    scale_side: str = "query",
    window: int = 0,
    sinks: int = 0,
    attention_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    initial_state: CosineState | None = None,
    return_state: bool = False,
    log_decay: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, CosineState | None]:
    """Sum the values of L(n), the visible keys outside window and sinks, each weighted by its cosine to the query.

    `query` side: `y_n = gain_h c_n^-s_h sum_L <N(q_n), N(k_j)> v_j` with `c_n = max(|L(n)|, 1)`. `key` side:
    `y_n = gain_h sum_L c_j^-s_h <N(q_n), N(k_j)> v_j`, c_j the real tokens up to and including j. A query with an
    empty L(n) returns 0. Not causal, both sides are the same. With log_decay the memory forgets: token n multiplies it
    by `exp(log_decay_n)`, then adds key n - W, which leaves the window, at weight 1, then reads; sinks never enter. On
    the query's side c_n is then the sum of these weights, on the key's side c_j stays.

    Args:
        query: `(B, H, T, Dk)`.
        key, value: `(B, G, T, Dk)`, `(B, G, T, Dv)`, never repeated.
        exponent: `(H,)`, s itself, in [0, 1].
        gain: `(H,)` or None, which is 1.
        causal: False sees every real key.
        scale_side: `query` or `key`; `key` without causal needs window and sinks 0.
        window: tokens left out around the query (itself included): j with n - j < window, |n - j| < window if not
            causal.
        sinks: first tokens of a row that are left out.
        attention_mask: `(B, T)` of this call's tokens, 1 = real; padding may lie anywhere.
        cu_seqlens: `(N + 1,)` int32, B = 1: N packed sequences, each a row of its own.
        initial_state: state of an earlier call on the same rows.
        return_state: also return the state after this call.
        log_decay: `(B, G, T)`, for the key's side `(B, H, T)`; finite, <= 0; causal only.
        backend: `auto`, `reference`, `chunked` or `triton`.

    Returns:
        Output `(B, H, T, Dv)` in the query's dtype, 0 at padding; the state, or None.

    Raises:
        ValueError: contradictory arguments, or a backend that cannot do the call.
    """
    _check_shapes(query, key, value, exponent, gain)
    _check_form(causal, scale_side, window, sinks)
    check_rows(query, causal, attention_mask, cu_seqlens, stateful=initial_state is not None or return_state)
    if initial_state is not None:
        _check_state(initial_state, query, key, value, scale_side, window, sinks, log_decay)
    _check_decay(query, key, scale_side, log_decay, causal)
    args = (query, key, value)
    options = {
        "exponent": exponent,
        "gain": gain,
        "causal": causal,
        "scale_side": scale_side,
        "window": window,
        "sinks": sinks,
        "attention_mask": attention_mask,
        "cu_seqlens": cu_seqlens,
        "initial_state": initial_state,
        "return_state": return_state,
        "log_decay": log_decay,
    }
    run = choose_backend("cosine", CONTRACT, backend, query.is_cuda, args, options)
    if run:
        output, state = run(*args, **options)
    else:
        output, state = over_rows(run_cosine, (*args, options.pop("log_decay")), options)
    return output, None if state is None else CosineState(*state)


def _check_shapes(query, key, value, exponent, gain):
    check_heads(query, key)
    heads, groups = query.shape[1], key.shape[1]
    if query.shape[-1] != key.shape[-1]:
        raise ValueError(f"query and key must have one width, not {query.shape[-1]} and {key.shape[-1]}")
    if not query.shape[2] == key.shape[2] == value.shape[2] or value.shape[1] != groups:
        raise ValueError(
            f"query, key and value must have the same tokens, key and value the same heads: "
            f"{tuple(query.shape)}, {tuple(key.shape)}, {tuple(value.shape)}"
        )
    for name, x in (("exponent", exponent), ("gain", gain)):
        if x is not None and x.shape != (heads,):
            raise ValueError(f"{name} must hold one number for each of the {heads} query heads, not {tuple(x.shape)}")


def _check_form(causal, scale_side, window, sinks):
    if scale_side not in ("query", "key"):
        raise ValueError(f"unknown scale_side {scale_side!r}: use query or key")
    if window < 0 or sinks < 0:
        raise ValueError(f"window and sinks must be at least 0, not {window} and {sinks}")
    if not causal and scale_side == "key" and window + sinks:
        raise ValueError("scale_side 'key' without causal needs window=0 and sinks=0: there it equals 'query'")


def _check_decay(query, key, scale_side, log_decay, causal):
    if log_decay is None:
        return
    if not causal:
        raise ValueError("log_decay needs causal=True: a bidirectional row has no memory that could forget")
    expected = (query.shape[0], (query if scale_side == "key" else key).shape[1], query.shape[2])
    if log_decay.shape != expected:
        found = tuple(log_decay.shape)
        raise ValueError(f"log_decay is {found}, but there is one for each head of the sums and token: {expected}")


def _check_state(state, query, key, value, scale_side, window, sinks, log_decay):
    heads = query.shape[1] if scale_side == "key" else key.shape[1]
    expected = (query.shape[0], heads, key.shape[-1], value.shape[-1])
    if state.kv.shape != expected:
        raise ValueError(f"initial_state.kv must have the shape {expected}, not {tuple(state.kv.shape)}")
    held = (state.window_key.shape[2], state.sink_key.shape[2])
    if held != (window, sinks):
        raise ValueError(f"initial_state was made with window and sinks {held}, not {(window, sinks)}")
    if scale_side == "query" and (state.mass is None) != (log_decay is None):
        found = "no mass" if state.mass is None else "the mass"
        raise ValueError(
            f"initial_state holds {found} of a memory that forgets: give log_decay in every call of a sequence, or in "
            "none"
        )
