"""The gradient of any function of a row's statistics, from four numbers per row.

    dL/dz_j = p_j (a + b (z_j - lse)) + c ([j = target] - p_j) + u w_j [j != target]

with p_j = exp(z_j - lse). c is kept apart from a: at the target, c (1 - p) = -c expm1(logprob)
keeps its digits when p is near 1. w_j: `class_weights`.
"""

import triton
import triton.language as tl

from .streaming import (
    apart,
    at,
    body_start,
    class_weights,
    group_starts,
    head_derivative,
    head_transform,
    lanes,
    log2_e_of,
    minus_expm1,
    row_start,
    row_window,
    step,
    target_group,
)


@triton.jit
def row_numbers(lse, lse_low, logprob, a, b, c, HAS_B: tl.constexpr):
    """(lse in base 2, the factors of p and of p (z - lse), the gradient at the target)."""
    e = log2_e_of(lse)
    scaled = lse * e
    low = tl.fma(lse, e, -scaled) + lse_low * e
    factor = tl.exp2(-low)  # p = factor exp2(z log2 e - scaled)
    p_target = tl.exp(logprob)
    at_target = tl.where(p_target == 0.0, 0.0, p_target * (a + b * logprob))
    at_target += c * minus_expm1(logprob)
    scale = a - c
    if HAS_B:
        scale -= b * lse_low  # what z - lse lacks
    return scaled, scale * factor, b * factor, at_target


@triton.jit
def gradient(
    x, lse, scaled, scale, slope, uniform, softcap, logit_scale,
    HAS_SOFTCAP: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_B: tl.constexpr, HAS_U: tl.constexpr,
):  # fmt: skip
    """dL/dx at classes other than the target. `uniform`: u w, or u where w is 1."""
    z = head_transform(x, softcap, logit_scale, HAS_SOFTCAP, HAS_SCALE)
    p = tl.exp2(tl.fma(z, log2_e_of(z), -tl.broadcast_to(scaled, z.shape)))
    grad = p * scale
    if HAS_B:
        grad = tl.where(p == 0.0, 0.0, p * (scale + slope * (z - lse)))
    if HAS_U:
        grad += uniform
    if HAS_SOFTCAP or HAS_SCALE:
        grad *= head_derivative(x, softcap, logit_scale, HAS_SOFTCAP, HAS_SCALE)
    return grad


@triton.jit
def write_body(
    x_ptr, grad_ptr, length, read, group, lse, scaled, scale, slope, uniform,
    softcap, logit_scale, x_stride_v, grad_stride_v, w_ptr, q_ptr, q_stride_v, q_scale, q_shift,
    HAS_SOFTCAP: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_B: tl.constexpr, HAS_U: tl.constexpr,
    PADDED: tl.constexpr, FOLDED: tl.constexpr, CONTIGUOUS: tl.constexpr,
    GRAD_CONTIGUOUS: tl.constexpr, Q_CONTIGUOUS: tl.constexpr, GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """`length` positions of a row's body, all but the target's group.

    PADDED: those at or past `read` are not read and get 0. FOLDED: `scaled` has -log2 scale in it.
    """
    tile = group_starts(GROUPS, WIDTH) + lanes(WIDTH)
    for i in range(0, length, GROUPS * WIDTH):
        groups = i + group_starts(GROUPS, WIDTH)
        position = groups + lanes(WIDTH)
        valid = tl.broadcast_to((groups < length) & (groups != group), [GROUPS, WIDTH])
        readable = valid & (position < read) if PADDED else valid
        x = tl.load(x_ptr + at(tile, x_stride_v, CONTIGUOUS), mask=readable, other=0.0)
        if FOLDED:
            z = x.to(tl.float32)
            grad = tl.exp2(tl.fma(z, log2_e_of(z), -tl.broadcast_to(scaled, z.shape)))
        else:
            u = uniform
            if HAS_U and ((w_ptr is not None) or (q_ptr is not None)):
                u *= class_weights(
                    w_ptr, q_ptr, i + tile, readable, q_stride_v, q_scale, q_shift,
                    Q_CONTIGUOUS, lse.dtype,
                )  # fmt: skip
            grad = gradient(
                x.to(lse.dtype), lse, scaled, scale, slope, u, softcap, logit_scale,
                HAS_SOFTCAP, HAS_SCALE, HAS_B, HAS_U,
            )  # fmt: skip
        if PADDED:
            grad = tl.where(readable, grad, 0.0)
        tl.store(
            grad_ptr + at(tile, grad_stride_v, GRAD_CONTIGUOUS),
            grad.to(grad_ptr.dtype.element_ty),
            mask=valid,
        )
        x_ptr += step(GROUPS * WIDTH, x_stride_v, CONTIGUOUS)
        grad_ptr += step(GROUPS * WIDTH, grad_stride_v, GRAD_CONTIGUOUS)


@triton.jit
def write_zeros(
    grad_ptr, length, stride_v,
    CONTIGUOUS: tl.constexpr, GROUPS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """`length` positions of the body of a row that is ignored."""
    tile = group_starts(GROUPS, WIDTH) + lanes(WIDTH)
    for i in range(0, length, GROUPS * WIDTH):
        valid = tl.broadcast_to(i + group_starts(GROUPS, WIDTH) < length, [GROUPS, WIDTH])
        zeros = tl.zeros([GROUPS, WIDTH], grad_ptr.dtype.element_ty)
        tl.store(grad_ptr + at(tile, stride_v, CONTIGUOUS), zeros, mask=valid)
        grad_ptr += step(GROUPS * WIDTH, stride_v, CONTIGUOUS)


@triton.jit
def write_apart(
    x_ptr, grad_ptr, head, body, columns_in_memory, columns, group, target_column, at_target,
    lse, scaled, scale, slope, uniform, softcap, logit_scale, x_stride_v, grad_stride_v,
    w_ptr, q_ptr, q_stride_v, q_scale, q_shift,
    HAS_SOFTCAP: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_B: tl.constexpr, HAS_U: tl.constexpr,
    Q_CONTIGUOUS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Head, tail and the target's group of a row."""
    edge, valid = apart(head, body, columns_in_memory, group, WIDTH)
    readable = valid & (edge < columns)
    x = tl.load(x_ptr + edge.to(tl.int64) * x_stride_v, mask=readable, other=0.0).to(lse.dtype)
    if HAS_U and ((w_ptr is not None) or (q_ptr is not None)):
        uniform *= class_weights(
            w_ptr, q_ptr, edge, readable, q_stride_v, q_scale, q_shift, Q_CONTIGUOUS, lse.dtype
        )
    grad = gradient(
        x, lse, scaled, scale, slope, uniform, softcap, logit_scale,
        HAS_SOFTCAP, HAS_SCALE, HAS_B, HAS_U,
    )  # fmt: skip
    at_target *= head_derivative(x, softcap, logit_scale, HAS_SOFTCAP, HAS_SCALE)
    grad = tl.where(edge == target_column, at_target, grad)
    grad = tl.where(readable, grad, 0.0)
    address = grad_ptr + edge.to(tl.int64) * grad_stride_v
    tl.store(address, grad.to(grad_ptr.dtype.element_ty), mask=valid)


@triton.jit
def write_span(
    x_ptr, grad_ptr, head, first, length, scored, columns, group, lse, scaled, scale, slope,
    uniform, softcap, logit_scale, x_stride_v, grad_stride_v,
    w_ptr, q_ptr, q_stride_v, q_scale, q_shift,
    HAS_SOFTCAP: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_B: tl.constexpr, HAS_U: tl.constexpr,
    PADDED: tl.constexpr, CONTIGUOUS: tl.constexpr, GRAD_CONTIGUOUS: tl.constexpr,
    Q_CONTIGUOUS: tl.constexpr, GROUPS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """`length` positions of a row's body from `first` on, by the loop that suits the row."""
    x_ptr += at(first, x_stride_v, CONTIGUOUS)
    grad_ptr += at(first, grad_stride_v, GRAD_CONTIGUOUS)
    if w_ptr is not None:
        w_ptr += first
    if q_ptr is not None:
        q_ptr += at(first, q_stride_v, Q_CONTIGUOUS)
    write_zeros(
        grad_ptr, tl.where(scored, 0, length), grad_stride_v, GRAD_CONTIGUOUS, GROUPS, WIDTH
    )
    length = tl.where(scored, length, 0)
    PLAIN: tl.constexpr = not (HAS_SOFTCAP or HAS_SCALE or HAS_B or HAS_U or PADDED)
    if PLAIN and x_ptr.dtype.element_ty.primitive_bitwidth == 16:
        # A positive scale goes into the exponent: an instruction a logit less. The sum is rounded
        # to fp32: up to 2^8 by 2^-17, a 60th of what float16 rounds by; at 2^24 by all there is.
        folded = tl.where((scale > 0.0) & (tl.abs(scaled) < 256.0), length, 0)
        length -= folded
        write_body(
            x_ptr, grad_ptr, folded, columns - head - first, group - first,
            lse, scaled - tl.log2(scale), scale, slope, uniform, softcap, logit_scale,
            x_stride_v, grad_stride_v, w_ptr, q_ptr, q_stride_v, q_scale, q_shift,
            HAS_SOFTCAP, HAS_SCALE, HAS_B, HAS_U, PADDED, True,
            CONTIGUOUS, GRAD_CONTIGUOUS, Q_CONTIGUOUS, GROUPS, WIDTH,
        )  # fmt: skip
    write_body(
        x_ptr, grad_ptr, length, columns - head - first, group - first, lse, scaled,
        scale, slope, uniform, softcap, logit_scale, x_stride_v, grad_stride_v,
        w_ptr, q_ptr, q_stride_v, q_scale, q_shift, HAS_SOFTCAP, HAS_SCALE, HAS_B, HAS_U, PADDED,
        False, CONTIGUOUS, GRAD_CONTIGUOUS, Q_CONTIGUOUS, GROUPS, WIDTH,
    )  # fmt: skip


@triton.jit(
    do_not_specialize=[  # so that another number of rows or of classes compiles nothing new
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
        "q_offset",
        "q_stride_outer",
        "q_stride_inner",
    ]
)
def token_grad_kernel(
    x_ptr,  # [rows, V] logits
    grad_ptr,  # [rows, V], may be x_ptr: each element is read and written by one program
    target_ptr,
    lse_ptr,
    logprob_ptr,
    lse_low_ptr,
    a_ptr,
    b_ptr,
    c_ptr,
    u_ptr,  # all [rows]; a, b, c, u are read only where HAS_* says so
    w_ptr,  # [V] or None
    q_ptr,  # [rows, V] or None
    columns_in_memory,  # V; the gradient of columns at or past vocab_size is 0
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
    q_offset,
    q_stride_outer,
    q_stride_inner,
    q_stride_v,
    q_scale: "fp64",
    q_shift: "fp64",
    softcap: "fp64",
    logit_scale: "fp64",
    HAS_SOFTCAP: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_A: tl.constexpr,
    HAS_B: tl.constexpr,
    HAS_C: tl.constexpr,
    HAS_U: tl.constexpr,
    PADDED: tl.constexpr,  # vocab_size < columns_in_memory
    CONTIGUOUS: tl.constexpr,
    GRAD_CONTIGUOUS: tl.constexpr,
    GRAD_ALIGNED: tl.constexpr,  # its rows start at the same place in 16 bytes as the logits'
    Q_CONTIGUOUS: tl.constexpr,
    Q_ALIGNED: tl.constexpr,
    SPAN: tl.constexpr,
    GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    row = tl.program_id(0)
    target = tl.load(target_ptr + row).to(tl.int64)
    scored = target != ignore_index
    x_start = row_start(row, x_offset, inner_rows, x_stride_outer, x_stride_inner)
    grad_start = row_start(row, grad_offset, inner_rows, grad_stride_outer, grad_stride_inner)
    DTYPE: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    softcap = tl.full([], softcap, DTYPE)
    logit_scale = tl.full([], logit_scale, DTYPE)
    q_scale = tl.full([], q_scale, DTYPE)
    q_shift = tl.full([], q_shift, DTYPE)
    columns = tl.where(scored, vocab_size, 0)  # an ignored row is not read
    head, body = row_window(x_start, columns_in_memory, WIDTH, CONTIGUOUS)
    target_column = tl.where((target >= 0) & (target < columns), target, -1).to(tl.int32)
    group = target_group(target_column, head, body, WIDTH)

    lse = tl.load(lse_ptr + row)
    a = tl.zeros([], DTYPE)
    b = tl.zeros([], DTYPE)
    c = tl.zeros([], DTYPE)
    u = tl.zeros([], DTYPE)
    if HAS_A:
        a += tl.load(a_ptr + row)
    if HAS_B:
        b += tl.load(b_ptr + row)
    if HAS_C:
        c += tl.load(c_ptr + row)
    if HAS_U:
        u += tl.load(u_ptr + row)
    lse_low, logprob = tl.load(lse_low_ptr + row), tl.load(logprob_ptr + row)
    scaled, scale, slope, at_target = row_numbers(lse, lse_low, logprob, a, b, c, HAS_B)

    first = tl.program_id(1) * SPAN
    x_body = x_ptr + body_start(x_start, head, x_stride_v, WIDTH, CONTIGUOUS)
    grad_body = grad_ptr + body_start(grad_start, head, grad_stride_v, WIDTH, GRAD_ALIGNED)
    # In the kernel, for up to Triton 3.6 a device function cannot return None.
    w_body, q_row, q_body = w_ptr, q_ptr, q_ptr
    if w_ptr is not None:
        w_body += head
    if q_ptr is not None:
        q_start = row_start(row, q_offset, inner_rows, q_stride_outer, q_stride_inner)
        q_row += q_start
        q_body += body_start(q_start, head, q_stride_v, WIDTH, Q_ALIGNED)
    write_span(
        x_body, grad_body, head, first, tl.minimum(body - first, SPAN), scored, columns, group,
        lse, scaled, scale, slope, u, softcap, logit_scale, x_stride_v, grad_stride_v,
        w_body, q_body, q_stride_v, q_scale, q_shift, HAS_SOFTCAP, HAS_SCALE, HAS_B, HAS_U,
        PADDED, CONTIGUOUS, GRAD_CONTIGUOUS, Q_CONTIGUOUS, GROUPS, WIDTH,
    )  # fmt: skip
    if tl.program_id(1) == 0:
        write_apart(
            x_ptr + x_start, grad_ptr + grad_start, head, body, columns_in_memory, columns, group,
            target_column, at_target, lse, scaled, scale, slope, u, softcap, logit_scale,
            x_stride_v, grad_stride_v, w_ptr, q_row, q_stride_v, q_scale, q_shift,
            HAS_SOFTCAP, HAS_SCALE, HAS_B, HAS_U, Q_CONTIGUOUS, WIDTH,
        )  # fmt: skip
