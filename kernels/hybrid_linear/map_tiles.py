"""Triton device functions of the learned feature maps, for tiles in registers: features, and their gradients.

`phi = max(a(u), 1e-12) * exp(clamp(x . magnitude, -10, 10))` with `u = x W + b`; `a` as in `features_of`.

Products run in the input's dtype with float32 sums, and W is split in two numbers of that dtype, `W = high + low`:
with one bfloat16 number per weight the features' relative error was 3e-3 to 9e-3 (identity plus noise of 0.02, D 128,
f 64, inputs of deviation 1 to 8), above what rounding the result costs (1.7e-3); with two it was 1e-5.
"""

import triton
import triton.language as tl

from .reference import FLOOR as FEATURE_FLOOR
from .reference import MAGNITUDE_LIMIT as LEVEL_LIMIT

FLOOR = tl.constexpr(FEATURE_FLOOR)
MAGNITUDE_LIMIT = tl.constexpr(LEVEL_LIMIT)


@triton.jit
def split_weight(weight, dtype: tl.constexpr):
    """Two numbers of `dtype`, high and low, whose sum is the float32 weight to about twice the dtype's precision."""
    high = weight.to(dtype)
    return high, (weight - high.to(tl.float32)).to(dtype)


@triton.jit
def project_tile(x, high, low, PRECISION: tl.constexpr):
    """`x W` in float32 for x `[rows, D]` and a split weight `[D, f]`; for float32 x, `high` is the whole weight."""
    u = tl.dot(x, high, input_precision=PRECISION)
    if x.dtype != tl.float32:
        u = tl.dot(x, low, u)
    return u


@triton.jit
def level_tile(x, magnitude):
    """`x . magnitude` in float32 per row, before the clamp."""
    return tl.sum(x.to(tl.float32) * magnitude[None, :], 1)


@triton.jit
def scale_of(level):
    """What multiplies a token's features."""
    return tl.exp(tl.minimum(tl.maximum(level, -MAGNITUDE_LIMIT), MAGNITUDE_LIMIT))


@triton.jit
def _half(v, ACTIVATION: tl.constexpr):
    """Features of v (u or -u, -inf where padded) before floor and magnitude."""
    if ACTIVATION == "softmax":
        share = tl.exp(v - tl.max(v, 1)[:, None])
        share = share * (1.0 / tl.sum(share, 1))[:, None]
    elif ACTIVATION == "exp":
        share = tl.exp(v - tl.max(v, 1)[:, None])
    elif ACTIVATION == "relu":
        share = tl.maximum(v, 0.0)
    else:
        share = tl.where(v > 0, v + 1.0, tl.exp(tl.minimum(v, 0.0)))
    return share


@triton.jit
def _half_gradient(v, grad, ACTIVATION: tl.constexpr):
    """For grad = dL/d features without magnitude: dL/dv, and per row the sum of grad times feature."""
    share = _half(v, ACTIVATION)
    level = tl.sum(grad * tl.maximum(share, FLOOR), 1)
    grad = tl.where(share >= FLOOR, grad, 0.0)
    if ACTIVATION == "softmax":
        weighted = grad * share
        grad = weighted - share * tl.sum(weighted, 1)[:, None]
    elif ACTIVATION == "exp":
        weighted = grad * share
        top = (v == tl.max(v, 1)[:, None]).to(tl.float32)  # ties divide the maximum's gradient, as in torch.amax
        grad = weighted - top * (tl.sum(weighted, 1) / tl.sum(top, 1))[:, None]
    elif ACTIVATION == "elu":
        grad = tl.where(v > 0, grad, grad * share)
    return grad, level


@triton.jit
def _real_columns(u, WIDTH: tl.constexpr):
    return (tl.arange(0, u.shape[1]) < WIDTH)[None, :]


@triton.jit
def finish_tile(u, level, ACTIVATION: tl.constexpr, MAGNITUDE: tl.constexpr, WIDTH: tl.constexpr):
    """Features from `u = x W + b` and `level = x . magnitude`, as `feature_tile` returns them."""
    real = _real_columns(u, WIDTH)
    plus = _half(tl.where(real, u, -float("inf")), ACTIVATION)
    plus = tl.where(real, tl.maximum(plus, FLOOR), 0.0)
    if MAGNITUDE:
        plus = plus * scale_of(level)[:, None]
    minus = plus
    if ACTIVATION == "softmax" or ACTIVATION == "exp":
        minus = _half(tl.where(real, -u, -float("inf")), ACTIVATION)
        minus = tl.where(real, tl.maximum(minus, FLOOR), 0.0)
        if MAGNITUDE:
            minus = minus * scale_of(level)[:, None]
    return plus, minus


@triton.jit
def feature_tile(
    x, high, low, bias, magnitude,
    ACTIVATION: tl.constexpr, BIAS: tl.constexpr, MAGNITUDE: tl.constexpr, WIDTH: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Features of a tile of tokens.

    Args:
        x: `[rows, D]`, 0 where padded.
        high, low: `split_weight(weight, x.dtype)`, `[D, f]`, 0 where padded.
        bias, magnitude: float32 `[f]`, `[D]`, 0 where padded; anything where BIAS, MAGNITUDE are false.
        WIDTH: the map's own f; columns from there on are padding.

    Returns:
        Two float32 `[rows, f]`: the features of +u and of -u, the same for relu and elu. Padded columns are 0.
    """
    u = project_tile(x, high, low, PRECISION)
    level = 0.0
    if BIAS:
        u += bias[None, :]
    if MAGNITUDE:
        level = level_tile(x, magnitude)
    return finish_tile(u, level, ACTIVATION, MAGNITUDE, WIDTH)


@triton.jit
def feature_tile_gradient(
    u, level, grad_plus, grad_minus, ACTIVATION: tl.constexpr, MAGNITUDE: tl.constexpr, WIDTH: tl.constexpr
):
    """dL/du `[rows, f]` and dL/dlevel `[rows]` (0.0 without MAGNITUDE) of `finish_tile`; gradients 0 where padded."""
    real = _real_columns(u, WIDTH)
    scale = 1.0
    grad_level = 0.0
    if MAGNITUDE:
        scale = scale_of(level)[:, None]
    grad_u, total = _half_gradient(tl.where(real, u, -float("inf")), grad_plus * scale, ACTIVATION)
    if ACTIVATION == "softmax" or ACTIVATION == "exp":
        grad_minus_u, more = _half_gradient(tl.where(real, -u, -float("inf")), grad_minus * scale, ACTIVATION)
        grad_u -= grad_minus_u
        total += more
    if MAGNITUDE:
        grad_level = tl.where((level >= -MAGNITUDE_LIMIT) & (level <= MAGNITUDE_LIMIT), total, 0.0)
    return grad_u, grad_level
