"""Statistics of rows in one read of the logits.

They are lse and logprob, and on request entropy, mean_logprob, rank and argmax.

A row is summed in segments of SEGMENT columns. `merge_parts` merges their sums in ascending order.
So no result depends on the number of segments per program. Only logit_sum includes the target.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .arguments import NOT_SPECIALIZED
from .online_softmax import (
    add_exponentials,
    class_weights,
    empty_sums,
    fold_sums,
    head_transform,
    merge,
    move_factors,
    row_factors,
    typed_head,
)
from .rows import (
    Row,
    advance,
    body_row,
    column_offsets,
    decode,
    edge_columns,
    group_starts,
    lane_ids,
    move_row,
    row_start,
    row_window,
)

MAX_INT = tl.constexpr(2147483647)


class Target(NamedTuple):
    """The target of a row."""

    column: Any  # -1 if it is not among the columns that are read
    logit: Any
    origin: Any  # subtracted from logits before they are summed, so a large common offset cancels


class Extra(NamedTuple):
    """Sums for the statistics other than lse, logprob and entropy."""

    logit_sum: Any  # sum w (z - origin)
    weight_sum: Any  # sum w of all classes but the target
    num_better: Any  # number of classes that beat the target
    best_value: Any
    best_class: Any


@triton.jit
def target_logit(row, target, valid, head, OPTIONS: tl.constexpr):
    """Return the target's logit, or NaN if it is +inf (as in torch) or not valid."""
    DTYPE: tl.constexpr = tl.float64 if row.ptr.dtype.element_ty == tl.float64 else tl.float32
    address = row.ptr + target * decode(row.stride_v)
    x = tl.load(address, mask=valid, other=float("nan")).to(DTYPE)
    z = head_transform(x, head, OPTIONS)
    return tl.where(z == float("inf"), float("nan"), z)


@triton.jit
def read_target(row, target, columns, head, OPTIONS: tl.constexpr):
    """Return the Target of a row that has `columns` classes."""
    inside = (target >= 0) & (target < columns)
    z = target_logit(row, target, inside, head, OPTIONS)
    column = tl.where(inside, target, -1).to(tl.int32)
    return Target(column, z, tl.where(z == float("-inf"), 0.0, z))


@triton.jit
def empty_extra(N: tl.constexpr, DTYPE: tl.constexpr):
    """Return the Extra [N] over no logits."""
    return Extra(
        tl.zeros([N], DTYPE),
        tl.zeros([N], DTYPE),
        tl.zeros([N], tl.int32),
        tl.full([N], float("-inf"), DTYPE),
        tl.full([N], MAX_INT, tl.int32),
    )


@triton.jit
def add_logits(extra, z, columns, valid, target, factors, OPTIONS: tl.constexpr):
    """Add w (z - origin) and w to each group's sums [G]. `factors` start at column 0."""
    logit_sum, weight_sum = extra.logit_sum, extra.weight_sum
    if OPTIONS.HAS_WEIGHT or OPTIONS.HAS_PROB:
        w = class_weights(factors, columns, valid, z.dtype, OPTIONS)
        logit_sum += tl.sum(tl.where(w == 0.0, 0.0, w * (z - target.origin)), 1)
        weight_sum += tl.sum(tl.where(columns == target.column, 0.0, w), 1)
    else:
        logit_sum += tl.sum(tl.where(valid, z - target.origin, 0.0), 1)
    return Extra(logit_sum, weight_sum, extra.num_better, extra.best_value, extra.best_class)


@triton.jit
def add_ranks(extra, z, columns, valid, target, OPTIONS: tl.constexpr):
    """Count the classes that beat the target, and keep the best class of each group [G]."""
    num_better, best_value, best_class = extra.num_better, extra.best_value, extra.best_class
    if OPTIONS.RANK:
        wins = (z > target.logit) | (z != z) | ((z == target.logit) & (columns < target.column))
        num_better += tl.sum((wins & valid & (columns != target.column)).to(tl.int32), 1)
    if OPTIONS.ARGMAX:
        value = tl.where(z != z, float("inf"), z)
        top = tl.max(value, 1)
        column = tl.min(tl.where((value == top[:, None]) & valid, columns, MAX_INT), 1)
        best_class = tl.where((top > best_value) | (best_class == MAX_INT), column, best_class)
        best_value = tl.maximum(best_value, top)
    return Extra(extra.logit_sum, extra.weight_sum, num_better, best_value, best_class)


@triton.jit
def pick_better(value, column, other_value, other_column):
    """Return the larger value and its class. The lower class wins a tie."""
    wins = (other_value > value) | ((other_value == value) & (other_column < column))
    return tl.maximum(value, other_value), tl.where(wins, other_column, column)


@triton.jit
def merge_extra(a, b):
    """Return the Extra over both parts of a row."""
    value, column = pick_better(a.best_value, a.best_class, b.best_value, b.best_class)
    logit_sum, weight_sum = a.logit_sum + b.logit_sum, a.weight_sum + b.weight_sum
    return Extra(logit_sum, weight_sum, a.num_better + b.num_better, value, column)


@triton.jit
def fold_extra(extra):
    """Return one Extra over all groups [G]."""
    value = tl.max(extra.best_value, 0)
    column = tl.min(tl.where(extra.best_value == value, extra.best_class, MAX_INT), 0)
    logit_sum, weight_sum = tl.sum(extra.logit_sum, 0), tl.sum(extra.weight_sum, 0)
    return Extra(logit_sum, weight_sum, tl.sum(extra.num_better, 0), value, column)


@triton.jit
def sum_body(
    row, length, first_column, group, target, head, factors,
    PADDED: tl.constexpr, TILE: tl.constexpr, OPTIONS: tl.constexpr,
):  # fmt: skip
    """Return (Sums, Extra) of `length` positions of a row's body, without the target's group.

    row and factors start at the first position. PADDED: `length` may end inside a group.
    """
    x_ptr = row.ptr
    sums = empty_sums(TILE.GROUPS, target.origin.dtype)
    extra = empty_extra(TILE.GROUPS, target.origin.dtype)
    no_target = Target(tl.full([], -1, tl.int32), target.logit, target.origin)
    tile = group_starts(TILE) + lane_ids(TILE.WIDTH)
    for i in range(0, length, TILE.GROUPS * TILE.WIDTH):
        groups = i + group_starts(TILE)
        valid = tl.broadcast_to((groups < length) & (groups != group), [TILE.GROUPS, TILE.WIDTH])
        if PADDED:
            valid &= i + tile < length
        offsets = column_offsets(tile, row.stride_v, OPTIONS.CONTIGUOUS)
        x = tl.load(x_ptr + offsets, mask=valid, other=float("-inf"))
        # An offset from the loop counter would make it and its comparisons 64 bits wide.
        x_ptr += advance(TILE.GROUPS * TILE.WIDTH, row.stride_v, OPTIONS.CONTIGUOUS)
        z = x.to(target.origin.dtype)
        if OPTIONS.HAS_SOFTCAP or OPTIONS.HAS_SCALE:
            # Mask after the transform, because softcap makes -inf finite.
            z = tl.where(valid, head_transform(z, head, OPTIONS), float("-inf"))
        if OPTIONS.MEAN_LOGPROB:
            extra = add_logits(extra, z, i + tile, valid, no_target, factors, OPTIONS)
        extra = add_ranks(extra, z, first_column + i + tile, valid, target, OPTIONS)
        sums = add_exponentials(sums, z, OPTIONS.ENTROPY)
    return fold_sums(sums), fold_extra(extra)


@triton.jit
def sum_edges(row, window, columns, target, head, factors, WIDTH: tl.constexpr,
              OPTIONS: tl.constexpr):  # fmt: skip
    """Return (Sums, Extra) of a row's edges. row and factors start at column 0."""
    edge, valid = edge_columns(window, columns, WIDTH)
    valid &= edge < columns
    offsets = column_offsets(edge, row.stride_v, OPTIONS.CONTIGUOUS)
    x = tl.load(row.ptr + offsets, mask=valid, other=0.0).to(target.origin.dtype)
    z = head_transform(x, head, OPTIONS)
    extra = empty_extra(4, target.origin.dtype)
    if OPTIONS.MEAN_LOGPROB:
        extra = add_logits(extra, z, edge, valid, target, factors, OPTIONS)
    valid &= edge != target.column
    z = tl.where(valid, z, float("-inf"))
    extra = add_ranks(extra, z, edge, valid, target, OPTIONS)
    sums = add_exponentials(empty_sums(4, target.origin.dtype), z, OPTIONS.ENTROPY)
    return fold_sums(sums), fold_extra(extra)


@triton.jit
def shard_origin(row, target, scored, head, OPTIONS: tl.constexpr):
    """Return the Target. If it lies in another shard, its origin is the first class's logit."""
    first = tl.load(row.ptr, mask=scored, other=0.0).to(target.origin.dtype)
    first = head_transform(first, head, OPTIONS)
    first = tl.where(tl.abs(first) < float("inf"), first, 0.0)
    origin = tl.where(target.origin == target.origin, target.origin, first)
    return Target(target.column, target.logit, origin)


@triton.jit
def store_part(parts, part, field, sums, extra, OPTIONS: tl.constexpr):
    """Store a segment's sums. `field` is the distance between one sum and the next."""
    floats = parts.floats_ptr + part
    tl.store(floats, sums.m)
    tl.store(floats + field, sums.s)
    if OPTIONS.ENTROPY:
        tl.store(floats + 2 * field, sums.ez_sum)
    if OPTIONS.MEAN_LOGPROB:
        tl.store(floats + 3 * field, extra.logit_sum)
    if OPTIONS.RANK:
        tl.store(parts.integers_ptr + part, extra.num_better)
    if OPTIONS.ARGMAX:
        tl.store(floats + 4 * field, extra.best_value)
        tl.store(parts.integers_ptr + field + part, extra.best_class)
    if OPTIONS.MEAN_LOGPROB and (OPTIONS.HAS_WEIGHT or OPTIONS.HAS_PROB):
        tl.store(floats + 5 * field, extra.weight_sum)


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def token_stats_kernel(
    x,  # Address of logits
    target_ptr,  # [rows] integers
    weights,  # Weights, of mean_logprob: w (prob_scale prob + prob_shift)
    parts,  # Parts, written
    rows, segments, segments_per_program, inner_rows, vocab_size, ignore_index,
    prob_scale: "fp64", prob_shift: "fp64", softcap: "fp64", logit_scale: "fp64",
    SEGMENT: tl.constexpr, TILE: tl.constexpr, OPTIONS: tl.constexpr,
):  # fmt: skip
    """Sum the segments of a row that belong to this program."""
    row = tl.program_id(0)
    target_class = tl.load(target_ptr + row).to(tl.int64)
    scored = target_class != ignore_index
    columns = tl.where(scored, vocab_size, 0)  # an ignored row is not read
    DTYPE: tl.constexpr = tl.float64 if x.ptr.dtype.element_ty == tl.float64 else tl.float32
    head = typed_head(softcap, logit_scale, DTYPE)
    start = row_start(row, inner_rows, x)
    x_row = Row(x.ptr + start, x.stride_v)
    target = read_target(x_row, target_class, columns, head, OPTIONS)
    if OPTIONS.MEAN_LOGPROB:
        target = shard_origin(x_row, target, scored, head, OPTIONS)
    window = row_window(start, columns, target.column, TILE.WIDTH, OPTIONS.CONTIGUOUS)
    prefix = window.prefix
    x_body = body_row(x, start, prefix, TILE.WIDTH, OPTIONS.CONTIGUOUS, OPTIONS.CONTIGUOUS)
    scale, shift = tl.full([], prob_scale, DTYPE), tl.full([], prob_shift, DTYPE)
    factors, body_factors = row_factors(
        weights, row, inner_rows, prefix, scale, shift, TILE.WIDTH, OPTIONS
    )
    first = tl.program_id(1) * segments_per_program
    for segment in range(first, tl.minimum(first + segments_per_program, segments)):
        begin = segment * SEGMENT
        length = tl.minimum(window.body - begin, SEGMENT)
        sums, extra = sum_body(
            move_row(x_body, begin, OPTIONS.CONTIGUOUS), length, prefix + begin,
            window.group - begin, target, head, move_factors(body_factors, begin, OPTIONS), False,
            TILE, OPTIONS,
        )  # fmt: skip
        if segment == 0:
            edge_sums, edge_extra = sum_edges(
                x_row, window, columns, target, head, factors, TILE.WIDTH, OPTIONS
            )
            sums, extra = merge(sums, edge_sums), merge_extra(extra, edge_extra)
        part = row.to(tl.int64) * segments + segment
        store_part(parts, part, tl.cast(rows, tl.int64) * segments, sums, extra, OPTIONS)
