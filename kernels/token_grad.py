"""Gradient of any function of the statistics of a row, from four numbers per row.

    dL/dz_j = p_j (a + b (z_j - lse)) + c ([j = target] - p_j) + u w_j [j != target]

with p_j = exp(z_j - lse) and w_j from `class_weights`. a and c are separate because
c (1 - p) = -c expm1(logprob) is accurate at the target when p is near 1.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .arguments import NOT_SPECIALIZED
from .online_softmax import (
    class_weights,
    head_derivative,
    head_transform,
    log2_e_like,
    minus_expm1,
    move_factors,
    row_factors,
    typed_head,
)
from .rows import (
    Row,
    advance,
    body_row,
    column_offsets,
    edge_columns,
    group_starts,
    lane_ids,
    move_row,
    row_start,
    row_window,
)


class Affine(NamedTuple):
    """The gradient p (scale + slope (z - lse)) + uniform w of a row's classes but the target."""

    lse: Any
    exponent: Any  # p = factor exp2(z log2 e - exponent); scale and slope include the factor
    scale: Any
    slope: Any
    uniform: Any


@triton.jit
def make_affine(lse, lse_low, logprob, a, b, c, u, OPTIONS: tl.constexpr):
    """Return (Affine of a row, gradient at its target)."""
    e = log2_e_like(lse)
    exponent = lse * e
    low = tl.fma(lse, e, -exponent) + lse_low * e
    factor = tl.exp2(-low)
    p_target = tl.exp(logprob)
    at_target = tl.where(p_target == 0.0, 0.0, p_target * (a + b * logprob))
    at_target += c * minus_expm1(logprob)
    scale = a - c
    if OPTIONS.HAS_B:
        scale -= b * lse_low  # corrects z - lse
    return Affine(lse, exponent, scale * factor, b * factor, u), at_target


@triton.jit
def gradient(x, affine, uniform, head, OPTIONS: tl.constexpr):
    """Return dL/dx at classes other than the target. uniform: u w."""
    z = head_transform(x, head, OPTIONS)
    p = tl.exp2(tl.fma(z, log2_e_like(z), -tl.broadcast_to(affine.exponent, z.shape)))
    grad = p * affine.scale
    if OPTIONS.HAS_B:
        grad = tl.where(p == 0.0, 0.0, p * (affine.scale + affine.slope * (z - affine.lse)))
    if OPTIONS.HAS_U:
        grad += uniform
    if OPTIONS.HAS_SOFTCAP or OPTIONS.HAS_SCALE:
        grad *= head_derivative(x, head, OPTIONS)
    return grad


@triton.jit
def weighted_gradient(x, columns, valid, affine, head, factors, OPTIONS: tl.constexpr):
    """Return dL/dx at columns other than the target's. `factors` start at column 0."""
    uniform = affine.uniform
    if OPTIONS.HAS_U and (OPTIONS.HAS_WEIGHT or OPTIONS.HAS_PROB):
        uniform *= class_weights(factors, columns, valid, x.dtype, OPTIONS)
    return gradient(x, affine, uniform, head, OPTIONS)


@triton.jit
def write_body(
    x, grad, length, read, group, affine, head, factors,
    FOLDED: tl.constexpr, TILE: tl.constexpr, OPTIONS: tl.constexpr,
):  # fmt: skip
    """Write `length` positions of a row's body, without the target's group.

    x, grad and factors start at the first position. PADDED: positions from `read` on are not read,
    and their gradient is 0. FOLDED: the exponent includes -log2 scale.
    """
    x_ptr, grad_ptr = x.ptr, grad.ptr
    tile = group_starts(TILE) + lane_ids(TILE.WIDTH)
    for i in range(0, length, TILE.GROUPS * TILE.WIDTH):
        groups = i + group_starts(TILE)
        position = groups + lane_ids(TILE.WIDTH)
        valid = tl.broadcast_to((groups < length) & (groups != group), [TILE.GROUPS, TILE.WIDTH])
        readable = valid & (position < read) if OPTIONS.PADDED else valid
        offsets = column_offsets(tile, x.stride_v, OPTIONS.CONTIGUOUS)
        logits = tl.load(x_ptr + offsets, mask=readable, other=0.0)
        if FOLDED:
            z = logits.to(tl.float32)
            exponent = tl.broadcast_to(affine.exponent, z.shape)
            value = tl.exp2(tl.fma(z, log2_e_like(z), -exponent))
        else:
            z = logits.to(affine.lse.dtype)
            value = weighted_gradient(z, i + tile, readable, affine, head, factors, OPTIONS)
        if OPTIONS.PADDED:
            value = tl.where(readable, value, 0.0)
        offsets = column_offsets(tile, grad.stride_v, OPTIONS.GRAD_CONTIGUOUS)
        tl.store(grad_ptr + offsets, value.to(grad_ptr.dtype.element_ty), mask=valid)
        x_ptr += advance(TILE.GROUPS * TILE.WIDTH, x.stride_v, OPTIONS.CONTIGUOUS)
        grad_ptr += advance(TILE.GROUPS * TILE.WIDTH, grad.stride_v, OPTIONS.GRAD_CONTIGUOUS)


@triton.jit
def write_zeros(grad, length, CONTIGUOUS: tl.constexpr, TILE: tl.constexpr):
    """Write 0 to `length` positions of the body of an ignored row."""
    grad_ptr = grad.ptr
    tile = group_starts(TILE) + lane_ids(TILE.WIDTH)
    for i in range(0, length, TILE.GROUPS * TILE.WIDTH):
        valid = tl.broadcast_to(i + group_starts(TILE) < length, [TILE.GROUPS, TILE.WIDTH])
        zeros = tl.full([TILE.GROUPS, TILE.WIDTH], 0.0, grad_ptr.dtype.element_ty)
        tl.store(grad_ptr + column_offsets(tile, grad.stride_v, CONTIGUOUS), zeros, mask=valid)
        grad_ptr += advance(TILE.GROUPS * TILE.WIDTH, grad.stride_v, CONTIGUOUS)


@triton.jit
def write_edges(
    x, grad, window, columns_in_memory, columns, target_column, at_target, affine, head, factors,
    WIDTH: tl.constexpr, OPTIONS: tl.constexpr,
):  # fmt: skip
    """Write a row's edges. x, grad and factors start at column 0."""
    edge, valid = edge_columns(window, columns_in_memory, WIDTH)
    readable = valid & (edge < columns)
    offsets = column_offsets(edge, x.stride_v, OPTIONS.CONTIGUOUS)
    logits = tl.load(x.ptr + offsets, mask=readable, other=0.0).to(affine.lse.dtype)
    value = weighted_gradient(logits, edge, readable, affine, head, factors, OPTIONS)
    at_target *= head_derivative(logits, head, OPTIONS)
    value = tl.where(edge == target_column, at_target, value)
    value = tl.where(readable, value, 0.0)
    address = grad.ptr + column_offsets(edge, grad.stride_v, OPTIONS.GRAD_CONTIGUOUS)
    tl.store(address, value.to(grad.ptr.dtype.element_ty), mask=valid)


@triton.jit
def write_span(
    x, grad, length, read, group, scored, affine, head, factors,
    TILE: tl.constexpr, OPTIONS: tl.constexpr,
):  # fmt: skip
    """Write `length` positions of a row's body with the loop that suits the row."""
    write_zeros(grad, tl.where(scored, 0, length), OPTIONS.GRAD_CONTIGUOUS, TILE)
    length = tl.where(scored, length, 0)
    TRANSFORMED: tl.constexpr = OPTIONS.HAS_SOFTCAP or OPTIONS.HAS_SCALE or OPTIONS.PADDED
    PLAIN: tl.constexpr = not (TRANSFORMED or OPTIONS.HAS_B or OPTIONS.HAS_U)
    if PLAIN and x.ptr.dtype.element_ty.primitive_bitwidth == 16:
        # Folding a positive scale into the exponent saves an instruction per logit. The sum is
        # rounded to fp32. Below 2^8 the error is 2^-17, a 60th of the rounding of float16.
        small = tl.abs(affine.exponent) < 256.0
        folded = tl.where((affine.scale > 0.0) & small, length, 0)
        length -= folded
        exponent = affine.exponent - tl.log2(affine.scale)
        shifted = Affine(affine.lse, exponent, affine.scale, affine.slope, affine.uniform)
        write_body(x, grad, folded, read, group, shifted, head, factors, True, TILE, OPTIONS)
    write_body(x, grad, length, read, group, affine, head, factors, False, TILE, OPTIONS)


@triton.jit
def load_numbers(coefficients, row, DTYPE: tl.constexpr, OPTIONS: tl.constexpr):
    """Return a, b, c, u of a row; 0 where one is absent."""
    a = tl.zeros([], DTYPE)
    b = tl.zeros([], DTYPE)
    c = tl.zeros([], DTYPE)
    u = tl.zeros([], DTYPE)
    if OPTIONS.HAS_A:
        a += tl.load(coefficients.a + row)
    if OPTIONS.HAS_B:
        b += tl.load(coefficients.b + row)
    if OPTIONS.HAS_C:
        c += tl.load(coefficients.c + row)
    if OPTIONS.HAS_U:
        u += tl.load(coefficients.u + row)
    return a, b, c, u


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def token_grad_kernel(
    x,  # Address of logits
    grad,  # Address, may be that of x: one program reads and writes each element
    target_ptr,  # [rows] integers
    saved,  # Saved
    coefficients,  # Coefficients
    weights,  # Weights: w (prob_scale prob + prob_shift)
    inner_rows,
    columns_in_memory,  # V; the gradient of columns at or past vocab_size is 0
    vocab_size, ignore_index,
    prob_scale: "fp64", prob_shift: "fp64", softcap: "fp64", logit_scale: "fp64",
    SPAN: tl.constexpr, TILE: tl.constexpr, OPTIONS: tl.constexpr,
):  # fmt: skip
    """Write SPAN columns of a row's body. The first program of a row also writes its edges."""
    row = tl.program_id(0)
    target = tl.load(target_ptr + row).to(tl.int64)
    scored = target != ignore_index
    columns = tl.where(scored, vocab_size, 0)  # an ignored row is not read
    DTYPE: tl.constexpr = tl.float64 if x.ptr.dtype.element_ty == tl.float64 else tl.float32
    head = typed_head(softcap, logit_scale, DTYPE)
    x_start, grad_start = row_start(row, inner_rows, x), row_start(row, inner_rows, grad)
    column = tl.where((target >= 0) & (target < columns), target, -1).to(tl.int32)
    window = row_window(x_start, columns_in_memory, column, TILE.WIDTH, OPTIONS.CONTIGUOUS)
    prefix = window.prefix
    lse, lse_low = tl.load(saved.lse + row), tl.load(saved.lse_low + row)
    a, b, c, u = load_numbers(coefficients, row, DTYPE, OPTIONS)
    logprob = tl.load(saved.logprob + row)
    affine, at_target = make_affine(lse, lse_low, logprob, a, b, c, u, OPTIONS)
    x_body = body_row(x, x_start, prefix, TILE.WIDTH, OPTIONS.CONTIGUOUS, OPTIONS.CONTIGUOUS)
    grad_body = body_row(
        grad, grad_start, prefix, TILE.WIDTH, OPTIONS.GRAD_CONTIGUOUS, OPTIONS.GRAD_ALIGNED
    )
    scale, shift = tl.full([], prob_scale, DTYPE), tl.full([], prob_shift, DTYPE)
    factors, body_factors = row_factors(
        weights, row, inner_rows, prefix, scale, shift, TILE.WIDTH, OPTIONS
    )
    first = tl.program_id(1) * SPAN
    write_span(
        move_row(x_body, first, OPTIONS.CONTIGUOUS),
        move_row(grad_body, first, OPTIONS.GRAD_CONTIGUOUS),
        tl.minimum(window.body - first, SPAN), columns - prefix - first, window.group - first,
        scored, affine, head, move_factors(body_factors, first, OPTIONS), TILE, OPTIONS,
    )  # fmt: skip
    if first == 0:
        write_edges(
            Row(x.ptr + x_start, x.stride_v), Row(grad.ptr + grad_start, grad.stride_v), window,
            columns_in_memory, columns, column, at_target, affine, head, factors,
            TILE.WIDTH, OPTIONS,
        )  # fmt: skip
