"""Device helpers every kernel shares.

Where a row lies in memory, its logits after the head's transforms, merging, the loss.

A row is read from its first 16-byte boundary on, so that any vocabulary (GPT-2's 50257) and any
row start gets 16-byte accesses:

    | head |  body: whole groups of WIDTH logits, 16 bytes each  | tail |

The loops walk the body in tiles [GROUPS, WIDTH] and leave out the target's group. Head, tail and
that group, at most 3 WIDTH logits, are a small tile apart, the only one to compare with the target.

Each group keeps a running maximum and sum of its own, so the loops need no barrier and no shuffle.
Exponentials are base 2 with one rounding: exp z = exp2(fma(z, log2 e, -m)), m = fl(max z log2 e).
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
# log2 e is rounded: 1 / fl(log2 e) = LN_2 + what it lacks, and log2 e / fl(log2 e) - 1.
LN_2 = tl.constexpr(0.6931471805599453)
LN_2_LOW, LN_2_LOW_FP64 = tl.constexpr(7.3487e-09), tl.constexpr(3.297e-17)
LOG2_E_LOW, LOG2_E_LOW_FP64 = tl.constexpr(1.335e-08), tl.constexpr(1.411e-17)


@triton.jit
def row_start(row, offset, inner_rows, stride_outer, stride_inner):
    """Offset of a row's first logit. Two strides: `logits[:, :-1]` of [B, T, V] needs no copy.

    `row` has 32 bits: to divide 64 is a subroutine.
    """
    outer, inner = row // inner_rows, row % inner_rows
    return offset + outer.to(tl.int64) * stride_outer + inner.to(tl.int64) * stride_inner


@triton.jit
def row_window(start, columns, WIDTH: tl.constexpr, CONTIGUOUS: tl.constexpr):
    """(head, body): logits before and from the boundary, of a row of `columns` at `start`."""
    head = tl.zeros([], tl.int32)
    if CONTIGUOUS:
        head += tl.minimum((WIDTH - start % WIDTH) % WIDTH, columns).to(tl.int32)
    body = (columns - head) // WIDTH * WIDTH
    return head, tl.multiple_of(body, WIDTH)


@triton.jit
def body_start(start, head, stride_v, WIDTH: tl.constexpr, ALIGNED: tl.constexpr):
    """Offset of a row's body, which the compiler cannot see to be a multiple of WIDTH."""
    offset = start + head.to(tl.int64) * stride_v
    return tl.multiple_of(offset, WIDTH) if ALIGNED else offset


@triton.jit
def target_group(target, head, body, WIDTH: tl.constexpr):
    """Position in the body of the first logit of the target's group; -1 where there is none."""
    position = (target - head).to(tl.int32)
    inside = (position >= 0) & (position < body)
    return tl.where(inside, position // WIDTH * WIDTH, -1)


@triton.jit
def group_starts(GROUPS: tl.constexpr, WIDTH: tl.constexpr):
    """[GROUPS, 1] position of each group in a tile."""
    return tl.arange(0, GROUPS)[:, None] * WIDTH


@triton.jit
def lanes(WIDTH: tl.constexpr):
    return tl.arange(0, WIDTH)[None, :]


@triton.jit
def apart(head, body, columns, group, WIDTH: tl.constexpr):
    """The tile apart: (columns [4, WIDTH], which of them are): head, tail, the target's group."""
    which = tl.arange(0, 4)[:, None]
    first = tl.where(which == 0, 0, tl.where(which == 1, head + body, head + group))
    count = tl.where(which == 0, head, tl.where(which == 1, columns - head - body, WIDTH))
    count = tl.where((which == 3) | ((which == 2) & (group < 0)), 0, count)
    return first + lanes(WIDTH), lanes(WIDTH) < count


@triton.jit
def at(columns, stride_v, CONTIGUOUS: tl.constexpr):
    """Offsets of columns: 32 bits where they are neighbours, for these cost the loops registers."""
    return columns if CONTIGUOUS else tl.cast(columns, tl.int64) * stride_v


@triton.jit
def step(columns: tl.constexpr, stride_v, CONTIGUOUS: tl.constexpr):
    """How far a pointer goes in that many columns."""
    return columns if CONTIGUOUS else tl.cast(stride_v, tl.int64) * columns


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
        x = softcap * tanh(x * (1.0 / softcap))
    return x


@triton.jit
def head_derivative(x, softcap, logit_scale, HAS_SOFTCAP: tl.constexpr, HAS_SCALE: tl.constexpr):
    """dz/dx = logit_scale (1 - tanh^2); 4e / (1 + e)^2 with e = exp(-2 |y|) does not cancel."""
    slope = tl.full(x.shape, 1.0, x.dtype)
    if HAS_SOFTCAP:
        e = tl.exp(-2.0 * tl.abs(x * (logit_scale / softcap)))
        slope = 4.0 * e / ((1.0 + e) * (1.0 + e))
    if HAS_SCALE:
        slope = slope * logit_scale
    return slope


@triton.jit
def class_weights(
    w_ptr, q_ptr, columns, valid, q_stride_v, q_scale, q_shift,
    Q_CONTIGUOUS: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """w (q_scale q + q_shift) of columns; a factor whose pointer is None is 1. 0 if not valid."""
    weights = tl.where(valid, 1.0, 0.0).to(DTYPE)
    if q_ptr is not None:
        q = tl.load(q_ptr + at(columns, q_stride_v, Q_CONTIGUOUS), mask=valid, other=0.0).to(DTYPE)
        weights *= tl.fma(q, tl.full(q.shape, q_scale, DTYPE), tl.full(q.shape, q_shift, DTYPE))
    if w_ptr is not None:
        weights *= tl.load(w_ptr + columns, mask=valid, other=0.0).to(DTYPE)
    return weights


@triton.jit
def log2_e_of(x):
    """log2 e in x's dtype and shape, for tl.fma."""
    return tl.full(x.shape, LOG2_E, x.dtype)


@triton.jit
def nothing(shape: tl.constexpr, DTYPE: tl.constexpr):
    """(m, s, weighted) of no logits: a maximum so low that all move away from it, but finite, so
    that -inf logits less it are -inf, not NaN."""
    lowest: tl.constexpr = -1e308 if DTYPE == tl.float64 else -3e38
    return tl.full(shape, lowest, DTYPE), tl.zeros(shape, DTYPE), tl.zeros(shape, DTYPE)


@triton.jit
def merge(m, s, weighted, other_m, other_s, other_weighted):
    """Sums over two parts of a row, from theirs (Milakov & Gimelshein, arXiv:1805.02867)."""
    both = tl.maximum(m, other_m)
    scale, other_scale = tl.exp2(m - both), tl.exp2(other_m - both)
    weighted = (weighted + s * (m - both)) * scale
    weighted += (other_weighted + other_s * (other_m - both)) * other_scale
    return both, s * scale + other_s * other_scale, weighted


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


@triton.jit
def row_loss(m, s, z_target):
    """(loss, lse, what rounding took from lse, lse - m in base 2) of whole rows.

    m and s are those of the classes but the target. With d = m + log s - z_target the loss is
    log(1 + exp(d)), so a confident token's 1e-8 is 1e-8, not log(1 + 1e-8) = 0.
    """
    e = log2_e_of(z_target)
    scaled = z_target * e
    gap = m - scaled
    back = gap - m
    low = (m - (gap - back)) - (scaled + back)  # what rounding took from gap (Knuth's TwoSum)
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
    return loss, lse, lse_low, above
