"""Device helpers every kernel shares.

Where a row starts, its logits after the head's transforms, merging.

A row is read in tiles of [GROUPS, WIDTH] logits. Each group (WIDTH neighbouring columns, one
16-byte load) keeps a running maximum and sum of its own, so the loop needs neither barriers nor
shuffles; the groups are merged once, after the loop.

Exponentials are base 2: exp(z - m) = exp2((z - m) log2 e).
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def row_start(row, inner_rows, stride_outer, stride_inner):
    """Offset of a row's first logit. Two strides: `logits[:, :-1]` of [B, T, V] needs no copy."""
    row = row.to(tl.int64)
    return (row // inner_rows) * stride_outer + (row % inner_rows) * stride_inner


@triton.jit
def tile_columns(GROUPS: tl.constexpr, WIDTH: tl.constexpr):
    """Column numbers of a tile at column 0: [GROUPS, WIDTH], contiguous in memory order."""
    return tl.arange(0, GROUPS)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]


@triton.jit
def tanh(x):
    """2 sigmoid(2x) - 1, by its Taylor series where that difference would cancel."""
    wide = 2.0 / (1.0 + tl.exp(-2.0 * x)) - 1.0
    if x.dtype == tl.float32:
        y = x * x
        series = 1.0 + y * (-1 / 3 + y * (2 / 15 + y * (-17 / 315 + y * (62 / 2835))))
        wide = tl.where(tl.abs(x) < 0.3, x * series, wide)
    return wide


@triton.jit
def head_transform(x, softcap, logit_scale, HAS_SOFTCAP: tl.constexpr, HAS_SCALE: tl.constexpr):
    """z = softcap tanh(logit_scale x / softcap); each part optional."""
    if HAS_SCALE:
        x = x * logit_scale
    if HAS_SOFTCAP:
        x = softcap * tanh(x / softcap)
    return x


@triton.jit
def head_derivative(x, softcap, logit_scale, HAS_SOFTCAP: tl.constexpr, HAS_SCALE: tl.constexpr):
    """dz/dx = logit_scale (1 - tanh^2); 4e / (1 + e)^2 with e = exp(-2 |y|) does not cancel."""
    slope = tl.full(x.shape, 1.0, x.dtype)
    if HAS_SOFTCAP:
        e = tl.exp(-2.0 * tl.abs(x * logit_scale / softcap))
        slope = 4.0 * e / ((1.0 + e) * (1.0 + e))
    if HAS_SCALE:
        slope = slope * logit_scale
    return slope


@triton.jit
def finite_or_zero(m):
    """A maximum as a reference to subtract.

    -inf (nothing seen yet) becomes 0, so -inf - m is never NaN.
    """
    return tl.where(m == float("-inf"), 0.0, m)


@triton.jit
def precise_exp(x):
    """exp(x) for x <= 0 to a few ulp.

    exp2(x log2 e) alone loses |x| ulp to the rounding of the product.
    x = hi + lo with hi a multiple of 1/16, log2 e = 23/16 + rest; hi * 23/16 is exact.
    """
    x = tl.where(x < -1000.0, -1000.0, x)  # -inf - hi would be NaN; exp(-1000) is 0 in fp64 too
    hi = tl.floor(x * 16.0) * 0.0625
    small = hi * 0.0051950408889634 + (x - hi) * LOG2_E
    return tl.exp2(hi * 1.4375) * tl.exp2(small)


@triton.jit
def log1p(e):
    """log(1 + e) for e >= 0.

    With u = 1 + e, log(u) e / (u - 1) cancels the rounding of u (Kahan).
    """
    u = 1.0 + e
    return tl.where(u == 1.0, e, tl.log(u) * e / tl.where(u == 1.0, 1.0, u - 1.0))


@triton.jit
def minus_expm1(y):
    """1 - exp(y) for y <= 0 without cancellation near 0 (Kahan's form of expm1)."""
    u = tl.exp(y)
    near = (1.0 - u) * y / tl.log(tl.where((u == 1.0) | (u == 0.0), 0.5, u))
    return tl.where(u == 1.0, -y, tl.where(y < -1.0, 1.0 - u, near))
