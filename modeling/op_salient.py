"""Salient-token attention: softmax over a window, sinks, and the old tokens that their window looked at most.

The public function and its checks; the state and the chunked PyTorch path are in `op_salient_chunked.py`.

Legend: B batch, H query heads, G key/value heads, T tokens, D head dim of queries, keys and values, W window, S sinks,
K kept tokens. Tensors are `(B, H|G, T, D)`.

Sources: heavy hitters, Zhang et al. 2023, arXiv 2306.14048; kept by what the window says, beside a linear memory:
STILL, arXiv 2602.02180. Scores from the far half of the window alone, the age penalty, and scores that do not depend
on what is kept (so that any cut into calls keeps the same tokens) are this project's.
"""

import math

from torch import Tensor

from .op_dispatch import check_shapes, choose_backend
from .op_rows import check_rows, over_rows
from .op_salient_chunked import SalientState, run_salient

CONTRACT = 1

__all__ = ["CONTRACT", "SalientState", "salient_attention"]


def salient_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    window: int = 224,
    sinks: int = 4,
    kept: int = 220,
    age_penalty: float = 0.6,
    scaling: float | None = None,
    attention_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    initial_state: SalientState | None = None,
    return_state: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, SalientState | None]:
    """Softmax attention of each query n over W(n), the keys j with `n - j < window` or `j < sinks`, and Z(n).

    Key j >= sinks leaves the window of its key/value head at token j + W with the mass
    `a_j = sum of p_nj over j + W // 2 <= n < j + W and the H / G query heads of the group`, p the softmax over W(n)
    alone, and the rank `log(max(a_j, 1e-20)) + age_penalty * j / 1000`: relative to the others, it falls by
    `age_penalty` nats with a thousand tokens. Z(n) are the `kept` keys of highest rank among all that have left by
    token n, which may differ between the G heads; ties are broken arbitrarily. So who is kept never depends on who was
    kept before, and a key that drops out never comes back. No gradient flows through the choice.

    Args:
        query: `(B, H, T, D)`.
        key, value: `(B, G, T, D)`, never repeated.
        window: tokens around the query, itself included; at least 1.
        sinks: first tokens of a row that always stay.
        kept: tokens kept of those that have left the window; 0 leaves the window and the sinks.
        age_penalty: nats per thousand tokens, finite, at least 0.
        scaling: of the scores; None is D**-0.5.
        attention_mask: `(B, T)` of this call's tokens, 1 = real; padding may lie anywhere.
        cu_seqlens: `(N + 1,)` int32, B = 1: N packed sequences, each a row of its own.
        initial_state: state of an earlier call on the same rows.
        return_state: also return the state after this call.
        backend: `auto`, `reference`, `chunked` or `triton`.

    Returns:
        Output `(B, H, T, D)` in the query's dtype, 0 at padding; the state, or None. Scores that rank are float32
        (float64 for float64); the output of half-precision input is as exact as `scaled_dot_product_attention`.

    Raises:
        ValueError: contradictory arguments, or a backend that cannot do the call.
    """
    check_shapes(query, key, value)
    _check_settings(window, sinks, kept, age_penalty)
    check_rows(query, True, attention_mask, cu_seqlens, stateful=initial_state is not None or return_state)
    if initial_state is not None:
        check_state(initial_state, window, sinks, kept)
    args = (query, key, value)
    options = {
        "window": window,
        "sinks": sinks,
        "kept": kept,
        "age_penalty": age_penalty,
        "scaling": scaling,
        "attention_mask": attention_mask,
        "cu_seqlens": cu_seqlens,
        "initial_state": initial_state,
        "return_state": return_state,
    }
    run = choose_backend("salient", CONTRACT, backend, query.is_cuda, args, options)
    output, state = run(*args, **options) if run else over_rows(run_salient, args, options)
    return output, None if state is None else SalientState(*state)


def _check_settings(window: int, sinks: int, kept: int, age_penalty: float) -> None:
    if window < 1:
        raise ValueError(f"window is {window}: it must be at least 1, for a token's rank is what its window gives it")
    if sinks < 0 or kept < 0:
        raise ValueError(f"sinks and kept must be at least 0, not {sinks} and {kept}")
    if not 0 <= age_penalty < math.inf:
        raise ValueError(f"age_penalty is {age_penalty}: it must be a finite number of nats, at least 0")


def check_state(state: SalientState, window: int, sinks: int, kept: int) -> None:
    """Refuse a state of other settings."""
    held = tuple(x.shape[2] for x in (state.window_key, state.sink_key, state.kept_key))
    if held != (window, sinks, kept):
        raise ValueError(f"initial_state was made with window, sinks and kept {held}, not {(window, sinks, kept)}")
