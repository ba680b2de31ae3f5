"""Gain-cell attention: dot products by charges of analog cells, a clamp instead of softmax, outputs tile by tile.

The public function and its checks; the state and the chunked PyTorch path are in `op_gain_cell_chunked.py`, the cell
in `gain_cell.py`.

Legend: B batch, H query heads, G key/value heads, T tokens, D head dim, W window, u = stored voltage - offset, P(u)
the cell's polynomial, a = n - j the age of token j at token n. Tensors are `(B, H|G, T, D)`.

Source: Leroux et al. 2025 (Nature Computational Science 5, 813; arXiv 2409.19315). The ring, the symmetric output
grid, sub-arrays for D above the tile, and the noise are this project's.
"""

from torch import Tensor

from .gain_cell import GainCell, GainCellNoise
from .op_dispatch import check_shapes, choose_backend
from .op_gain_cell_chunked import GainCellState, run_gain_cell
from .op_rows import check_rows, over_rows

CONTRACT = 1
GRADIENTS = ("exact", "linear")

__all__ = ["CONTRACT", "GainCell", "GainCellNoise", "GainCellState", "gain_cell_attention"]


def gain_cell_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    cell: GainCell,
    window: int = 1024,
    gradient: str = "exact",
    noise: GainCellNoise | None = None,
    attention_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    initial_state: GainCellState | None = None,
    return_state: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, GainCellState | None]:
    """Attend with two arrays of gain cells per key head, which hold the last W tokens on a ring.

    `S_nj = sum_d x_nd P(u_jd e^(-leak a))` with x the query's pulse, on its levels, and u the key's stored deviation,
    on its own; `A_nj = clamp(S_nj / score_saturation, 0, 1)` for `0 <= a < W`, else 0. Each tile t of the ring (slot
    j % W, tile slot // P) gives `y_t = sum_{j in t} A_nj P(v_j e^(-leak a)) / output_saturation`, saturated at -1 and
    1 and put on the output's levels; the output is the sum of the tiles, before the output scaler. D above the tile's
    width takes several sub-arrays whose charges add up before the converter: the values do not change.

    Args:
        query: `(B, H, T, D)`, after the range scaler, before clamp and levels.
        key, value: `(B, G, T, D)`, the same; never repeated.
        cell: the device and its converters.
        window: slots of the ring, a multiple of the cell's tile.
        gradient: `exact`, of the cell's polynomial; `linear`, the published surrogate: both products as if the cell
            were linear with its slope, around the true scores and clamps. Levels pass gradients straight through.
        noise: deviations of cells and readouts, or None.
        attention_mask: `(B, T)` of this call's tokens, 1 = real; padding may lie anywhere.
        cu_seqlens: `(N + 1,)` int32, B = 1: N packed sequences, each a row of its own.
        initial_state: state of an earlier call on the same rows.
        return_state: also return the state after this call.
        backend: `auto`, `reference` or `chunked`; there is no Triton kernel.

    Returns:
        Output `(B, H, T, D)` in the query's dtype, 0 at padding; the state, or None.

    Raises:
        ValueError: contradictory arguments, or a backend that cannot do the call.
    """
    _check(query, key, value, cell, window, gradient, initial_state)
    check_rows(query, True, attention_mask, cu_seqlens, stateful=initial_state is not None or return_state)
    args = (query, key, value)
    options = {
        "cell": cell,
        "window": window,
        "gradient": gradient,
        "noise": noise,
        "attention_mask": attention_mask,
        "cu_seqlens": cu_seqlens,
        "initial_state": initial_state,
        "return_state": return_state,
    }
    run = choose_backend("gain_cell", CONTRACT, backend, query.is_cuda, args, options)
    output, state = run(*args, **options) if run else over_rows(run_gain_cell, args, options)
    return output, None if state is None else GainCellState(*state)


def check_window(window: int, tile: int) -> None:
    """Refuse a window that is not whole tiles."""
    if window < 1 or window % tile:
        raise ValueError(f"window is {window}: it must be a positive multiple of the cell's tile of {tile} tokens")


def _check(query, key, value, cell, window, gradient, state):
    check_shapes(query, key, value)
    check_window(window, cell.tile)
    if gradient not in GRADIENTS:
        raise ValueError(f"unknown gradient {gradient!r}: use {' or '.join(GRADIENTS)}")
    if state is not None:
        expected = (query.shape[0], key.shape[1], window, key.shape[3])
        if state.key.shape != expected:
            raise ValueError(f"initial_state.key must have the shape {expected}, not {tuple(state.key.shape)}")
