"""Binary cross-entropy of each logit with its label, and its gradient.

With softplus(z) = max(z, 0) + log(1 + exp(-|z|)), label y, weight w and positive weight v:

    loss = w [(1 - y) softplus(z) + v y softplus(-z)]
    dloss/dz = w [(1 - y) sigmoid(z) - v y sigmoid(-z)]

No term cancels for a label of 0 or 1. Labels given by index count as y = 0 here, and the sum of
losses leaves them out. They are few, so `ops/binary.py` adds their terms without a kernel.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .arguments import NOT_SPECIALIZED
from .online_softmax import log1p
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


class Tensors(NamedTuple):
    """One Row of each tensor, starting at column 0. Rows of absent tensors are not touched."""

    x: Any
    y: Any
    w: Any
    v: Any
    out: Any
    upstream: Any


class LeftOut(NamedTuple):
    """Labels of a row that are left out of the sum."""

    labels: Any  # [LABELS] ascending
    ptr: Any  # pointer to the first


@triton.jit
def label_terms(
    y, w, v, columns, first_column, valid, DTYPE: tl.constexpr, OPTIONS: tl.constexpr
):  # fmt: skip
    """Return (w (1 - y), w v y), 0 where not valid.

    y starts at column `first_column`, from which `columns` are counted; w and v at column 0.
    """
    row_columns = (first_column + columns).to(tl.int64)
    negative = tl.where(valid, 1.0, 0.0).to(DTYPE)
    positive = tl.zeros(columns.shape, DTYPE)
    if OPTIONS.HAS_Y:
        offsets = column_offsets(columns, y.stride_v, OPTIONS.Y_CONTIGUOUS)
        label = tl.load(y.ptr + offsets, mask=valid, other=0.0)
        positive = label.to(DTYPE)
        if label.dtype == tl.float64:  # near 1, 1 - y must be computed before rounding
            negative = tl.where(valid, 1.0 - label, 0.0).to(DTYPE)
        else:
            negative -= positive
    if OPTIONS.HAS_V:
        positive *= load_columns(v, row_columns, valid, OPTIONS.V_CONTIGUOUS, DTYPE)
    if OPTIONS.HAS_W:
        weight = load_columns(w, row_columns, valid, OPTIONS.W_CONTIGUOUS, DTYPE)
        negative *= weight
        positive *= weight
    return negative, positive


@triton.jit
def load_columns(row, columns, valid, CONTIGUOUS: tl.constexpr, DTYPE: tl.constexpr):
    """Return a row's numbers at `columns` (64 bits), or 0 where not valid."""
    offsets = column_offsets(columns, row.stride_v, CONTIGUOUS)
    return tl.load(row.ptr + offsets, mask=valid, other=0.0).to(DTYPE)


@triton.jit
def losses(z, negative, positive):
    """Return the loss of each logit. A NaN logit has loss NaN."""
    small = log1p(tl.exp(-tl.abs(z)))
    above, below = tl.maximum(z, 0.0), tl.maximum(-z, 0.0)
    # 0 times softplus(inf) would be NaN.
    loss = tl.where(negative == 0.0, 0.0, negative * (above + small))
    loss += tl.where(positive == 0.0, 0.0, positive * (below + small))
    return tl.where(z == z, loss, z)


@triton.jit
def slopes(z, negative, positive):
    """Return the derivative of each loss. A NaN logit has derivative NaN."""
    e = tl.exp(-tl.abs(z))
    larger = 1.0 / (1.0 + e)
    up = tl.where(z >= 0, larger, e * larger)
    down = tl.where(z >= 0, e * larger, larger)
    return tl.where(z == z, negative * up - positive * down, z)


@triton.jit
def write_values(
    z, y, out, columns, first_column, valid, row, OPTIONS: tl.constexpr
):  # fmt: skip
    """Return each logit's loss or gradient, and write it if HAS_OUT.

    y and out start at column `first_column`, from which `columns` are counted. row: Tensors.
    """
    negative, positive = label_terms(
        y, row.w, row.v, columns, first_column, valid, z.dtype, OPTIONS
    )
    if OPTIONS.GRADIENT:
        row_columns = (first_column + columns).to(tl.int64)
        CONTIGUOUS: tl.constexpr = OPTIONS.UPSTREAM_CONTIGUOUS
        upstream = load_columns(row.upstream, row_columns, valid, CONTIGUOUS, z.dtype)
        value = slopes(z, negative, positive) * upstream
    else:
        value = losses(z, negative, positive)
    if OPTIONS.HAS_OUT:
        address = out.ptr + column_offsets(columns, out.stride_v, OPTIONS.OUT_CONTIGUOUS)
        tl.store(address, value.to(out.ptr.dtype.element_ty), mask=valid)
    return value


@triton.jit
def exclude_labels(valid, columns, first, last, left_out):
    """Return `valid` with False at the labels in columns [first, last)."""
    labels = left_out.labels
    begin = tl.sum((labels < first).to(tl.int32))
    for k in range(begin, tl.sum((labels < last).to(tl.int32))):
        valid &= columns != tl.load(left_out.ptr + k)
    return valid


@triton.jit
def body_sum(x, y, out, length, first, left_out, row, DTYPE: tl.constexpr, TILE: tl.constexpr,
             OPTIONS: tl.constexpr):  # fmt: skip
    """Write `length` positions of a row's body, or return their sum.

    x, y and out start at the first position. It is column `first` of the row.
    """
    total = tl.full([TILE.GROUPS], 0.0, DTYPE)
    x_ptr = x.ptr
    tile = group_starts(TILE) + lane_ids(TILE.WIDTH)
    for i in range(0, length, TILE.GROUPS * TILE.WIDTH):
        valid = i + group_starts(TILE) < length
        valid = tl.broadcast_to(valid, [TILE.GROUPS, TILE.WIDTH])
        columns = tl.broadcast_to(i + tile, [TILE.GROUPS, TILE.WIDTH])
        offsets = column_offsets(tile, x.stride_v, OPTIONS.CONTIGUOUS)
        z = tl.load(x_ptr + offsets, mask=valid, other=0.0).to(DTYPE)
        x_ptr += advance(TILE.GROUPS * TILE.WIDTH, x.stride_v, OPTIONS.CONTIGUOUS)
        value = write_values(z, y, out, columns, first, valid, row, OPTIONS)
        if not OPTIONS.HAS_OUT:
            if OPTIONS.HAS_LEFT_OUT:
                begin = first + i
                end = begin + TILE.GROUPS * TILE.WIDTH
                valid = exclude_labels(valid, first + columns, begin, end, left_out)
            total += tl.sum(tl.where(valid, value, 0.0), 1)
    return tl.sum(total, 0)


@triton.jit
def edge_sum(window, classes, left_out, row, DTYPE: tl.constexpr, WIDTH: tl.constexpr,
             OPTIONS: tl.constexpr):  # fmt: skip
    """Write a row's edges, or return their sum."""
    edge, valid = edge_columns(window, classes, WIDTH)
    z = load_columns(row.x, edge.to(tl.int64), valid, OPTIONS.CONTIGUOUS, DTYPE)
    value = write_values(z, row.y, row.out, edge, 0, valid, row, OPTIONS)
    if OPTIONS.HAS_LEFT_OUT:
        valid = exclude_labels(valid, edge, 0, window.prefix, left_out)
        end = window.prefix + window.body
        valid = exclude_labels(valid, edge, end, classes, left_out)
    return tl.sum(tl.where(valid, value, 0.0))


@triton.jit
def load_left_out(label_ptr, row, labels_per_row, LABELS: tl.constexpr, OPTIONS: tl.constexpr):
    """Return the LeftOut of a row."""
    labels = tl.full([LABELS], 2147483647, tl.int32)
    label_ptr += tl.cast(row, tl.int64) * labels_per_row
    if OPTIONS.HAS_LEFT_OUT:
        k = tl.arange(0, LABELS)
        labels = tl.load(label_ptr + k, mask=k < labels_per_row, other=2147483647)
    return LeftOut(labels, label_ptr)


@triton.jit
def make_row(row, inner_rows, address):
    """Return the Row of a tensor that starts at column 0."""
    return Row(address.ptr + row_start(row, inner_rows, address), address.stride_v)


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def binary_kernel(
    x,  # Address of logits
    y,  # Address of labels
    w,  # Address of weights
    v,  # Address of weights of positive labels
    out,  # Address of each logit's value: its loss, or where GRADIENT its gradient
    upstream,  # Address, or [] with strides 0
    part_ptr,  # [rows, segments] sums of losses, written unless HAS_OUT
    label_ptr,  # [rows, K] labels to leave out of the sum, ascending
    labels_per_row,
    columns,
    segments,
    inner_rows,
    SEGMENT: tl.constexpr,
    LABELS: tl.constexpr,  # a power of two, at least labels_per_row
    TILE: tl.constexpr,
    OPTIONS: tl.constexpr,
):
    """Compute a segment of a row: write its values to `out`, or its sum to `part_ptr`."""
    number, segment = tl.program_id(0), tl.program_id(1)
    DTYPE: tl.constexpr = tl.float64 if x.ptr.dtype.element_ty == tl.float64 else tl.float32
    row = Tensors(
        make_row(number, inner_rows, x), make_row(number, inner_rows, y),
        make_row(number, inner_rows, w), make_row(number, inner_rows, v),
        make_row(number, inner_rows, out), make_row(number, inner_rows, upstream),
    )  # fmt: skip
    start = row_start(number, inner_rows, x)
    window = row_window(start, columns, -1, TILE.WIDTH, OPTIONS.CONTIGUOUS)
    prefix = window.prefix
    # Only the start of the body is known to be aligned. Tiles lie at multiples of WIDTH from it.
    x_body = body_row(x, start, prefix, TILE.WIDTH, OPTIONS.CONTIGUOUS, OPTIONS.CONTIGUOUS)
    y_start, out_start = row_start(number, inner_rows, y), row_start(number, inner_rows, out)
    y_body = body_row(y, y_start, prefix, TILE.WIDTH, OPTIONS.Y_CONTIGUOUS, OPTIONS.Y_ALIGNED)
    out_body = body_row(
        out, out_start, prefix, TILE.WIDTH, OPTIONS.OUT_CONTIGUOUS, OPTIONS.OUT_ALIGNED
    )
    left_out = load_left_out(label_ptr, number, labels_per_row, LABELS, OPTIONS)
    begin = segment * SEGMENT
    total = body_sum(
        move_row(x_body, begin, OPTIONS.CONTIGUOUS), move_row(y_body, begin, OPTIONS.Y_CONTIGUOUS),
        move_row(out_body, begin, OPTIONS.OUT_CONTIGUOUS), tl.minimum(window.body - begin, SEGMENT),
        prefix + begin, left_out, row, DTYPE, TILE, OPTIONS,
    )  # fmt: skip
    if segment == 0:
        total += edge_sum(window, columns, left_out, row, DTYPE, TILE.WIDTH, OPTIONS)
    if not OPTIONS.HAS_OUT:
        tl.store(part_ptr + tl.cast(number, tl.int64) * segments + segment, total)
