"""The gradient of any function of a row's statistics, from four numbers per row.

    dL/dz_j = p_j (a + b (z_j - lse)) + c ([j = target] - p_j) + u        p_j = exp(z_j - lse)

c is kept apart from a: at the target, c (1 - p) = -c expm1(logprob) keeps its digits when p is
near 1.
"""

import triton
import triton.language as tl

from .streaming import LOG2_E, head_derivative, head_transform, minus_expm1, row_start, tile_columns


@triton.jit
def token_grad_kernel(
    x_ptr,  # [rows, V] logits
    grad_ptr,  # [rows, V], may be x_ptr: each element is read and written by one thread
    target_ptr,
    lse_ptr,
    logprob_ptr,
    lse_low_ptr,
    a_ptr,
    b_ptr,
    c_ptr,
    u_ptr,  # all [rows]; a, b, c, u are read only where HAS_* says so
    columns_in_memory,  # V; the gradient of columns at or past vocab_size is 0
    vocab_size,
    ignore_index,
    inner_rows,
    x_stride_outer,
    x_stride_inner,
    x_stride_v,
    grad_stride_outer,
    grad_stride_inner,
    grad_stride_v,
    softcap: "fp64",
    logit_scale: "fp64",
    HAS_SOFTCAP: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_A: tl.constexpr,
    HAS_B: tl.constexpr,
    HAS_C: tl.constexpr,
    HAS_U: tl.constexpr,
    TILES: tl.constexpr,
    GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(target_ptr + row).to(tl.int64)
    ignored = target == ignore_index
    in_range = (target >= 0) & (target < vocab_size)
    target_column = tl.where(in_range, target, -1).to(tl.int32)
    x_ptr += row_start(row, inner_rows, x_stride_outer, x_stride_inner)
    grad_ptr += row_start(row, inner_rows, grad_stride_outer, grad_stride_inner)
    DTYPE: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    softcap = tl.full([], softcap, DTYPE)
    logit_scale = tl.full([], logit_scale, DTYPE)

    lse = tl.load(lse_ptr + row)
    logprob = tl.load(logprob_ptr + row)
    correction = tl.exp(-tl.load(lse_low_ptr + row))  # p = exp(z - lse - lse_low)
    scale = tl.zeros([], DTYPE)
    slope = tl.zeros([], DTYPE)
    at_target = tl.zeros([], DTYPE)
    uniform = tl.zeros([], DTYPE)
    if HAS_A:
        scale += tl.load(a_ptr + row)
    if HAS_B:
        slope += tl.load(b_ptr + row)
    p_target = tl.exp(logprob)
    at_target += tl.where(p_target == 0.0, 0.0, p_target * (scale + slope * logprob))
    if HAS_C:
        c = tl.load(c_ptr + row)
        scale -= c
        at_target += c * minus_expm1(logprob)
    if HAS_U:
        uniform += tl.load(u_ptr + row)
        at_target += uniform
    scale *= correction
    slope *= correction

    tile = tile_columns(GROUPS, WIDTH)
    end = tl.where(ignored, 0, vocab_size)  # an ignored row is not read
    first = tl.program_id(1) * TILES * GROUPS * WIDTH
    for i in range(TILES):
        columns = first + i * GROUPS * WIDTH + tile
        valid = columns < end
        x = tl.load(x_ptr + columns.to(tl.int64) * x_stride_v, mask=valid, other=0.0).to(DTYPE)
        z = head_transform(x, softcap, logit_scale, HAS_SOFTCAP, HAS_SCALE)
        relative = z - lse
        p = tl.exp2(relative * LOG2_E)
        grad = p * scale
        if HAS_B:
            grad = tl.where(p == 0.0, 0.0, p * (scale + slope * relative))
        if HAS_U:
            grad += uniform
        grad = tl.where(columns == target_column, at_target, grad)
        grad *= head_derivative(x, softcap, logit_scale, HAS_SOFTCAP, HAS_SCALE)
        grad = tl.where(valid, grad, 0.0)
        tl.store(
            grad_ptr + columns.to(tl.int64) * grad_stride_v,
            grad.to(grad_ptr.dtype.element_ty),
            mask=columns < columns_in_memory,
        )
