"""The sizes, buffers and launches of the fused forward kernels."""

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..launching import cdiv, launch, tile_side, triton_type
from ..triton_support import product_precision
from .decay import decay_sums
from .forward import hybrid_linear_fwd_kernel, hybrid_linear_state_kernel
from .maps import map_features
from .rows import PLAIN, SPANS, Blocks, Rows, make_blocks

LOG2E = 1.4426950408889634


class Call(NamedTuple):
    """What a call fixes beside its tensors.

    Fields: rows; window, sinks, scaling; maximum, whether the window's level is its maximum; activations of the query
    and key maps, None where features are given; final, whether the sums after the last token are asked for.
    """

    rows: Rows
    window: int
    sinks: int
    scaling: float
    maximum: bool
    activations: tuple[str | None, str | None]
    final: bool


class Operands(NamedTuple):
    """The tensors of a call in the order of the autograd function; unused ones None."""

    query: Tensor
    key: Tensor
    value: Tensor
    feature_q: Tensor | None
    feature_k: Tensor | None
    q_weight: Tensor | None
    q_bias: Tensor | None
    q_magnitude: Tensor | None
    k_weight: Tensor | None
    k_bias: Tensor | None
    k_magnitude: Tensor | None
    weight: Tensor | None
    shift: Tensor | None
    sink_key: Tensor | None
    sink_value: Tensor | None
    first_kv: Tensor | None
    first_z: Tensor | None
    map_query: Tensor | None
    map_key: Tensor | None
    log_decay: Tensor | None


class Launch(NamedTuple):
    """Sizes of one kernel: rows of a program's block, rows of the blocks it walks over, warps, pipeline stages, and
    registers of a thread (None: the compiler chooses), which decides how many programs share a multiprocessor."""

    block: int
    inner: int
    warps: int
    stages: int
    registers: int | None = None


class Tiles(NamedTuple):
    """Sizes of a call, powers of two: every block divides the chunk, every inner block divides every block.

    In `sums`, block and inner are the sides of the tile of F x V that a program holds.
    """

    chunk: int
    sums: Launch
    forward: Launch
    query: Launch
    key: Launch


class Map(NamedTuple):
    """A feature map as the maps' kernels read it."""

    weight: Tensor
    bias: Tensor | None
    magnitude: Tensor | None
    activation: str


def choose_tiles(dot: torch.dtype, widest: int) -> Tiles:
    """Tiles by the dtype of the products and the widest of D, V and F; measured on an H100 (docs/results.md).

    Always four warps: with eight and a product of 16 columns (the sinks' block) Triton 3.6 gave wrong results or
    illegal accesses on an H100.
    """
    if dot == torch.bfloat16 and widest <= 128:
        forward, query, key = Launch(64, 64, 4, 1, 168), Launch(64, 64, 4, 2), Launch(64, 32, 4, 1)
        return Tiles(128, Launch(32, 128, 4, 4), forward, query, key)
    if dot == torch.bfloat16:
        return Tiles(128, Launch(64, 64, 4, 3), *[Launch(64, 32, 4, 1)] * 3)
    return Tiles(64, Launch(64, 64, 4, 2), *[Launch(64, 32, 4, 1)] * 3)


class Settings(NamedTuple):
    """What calls of one kind share: tiles, the window rounded up to whole blocks, compile-time constants by name."""

    tiles: Tiles
    reach: int
    values: dict[str, Any]


@functools.lru_cache(maxsize=256)
def make_settings(
    tiles: Tiles, dtype, heads, groups, feature_heads, dim, value_dim, width, window, sinks, kind, past, linear, shift,
    maximum, decay,
) -> Settings:  # fmt: skip
    """Settings of a call with these dtypes, sizes and switches."""
    dot, precision = product_precision(dtype)
    grain = max(launch.inner for launch in tiles[2:])
    # The keys that enter a memory that forgets at a chunk's tokens are those of one chunk.
    reach = window if decay else cdiv(window, grain) * grain
    values = {
        "H": heads, "G": groups, "E": feature_heads, "D": dim, "V": value_dim, "F": width,
        "W": window, "S": sinks, "WB": reach, "C": tiles.chunk,
        "BD": tile_side(dim), "BV": tile_side(value_dim), "BF": tile_side(width), "BS": tile_side(sinks),
        "SINKS_OF_ROW": not past, "SHIFT": shift, "MAXIMUM": maximum, "KIND": kind, "PAST": past, "LINEAR": linear,
        "DECAY": decay,
        "DOT": triton_type(dot), "PRECISION": precision,
    }  # fmt: skip
    return Settings(tiles, reach, values)


class Plan(NamedTuple):
    """Settings of one call and its chunks of queries and of keys (reach more tokens), for forward and backward."""

    settings: Settings
    queries: Blocks
    keys: Blocks


def make_plan(call: Call, x: Operands, feature_q, feature_k) -> Plan:
    """Plan a call; features are None for the softmax branch alone."""
    heads, dim, value_dim, rows = x.query.shape[1], x.query.shape[3], x.value.shape[3], call.rows
    linear = feature_q is not None
    width, feature_heads = (feature_q.shape[3], feature_k.shape[1]) if linear else (16, heads)
    tiles = choose_tiles(product_precision(x.query.dtype)[0], max(dim, value_dim, width))
    settings = make_settings(
        tiles, x.query.dtype, heads, x.key.shape[1], feature_heads, dim, value_dim, width, call.window, call.sinks,
        rows.kind, rows.past is not None, linear, x.shift is not None, call.maximum, x.log_decay is not None,
    )  # fmt: skip
    return Plan(settings, make_blocks(rows, tiles.chunk), make_blocks(rows, tiles.chunk, settings.reach))


def strides(*tensors: Tensor | None) -> list[int]:
    """Batch, head and token strides of each tensor, 0 for None."""
    return [step for x in tensors for step in ((0, 0, 0) if x is None else x.stride()[:3])]


def new_buffer(*shape: int, whole: bool, like: Tensor, dtype=None) -> Tensor:
    """A result's buffer; `whole` where the kernels write every element, else what they leave out must read 0."""
    make = torch.empty if whole else torch.zeros
    return make(shape, dtype=dtype or like.dtype, device=like.device)


def run_sums(plan: Plan, call: Call, value, feature_k, first_kv, first_z, decay):
    """The sums before each chunk; and after the last token when the call asks for them."""
    settings, rows = plan.settings, call.rows
    heads, width, value_dim = feature_k.shape[1], feature_k.shape[3], value.shape[3]
    batch = rows.batch * heads
    dot, _ = product_precision(value.dtype)
    sums = torch.empty(batch, plan.queries.total, width, value_dim, dtype=dot, device=value.device)
    sums_z = torch.empty(batch, plan.queries.total, width, dtype=torch.float32, device=value.device)
    last_kv = last_z = None
    if call.final:
        last_kv = torch.empty(rows.batch, heads, width, value_dim, dtype=torch.float32, device=value.device)
        last_z = torch.empty(rows.batch, heads, width, dtype=torch.float32, device=value.device)
    block_f, block_v = sum_blocks(settings)
    launch(
        hybrid_linear_state_kernel,
        (cdiv(width, block_f) * cdiv(value_dim, block_v), rows.number * heads),
        (feature_k, value, decay, first_kv, first_z, sums, sums_z, last_kv, last_z, rows.start, rows.size, rows.past,
         plan.queries.base),
        (rows.length, plan.queries.total, call.window, batch * rows.length, *strides(feature_k, value)),
        {"BF": block_f, "BV": block_v, "FINAL": call.final},
        *settings.tiles.sums[2:],
        shared=settings.values,
    )  # fmt: skip
    return sums, sums_z, last_kv, last_z


def sum_blocks(settings: Settings) -> tuple[int, int]:
    """Sides of the tile of F x V that a program of the sums' kernels holds."""
    sizes, values = settings.tiles.sums, settings.values
    return min(sizes.block, values["BF"]), min(sizes.inner, values["BV"])


class Saved(NamedTuple):
    """What the forward leaves for the backward, unused ones None.

    Fields: output and difference `(B, T, H, V)`, the softmax branch's output less the whole; stats `(3 or 4, B, H, T)`
    float32, log-sum-exp, mass, denominator and, where the level is the maximum, that maximum; best `(B, H, T)` int32,
    the key that holds the maximum (counted as in `rows.py`, or 2^30 + number of a sink); decay `(2, B, E, T)` float32,
    as `decay_sums` gives it; last_kv, last_z, the sums after the last token where they forget.
    """

    output: Tensor
    difference: Tensor | None
    stats: Tensor | None
    best: Tensor | None
    decay: Tensor | None = None
    last_kv: Tensor | None = None
    last_z: Tensor | None = None


def run_forward(plan: Plan, call: Call, x: Operands, feature_q, feature_k, sums, sums_z, decay, save: bool):
    """The output `(B, T, H, V)` and, with `save`, what the backward needs."""
    settings, rows, blocks = plan.settings, call.rows, plan.queries
    batch, heads, length, _ = x.query.shape
    sink_key, sink_value = (x.key, x.value) if x.sink_key is None else (x.sink_key, x.sink_value)
    linear, spans = feature_q is not None, call.window + call.sinks > 0
    output = new_buffer(batch, length, heads, x.value.shape[3], whole=rows.kind == PLAIN, like=x.query)
    difference = torch.empty_like(output) if save and linear and spans else None
    stats = best = None
    if save:
        planes = 4 if call.maximum else 3
        stats = torch.empty(planes, batch, heads, length, dtype=torch.float32, device=output.device)
        best = torch.empty(batch, heads, length, dtype=torch.int32, device=output.device) if call.maximum else None
    tensors = (sink_key, sink_value, x.query, x.key, x.value, feature_q, feature_k)
    sizes = settings.tiles.forward
    launch(
        hybrid_linear_fwd_kernel,
        (blocks.total * (settings.tiles.chunk // sizes.block), batch * heads),
        (x.query, x.key, x.value, feature_q, feature_k, sink_key, sink_value, sums, sums_z, decay, x.weight,
         x.shift, output, difference, stats, best, blocks.row, blocks.base, rows.start, rows.size, rows.past),
        (rows.number, length, plan.queries.total, call.window, call.scaling * LOG2E, batch * heads * length,
         *strides(*tensors)),
        {"BQ": sizes.block, "BK": sizes.inner, "SAVE": save},
        sizes.warps,
        sizes.stages,
        None if save else sizes.registers,  # two outputs at a time need them all
        shared=settings.values,
    )  # fmt: skip
    return output, Saved(output, difference, stats, best, decay)


def run(call: Call, x: Operands, save: bool):
    """Launch the forward: the output `(B, H, T, V)`, last kv and normalizer or None; with `save` plan, sums, rest."""
    feature_q, feature_k = make_features(call, x)
    plan = make_plan(call, x, feature_q, feature_k)
    sums = sums_z = last_kv = last_z = decay = None
    if x.log_decay is not None:
        decay = decay_sums(call.rows, plan.queries, x.log_decay, plan.settings.values)
    if feature_q is not None:
        sums, sums_z, last_kv, last_z = run_sums(plan, call, x.value, feature_k, x.first_kv, x.first_z, decay)
    output, saved = run_forward(plan, call, x, feature_q, feature_k, sums, sums_z, decay, save)
    if decay is not None:
        saved = saved._replace(last_kv=last_kv, last_z=last_z)
    return output.transpose(1, 2), last_kv, last_z, (plan, sums, sums_z, saved)


def maps_of(call: Call, x: Operands) -> tuple[Map | None, Map | None]:
    """The query's and the key's map, None where features are given."""
    query, key = call.activations
    return (
        None if query is None or x.q_weight is None else Map(x.q_weight, x.q_bias, x.q_magnitude, query),
        None if key is None or x.k_weight is None else Map(x.k_weight, x.k_bias, x.k_magnitude, key),
    )


def map_spans(call: Call):
    """The real places of the queries and of the (extended) keys as the maps' kernels take them."""
    rows = call.rows
    if rows.kind != SPANS:
        return None, None
    assert rows.start is not None and rows.size is not None
    ours = (rows.start, rows.size)
    return ours, ours if rows.past is None else (torch.zeros_like(rows.start), rows.size + call.window)


def make_features(call: Call, x: Operands) -> tuple[Tensor | None, Tensor | None]:
    """Both features `(B, H | E, T, F)`, computed where maps are given."""
    dot, _ = product_precision(x.query.dtype)
    query_map, key_map = maps_of(call, x)
    query_span, key_span = map_spans(call)
    query, key = map_sources(x)
    feature_q = x.feature_q if query_map is None else map_features(query, query_map, dot, span=query_span)
    feature_k = x.feature_k if key_map is None else map_features(key, key_map, dot, span=key_span)
    return feature_q, feature_k


def map_sources(x: Operands) -> tuple[Tensor, Tensor]:
    """What the query's and the key's map read."""
    return (x.query, x.key) if x.map_query is None or x.map_key is None else (x.map_query, x.map_key)
