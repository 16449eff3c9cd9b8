"""Merge the parts of each row and compute its statistics, the target included."""

import triton
import triton.language as tl

from .arguments import NOT_SPECIALIZED
from .online_softmax import (
    LN_2,
    Factors,
    Sums,
    class_weights,
    empty_sums,
    merge,
    row_loss,
    typed_head,
)
from .rows import Row, row_start
from .token_stats import MAX_INT, Extra, empty_extra, merge_extra, target_logit


@triton.jit
def load_part(parts, part, field, valid, OPTIONS: tl.constexpr):
    """Return (Sums, Extra) of a segment of each row, as stored by `token_stats.store_part`."""
    floats, integers = parts.floats_ptr + part, parts.integers_ptr + part
    m = tl.load(floats, mask=valid, other=0.0)
    s = tl.load(floats + field, mask=valid, other=0.0)
    ez_sum, logit_sum, weight_sum = tl.zeros_like(s), tl.zeros_like(s), tl.zeros_like(s)
    best_value = tl.full(s.shape, float("-inf"), s.dtype)
    num_better = tl.zeros(s.shape, tl.int32)
    best_class = tl.full(s.shape, MAX_INT, tl.int32)
    if OPTIONS.ENTROPY:
        ez_sum = tl.load(floats + 2 * field, mask=valid, other=0.0)
    if OPTIONS.MEAN_LOGPROB:
        logit_sum = tl.load(floats + 3 * field, mask=valid, other=0.0)
        if OPTIONS.HAS_WEIGHT or OPTIONS.HAS_PROB:
            weight_sum = tl.load(floats + 5 * field, mask=valid, other=0.0)
    if OPTIONS.RANK:
        num_better = tl.load(integers, mask=valid, other=0)
    if OPTIONS.ARGMAX:
        best_value = tl.load(floats + 4 * field, mask=valid, other=float("-inf"))
        best_class = tl.load(integers + field, mask=valid, other=MAX_INT)
    return Sums(m, s, ez_sum), Extra(logit_sum, weight_sum, num_better, best_value, best_class)


@triton.jit
def finish_entropy(sums, z):
    """Return the entropy; z: the RowLoss.

    -sum p log p = p_t loss + sum over the others of e^(m - lse) e_j (lse - z_j): no term is
    negative.
    """
    others = tl.exp2(-z.above) * (sums.s * z.above - sums.ez_sum) * LN_2
    return tl.where(z.loss == float("inf"), 0.0, tl.exp(-z.loss) * z.loss) + others


@triton.jit
def finish_mean_logprob(
    extra, z, target, z_target, read, vocab_size, factors, OPTIONS: tl.constexpr
):  # fmt: skip
    """Return mean_logprob; z: the RowLoss. `read`: which targets have valid factors."""
    from_origin = tl.where(z_target == float("-inf"), -z.lse, -z.loss)
    mean = extra.logit_sum / vocab_size + from_origin
    if OPTIONS.HAS_WEIGHT or OPTIONS.HAS_PROB:
        w = class_weights(factors, target, read, z.lse.dtype, OPTIONS) + extra.weight_sum
        mean = (extra.logit_sum + tl.where(w == 0.0, 0.0, w * from_origin)) / vocab_size
    return mean


@triton.jit
def overall_best_class(extra, target, z_target, inside):
    """Return the class of the largest logit. NaN counts as largest; the lowest class wins a tie."""
    value = tl.where(z_target != z_target, float("inf"), z_target)
    tied = (value == extra.best_value) & (target < extra.best_class)
    ahead = (value > extra.best_value) | tied
    return tl.where(ahead & inside, target, extra.best_class.to(tl.int64))


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def merge_parts_kernel(
    x,  # Address of logits
    target_ptr,  # [rows] integers
    weights,  # Weights, the same as for `token_stats`
    parts,  # Parts
    out,  # Outputs, written
    rows, segments, inner_rows, vocab_size, ignore_index,
    prob_scale: "fp64", prob_shift: "fp64", softcap: "fp64", logit_scale: "fp64",
    ROWS: tl.constexpr, OPTIONS: tl.constexpr,
):  # fmt: skip
    """Merge the parts of each row and write its statistics, ROWS rows a program."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    valid = row < rows
    target = tl.load(target_ptr + row, mask=valid, other=0).to(tl.int64)
    scored = target != ignore_index
    inside = (target >= 0) & (target < vocab_size)
    DTYPE: tl.constexpr = tl.float64 if x.ptr.dtype.element_ty == tl.float64 else tl.float32
    head = typed_head(softcap, logit_scale, DTYPE)
    x_row = Row(x.ptr + row_start(row, inner_rows, x), x.stride_v)
    z_target = target_logit(x_row, target, scored & valid & inside, head, OPTIONS)
    sums, extra = empty_sums(ROWS, DTYPE), empty_extra(ROWS, DTYPE)
    for segment in range(0, segments):
        part = row.to(tl.int64) * segments + segment
        field = tl.cast(rows, tl.int64) * segments
        part_sums, part_extra = load_part(parts, part, field, valid, OPTIONS)
        sums, extra = merge(sums, part_sums), merge_extra(extra, part_extra)
    z = row_loss(sums.m, sums.s, z_target)
    tl.store(out.lse + row, tl.where(scored, z.lse, 0.0), mask=valid)
    tl.store(out.logprob + row, tl.where(scored, -z.loss, 0.0), mask=valid)
    tl.store(out.lse_low + row, tl.where(scored, z.lse_low, 0.0), mask=valid)
    if OPTIONS.ENTROPY:
        tl.store(out.entropy + row, tl.where(scored, finish_entropy(sums, z), 0.0), mask=valid)
    if OPTIONS.MEAN_LOGPROB:
        start = row_start(row, inner_rows, weights)
        scale, shift = tl.full([], prob_scale, DTYPE), tl.full([], prob_shift, DTYPE)
        q_ptr, q_stride_v = weights.ptr + start, weights.stride_v
        factors = Factors(weights.w_ptr, q_ptr, q_stride_v, scale, shift)
        if OPTIONS.HAS_WEIGHT or OPTIONS.HAS_PROB:
            tl.store(out.weight_sum + row, extra.weight_sum, mask=valid)
        read = valid & scored & inside
        mean = finish_mean_logprob(extra, z, target, z_target, read, vocab_size, factors, OPTIONS)
        tl.store(out.mean_logprob + row, tl.where(scored, mean, 0.0), mask=valid)
    if OPTIONS.RANK:
        rank = tl.where(z_target == z_target, extra.num_better, vocab_size - 1)
        tl.store(out.rank + row, tl.where(inside & scored, rank, -1).to(tl.int64), mask=valid)
    if OPTIONS.ARGMAX:
        best = overall_best_class(extra, target, z_target, inside)
        tl.store(out.argmax + row, tl.where(scored, best, -1), mask=valid)
