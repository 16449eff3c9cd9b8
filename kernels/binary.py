"""Binary cross-entropy of every logit with its label, and its gradient.

With softplus(z) = max(z, 0) + log(1 + exp(-|z|)), label y, weight w and positive weight v:

    loss = w [(1 - y) softplus(z) + v y softplus(-z)]
    dloss/dz = w [(1 - y) sigmoid(z) - v y sigmoid(-z)]

No term cancels for a label of 0 or 1. Labels given by index are no labels here: y = 0, and the loss
leaves them out; what they add is not worth a kernel.
"""

import triton
import triton.language as tl

from .streaming import (
    apart,
    at,
    body_start,
    group_starts,
    lanes,
    log1p,
    row_start,
    row_window,
    step,
)


@triton.jit
def label_terms(
    y_ptr, w_ptr, v_ptr, columns, first_column, valid, y_stride_v, w_stride_v, v_stride_v,
    Y_CONTIGUOUS: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """(w (1 - y), w v y), 0 where not valid.

    y_ptr is the label of column `first_column`; w_ptr and v_ptr are those of column 0.
    """
    row_columns = (first_column + columns).to(tl.int64)
    negative = tl.where(valid, 1.0, 0.0).to(DTYPE)
    positive = tl.zeros(columns.shape, DTYPE)
    if y_ptr is not None:
        y = tl.load(y_ptr + at(columns, y_stride_v, Y_CONTIGUOUS), mask=valid, other=0.0)
        positive = y.to(DTYPE)
        if y.dtype == tl.float64:  # near 1, whose difference is not that of the rounded
            negative = tl.where(valid, 1.0 - y, 0.0).to(DTYPE)
        else:
            negative -= positive
    if v_ptr is not None:
        v = tl.load(v_ptr + row_columns * v_stride_v, mask=valid, other=0.0).to(DTYPE)
        positive *= v
    if w_ptr is not None:
        w = tl.load(w_ptr + row_columns * w_stride_v, mask=valid, other=0.0).to(DTYPE)
        negative *= w
        positive *= w
    return negative, positive


@triton.jit
def losses(z, negative, positive):
    small = log1p(tl.exp(-tl.abs(z)))
    above, below = tl.maximum(z, 0.0), tl.maximum(-z, 0.0)
    # 0 softplus(inf) would be NaN.
    loss = tl.where(negative == 0.0, 0.0, negative * (above + small))
    loss += tl.where(positive == 0.0, 0.0, positive * (below + small))
    return tl.where(z == z, loss, z)


@triton.jit
def slopes(z, negative, positive):
    e = tl.exp(-tl.abs(z))
    larger = 1.0 / (1.0 + e)
    up = tl.where(z >= 0, larger, e * larger)
    down = tl.where(z >= 0, e * larger, larger)
    return tl.where(z == z, negative * up - positive * down, z)


@triton.jit
def without_labels(valid, columns, first, last, labels, label_ptr):
    """`valid`, but false at labels from column `first` to before `last`. labels: sorted."""
    for k in range(tl.sum((labels < first).to(tl.int32)), tl.sum((labels < last).to(tl.int32))):
        valid &= columns != tl.load(label_ptr + k)
    return valid


@triton.jit(
    do_not_specialize=[  # so that another number of rows or of classes compiles nothing new
        "classes",
        "segments",
        "inner_rows",
        "x_offset",
        "x_stride_outer",
        "x_stride_inner",
        "y_offset",
        "y_stride_outer",
        "y_stride_inner",
        "w_offset",
        "w_stride_outer",
        "w_stride_inner",
        "v_offset",
        "v_stride_outer",
        "v_stride_inner",
        "out_offset",
        "out_stride_outer",
        "out_stride_inner",
        "up_offset",
        "up_stride_outer",
        "up_stride_inner",
    ]
)
def binary_kernel(
    x_ptr,  # [rows, V] logits
    y_ptr,  # [rows, V] labels, or None: 0
    w_ptr,  # [rows, V] weights, or None: 1
    v_ptr,  # [rows, V] weights of positive labels, or None: 1
    out_ptr,  # [rows, V] of each logit: its loss, or where GRADIENT its gradient; None: parts
    part_ptr,  # [rows, segments] sums of losses
    upstream_ptr,  # where GRADIENT: [rows, V], or [] with strides 0
    label_ptr,  # [rows, K] labels to leave out of the sum, ascending; None: none
    labels_per_row,
    classes,
    segments,
    inner_rows,
    x_offset, x_stride_outer, x_stride_inner, x_stride_v,
    y_offset, y_stride_outer, y_stride_inner, y_stride_v,
    w_offset, w_stride_outer, w_stride_inner, w_stride_v,
    v_offset, v_stride_outer, v_stride_inner, v_stride_v,
    out_offset, out_stride_outer, out_stride_inner, out_stride_v,
    up_offset, up_stride_outer, up_stride_inner, up_stride_v,
    GRADIENT: tl.constexpr,
    CONTIGUOUS: tl.constexpr,
    Y_CONTIGUOUS: tl.constexpr,
    Y_ALIGNED: tl.constexpr,  # its rows start at the same place in a group as the logits'
    OUT_CONTIGUOUS: tl.constexpr,
    OUT_ALIGNED: tl.constexpr,
    SEGMENT: tl.constexpr,
    LABELS: tl.constexpr,  # a power of two, at least labels_per_row
    GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """A segment of a row."""
    row, segment = tl.program_id(0), tl.program_id(1)
    DTYPE: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    start = row_start(row, x_offset, inner_rows, x_stride_outer, x_stride_inner)
    head, body = row_window(start, classes, WIDTH, CONTIGUOUS)
    x_row = x_ptr + start
    # Aligned only as a whole: a tile's offset is a multiple of WIDTH from a body's start.
    x_body = x_ptr + body_start(start, head, x_stride_v, WIDTH, CONTIGUOUS)
    # In the kernel, for up to Triton 3.6 a device function cannot return None.
    y_row, y_body, w_row, v_row = y_ptr, y_ptr, w_ptr, v_ptr
    out_row, out_body, up_row = out_ptr, out_ptr, upstream_ptr
    if y_ptr is not None:
        y_start = row_start(row, y_offset, inner_rows, y_stride_outer, y_stride_inner)
        y_row += y_start
        y_body += body_start(y_start, head, y_stride_v, WIDTH, Y_ALIGNED)
    if w_ptr is not None:
        w_row += row_start(row, w_offset, inner_rows, w_stride_outer, w_stride_inner)
    if v_ptr is not None:
        v_row += row_start(row, v_offset, inner_rows, v_stride_outer, v_stride_inner)
    if out_ptr is not None:
        out_start = row_start(row, out_offset, inner_rows, out_stride_outer, out_stride_inner)
        out_row += out_start
        out_body += body_start(out_start, head, out_stride_v, WIDTH, OUT_ALIGNED)
    if upstream_ptr is not None:
        up_row += row_start(row, up_offset, inner_rows, up_stride_outer, up_stride_inner)
    labels = tl.full([LABELS], 2147483647, tl.int32)
    label_row = label_ptr
    if label_ptr is not None:
        k = tl.arange(0, LABELS)
        label_row += tl.cast(row, tl.int64) * labels_per_row
        labels = tl.load(label_row + k, mask=k < labels_per_row, other=2147483647)

    begin = segment * SEGMENT
    length = tl.minimum(body - begin, SEGMENT)
    total = tl.zeros([GROUPS], DTYPE)
    tile = group_starts(GROUPS, WIDTH) + lanes(WIDTH)
    x_body += at(begin, x_stride_v, CONTIGUOUS)
    for i in range(0, length, GROUPS * WIDTH):
        here = begin + i
        valid = tl.broadcast_to(i + group_starts(GROUPS, WIDTH) < length, [GROUPS, WIDTH])
        columns = tl.broadcast_to(here + tile, [GROUPS, WIDTH])
        z = tl.load(x_body + at(tile, x_stride_v, CONTIGUOUS), mask=valid, other=0.0).to(DTYPE)
        x_body += step(GROUPS * WIDTH, x_stride_v, CONTIGUOUS)
        negative, positive = label_terms(
            y_body, w_row, v_row, columns, head, valid, y_stride_v, w_stride_v, v_stride_v,
            Y_CONTIGUOUS, DTYPE,
        )  # fmt: skip
        if GRADIENT:
            up_columns = (head + columns).to(tl.int64)
            up = tl.load(up_row + up_columns * up_stride_v, mask=valid, other=0.0)
            value = slopes(z, negative, positive) * up.to(DTYPE)
        else:
            value = losses(z, negative, positive)
        if out_ptr is not None:
            tl.store(
                out_body + at(columns, out_stride_v, OUT_CONTIGUOUS),
                value.to(out_ptr.dtype.element_ty),
                mask=valid,
            )
        else:
            if label_ptr is not None:
                first = head + here
                valid = without_labels(
                    valid, head + columns, first, first + GROUPS * WIDTH, labels, label_row
                )
            total += tl.sum(tl.where(valid, value, 0.0), 1)
    sum_of_parts = tl.sum(total, 0)
    if segment == 0:
        edge, valid = apart(head, body, classes, -1, WIDTH)
        z = tl.load(x_row + edge.to(tl.int64) * x_stride_v, mask=valid, other=0.0).to(DTYPE)
        negative, positive = label_terms(
            y_row, w_row, v_row, edge, 0, valid, y_stride_v, w_stride_v, v_stride_v, Y_CONTIGUOUS,
            DTYPE,
        )  # fmt: skip
        if GRADIENT:
            up_columns = edge.to(tl.int64)
            up = tl.load(up_row + up_columns * up_stride_v, mask=valid, other=0.0).to(DTYPE)
            value = slopes(z, negative, positive) * up
        else:
            value = losses(z, negative, positive)
        if out_ptr is not None:
            tl.store(
                out_row + edge.to(tl.int64) * out_stride_v,
                value.to(out_ptr.dtype.element_ty),
                mask=valid,
            )
        else:
            if label_ptr is not None:
                valid = without_labels(valid, edge, 0, head, labels, label_row)
                valid = without_labels(valid, edge, head + body, classes, labels, label_row)
            sum_of_parts += tl.sum(tl.where(valid, value, 0.0))
    if out_ptr is None:
        tl.store(part_ptr + tl.cast(row, tl.int64) * segments + segment, sum_of_parts)
