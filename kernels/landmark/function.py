"""The launches of the kernels, their sizes, and the autograd function around them."""

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..hybrid_linear.rows import PLAIN, Rows, make_blocks
from ..launching import dense_rows, launch, tile_side, triton_type
from ..triton_support import product_precision
from .backward import landmark_bwd_key_kernel, landmark_bwd_query_kernel
from .forward import landmark_fwd_kernel


class Call(NamedTuple):
    """What a call fixes beside its tensors.

    Fields: rows; block_size; scaling; offset, a number or `(rows,)` int32; open_blocks, None or `(rows, blocks)`
    uint8.
    """

    rows: Rows
    block_size: int
    scaling: float
    offset: int | Tensor
    open_blocks: Tensor | None


class Launch(NamedTuple):
    """Sizes of one kernel: queries of a tile, warps, pipeline stages."""

    queries: int
    warps: int
    stages: int


class Tiles(NamedTuple):
    """Sizes of the three kernels."""

    forward: Launch
    query: Launch
    key: Launch


def choose_tiles(dot: torch.dtype, block_size: int, dim: int) -> Tiles:
    """Tiles by the dtype of the products, the block and the head dim: for an H100, by what its compiler says of
    registers and shared memory (160 KiB at most).

    Four warps where a product may have 16 rows or columns: with eight Triton 3.6 gave wrong results there (H100).
    """
    if dot != torch.bfloat16:  # three products and twice the bytes; rows only matter for what fits
        return Tiles(Launch(32, 4, 1), Launch(32, 4, 1), Launch(32 if block_size * dim <= 4096 else 16, 4, 1))
    if min(block_size, dim) < 64:
        return Tiles(Launch(64, 4, 2), Launch(64, 4, 2), Launch(64, 4, 1))
    if block_size == 64:
        return Tiles(Launch(128, 8, 3), Launch(64, 4, 2), Launch(64, 4, 1))
    return Tiles(Launch(128, 8, 1), Launch(64, 8, 1), Launch(32, 8, 1))


@functools.lru_cache(maxsize=256)
def make_constants(dtype, heads, groups, dim, block_size, kind, offsets, is_open) -> dict[str, Any]:
    """What the kernels of calls of one kind are compiled for."""
    dot, precision = product_precision(dtype)
    return {
        "H": heads, "G": groups, "D": dim, "BD": tile_side(dim), "P": block_size, "KIND": kind, "OFFSETS": offsets,
        "OPEN": is_open, "DOT": triton_type(dot), "PRECISION": precision,
    }  # fmt: skip


class Plan(NamedTuple):
    """What the launches of a call share: constants, tile sizes, how far offsets lengthen rows, and last numbers."""

    constants: dict[str, Any]
    tiles: Tiles
    extra: int
    numbers: tuple[int | float, ...]


def make_plan(call: Call, query: Tensor, key: Tensor) -> Plan:
    """Plan a call, the same for forward and backward."""
    rows, offset, is_open = call.rows, call.offset, call.open_blocks
    heads, dim = query.shape[1], query.shape[3]
    per_row = isinstance(offset, Tensor)
    constants = make_constants(
        query.dtype, heads, key.shape[1], dim, call.block_size, rows.kind, per_row, is_open is not None
    )
    tiles = choose_tiles(product_precision(query.dtype)[0], call.block_size, dim)
    numbers = (
        0 if isinstance(offset, Tensor) else offset, 0 if is_open is None else is_open.shape[1],
        rows.number, rows.length, call.scaling,
    )  # fmt: skip
    return Plan(constants, tiles, call.block_size - 1 if isinstance(offset, Tensor) else offset, numbers)


def strides(*tensors: Tensor) -> list[int]:
    """Batch, head and token strides of each tensor."""
    return [step for x in tensors for step in x.stride()[:3]]


def tables(call: Call, plan: Plan, size: int) -> tuple[int, tuple[Tensor | None, ...]]:
    """How many tiles of `size` places all rows have, and the tensors by which a program finds its row."""
    blocks = make_blocks(call.rows, size, plan.extra)
    offsets = call.offset if isinstance(call.offset, Tensor) else None
    return blocks.total, (call.open_blocks, offsets, blocks.row, blocks.base, call.rows.start, call.rows.size)


def like(x: Tensor, call: Call) -> Tensor:
    """A dense buffer laid out as x, 0 where padding would be left out."""
    buffer = torch.empty_like(x) if call.rows.kind == PLAIN else torch.zeros_like(x)
    return buffer if buffer.stride(-1) == 1 else buffer.contiguous()


def run_forward(call: Call, query, key, value, save: bool) -> tuple[Tensor, Tensor | None]:
    """The output `(B, H, T, D)` and, with `save`, the log-sum-exp of each query `(B, H, T)`."""
    plan = make_plan(call, query, key)
    sizes = plan.tiles.forward
    output, level = like(query, call), None
    if save:
        level = torch.empty(query.shape[:3], dtype=torch.float32, device=query.device)
    total, (is_open, offsets, table, base, start, size) = tables(call, plan, sizes.queries)
    launch(
        landmark_fwd_kernel,
        (total, query.shape[0] * query.shape[1]),
        (query, key, value, is_open, offsets, output, level, table, base, start, size),
        (*plan.numbers, *strides(query, key, value, output)),
        {"BQ": sizes.queries, "SAVE": save},
        sizes.warps,
        sizes.stages,
        shared=plan.constants,
    )
    return output, level


def run_backward(call: Call, query, key, value, output, level, grad) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value from that of the output."""
    plan = make_plan(call, query, key)
    batch, heads = query.shape[:2]
    grad = dense_rows(grad)
    delta = torch.empty_like(level)
    grad_query, grad_key, grad_value = (like(x, call) for x in (query, key, value))
    sizes = plan.tiles.query
    total, where = tables(call, plan, sizes.queries)
    launch(
        landmark_bwd_query_kernel,
        (total, batch * heads),
        (query, key, value, output, grad, level, delta, grad_query, *where),
        (*plan.numbers, *strides(query, key, value, output, grad, grad_query)),
        {"BQ": sizes.queries},
        sizes.warps,
        sizes.stages,
        shared=plan.constants,
    )
    sizes = plan.tiles.key
    total, where = tables(call, plan, call.block_size)
    launch(
        landmark_bwd_key_kernel,
        (total, batch * key.shape[1]),
        (query, key, value, grad, level, delta, grad_key, grad_value, *where),
        (*plan.numbers, *strides(query, key, value, grad, grad_key, grad_value)),
        {"BQ": sizes.queries},
        sizes.warps,
        sizes.stages,
        shared=plan.constants,
    )
    return grad_query, grad_key, grad_value


class Landmark(torch.autograd.Function):
    """Fused landmark attention `(B, H, T, D)`; saved are the inputs, the output and one float32 a query."""

    @staticmethod
    def forward(ctx, call: Call, query, key, value):
        output, level = run_forward(call, query, key, value, save=True)
        ctx.call = call
        ctx.save_for_backward(query, key, value, output, level)
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        query, key, value, output, level = ctx.saved_tensors
        return None, *run_backward(ctx.call, query, key, value, output, level, grad)
