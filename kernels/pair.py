"""Divergence of two rows of logits, a student's and a teacher's: statistics and gradient.

Two visits of both rows: the first brings each row's softmax, by running sums; the second the
divergence (`divergence.py`). The gradient is a kernel of its own, from the numbers of the first.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .arguments import NOT_SPECIALIZED
from .divergence import JSD, PairRow, Shares, bases, class_slopes, class_terms, probabilities
from .online_softmax import LOG2_E, empty_sums
from .rows import (
    Row,
    body_row,
    column_offsets,
    edge_columns,
    group_starts,
    lane_ids,
    move_row,
    row_start,
    row_window,
)


class PairNumbers(NamedTuple):
    """Pointers to what the statistics of pairs leave, all [rows]."""

    loss: Any
    student_kl: Any
    max: Any
    log_sum: Any
    teacher_max: Any
    teacher_log_sum: Any
    shift: Any


class RunningSum(NamedTuple):
    """m, the largest logit that was met, and s = sum exp((z - m) / temperature)."""

    m: Any
    s: Any


@triton.jit
def add_exponentials(sum, z, scale):
    """Add a tile z [G, W] to each group's sum [G]. scale: log2 e / temperature."""
    m = tl.maximum(sum.m, tl.max(z, 1))
    e = tl.exp2((z - tl.broadcast_to(m[:, None], z.shape)) * scale)
    return RunningSum(m, sum.s * tl.exp2((sum.m - m) * scale) + tl.sum(e, 1))


@triton.jit
def fold_groups(a, b, scale):
    """Return the sum over the groups of a [G] and of b [H] as one."""
    m = tl.maximum(tl.max(a.m, 0), tl.max(b.m, 0))
    s = tl.sum(a.s * tl.exp2((a.m - m) * scale), 0) + tl.sum(b.s * tl.exp2((b.m - m) * scale), 0)
    return RunningSum(m, s)


@triton.jit
def no_sum(N: tl.constexpr, DTYPE: tl.constexpr):
    """Return the RunningSum [N] of no logits."""
    empty = empty_sums(N, DTYPE)
    return RunningSum(empty.m, empty.s)


@triton.jit
def mixture_shares(beta, DTYPE: tl.constexpr):
    """Return the Shares; beta in float64."""
    return Shares(tl.full([], beta, DTYPE), tl.full([], 1.0 - beta, DTYPE))


@triton.jit
def load_logits(row, columns, valid, CONTIGUOUS: tl.constexpr, DTYPE: tl.constexpr):
    """Return logits at 32-bit columns; -inf where not valid."""
    offsets = column_offsets(columns, row.stride_v, CONTIGUOUS)
    return tl.load(row.ptr + offsets, mask=valid, other=float("-inf")).to(DTYPE)


@triton.jit
def load_pair(x, y, columns, valid, DTYPE: tl.constexpr, OPTIONS: tl.constexpr):
    """Return the logits of both rows."""
    z = load_logits(x, columns, valid, OPTIONS.CONTIGUOUS, DTYPE)
    return z, load_logits(y, columns, valid, OPTIONS.Y_CONTIGUOUS, DTYPE)


@triton.jit
def pair_bodies(x, y, x_start, y_start, prefix, TILE: tl.constexpr, OPTIONS: tl.constexpr):
    """Return the Row of each row's body."""
    x_body = body_row(x, x_start, prefix, TILE.WIDTH, OPTIONS.CONTIGUOUS, OPTIONS.CONTIGUOUS)
    y_body = body_row(y, y_start, prefix, TILE.WIDTH, OPTIONS.Y_CONTIGUOUS, OPTIONS.Y_ALIGNED)
    return x_body, y_body


@triton.jit
def tile_at(i, length, TILE: tl.constexpr):
    """Return the positions of a tile from `i` on, and which are before `length`."""
    columns = i + group_starts(TILE) + lane_ids(TILE.WIDTH)
    valid = tl.broadcast_to(i + group_starts(TILE) < length, [TILE.GROUPS, TILE.WIDTH])
    return columns, valid


@triton.jit
def pair_sums(x, y, x_body, y_body, window, classes, scale, DTYPE: tl.constexpr,
              TILE: tl.constexpr, OPTIONS: tl.constexpr):  # fmt: skip
    """Return the RunningSum of each of the two rows."""
    student = no_sum(TILE.GROUPS, DTYPE)
    teacher = no_sum(TILE.GROUPS, DTYPE)
    for i in range(0, window.body, TILE.GROUPS * TILE.WIDTH):
        columns, valid = tile_at(i, window.body, TILE)
        z, t = load_pair(x_body, y_body, columns, valid, DTYPE, OPTIONS)
        student, teacher = add_exponentials(student, z, scale), add_exponentials(teacher, t, scale)
    edge, valid = edge_columns(window, classes, TILE.WIDTH)
    z, t = load_pair(x, y, edge, valid, DTYPE, OPTIONS)
    z_edge = add_exponentials(no_sum(4, DTYPE), z, scale)
    t_edge = add_exponentials(no_sum(4, DTYPE), t, scale)
    return fold_groups(student, z_edge, scale), fold_groups(teacher, t_edge, scale)


@triton.jit
def pair_divergence(x, y, x_body, y_body, window, classes, row, inverse, shares,
                    DTYPE: tl.constexpr, TILE: tl.constexpr, OPTIONS: tl.constexpr):  # fmt: skip
    """Return the loss and `student_kl`."""
    loss = tl.full([TILE.GROUPS], 0.0, DTYPE)
    student_kl = tl.full([TILE.GROUPS], 0.0, DTYPE)
    for i in range(0, window.body, TILE.GROUPS * TILE.WIDTH):
        columns, valid = tile_at(i, window.body, TILE)
        z, t = load_pair(x_body, y_body, columns, valid, DTYPE, OPTIONS)
        terms = class_terms(probabilities(z, t, row, inverse), shares, OPTIONS.KIND)
        loss += tl.sum(terms[0], 1)
        student_kl += tl.sum(terms[1], 1)
    edge, valid = edge_columns(window, classes, TILE.WIDTH)
    z, t = load_pair(x, y, edge, valid, DTYPE, OPTIONS)
    terms = class_terms(probabilities(z, t, row, inverse), shares, OPTIONS.KIND)
    loss, student_kl = tl.sum(loss) + tl.sum(terms[0]), tl.sum(student_kl) + tl.sum(terms[1])
    if OPTIONS.KIND == JSD:
        loss = shares.teacher * loss + shares.student * student_kl
    return loss, student_kl


@triton.jit
def load_row(numbers, number):
    """Return the PairRow of a pair of rows."""
    return PairRow(
        tl.load(numbers.max + number), tl.load(numbers.log_sum + number),
        tl.load(numbers.teacher_max + number), tl.load(numbers.teacher_log_sum + number),
        tl.load(numbers.shift + number), tl.load(numbers.student_kl + number),
    )  # fmt: skip


@triton.jit
def row_of_sums(student, teacher, inverse):
    """Return the PairRow of two RunningSums, without its `student_kl`."""
    base, teacher_base = bases(student.m, teacher.m)
    above = (teacher.m - teacher_base) - (student.m - base)
    shift = above * inverse + tl.log(teacher.s / student.s)
    return PairRow(student.m, tl.log(student.s), teacher.m, tl.log(teacher.s), shift, shift)


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def pair_stats_kernel(
    x,  # Address of the student's logits
    y,  # Address of the teacher's
    ignored_ptr,  # [rows] booleans, read where HAS_IGNORED
    numbers,  # PairNumbers, written; and read where HAS_NORMS
    inner_rows,
    vocab_size,
    temperature: "fp64",
    beta: "fp64",
    TILE: tl.constexpr,
    OPTIONS: tl.constexpr,
):
    """Write the numbers of a pair of rows; 0 of one that is ignored.

    With HAS_NORMS, all but the loss and `student_kl` stays as it was.
    """
    number = tl.program_id(0)
    DTYPE: tl.constexpr = tl.float64 if x.ptr.dtype.element_ty == tl.float64 else tl.float32
    inverse, shares = tl.full([], 1.0 / temperature, DTYPE), mixture_shares(beta, DTYPE)
    scored = True
    if OPTIONS.HAS_IGNORED:
        scored = tl.load(ignored_ptr + number) == 0
    classes = tl.where(scored, vocab_size, 0)
    x_start, y_start = row_start(number, inner_rows, x), row_start(number, inner_rows, y)
    window = row_window(x_start, classes, -1, TILE.WIDTH, OPTIONS.CONTIGUOUS)
    x_row, y_row = Row(x.ptr + x_start, x.stride_v), Row(y.ptr + y_start, y.stride_v)
    prefix = window.prefix
    x_body, y_body = pair_bodies(x, y, x_start, y_start, prefix, TILE, OPTIONS)
    if OPTIONS.HAS_NORMS:
        row = load_row(numbers, number)
    else:
        student, teacher = pair_sums(
            x_row, y_row, x_body, y_body, window, classes, inverse * LOG2_E, DTYPE, TILE, OPTIONS
        )
        row = row_of_sums(student, teacher, inverse)
    loss, student_kl = pair_divergence(
        x_row, y_row, x_body, y_body, window, classes, row, inverse, shares, DTYPE, TILE, OPTIONS
    )
    tl.store(numbers.loss + number, tl.where(scored, loss, 0.0))
    tl.store(numbers.student_kl + number, tl.where(scored, student_kl, 0.0))
    tl.store(numbers.max + number, tl.where(scored, row.max, 0.0))
    tl.store(numbers.log_sum + number, tl.where(scored, row.log_sum, 0.0))
    tl.store(numbers.teacher_max + number, tl.where(scored, row.teacher_max, 0.0))
    tl.store(numbers.teacher_log_sum + number, tl.where(scored, row.teacher_log_sum, 0.0))
    tl.store(numbers.shift + number, tl.where(scored, row.shift, 0.0))


@triton.jit
def write_slopes(x, y, grad, columns, valid, readable, row, weight, inverse, shares,
                 DTYPE: tl.constexpr, OPTIONS: tl.constexpr):  # fmt: skip
    """Write the gradient at columns of x, y and grad; 0 where not readable."""
    z, t = load_pair(x, y, columns, readable, DTYPE, OPTIONS)
    at = probabilities(z, t, row, inverse)
    value = class_slopes(at, row.student_kl, shares, OPTIONS.KIND) * weight
    value = tl.where(readable, value, 0.0)
    address = grad.ptr + column_offsets(columns, grad.stride_v, OPTIONS.GRAD_CONTIGUOUS)
    tl.store(address, value.to(grad.ptr.dtype.element_ty), mask=valid)


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def pair_grad_kernel(
    x,  # Address of the student's logits
    y,  # Address of the teacher's
    grad,  # Address, may be x: each element is read and written by one program
    ignored_ptr,  # [rows] booleans, read where HAS_IGNORED
    numbers,  # PairNumbers
    upstream_ptr,  # [rows]
    inner_rows,
    columns_in_memory,  # V; the gradient of columns at or past vocab_size is 0
    vocab_size,
    temperature: "fp64",
    beta: "fp64",
    SPAN: tl.constexpr,
    TILE: tl.constexpr,
    OPTIONS: tl.constexpr,
):
    """Write SPAN columns of a row's body; the first program of a row its edges too."""
    number = tl.program_id(0)
    DTYPE: tl.constexpr = tl.float64 if x.ptr.dtype.element_ty == tl.float64 else tl.float32
    inverse, shares = tl.full([], 1.0 / temperature, DTYPE), mixture_shares(beta, DTYPE)
    classes = vocab_size
    if OPTIONS.HAS_IGNORED:  # an ignored row is not read
        classes = tl.where(tl.load(ignored_ptr + number) == 0, vocab_size, 0)
    row, weight = load_row(numbers, number), tl.load(upstream_ptr + number) * inverse
    x_start, y_start = row_start(number, inner_rows, x), row_start(number, inner_rows, y)
    out_start = row_start(number, inner_rows, grad)
    window = row_window(x_start, columns_in_memory, -1, TILE.WIDTH, OPTIONS.CONTIGUOUS)
    prefix = window.prefix
    x_body, y_body = pair_bodies(x, y, x_start, y_start, prefix, TILE, OPTIONS)
    out_body = body_row(
        grad, out_start, prefix, TILE.WIDTH, OPTIONS.GRAD_CONTIGUOUS, OPTIONS.GRAD_ALIGNED
    )
    first = tl.program_id(1) * SPAN
    x_body = move_row(x_body, first, OPTIONS.CONTIGUOUS)
    y_body = move_row(y_body, first, OPTIONS.Y_CONTIGUOUS)
    out_body = move_row(out_body, first, OPTIONS.GRAD_CONTIGUOUS)
    length = tl.minimum(window.body - first, SPAN)
    for i in range(0, length, TILE.GROUPS * TILE.WIDTH):
        columns, valid = tile_at(i, length, TILE)
        readable = tile_at(i, tl.minimum(length, classes), TILE)[1]
        if OPTIONS.PADDED:  # a mask that differs within a group makes loads of 2 bytes, not of 16
            readable = valid & (columns < classes - prefix - first)
        write_slopes(x_body, y_body, out_body, columns, valid, readable, row, weight, inverse,
                     shares, DTYPE, OPTIONS)  # fmt: skip
    if first == 0:
        edge, valid = edge_columns(window, columns_in_memory, TILE.WIDTH)
        x_row, y_row = Row(x.ptr + x_start, x.stride_v), Row(y.ptr + y_start, y.stride_v)
        write_slopes(x_row, y_row, Row(grad.ptr + out_start, grad.stride_v), edge, valid,
                     valid & (edge < classes), row, weight, inverse, shares, DTYPE,
                     OPTIONS)  # fmt: skip
