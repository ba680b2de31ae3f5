"""The launches of the kernels, their sizes, and the autograd function around them."""

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..hybrid_linear.rows import PLAIN, Blocks, Rows, make_blocks
from ..launching import cdiv, dense_rows, launch, next_power_of_2, tile_side, triton_type
from ..triton_support import product_precision
from .backward import salient_bwd_far_kernel, salient_bwd_key_kernel, salient_bwd_query_kernel
from .choosing import salient_merge_kernel, salient_sort_kernel, salient_until_kernel
from .forward import salient_fwd_kernel
from .scoring import salient_mass_kernel, salient_window_kernel

COMPARED = 32  # items that are compared with all of a block's at a time


class Call(NamedTuple):
    """What a call fixes beside its tensors; rows, then the settings of the op."""

    rows: Rows
    window: int
    sinks: int
    kept: int
    age_penalty: float
    scaling: float


class Choice(NamedTuple):
    """Who is kept; N places of keys, see `tiles.py`.

    Fields: lists `(B, G, blocks, K)` int32, the places of the keys stored before each block of C queries, best first,
    -1 where empty; until `(B, G, N)` int32, the first token that no longer sees a key; mass, rank `(B, G, N)` float32.
    """

    lists: Tensor
    until: Tensor
    mass: Tensor
    rank: Tensor


class Launch(NamedTuple):
    """Sizes of one kernel: queries and keys of a tile, warps, pipeline stages."""

    queries: int
    keys: int
    warps: int
    stages: int


class Tiles(NamedTuple):
    """Sizes of a call, powers of two: tokens between stored lists, which the queries of every tile divide; tokens that
    share a list going forward and, in the key's gradient, backward; the kernels."""

    block: int
    forward_span: int
    backward_span: int
    window: Launch
    mass: Launch
    forward: Launch
    query: Launch
    far: Launch
    key: Launch


def choose_tiles(dot: torch.dtype, dim: int) -> Tiles:
    """Tiles by the dtype of the products and the head dim: for an H100, by what its compiler says of registers.

    Four warps: with eight and products of 16 columns (the sinks' tile) Triton 3.6 gave wrong results there.
    """
    scoring = Launch(64, 64, 4, 3)
    if dot != torch.bfloat16:  # twice the bytes
        return Tiles(64, 64, 256, *[Launch(32, 32, 4, 1)] * 6)
    if dim > 64:  # 32 keys: the backward's registers then hold what they need
        return Tiles(64, 64, 256, scoring, scoring, Launch(64, 64, 4, 2), *[Launch(64, 32, 4, 1)] * 3)
    return Tiles(64, 64, 256, scoring, scoring, Launch(64, 64, 4, 3), *[Launch(64, 64, 4, 2)] * 3)


@functools.lru_cache(maxsize=256)
def make_constants(dtype, heads, groups, dim, window, sinks, kept, block, kind, past) -> dict[str, Any]:
    """What the kernels of calls of one kind are compiled for."""
    dot, precision = product_precision(dtype)
    side = next_power_of_2(max(kept, 1))
    return {
        "H": heads, "G": groups, "D": dim, "BD": tile_side(dim), "W": window, "S": sinks, "K": kept, "C": block,
        "BS": tile_side(sinks), "BK": side, "STEPS": side.bit_length(), "BE": max(side, block) if past else block,
        "BC": min(COMPARED, block), "KIND": kind, "PAST": past, "DOT": triton_type(dot), "PRECISION": precision,
    }  # fmt: skip


class Plan(NamedTuple):
    """What the launches of a call share: constants, tiles, blocks of queries (one more than a row has, for what is
    stored after it), and the numbers rows, tokens and places of keys."""

    constants: dict[str, Any]
    tiles: Tiles
    blocks: Blocks
    numbers: tuple[int, int, int]


def make_plan(call: Call, query: Tensor, key: Tensor) -> Plan:
    """Plan a call, the same for forward and backward."""
    rows, (heads, length, dim) = call.rows, query.shape[1:]
    tiles = choose_tiles(product_precision(query.dtype)[0], dim)
    constants = make_constants(
        query.dtype, heads, key.shape[1], dim, call.window, call.sinks, call.kept, tiles.block, rows.kind,
        rows.past is not None,
    )  # fmt: skip
    blocks = make_blocks(rows, tiles.block, tiles.block)
    return Plan(constants, tiles, blocks, (rows.number, length, key.shape[2]))


def strides(*tensors: Tensor) -> list[int]:
    """Batch, head and token strides of each tensor."""
    return [step for x in tensors for step in x.stride()[:3]]


def like(x: Tensor, call: Call) -> Tensor:
    """A dense buffer laid out as x, 0 where padding would be left out."""
    buffer = torch.empty_like(x) if call.rows.kind == PLAIN else torch.zeros_like(x)
    return buffer if buffer.stride(-1) == 1 else buffer.contiguous()


def tables(call: Call, blocks: Blocks) -> tuple[Tensor | None, ...]:
    """The tensors by which a program finds its row."""
    return blocks.row, blocks.base, call.rows.start, call.rows.size, call.rows.past


def key_blocks(call: Call, plan: Plan, size: int) -> Blocks:
    return make_blocks(call.rows, size, call.window if plan.constants["PAST"] else 0)


def query_programs(plan: Plan, sizes: Launch) -> int:
    """Tiles of queries of all blocks."""
    return plan.blocks.total * (plan.tiles.block // sizes.queries)


@torch.no_grad()
def run_choice(call: Call, query: Tensor, key: Tensor, old_mass: Tensor | None, old_rank: Tensor | None) -> Choice:
    """Choose the keys; old_mass `(B, G, W)`, old_rank `(B, G, K)`: the state's, in the order of the keys' places."""
    plan = make_plan(call, query, key)
    batch, groups, places = key.shape[:3]
    mass = torch.zeros(batch, groups, places, dtype=torch.float32, device=key.device)
    rank = torch.full_like(mass, -torch.inf)
    if old_mass is not None and old_rank is not None:
        rank[:, :, : call.kept] = old_rank
        mass[:, :, call.kept + call.sinks : call.kept + call.sinks + call.window] = old_mass
    run_scoring(call, plan, query, key, mass, rank)
    lists, ranks = run_lists(call, plan, rank)
    until = torch.full(rank.shape, torch.iinfo(torch.int32).max, dtype=torch.int32, device=key.device)
    launch(
        salient_until_kernel,
        (plan.blocks.total, batch * groups),
        (rank, lists, ranks, until, *tables(call, plan.blocks)),
        (*plan.numbers, plan.blocks.total),
        {},
        4,
        1,
        shared=plan.constants,
    )
    return Choice(lists, until, mass, rank)


def run_scoring(call: Call, plan: Plan, query: Tensor, key: Tensor, mass: Tensor, rank: Tensor) -> None:
    """Add to the masses what the call's queries give, and rank the keys that leave."""
    batch, heads, length = query.shape[:3]
    level = torch.empty(batch, heads, length, dtype=torch.float32, device=query.device)
    sizes = plan.tiles.window
    launch(
        salient_window_kernel,
        (query_programs(plan, sizes), batch * heads),
        (query, key, level, *tables(call, plan.blocks)),
        (*plan.numbers, call.scaling, *strides(query, key)),
        {"BQ": sizes.queries, "BN": sizes.keys},
        sizes.warps,
        sizes.stages,
        shared=plan.constants,
    )
    sizes = plan.tiles.mass
    blocks = key_blocks(call, plan, sizes.keys)
    launch(
        salient_mass_kernel,
        (blocks.total, batch * key.shape[1]),
        (query, key, level, mass, rank, *tables(call, blocks)),
        (*plan.numbers, call.scaling, call.age_penalty / 1000, *strides(query, key)),
        {"BQ": sizes.queries, "BN": sizes.keys},
        sizes.warps,
        sizes.stages,
        shared=plan.constants,
    )


def run_lists(call: Call, plan: Plan, rank: Tensor) -> tuple[Tensor, Tensor]:
    """The list before each block, and after the last one, from the ranks of all keys; and its items' ranks."""
    total, programs = plan.blocks.total, rank.shape[0] * rank.shape[1]
    shape = (*rank.shape[:2], total, call.kept)

    def empty() -> tuple[Tensor, Tensor]:
        return torch.full(shape, -1, dtype=torch.int32, device=rank.device), rank.new_full(shape, -torch.inf)

    lists, merged = empty(), empty()
    where, (number, length, reach) = tables(call, plan.blocks), plan.numbers
    launch(
        salient_sort_kernel,
        (total, programs),
        (rank, *lists, *where),
        (number, length, reach, total),
        {},
        4,
        1,
        shared=plan.constants,
    )
    distance, longest = 1, cdiv(call.rows.length, plan.tiles.block)
    while distance <= longest:
        launch(
            salient_merge_kernel,
            (total, programs),
            (*lists, *merged, *where),
            (number, length, total, distance),
            {},
            4,
            1,
            shared=plan.constants,
        )
        lists, merged, distance = merged, lists, 2 * distance
    return lists


def run_forward(call: Call, query, key, value, lists, until, save: bool) -> tuple[Tensor, Tensor | None]:
    """The output `(B, H, T, D)` and, with `save`, the log-sum-exp of each query `(B, H, T)`."""
    plan = make_plan(call, query, key)
    batch, heads, length = query.shape[:3]
    output, level = like(query, call), None
    if save:
        level = torch.empty(batch, heads, length, dtype=torch.float32, device=query.device)
    sizes = plan.tiles.forward
    launch(
        salient_fwd_kernel,
        (query_programs(plan, sizes), batch * heads),
        (query, key, value, lists, until, output, level, *tables(call, plan.blocks)),
        (*plan.numbers, plan.blocks.total, call.scaling, *strides(query, key, value, output)),
        {"CS": plan.tiles.forward_span, "BQ": sizes.queries, "BN": sizes.keys, "SAVE": save},
        sizes.warps,
        sizes.stages,
        shared=plan.constants,
    )
    return output, level


def run_backward(call: Call, query, key, value, lists, until, output, level, grad) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value from that of the output."""
    plan, grad = make_plan(call, query, key), dense_rows(grad)
    batch, heads = query.shape[:2]
    delta, grad_query = torch.empty_like(level), like(query, call)
    sizes = plan.tiles.query
    launch(
        salient_bwd_query_kernel,
        (query_programs(plan, sizes), batch * heads),
        (query, key, value, lists, until, output, grad, level, delta, grad_query, *tables(call, plan.blocks)),
        (*plan.numbers, plan.blocks.total, call.scaling, *strides(query, key, value, output, grad, grad_query)),
        {"CS": plan.tiles.forward_span, "BQ": sizes.queries, "BN": sizes.keys},
        sizes.warps,
        sizes.stages,
        shared=plan.constants,
    )
    return grad_query, *run_key_backward(call, plan, query, key, value, lists, until, level, delta, grad)


def run_key_backward(call: Call, plan: Plan, query, key, value, lists, until, level, delta, grad):
    """Gradients of key and value."""
    rows, span, held = key.shape[0] * key.shape[1], plan.tiles.backward_span, call.sinks + call.kept
    far: list[Tensor | None] = [None, None]
    if held:
        far = [torch.zeros(x.shape, dtype=torch.float32, device=x.device) for x in (key, value)]
        sizes = plan.tiles.far
        launch(
            salient_bwd_far_kernel,
            (plan.blocks.total * cdiv(held, sizes.keys), rows),
            (query, key, value, lists, until, grad, level, delta, *far, *tables(call, plan.blocks)),
            (*plan.numbers, plan.blocks.total, call.scaling, *strides(query, key, value, grad)),
            {"CS": span, "BQ": sizes.queries, "BN": sizes.keys},
            sizes.warps,
            sizes.stages,
            shared=plan.constants,
        )
    grads = [like(x, call) for x in (key, value)]
    sizes = plan.tiles.key
    blocks = key_blocks(call, plan, sizes.keys)
    launch(
        salient_bwd_key_kernel,
        (blocks.total, rows),
        (query, key, value, until, grad, level, delta, *far, *grads, *tables(call, blocks)),
        (*plan.numbers, call.scaling, *strides(query, key, value, grad, *grads)),
        {"CS": span, "BQ": sizes.queries, "BN": sizes.keys},
        sizes.warps,
        sizes.stages,
        shared=plan.constants,
    )
    if plan.constants["PAST"]:  # kept slots and sinks: gathered, never walked over
        for whole, part in zip(grads, far, strict=True):
            if part is not None:
                whole[:, :, :held] = part[:, :, :held]
    return grads


class Salient(torch.autograd.Function):
    """Fused salient-token attention `(B, H, T, D)`; saved are the inputs, the output, one float32 a query, the lists
    and one int32 a key."""

    @staticmethod
    def forward(ctx, call: Call, lists, until, query, key, value):
        output, level = run_forward(call, query, key, value, lists, until, save=True)
        ctx.call = call
        ctx.save_for_backward(query, key, value, lists, until, output, level)
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        query, key, value, lists, until, output, level = ctx.saved_tensors
        return None, None, None, *run_backward(ctx.call, query, key, value, lists, until, output, level, grad)
