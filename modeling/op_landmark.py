"""Landmark attention: a grouped softmax in which a block's last token, its landmark, decides how much of it is read.

The two public functions and their checks; the PyTorch paths are in `op_landmark_chunked.py` (all blocks) and
`op_landmark_retrieval.py` (the best few).

Legend: B batch, H query heads, G key/value heads, T tokens, D head dim, P block size, landmark included, F = P - 1.

For a query in block n: local scores are those of its own block's tokens up to itself, never of a landmark; every
earlier block c has a gate, its landmark's score. One softmax over local scores and gates; a block's gate is then
shared out among its F tokens by their own softmax. Written as one softmax over real tokens, the logits are
`s_j` for a local token and `s_j - logsumexp_c(s) + s_landmark(c)` for a token of an earlier block c.

Source: Mohtashami and Jaggi 2023 (arXiv 2305.16300). Windows of one block, which make a result independent of the
calls that the text comes in (but for `selection="head"`, whose queries of a call choose together), are this project's.
"""

import torch
from torch import Tensor

from .op_dispatch import check_heads, check_shapes, choose_backend
from .op_landmark_chunked import run_landmark
from .op_landmark_retrieval import BLOCK_WEIGHTS, CONTRACT, SELECTIONS, LandmarkBlocks, run_retrieval
from .op_rows import check_rows

__all__ = ["CONTRACT", "SELECTIONS", "LandmarkBlocks", "landmark_attention", "landmark_retrieval_attention"]


def landmark_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    block_size: int,
    offset: int | Tensor = 0,
    scaling: float | None = None,
    attention_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    open_blocks: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, None]:
    """Attend causally by the grouped softmax, every earlier block open unless told otherwise.

    Args:
        query: `(B, H, T, D)`, rotated; key, value: `(B, G, T, D)`, never repeated.
        block_size: P, the landmark included: with n counted from a row's first real token, token n is a landmark when
            `(n + offset) % P == P - 1`. At least 2; any number of blocks.
        offset: place in its block of a row's first real token, below P: a number, or `(B,)`; `(N,)` of packed rows.
        scaling: of the scores; `D ** -0.5`.
        attention_mask: `(B, T)`, 1 = real; padding may lie anywhere.
        cu_seqlens: `(N + 1,)` int32, B = 1: N packed sequences, each a row of its own.
        open_blocks: `(B, blocks)` bool, `(N, blocks)` of packed rows: which of a row's blocks the blocks after them
            read, as training that leaves blocks out does; a query always sees its own. Blocks that it does not reach
            are open; None, all.
        backend: `auto`, `reference`, `chunked` or `triton`, whose blocks are 16, 32, 64 or 128 tokens.

    Returns:
        Output `(B, H, T, D)` in the query's dtype, 0 at padding and where nothing is visible; and None.

    Raises:
        ValueError: contradictory arguments, or a backend that cannot do the call.
    """
    _check(query, key, value, block_size)
    check_rows(query, True, attention_mask, cu_seqlens, stateful=False)
    if isinstance(offset, int) and not 0 <= offset < block_size:
        raise ValueError(f"offset is {offset}: a place in a block of {block_size} tokens is 0 to {block_size - 1}")
    args = (query, key, value)
    options = {
        "block_size": block_size,
        "offset": offset,
        "scaling": scaling,
        "attention_mask": attention_mask,
        "cu_seqlens": cu_seqlens,
    }
    if open_blocks is not None:  # else left out, for installed kernels that do not know it
        check_open_blocks(open_blocks, query.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1)
        options["open_blocks"] = open_blocks
    run = choose_backend("landmark", CONTRACT, backend, query.is_cuda, args, options)
    if run:
        return run(*args, **options)
    with torch.autocast(query.device.type, enabled=False):
        return run_landmark(*args, **options)


def landmark_retrieval_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    blocks: LandmarkBlocks,
    *,
    position: Tensor,
    first: Tensor,
    top_k: int,
    selection: str = "token_and_head",
    max_blocks: int | None = None,
    rotary: tuple[Tensor, Tensor] | None = None,
    scaling: float | None = None,
    block_weight: str = "landmark",
    backend: str = "auto",
) -> Tensor:
    """Attend by the grouped softmax to a query's own block and to the best `top_k` of the blocks before it.

    Keys come rotated by their place in the block, 0 to P - 1, and by nothing else, so that a block can lie anywhere:
    counted in blocks from the start of the query's own block n, with K = min(top_k, candidates), a candidate i is
    scored by its landmark as if it lay at `i - n` when it is one of the last K, else at `-(K + 1)`; the selected ones,
    in their order s = 0..K-1, lie at `s - (K + 1)`, one further if among the last K. No distance exceeds K + 2 blocks,
    whatever the length of the text; with K = n all positions are the true ones. That score only selects: a selected
    block's gate is its landmark's score at the place where the block is read, as published.

    Args:
        query: `(B, H, T, D)`, not rotated.
        key, value: `(B, G, U, P, D)`: the U blocks that hold this call's tokens, of which a query sees its own up to
            itself.
        blocks: the complete blocks, in slots of any order. With bounds in place of landmarks' keys a block's score is
            the best of its parts' bounds: `sum_d max(q_d greatest_d, q_d least_d)`, q rotated to the distance.
        position: `(B, T)` int64, a token's place in its row, landmarks counted; -1 = padding. Contiguous.
        first: `(B,)` int64, number of the first local block.
        top_k: blocks that a query reads, at least 1.
        selection: `token_and_head`, by the score, for each query and head; `head`, by the largest log-weight (softmax
            over candidates) among the call's queries of one block; `token`, by the largest among the heads. Each less
            1e-5 for every block of age, so that the newest of equals is taken.
        max_blocks: candidates are the last so many; None, all.
        rotary: cosines and sines `(M, D)` of positions 0 to M - 1, M >= (top_k + 2) P, in halves as transformers has
            them; None, no rotation.
        scaling: of the scores; `D ** -0.5`.
        block_weight: what a selected block weighs by: `landmark`, its landmark's gate, the grouped softmax; `tokens`,
            its tokens' own scores, which is the ordinary softmax over all tokens that are read: landmarks only select.
        backend: `auto`, `reference` or `chunked`.

    Returns:
        Output `(B, H, T, D)` in the query's dtype, 0 at padding and where nothing is visible.

    Raises:
        ValueError: contradictory arguments, or a backend that cannot do the call.
    """
    _check_retrieval(query, key, value, top_k, selection, max_blocks, rotary)
    check_block_weight(block_weight)
    if blocks.landmark.dim() == 5 and block_weight == "landmark":
        raise ValueError("bounds of the keys only select blocks: set block_weight to tokens")
    args = (query, key, value, blocks)
    options = {
        "position": position,
        "first": first,
        "top_k": top_k,
        "selection": selection,
        "max_blocks": max_blocks,
        "rotary": rotary,
        "scaling": scaling,
        "block_weight": block_weight,
    }
    run = choose_backend("landmark_retrieval", CONTRACT, backend, query.is_cuda, args, options)
    if run:
        return run(*args, **options)
    with torch.autocast(query.device.type, enabled=False):
        return run_retrieval(*args, **options)


def check_block_size(block_size: int) -> None:
    """Refuse a block without a token beside its landmark."""
    if block_size < 2:
        raise ValueError(f"block_size is {block_size}: it must be at least 2, a token and its landmark")


def check_open_blocks(open_blocks: Tensor, rows: int) -> None:
    """Refuse what is not a choice of blocks for each row."""
    if open_blocks.dtype != torch.bool or open_blocks.dim() != 2 or open_blocks.shape[0] != rows:
        raise ValueError(
            f"open_blocks is {tuple(open_blocks.shape)} of {open_blocks.dtype}: it must be (rows, blocks) of "
            f"torch.bool, and this call has {rows} rows"
        )


def check_retrieval(top_k: int, max_blocks: int | None, selection: str) -> None:
    """Refuse settings under which nothing could be retrieved."""
    if top_k < 1:
        raise ValueError(f"top_k is {top_k}: a query must read at least 1 block")
    if max_blocks is not None and max_blocks < top_k:
        raise ValueError(f"max_blocks is {max_blocks}: it must be at least top_k ({top_k}), or null for all blocks")
    if selection not in SELECTIONS:
        raise ValueError(f"selection is {selection!r}: choose one of {', '.join(SELECTIONS)}")


def check_block_weight(block_weight: str) -> None:
    """Refuse an unknown weight of the blocks that are read."""
    if block_weight not in BLOCK_WEIGHTS:
        raise ValueError(f"block_weight is {block_weight!r}: choose one of {', '.join(BLOCK_WEIGHTS)}")


def _check(query, key, value, block_size):
    check_shapes(query, key, value)
    check_block_size(block_size)


def _check_retrieval(query, key, value, top_k, selection, max_blocks, rotary):
    check_heads(query, key)
    if key.shape != value.shape or key.dim() != 5 or key.shape[-1] != query.shape[-1]:
        raise ValueError(
            "key and value are blocks (batch, heads, blocks, block size, width) of the query's width: "
            f"{tuple(query.shape)}, {tuple(key.shape)}, {tuple(value.shape)}"
        )
    check_block_size(key.shape[3])
    check_retrieval(top_k, max_blocks, selection)
    needed = (top_k + 2) * key.shape[3]
    if rotary is not None and rotary[0].shape[0] < needed:
        raise ValueError(f"rotary has {rotary[0].shape[0]} positions: top_k + 2 blocks need {needed}")
