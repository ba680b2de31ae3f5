"""Triton kernels of the learned feature maps: features of queries or keys, and the gradients of maps and inputs.

One program owns one map head and a run of tiles of tokens, so that it reads the map once; `map_tiles.py` has the
arithmetic. Backward recomputes u. The gradients' products take du and W in bfloat16 once, as any bfloat16 layer does;
for float16, whose range du would leave, in TF32.

Notation: B batch, HX heads of x, HM heads of the map, T tokens, D head dim, f the map's width, F features.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launching import cdiv, dense_rows, launch, next_power_of_2, tile_side, triton_type
from ..triton_support import product_precision
from .map_tiles import (
    feature_tile,
    feature_tile_gradient,
    finish_tile,
    level_tile,
    project_tile,
    split_weight,
)

PAIRED = ("softmax", "exp")  # activations with features for both signs of u: F = 2f
WEIGHT_TILE = 16384  # elements of W that a program multiplies by at once; a larger map is cut along D


class Sizes(NamedTuple):
    """How a kernel runs: tokens per tile, warps, pipeline stages, and about how many programs share the tiles."""

    rows: int
    warps: int
    stages: int
    programs: int


@triton.jit
def _tile_tokens(tile, row_tiles, tokens, start, length, SPAN: tl.constexpr, ROWS: tl.constexpr):
    """A tile's batch row (int64), tokens `[ROWS]`, which of them exist, and which of those are real."""
    batch = tile // row_tiles
    token = (tile - batch * row_tiles) * ROWS + tl.arange(0, ROWS)
    exists = token < tokens
    real = exists
    if SPAN:
        begin = tl.load(start + batch)
        real = exists & (token >= begin) & (token < begin + tl.load(length + batch))
    return tl.cast(batch, tl.int64), token, exists, real


@triton.jit
def _load_map(
    weight, magnitude, head, dim, D: tl.constexpr, WIDTH: tl.constexpr, BLOCK_F: tl.constexpr, MAGNITUDE: tl.constexpr
):
    """W `[dims, f]` and magnitude `[dims]` of one head in float32, 0 where padded."""
    column = tl.arange(0, BLOCK_F)
    inside = (dim < D)[:, None] & (column < WIDTH)[None, :]
    place = head.to(tl.int64) * D * WIDTH + dim[:, None] * WIDTH + column[None, :]
    w = tl.load(weight + place, mask=inside, other=0.0).to(tl.float32)
    m = tl.zeros([dim.shape[0]], tl.float32)
    if MAGNITUDE:
        m = tl.load(magnitude + head * D + dim, mask=dim < D, other=0.0).to(tl.float32)
    return w, m


@triton.jit
def _load_bias(bias, head, WIDTH: tl.constexpr, BLOCK_F: tl.constexpr, BIAS: tl.constexpr):
    column = tl.arange(0, BLOCK_F)
    b = tl.zeros([BLOCK_F], tl.float32)
    if BIAS:
        b = tl.load(bias + head * WIDTH + column, mask=column < WIDTH, other=0.0).to(tl.float32)
    return b


@triton.jit
def _project_in_parts(
    x, real, weight, magnitude, head,
    D: tl.constexpr, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_F: tl.constexpr, PARTS: tl.constexpr,
    MAGNITUDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`x W` and `x . magnitude` for a map too large to hold at once; x `[rows, 1]` points at the tokens."""
    u = tl.zeros([x.shape[0], BLOCK_F], tl.float32)
    level = tl.zeros([x.shape[0]], tl.float32)
    for part in range(PARTS):
        dim = part * BLOCK_D + tl.arange(0, BLOCK_D)
        tile = tl.load(x + dim[None, :], mask=real[:, None] & (dim < D)[None, :], other=0.0)
        w, m = _load_map(weight, magnitude, head, dim, D, WIDTH, BLOCK_F, MAGNITUDE)
        high, low = split_weight(w, x.dtype.element_ty)
        u += project_tile(tile, high, low, PRECISION)
        level += level_tile(tile, m)
    return u, level


@triton.jit
def feature_map_fwd_kernel(
    x, weight, bias, magnitude, start, length, phi,
    stride_batch, stride_head, stride_token, tokens, heads, ratio, row_tiles, tiles, run,
    D: tl.constexpr, WIDTH: tl.constexpr, ACTIVATION: tl.constexpr, BIAS: tl.constexpr, MAGNITUDE: tl.constexpr,
    SPAN: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_F: tl.constexpr, PARTS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Program (h, s) writes map head h's features for tiles `[s run, (s + 1) run)` of the batch's tokens."""
    head = tl.program_id(0)
    first = tl.program_id(1) * run
    column = tl.arange(0, BLOCK_F)
    dim = tl.arange(0, BLOCK_D)
    FEATURES: tl.constexpr = 2 * WIDTH if ACTIVATION == "softmax" or ACTIVATION == "exp" else WIDTH
    b = _load_bias(bias, head, WIDTH, BLOCK_F, BIAS)
    if PARTS == 1:
        w, m = _load_map(weight, magnitude, head, dim, D, WIDTH, BLOCK_F, MAGNITUDE)
        high, low = split_weight(w, x.dtype.element_ty)
    for tile in range(first, tl.minimum(first + run, tiles)):
        batch, token, exists, real = _tile_tokens(tile, row_tiles, tokens, start, length, SPAN, ROWS)
        source = x + batch * stride_batch + (head // ratio).to(tl.int64) * stride_head
        source += token.to(tl.int64)[:, None] * stride_token
        if PARTS == 1:
            q = tl.load(source + dim[None, :], mask=real[:, None] & (dim < D)[None, :], other=0.0)
            plus, minus = feature_tile(q, high, low, b, m, ACTIVATION, BIAS, MAGNITUDE, WIDTH, PRECISION)
        else:
            u, level = _project_in_parts(
                source, real, weight, magnitude, head, D, WIDTH, BLOCK_D, BLOCK_F, PARTS, MAGNITUDE, PRECISION
            )
            plus, minus = finish_tile(u + b[None, :], level, ACTIVATION, MAGNITUDE, WIDTH)
        target = phi + ((batch * heads + head) * tokens + token)[:, None] * FEATURES + column[None, :]
        write = exists[:, None] & (column < WIDTH)[None, :]
        tl.store(target, plus.to(phi.dtype.element_ty), mask=write)
        if FEATURES > WIDTH:
            tl.store(target + WIDTH, minus.to(phi.dtype.element_ty), mask=write)


@triton.jit
def feature_map_bwd_kernel(
    x, weight, bias, magnitude, start, length, grad_phi, grad_x, partial,
    stride_batch, stride_head, stride_token, grad_stride_batch, grad_stride_head, grad_stride_token,
    out_stride_batch, out_stride_head, out_stride_token,
    tokens, heads, ratio, row_tiles, tiles, run, partial_stride, bias_place, magnitude_place,
    D: tl.constexpr, WIDTH: tl.constexpr, ACTIVATION: tl.constexpr, BIAS: tl.constexpr, MAGNITUDE: tl.constexpr,
    SPAN: tl.constexpr, INPUT: tl.constexpr, ADD: tl.constexpr, WEIGHTS: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_F: tl.constexpr, PARTS: tl.constexpr, PRECISION: tl.constexpr, PRODUCT: tl.constexpr,
):  # fmt: skip
    """Program (h, s, c): map head h, tiles `[s run, (s + 1) run)`, and the c-th block of D for what it writes.

    It writes dL/dx to grad_x (INPUT), added to what is there or not (ADD), and its sums of the map's gradients to row
    s of partial (WEIGHTS):
    all heads' dW `(HM, D, f)`, then db `(HM, f)`, then dmagnitude `(HM, D)`. PRODUCT: dtype of those products.
    """
    head = tl.program_id(0)
    segment = tl.program_id(1)
    part = tl.program_id(2)
    first = segment * run
    column = tl.arange(0, BLOCK_F)
    dim = part * BLOCK_D + tl.arange(0, BLOCK_D)
    b = _load_bias(bias, head, WIDTH, BLOCK_F, BIAS)
    w, m = _load_map(weight, magnitude, head, dim, D, WIDTH, BLOCK_F, MAGNITUDE)
    high, low = split_weight(w, x.dtype.element_ty)
    grad_w = tl.zeros([BLOCK_D, BLOCK_F], tl.float32)
    grad_b = tl.zeros([BLOCK_F], tl.float32)
    grad_m = tl.zeros([BLOCK_D], tl.float32)
    for tile in range(first, tl.minimum(first + run, tiles)):
        batch, token, exists, real = _tile_tokens(tile, row_tiles, tokens, start, length, SPAN, ROWS)
        row = token.to(tl.int64)[:, None]
        source = x + batch * stride_batch + (head // ratio).to(tl.int64) * stride_head + row * stride_token
        inside = real[:, None] & (dim < D)[None, :]
        q = tl.load(source + dim[None, :], mask=inside, other=0.0)
        if PARTS == 1:
            u = project_tile(q, high, low, PRECISION)
            level = level_tile(q, m)
        else:
            u, level = _project_in_parts(
                source, real, weight, magnitude, head, D, WIDTH, BLOCK_D, BLOCK_F, PARTS, MAGNITUDE, PRECISION
            )
        grads = grad_phi + batch * grad_stride_batch + head.to(tl.int64) * grad_stride_head
        grads += row * grad_stride_token + column[None, :]
        wanted = real[:, None] & (column < WIDTH)[None, :]
        grad_plus = tl.load(grads, mask=wanted, other=0.0).to(tl.float32)
        grad_minus = grad_plus
        if ACTIVATION == "softmax" or ACTIVATION == "exp":
            grad_minus = tl.load(grads + WIDTH, mask=wanted, other=0.0).to(tl.float32)
        grad_u, grad_level = feature_tile_gradient(
            u + b[None, :], level, grad_plus, grad_minus, ACTIVATION, MAGNITUDE, WIDTH
        )
        narrow = grad_u.to(PRODUCT)
        if WEIGHTS:
            flipped = tl.trans(q.to(PRODUCT))
            grad_w = tl.dot(flipped, narrow, grad_w, input_precision=PRECISION)
            if BIAS:
                grad_b += tl.sum(grad_u, 0)
            if MAGNITUDE:
                grad_m += tl.sum(q.to(tl.float32) * grad_level[:, None], 0)
        if INPUT:
            update = tl.dot(narrow, tl.trans(w.to(PRODUCT)), input_precision=PRECISION)
            if MAGNITUDE:
                update += grad_level[:, None] * m[None, :]
            out = grad_x + batch * out_stride_batch + head.to(tl.int64) * out_stride_head
            out += row * out_stride_token + dim[None, :]
            if ADD:
                update += tl.load(out, mask=inside, other=0.0).to(tl.float32)
                tl.store(out, update.to(grad_x.dtype.element_ty), mask=inside)
            else:
                update = tl.where(real[:, None], update, 0.0)
                tl.store(out, update.to(grad_x.dtype.element_ty), mask=exists[:, None] & (dim < D)[None, :])
    if WEIGHTS:
        sums = partial + segment.to(tl.int64) * partial_stride
        place = head.to(tl.int64) * D * WIDTH + dim[:, None] * WIDTH + column[None, :]
        tl.store(sums + place, grad_w, mask=(dim < D)[:, None] & (column < WIDTH)[None, :])
        if BIAS:
            if part == 0:
                tl.store(sums + bias_place + head * WIDTH + column, grad_b, mask=column < WIDTH)
        if MAGNITUDE:
            tl.store(sums + magnitude_place + head * D + dim, grad_m, mask=dim < D)


def _shape(x: Tensor, maps) -> dict:
    """What both kernels need to know of x and the map at compile time."""
    dim, width = maps.weight.shape[1:]
    tile = WEIGHT_TILE // (4 if x.dtype == torch.float32 else 1)
    block_f = tile_side(width)
    block_d = max(16, min(next_power_of_2(dim), tile // block_f))
    return {
        "D": dim,
        "WIDTH": width,
        "ACTIVATION": maps.activation,
        "BIAS": maps.bias is not None,
        "MAGNITUDE": maps.magnitude is not None,
        "BLOCK_D": block_d,
        "BLOCK_F": block_f,
        "PARTS": cdiv(dim, block_d),
        "PRECISION": product_precision(x.dtype)[1],
    }


def _choose_sizes(shape: dict, dtype: torch.dtype, stages: int) -> Sizes:
    """Sizes by shape, `stages` where there is room.

    64 rows: the least that Hopper's warpgroups multiply; fewer would put W into registers, where it spills.

    float32, in three TF32 products, needs its room for the parts of both sides: nothing is loaded ahead, and the
    widest maps take the smallest tiles.
    """
    large = shape["BLOCK_F"] > 64 or shape["BLOCK_D"] * shape["BLOCK_F"] > 8192
    if dtype == torch.float32:
        return Sizes(16, 4, 1, 528) if shape["BLOCK_F"] > 128 else Sizes(64, 8 if large else 4, 1, 528)
    return Sizes(64, 8 if large else 4, 2 if large else stages, 528)


def _tiling(x: Tensor, heads: int, sizes: Sizes, parts: int = 1) -> tuple[int, int, int, int]:
    """Tiles per batch row, tiles, tiles per program, and programs per head."""
    row_tiles = cdiv(x.shape[2], sizes.rows)
    tiles = x.shape[0] * row_tiles
    run = max(1, cdiv(tiles, max(1, sizes.programs // (heads * parts))))
    return row_tiles, tiles, run, cdiv(tiles, run)


def _pointers(maps, span) -> list[Tensor]:
    """Weight, bias, magnitude, start and length; the weight stands in for what is absent."""
    weight = maps.weight.contiguous()
    bias, magnitude = (weight if y is None else y.contiguous() for y in (maps.bias, maps.magnitude))
    start, length = (weight, weight) if span is None else (y.contiguous() for y in span)
    return [weight, bias, magnitude, start, length]


def map_features(x: Tensor, maps, dtype: torch.dtype, span=None, sizes: Sizes | None = None) -> Tensor:
    """Features of x, in the order of `features_of`: those of +u, then those of -u.

    Args:
        x: `(B, HX, T, D)`, bfloat16, float16 or float32; any strides, the last one 1 (else it is copied).
        maps: weight `(HM, D, f)`, bias `(HM, f)` or None, magnitude `(HM, D)` or None, activation. HM % HX == 0: map
            head h reads head `h // (HM / HX)` of x.
        dtype: of the result; the arithmetic is in float32.
        span: None, or start `(B,)` and length `(B,)`, int32: the real tokens of a batch row are those from start on.
            The others are not read; their features are those of x = 0.
        sizes: how to run; None = chosen by shape.

    Returns:
        `(B, HM, T, F)`, contiguous.
    """
    x = dense_rows(x)
    heads = maps.weight.shape[0]
    shape = _shape(x, maps)
    features = shape["WIDTH"] * (2 if maps.activation in PAIRED else 1)
    phi = torch.empty(x.shape[0], heads, x.shape[2], features, dtype=dtype, device=x.device)
    sizes = sizes or _choose_sizes(shape, x.dtype, stages=3)
    row_tiles, tiles, run, segments = _tiling(x, heads, sizes)
    if tiles:
        launch(
            feature_map_fwd_kernel,
            (heads, segments),
            (x, *_pointers(maps, span), phi),
            (*x.stride()[:3], x.shape[2], heads, heads // x.shape[1], row_tiles, tiles, run),
            {**shape, "SPAN": span is not None, "ROWS": sizes.rows},
            sizes.warps,
            sizes.stages,
        )  # fmt: skip
    return phi


def map_backward(
    x: Tensor,
    maps,
    grad_features: Tensor,
    grad_x: Tensor | None = None,
    span=None,
    need_weights: bool = True,
    sizes: Sizes | None = None,
    add: bool = True,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of `map_features`, given `grad_features` = dL/dphi `(B, HM, T, F)`, float32 or x's dtype.

    Args:
        x, maps, span, sizes: as for `map_features`; no gradient comes from or goes to tokens outside the span.
        grad_x: `(B, HM, T, D)`, x's dtype or float32, last stride 1: dL/dx per map head is added to it in place.
        add: False writes it there instead, 0 outside the span.
        need_weights: whether to compute the map's gradients.

    Returns:
        dL/dweight `(HM, D, f)`, dL/dbias `(HM, f)` or None, dL/dmagnitude `(HM, D)` or None, in float32, summed in a
        fixed order; three times None without need_weights.
    """
    x, grad_features = dense_rows(x), dense_rows(grad_features)
    heads, dim, width = maps.weight.shape
    shape = _shape(x, maps)
    sizes = sizes or _choose_sizes(shape, x.dtype, stages=2 if grad_x is None else 1)  # 2 spill beside grad_x
    row_tiles, tiles, run, segments = _tiling(x, heads, sizes, shape["PARTS"])
    places = [heads * dim * width, heads * width * shape["BIAS"], heads * dim * shape["MAGNITUDE"]]
    partial = torch.empty(segments, sum(places) if need_weights else 0, dtype=torch.float32, device=x.device)
    if tiles and (need_weights or grad_x is not None):
        target = x if grad_x is None else grad_x  # x stands in for what is absent
        launch(
            feature_map_bwd_kernel,
            (heads, segments, shape["PARTS"]),
            (x, *_pointers(maps, span), grad_features, target, partial),
            (*x.stride()[:3], *grad_features.stride()[:3], *target.stride()[:3],
             x.shape[2], heads, heads // x.shape[1], row_tiles, tiles, run,
             sum(places), places[0], places[0] + places[1]),
            {**shape, "SPAN": span is not None, "INPUT": grad_x is not None, "ADD": add, "WEIGHTS": need_weights,
             "ROWS": sizes.rows, "PRODUCT": triton_type(product_precision(x.dtype)[0])},
            sizes.warps,
            sizes.stages,
        )  # fmt: skip
    if not need_weights:
        return None, None, None
    weight, bias, magnitude = (partial[0] if segments == 1 else partial.sum(0)).split(places)
    return (
        weight.view(heads, dim, width),
        bias.view(heads, width) if shape["BIAS"] else None,
        magnitude.view(heads, dim) if shape["MAGNITUDE"] else None,
    )
