"""How the kernels are launched: tile sizes by width and dtype, grids, and the buffers between the passes."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..hybrid_linear.rows import PACKED, SPANS, Blocks, Rows, make_blocks
from ..launching import ample_shared_memory, cdiv, launch, tile_side, triton_type
from ..triton_support import product_precision
from .passes import cosine_apply_kernel, cosine_project_kernel, cosine_sums_kernel

PROGRAMS = 512  # that sums of whole rows are cut into, where their length allows


class Tile(NamedTuple):
    """One kernel's sizes: rows (tokens) and others (tokens met at a time) of a program, columns of the value width."""

    rows: int
    others: int
    columns: int
    warps: int
    stages: int


class Tiles(NamedTuple):
    """CHUNK, the tokens between two snapshots of the sum, and the three kernels' sizes."""

    chunk: int
    sums: Tile
    apply: Tile
    project: Tile


NARROW = Tiles(128, Tile(128, 0, 32, 8, 4), Tile(64, 64, 128, 4, 1), Tile(64, 64, 128, 4, 1))
WIDE = Tiles(128, Tile(128, 0, 32, 8, 3), Tile(64, 64, 128, 8, 1), Tile(64, 64, 64, 8, 1))
# Float: with eight warps and 16 columns of a product Triton 3.6 gave wrong results (H100).
NARROW_FLOAT = Tiles(64, Tile(64, 0, 32, 4, 2), Tile(64, 32, 64, 4, 1), Tile(64, 32, 64, 4, 1))
WIDE_FLOAT = Tiles(64, Tile(64, 0, 32, 4, 2), Tile(64, 32, 32, 4, 1), Tile(32, 32, 32, 4, 1))


class Sharing(NamedTuple):
    """Which heads the programs of a pass read (see passes.py)."""

    loop: int
    x: int
    other: int
    sums: int


class Side(NamedTuple):
    """The tokens of one side, queries or keys: vectors x `(B, heads, T, Dk)` and y `(B, heads, T, Dv)`, and which of
    gain and power its factors carry (None: not this side)."""

    x: Tensor
    y: Tensor
    exponent: Tensor | None
    gain: Tensor | None


class Pass(NamedTuple):
    """What every kernel of a call shares; chunks `Blocks` of the rows."""

    rows: Rows
    chunks: Blocks
    tiles: Tiles
    causal: bool


def choose_tiles(dim: int, value_dim: int, dtype: torch.dtype) -> Tiles:
    """Sizes for an H100: several programs on each multiprocessor where registers allow, hardly a spill elsewhere."""
    wide = max(dim, value_dim) > 128
    columns = tile_side(value_dim)
    if dtype == torch.bfloat16:
        tiles = WIDE if wide else NARROW
    else:
        tiles = WIDE_FLOAT if wide else NARROW_FLOAT
    return Tiles(tiles.chunk, *(tile._replace(columns=min(tile.columns, columns)) for tile in tiles[1:]))


def make_pass(rows: Rows, query: Tensor, value: Tensor, causal: bool) -> Pass:
    """The chunks and tile sizes of a call."""
    tiles = choose_tiles(query.shape[3], value.shape[3], query.dtype)
    if not ample_shared_memory(query.device):  # one chunk in flight
        tiles = tiles._replace(sums=tiles.sums._replace(stages=2))
    return Pass(rows, make_blocks(rows, tiles.chunk), tiles, causal)


def sum_side(
    this: Pass, side: Side, heads: int, sharing: Sharing, reverse: bool, initial: Tensor | None, keep_total: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Sums of one side.

    Args:
        heads: heads of the sums. reverse: from the rows' ends. initial: `(B, heads, Dk, Dv)` float32 or None, the sum
            to start from. keep_total: also return the sum of all.

    Returns:
        Snapshots before each chunk `(B, heads, slots, Dk, Dv)` (not causal: the total `(rows, heads, Dk, Dv)`), the
        factors `(B, heads LOOP, T)`, and the total `(B, heads, Dk, Dv)` or None.
    """
    rows, tile = this.rows, this.tiles.sums
    x, y = side.x, side.y
    dim, value_dim = x.shape[3], y.shape[3]
    multiply, precision = product_precision(x.dtype)
    kept = x.dtype if multiply == torch.bfloat16 else torch.float32
    factor = x.new_empty(rows.batch, heads * sharing.loop, rows.length, dtype=torch.float32)
    blocks, segments, total = cdiv(value_dim, tile.columns), 1, None
    if this.causal:
        snapshots = x.new_empty(rows.batch, heads, this.chunks.total, dim, value_dim, dtype=kept)
        if keep_total:
            total = x.new_empty(rows.batch, heads, dim, value_dim, dtype=torch.float32)
    else:
        longest = this.chunks.total // rows.number if rows.kind == PACKED else this.chunks.total
        segments = max(1, min(longest // 4, PROGRAMS // (blocks * heads * rows.number)))
        total = x.new_empty(rows.number, heads, segments, dim, value_dim, dtype=torch.float32)
        snapshots = total
    launch(
        cosine_sums_kernel,
        (blocks * segments, heads, rows.number),
        (
            x, y, side.exponent, side.gain, initial, factor, snapshots, total,
            rows.start, rows.size, rows.past, this.chunks.base,
        ),
        (*x.stride()[:3], *y.stride()[:3], rows.length, this.chunks.total, segments),
        {
            "DX": dim, "DY": value_dim, "BLOCK_X": tile_side(dim), "BLOCK_Y": tile.columns, "CHUNK": this.tiles.chunk,
            "LOOP": sharing.loop, "X_DIVISOR": sharing.x, "KIND": rows.kind, "CAUSAL": this.causal,
            "REVERSE": reverse, "POWER": side.exponent is not None, "GAIN": side.gain is not None,
            "PAST": rows.past is not None, "INITIAL": initial is not None, "TOTAL": total is not None,
            "DTYPE": triton_type(multiply), "PRECISION": precision,
        },
        tile.warps, tile.stages,
    )  # fmt: skip
    if this.causal:
        return snapshots, factor, total
    return snapshots.sum(2).to(kept), factor, None


def apply_sums(this: Pass, side: Side, other: Side, sums: Tensor, factor: Tensor, heads: int, sharing: Sharing,
               after: bool, like: Tensor) -> Tensor:  # fmt: skip
    """y of this side from the sums of the other: `(B, heads, T, Dv)`, laid out as `like` where the shape is its."""
    rows, tile = this.rows, this.tiles.apply
    dim, value_dim = side.x.shape[3], other.y.shape[3]
    out = _empty(rows, like, heads, value_dim)
    parts = (this.tiles.chunk // tile.rows) * cdiv(value_dim, tile.columns)
    launch(
        cosine_apply_kernel,
        (heads, this.chunks.total * parts, rows.batch),
        (
            side.x, other.x, other.y, factor, sums, out, side.exponent, side.gain,
            rows.start, rows.size, rows.past, this.chunks.row, this.chunks.base,
        ),
        (
            *side.x.stride()[:3], *other.x.stride()[:3], *other.y.stride()[:3], *out.stride()[:3],
            rows.number, rows.length, this.chunks.total,
        ),
        _constants(this, tile, side, dim, value_dim, sharing, after),
        tile.warps, tile.stages,
    )  # fmt: skip
    return out


def project_sums(this: Pass, side: Side, other: Side, sums: Tensor, factor: Tensor, heads: int, sharing: Sharing,
                 after: bool, like: Tensor, need_partial: bool) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Gradient of this side's x `(B, heads, T, Dk)`, and the sums over tokens that the gradients of exponent and gain
    need, `(2, heads)`."""
    rows, tile = this.rows, this.tiles.project
    dim, value_dim = side.x.shape[3], side.y.shape[3]
    out = _empty(rows, like, heads, dim)
    programs = this.chunks.total * (this.tiles.chunk // tile.rows)
    partial = None
    if need_partial:
        # A program beyond its row's last token writes nothing.
        whole = rows.kind not in (SPANS, PACKED) and this.tiles.chunk == tile.rows and rows.length
        new = side.x.new_empty if whole else side.x.new_zeros
        partial = new(2, heads, rows.batch, programs, dtype=torch.float32)
    launch(
        cosine_project_kernel,
        (heads, programs, rows.batch),
        (
            side.x, side.y, other.x, other.y, factor, sums, out, partial, side.exponent, side.gain,
            rows.start, rows.size, rows.past, this.chunks.row, this.chunks.base,
        ),
        (
            *side.x.stride()[:3], *side.y.stride()[:3], *other.x.stride()[:3], *other.y.stride()[:3],
            *out.stride()[:3], rows.number, rows.length, this.chunks.total,
        ),
        {**_constants(this, tile, side, dim, value_dim, sharing, after), "PARTIAL": need_partial},
        tile.warps, tile.stages,
    )  # fmt: skip
    return out, None if partial is None else partial.sum((2, 3))


def _constants(
    this: Pass, tile: Tile, side: Side, dim: int, value_dim: int, sharing: Sharing, after: bool
) -> dict[str, Any]:
    """Compile-time arguments of the kernels that read the sums."""
    multiply, precision = product_precision(side.x.dtype)
    return {
        "DX": dim, "DY": value_dim, "BLOCK_X": tile_side(dim), "BLOCK_Y": tile.columns, "CHUNK": this.tiles.chunk,
        "BLOCK_M": tile.rows, "BLOCK_N": tile.others, "LOOP": sharing.loop, "X_DIVISOR": sharing.x,
        "O_DIVISOR": sharing.other, "S_DIVISOR": sharing.sums, "KIND": this.rows.kind, "CAUSAL": this.causal,
        "AFTER": int(after), "POWER": side.exponent is not None, "GAIN": side.gain is not None,
        "PAST": this.rows.past is not None, "DTYPE": triton_type(multiply), "PRECISION": precision,
    }  # fmt: skip


def _empty(rows: Rows, like: Tensor, heads: int, width: int) -> Tensor:
    """A result's buffer, 0 where padding will be left out; in `like`'s layout where that fits."""
    shape = (rows.batch, heads, rows.length, width)
    if like.shape == shape:
        return torch.zeros_like(like) if rows.kind == SPANS else torch.empty_like(like)
    return like.new_zeros(shape) if rows.kind == SPANS else like.new_empty(shape)
