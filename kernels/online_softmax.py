"""Online softmax: running sums over a row, merging them, and the loss of the row.

The sums are m, a maximum of z log2 e; s = sum exp2(z log2 e - m); and for the entropy
ez_sum = sum exp2(z log2 e - m) (z log2 e - m). Each group of a tile has its own sums, so the loops
need no barrier and no shuffle. An exponent is rounded once: exp2(fma(z, log2 e, -m)).
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .rows import body_row, column_offsets, row_start

LOG2_E = tl.constexpr(1.4426950408889634)
# log2 e is rounded. 1 / fl(log2 e) = LN_2 + LN_2_LOW, and log2 e / fl(log2 e) = 1 + LOG2_E_LOW.
LN_2 = tl.constexpr(0.6931471805599453)
LN_2_LOW, LN_2_LOW_FP64 = tl.constexpr(7.3487e-09), tl.constexpr(3.297e-17)
LOG2_E_LOW, LOG2_E_LOW_FP64 = tl.constexpr(1.335e-08), tl.constexpr(1.411e-17)


class Sums(NamedTuple):
    """Sums over logits in base 2. m is finite, and at least as large as each logit so far."""

    m: Any
    s: Any
    ez_sum: Any


class Head(NamedTuple):
    """The parameters of the head's transforms, in the dtype of the computation."""

    softcap: Any
    logit_scale: Any


class Factors(NamedTuple):
    """Class weights w (scale q + shift) of a row from some column on. Options enable w and q."""

    w_ptr: Any
    q_ptr: Any
    q_stride_v: Any  # encoded by `arguments.encode`
    scale: Any
    shift: Any


class RowLoss(NamedTuple):
    """Loss and lse of a row. lse_low: the rounding error of lse; above: lse - m in base 2."""

    loss: Any
    lse: Any
    lse_low: Any
    above: Any


@triton.jit
def tanh(x):
    """Return tanh x = 2 sigmoid(2x) - 1. Near 0, where that cancels, use the Taylor series."""
    wide = 2.0 / (1.0 + tl.exp(-2.0 * x)) - 1.0
    if x.dtype == tl.float32:
        y = x * x
        series = 1.0 + y * (-1 / 3 + y * (2 / 15 + y * (-17 / 315 + y * (62 / 2835))))
        wide = tl.where(tl.abs(x) < 0.3, x * series, wide)
    return wide


@triton.jit
def typed_head(softcap, logit_scale, DTYPE: tl.constexpr):
    """Return the Head from fp64 arguments."""
    return Head(tl.full([], softcap, DTYPE), tl.full([], logit_scale, DTYPE))


@triton.jit
def head_transform(x, head, OPTIONS: tl.constexpr):
    """Return z = softcap tanh(logit_scale x / softcap). Scale and cap are optional."""
    if OPTIONS.HAS_SCALE:
        x = x * head.logit_scale
    if OPTIONS.HAS_SOFTCAP:
        x = head.softcap * tanh(x * (1.0 / head.softcap))
    return x


@triton.jit
def head_derivative(x, head, OPTIONS: tl.constexpr):
    """Return dz/dx = logit_scale (1 - tanh²).

    With e = exp(-2 |y|) it is 4e / (1 + e)², which does not cancel.
    """
    slope = tl.full(x.shape, 1.0, x.dtype)
    if OPTIONS.HAS_SOFTCAP:
        e = tl.exp(-2.0 * tl.abs(x * (head.logit_scale / head.softcap)))
        slope = 4.0 * e / ((1.0 + e) * (1.0 + e))
    if OPTIONS.HAS_SCALE:
        slope = slope * head.logit_scale
    return slope


@triton.jit
def class_weights(factors, columns, valid, DTYPE: tl.constexpr, OPTIONS: tl.constexpr):
    """Return the class weights of `columns`, or 0 where not valid. An absent factor is 1."""
    weights = tl.where(valid, 1.0, 0.0).to(DTYPE)
    if OPTIONS.HAS_PROB:
        offsets = column_offsets(columns, factors.q_stride_v, OPTIONS.PROB_CONTIGUOUS)
        q = tl.load(factors.q_ptr + offsets, mask=valid, other=0.0).to(DTYPE)
        scale, shift = (
            tl.full(q.shape, factors.scale, DTYPE),
            tl.full(q.shape, factors.shift, DTYPE),
        )
        weights *= tl.fma(q, scale, shift)
    if OPTIONS.HAS_WEIGHT:
        weights *= tl.load(factors.w_ptr + columns, mask=valid, other=0.0).to(DTYPE)
    return weights


@triton.jit
def row_factors(weights, row, inner_rows, prefix, scale, shift, WIDTH: tl.constexpr,
                OPTIONS: tl.constexpr):  # fmt: skip
    """Return (Factors from column 0 on, Factors from the body on) of a row."""
    start = row_start(row, inner_rows, weights)
    body = body_row(weights, start, prefix, WIDTH, OPTIONS.PROB_CONTIGUOUS, OPTIONS.PROB_ALIGNED)
    whole = Factors(weights.w_ptr, weights.ptr + start, weights.stride_v, scale, shift)
    return whole, Factors(weights.w_ptr + prefix, body.ptr, weights.stride_v, scale, shift)


@triton.jit
def move_factors(factors, columns, OPTIONS: tl.constexpr):
    """Return the Factors that start `columns` further on."""
    offset = column_offsets(columns, factors.q_stride_v, OPTIONS.PROB_CONTIGUOUS)
    w_ptr, q_ptr = factors.w_ptr + columns, factors.q_ptr + offset
    return Factors(w_ptr, q_ptr, factors.q_stride_v, factors.scale, factors.shift)


@triton.jit
def log2_e_like(x):
    """Return log2 e with the dtype and shape of x, as tl.fma requires."""
    return tl.full(x.shape, LOG2_E, x.dtype)


@triton.jit
def empty_sums(N: tl.constexpr, DTYPE: tl.constexpr):
    """Return the Sums [N] over no logits.

    The maximum is lower than every finite logit, but finite. So -inf minus it is -inf, not NaN.
    """
    lowest: tl.constexpr = -1e308 if DTYPE == tl.float64 else -3e38
    return Sums(tl.full([N], lowest, DTYPE), tl.zeros([N], DTYPE), tl.zeros([N], DTYPE))


@triton.jit
def merge(a, b):
    """Return the sums over both parts of a row (Milakov & Gimelshein, arXiv:1805.02867)."""
    m = tl.maximum(a.m, b.m)
    a_scale, b_scale = tl.exp2(a.m - m), tl.exp2(b.m - m)
    ez_sum = (a.ez_sum + a.s * (a.m - m)) * a_scale
    ez_sum += (b.ez_sum + b.s * (b.m - m)) * b_scale
    return Sums(m, a.s * a_scale + b.s * b_scale, ez_sum)


@triton.jit
def add_exponentials(sums, z, ENTROPY: tl.constexpr):
    """Add a tile z [G, W] to each group's sums [G]."""
    m = tl.maximum(sums.m, tl.max(z, 1) * LOG2_E)
    shifted = tl.fma(z, log2_e_like(z), -tl.broadcast_to(m[:, None], z.shape))
    e = tl.exp2(shifted)
    rescale = tl.exp2(sums.m - m)
    ez_sum = sums.ez_sum
    if ENTROPY:
        ez_sum = (ez_sum + sums.s * (sums.m - m)) * rescale
        ez_sum += tl.sum(tl.where(z == float("-inf"), 0.0, e * shifted), 1)
    return Sums(m, sums.s * rescale + tl.sum(e, 1), ez_sum)


@triton.jit
def fold_sums(sums):
    """Return one Sums over all groups [G]."""
    m = tl.max(sums.m, 0)
    scale = tl.exp2(sums.m - m)
    ez_sum = tl.sum((sums.ez_sum + sums.s * (sums.m - m)) * scale, 0)
    return Sums(m, tl.sum(sums.s * scale, 0), ez_sum)


@triton.jit
def log1p(e):
    """Return log(1 + e) for e >= 0.

    With u = 1 + e, log(u) e / (u - 1) cancels the rounding error of u (Kahan).
    """
    u = 1.0 + e
    return tl.where(u == 1.0, e, tl.log(u) * e / tl.where(u == 1.0, 1.0, u - 1.0))


@triton.jit
def minus_expm1(y):
    """Return 1 - exp(y) for y <= 0 without cancellation near 0 (Kahan's form of expm1)."""
    u = tl.exp(y)
    near = (1.0 - u) * y / tl.log(tl.where((u == 1.0) | (u == 0.0), 0.5, u))
    return tl.where(u == 1.0, -y, tl.where(y < -1.0, 1.0 - u, near))


@triton.jit
def row_loss(m, s, z_target):
    """Return the RowLoss of whole rows from m and s of all classes but the target.

    With d = m + log s - z_target the loss is log(1 + exp(d)). So the loss of a confident token
    is 1e-8, not log(1 + 1e-8) = 0.
    """
    e = log2_e_like(z_target)
    scaled = z_target * e
    gap = m - scaled
    back = gap - m
    low = (m - (gap - back)) - (scaled + back)  # rounding error of gap (Knuth's TwoSum)
    low -= tl.fma(z_target, e, -scaled)
    if z_target.dtype == tl.float32:
        low += gap * LOG2_E_LOW
    else:
        low += gap * LOG2_E_LOW_FP64
    low = tl.where((low == low) & (tl.abs(gap) != float("inf")), low, 0.0)
    log2_s = tl.log2(s)
    d = gap + (log2_s + low)
    ratio = s * tl.exp2(gap) * (1.0 + low * LN_2)
    tail = log1p(tl.where(d < 0.0, ratio, tl.exp2(-d)))
    loss = tl.where(d > 0.0, d * LN_2, 0.0) + tl.where(d == d, tail, d)
    above = tl.where(d > 0.0, log2_s + tail * LOG2_E, loss * LOG2_E - (gap + low))
    base = m * LN_2
    lse = tl.where(d > 0.0, base + above * LN_2, z_target + loss)
    base_low = tl.fma(m, tl.full(m.shape, LN_2, m.dtype), -base)
    if z_target.dtype == tl.float32:
        base_low += m * LN_2_LOW
    else:
        base_low += m * LN_2_LOW_FP64
    lse_low = (base - lse) + above * LN_2 + base_low
    lse_low = tl.where(d > 0.0, lse_low, (z_target - lse) + loss)
    return RowLoss(loss, lse, lse_low, above)
