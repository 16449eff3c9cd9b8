"""Loss and gradient of a row at once, where the loss's weights are known beforehand.

With label smoothing s, z-loss weight y, and w = token_weight / divisor read on the device:

    loss = -(1 - s) logprob - s mean_logprob + y lse²
    dL/dz_j = p_j w (2 y lse + s (V - 1) / V) + c ([j = target] - p_j) - (w s / V) [j != target]
    c = -w (1 - s + s / V)

A row comes from memory once, 4 bytes a 16-bit logit for loss and gradient: on chip it stays in
registers; streamed, so few rows are under way that the second read finds it in the L2 cache.
"""

import triton
import triton.language as tl

from .streaming import (
    LOG2_E,
    body_start,
    group_starts,
    lanes,
    log2_e_of,
    merge,
    row_loss,
    row_start,
    row_window,
    target_group,
)
from .token_grad import gradient, row_numbers, write_apart, write_span
from .token_stats import load_target, sum_apart, sum_body


@triton.jit
def token_loss(loss, lse, total, z_target, smoothing, z_loss_weight, vocab_size,
               SMOOTHING: tl.constexpr):  # fmt: skip
    """The token's loss, before its weight. `total`: sum of z less the target's, where SMOOTHING."""
    if SMOOTHING:
        mean = total / vocab_size + tl.where(z_target == float("-inf"), -lse, -loss)
        # All smoothed: else 0 * inf where the target is masked.
        of_target = tl.where(smoothing == 1.0, 0.0, (1.0 - smoothing) * loss)
        loss = of_target - smoothing * mean
    return loss + z_loss_weight * lse * lse


@triton.jit
def token_coefficients(weight_ptr, divisor_ptr, row, lse, smoothing, z_loss_weight, vocab_size,
                       HAS_WEIGHT: tl.constexpr, HAS_DIVISOR: tl.constexpr,
                       SMOOTHING: tl.constexpr):  # fmt: skip
    """a, c and u of `token_grad`."""
    w = tl.full([], 1.0, lse.dtype)
    if HAS_WEIGHT:
        w *= tl.load(weight_ptr + row)
    if HAS_DIVISOR:
        w /= tl.load(divisor_ptr)
    a, c, u = w * 2.0 * z_loss_weight * lse, -w, 0.0
    if SMOOTHING:
        u = -w * smoothing / vocab_size
        a, c = a - u * (vocab_size - 1), w * (smoothing - 1.0) + u
    return a, c, u


@triton.jit(
    do_not_specialize=[  # so that another number of rows or of classes compiles nothing new
        "rows",
        "columns_in_memory",
        "vocab_size",
        "ignore_index",
        "inner_rows",
        "x_offset",
        "x_stride_outer",
        "x_stride_inner",
        "grad_offset",
        "grad_stride_outer",
        "grad_stride_inner",
    ]
)
def loss_and_grad_kernel(
    x_ptr,  # [rows, V] logits
    grad_ptr,  # [rows, V], may be x_ptr
    target_ptr,  # [rows]
    loss_ptr,  # [rows]
    weight_ptr,  # [rows], read where HAS_WEIGHT
    divisor_ptr,  # [], read where HAS_DIVISOR
    rows,
    columns_in_memory,
    vocab_size,
    ignore_index,
    inner_rows,
    x_offset,
    x_stride_outer,
    x_stride_inner,
    x_stride_v,
    grad_offset,
    grad_stride_outer,
    grad_stride_inner,
    grad_stride_v,
    smoothing: "fp64",
    z_loss_weight: "fp64",
    softcap: "fp64",
    logit_scale: "fp64",
    HAS_SOFTCAP: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_DIVISOR: tl.constexpr,
    SMOOTHING: tl.constexpr,
    PADDED: tl.constexpr,
    CONTIGUOUS: tl.constexpr,
    GRAD_CONTIGUOUS: tl.constexpr,
    GRAD_ALIGNED: tl.constexpr,
    ON_CHIP: tl.constexpr,  # a tile holds a row, whose logits are as they come
    GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """On chip a row a program; streamed, one row after another: row, row + programs, ..."""
    DTYPE: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    softcap = tl.full([], softcap, DTYPE)
    logit_scale = tl.full([], logit_scale, DTYPE)
    smoothing = tl.full([], smoothing, DTYPE)
    z_loss_weight = tl.full([], z_loss_weight, DTYPE)
    first = tl.program_id(0)
    last = first + 1 if ON_CHIP else rows
    for number in range(first, last, 1 if ON_CHIP else tl.num_programs(0)):
        row = tl.cast(number, tl.int32)
        target = tl.load(target_ptr + row).to(tl.int64)
        scored = target != ignore_index
        x_start = row_start(row, x_offset, inner_rows, x_stride_outer, x_stride_inner)
        grad_start = row_start(row, grad_offset, inner_rows, grad_stride_outer, grad_stride_inner)
        z_target = load_target(
            x_ptr + x_start, target, x_stride_v, vocab_size, scored,
            softcap, logit_scale, HAS_SOFTCAP, HAS_SCALE,
        )  # fmt: skip
        origin = tl.where(z_target == float("-inf"), 0.0, z_target)
        columns = tl.where(scored, vocab_size, 0)  # an ignored row is not read
        head, body = row_window(x_start, columns_in_memory, WIDTH, CONTIGUOUS)
        target_column = tl.where((target >= 0) & (target < columns), target, -1).to(tl.int32)
        group = target_group(target_column, head, body, WIDTH)
        x_body = x_ptr + body_start(x_start, head, x_stride_v, WIDTH, CONTIGUOUS)
        grad_body = grad_ptr + body_start(grad_start, head, grad_stride_v, WIDTH, GRAD_ALIGNED)
        m, s, weighted, total, _, _, _, _ = sum_apart(
            x_ptr + x_start, head, body, columns, group, x_stride_v, origin, z_target,
            target_column, softcap, logit_scale, None, None, 0, 1.0, 0.0, HAS_SOFTCAP, HAS_SCALE,
            False, SMOOTHING, False, False, True, WIDTH,
        )  # fmt: skip
        readable = tl.minimum(columns - head, body)
        if ON_CHIP:
            groups = group_starts(GROUPS, WIDTH)
            position = groups + lanes(WIDTH)
            valid = tl.broadcast_to((groups < body) & (groups != group), [GROUPS, WIDTH])
            read = valid & (position < readable) if PADDED else valid & (groups < readable)
            x = tl.load(x_body + position, mask=read, other=float("-inf"))
            z = x.to(DTYPE)
            if SMOOTHING:
                total += tl.sum(tl.where(read, z - origin, 0.0))
            body_m = tl.maximum(tl.max(z) * LOG2_E, m)
            e = tl.exp2(tl.fma(z, log2_e_of(z), -tl.broadcast_to(body_m, z.shape)))
            body_s, body_weighted = tl.sum(e), weighted
        else:
            body_m, body_s, body_weighted, body_total, _, _, _, _ = sum_body(
                x_body, readable, head, group, x_stride_v, origin, z_target, target_column,
                softcap, logit_scale, None, None, 0, 1.0, 0.0, HAS_SOFTCAP, HAS_SCALE,
                False, SMOOTHING, False, False, PADDED, CONTIGUOUS, True, GROUPS, WIDTH,
            )  # fmt: skip
            total += body_total
        m, s, weighted = merge(m, s, weighted, body_m, body_s, body_weighted)
        loss, lse, lse_low, _ = row_loss(m, s, z_target)
        value = token_loss(
            loss, lse, total, z_target, smoothing, z_loss_weight, vocab_size, SMOOTHING
        )
        tl.store(loss_ptr + row, tl.where(scored, value, 0.0))
        a, c, u = token_coefficients(
            weight_ptr, divisor_ptr, row, lse, smoothing, z_loss_weight, vocab_size,
            HAS_WEIGHT, HAS_DIVISOR, SMOOTHING,
        )  # fmt: skip
        scaled, scale, slope, at_target = row_numbers(lse, lse_low, -loss, a, 0.0, c, False)
        scaled, scale = tl.where(scored, scaled, 0.0), tl.where(scored, scale, 0.0)
        # In place, none writes what another has yet to sum: the sums of all are in `scaled`.
        write_apart(
            x_ptr + x_start, grad_ptr + grad_start, head, body, columns_in_memory, columns, group,
            target_column, at_target, lse, scaled, scale, slope, u, softcap, logit_scale,
            x_stride_v, grad_stride_v, None, None, 0, 1.0, 0.0, HAS_SOFTCAP, HAS_SCALE,
            False, SMOOTHING, True, WIDTH,
        )  # fmt: skip
        if ON_CHIP:
            grad = gradient(
                x.to(DTYPE), lse, scaled, scale, slope, u, softcap, logit_scale,
                HAS_SOFTCAP, HAS_SCALE, False, SMOOTHING,
            )  # fmt: skip
            if SMOOTHING:  # else exp(-inf) is 0
                grad = tl.where(read, grad, 0.0)
            tl.store(grad_body + position, grad.to(grad_ptr.dtype.element_ty), mask=valid)
        else:
            write_span(
                x_body, grad_body, head, 0, body, scored, columns, group, lse, scaled, scale,
                slope, u, softcap, logit_scale, x_stride_v, grad_stride_v,
                None, None, 0, 1.0, 0.0, HAS_SOFTCAP, HAS_SCALE,
                False, SMOOTHING, PADDED, CONTIGUOUS, GRAD_CONTIGUOUS, True, GROUPS, WIDTH,
            )  # fmt: skip
