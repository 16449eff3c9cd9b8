"""Row statistics in one read of the logits.

lse and logprob, and on request entropy, mean_logprob, rank, argmax.

The target is left out of the running sums: over the other classes, with m = max z and
s = sum exp(z - m), d = m + log s - z_target, the loss is

    -logprob = log(1 + exp(d))          lse = z_target - logprob

so a confident token's loss of 1e-8 is computed as 1e-8, not as log(1 + 1e-8) = 0.
"""

import triton
import triton.language as tl

from .streaming import (
    LOG2_E,
    finite_or_zero,
    head_transform,
    log1p,
    precise_exp,
    row_start,
    tile_columns,
)

MAX_INT = tl.constexpr(2147483647)


@triton.jit
def token_stats_kernel(
    x_ptr,  # [rows, V] logits, rows addressed by (stride_outer, stride_inner)
    target_ptr,  # [rows] integers
    lse_ptr,
    logprob_ptr,
    lse_low_ptr,
    entropy_ptr,
    mean_logprob_ptr,
    rank_ptr,
    argmax_ptr,  # all [rows]; the last four are read only when asked for
    vocab_size,
    ignore_index,
    inner_rows,
    stride_outer,
    stride_inner,
    stride_v,
    softcap: "fp64",
    logit_scale: "fp64",
    HAS_SOFTCAP: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    ENTROPY: tl.constexpr,
    MEAN_LOGPROB: tl.constexpr,
    RANK: tl.constexpr,
    ARGMAX: tl.constexpr,
    GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(target_ptr + row).to(tl.int64)
    ignored = target == ignore_index
    in_range = (target >= 0) & (target < vocab_size)
    x_ptr += row_start(row, inner_rows, stride_outer, stride_inner)
    DTYPE: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    softcap = tl.full([], softcap, DTYPE)
    logit_scale = tl.full([], logit_scale, DTYPE)

    z_target = tl.load(
        x_ptr + target * stride_v, mask=in_range & (ignored == 0), other=float("nan")
    ).to(DTYPE)
    z_target = head_transform(z_target, softcap, logit_scale, HAS_SOFTCAP, HAS_SCALE)
    z_target = tl.where(z_target == float("inf"), float("nan"), z_target)
    # Sums of z are taken from the target's logit, so that a large common offset cancels.
    origin = tl.where(z_target == float("-inf"), 0.0, z_target)
    tile = tile_columns(GROUPS, WIDTH)
    target_column = tl.where(in_range, target, -1).to(tl.int32)
    end = tl.where(ignored, 0, vocab_size)  # an ignored row is not read

    m = tl.full([GROUPS], float("-inf"), DTYPE)
    s = tl.zeros([GROUPS], DTYPE)
    weighted = tl.zeros([GROUPS], DTYPE)  # sum exp(z - m) (z - m)
    total = tl.zeros([GROUPS], DTYPE)  # sum (z - origin)
    beaten_by = tl.zeros([GROUPS], tl.int32)
    best_key = tl.full([GROUPS], float("-inf"), DTYPE)
    best = tl.arange(0, GROUPS) * WIDTH
    for start in range(0, end, GROUPS * WIDTH):
        columns = start + tile
        valid = columns < end
        x = tl.load(x_ptr + columns.to(tl.int64) * stride_v, mask=valid, other=0.0).to(DTYPE)
        # Mask after the transform: softcap would make a padding of -inf finite.
        z = tl.where(
            valid, head_transform(x, softcap, logit_scale, HAS_SOFTCAP, HAS_SCALE), float("-inf")
        )
        if MEAN_LOGPROB:
            total += tl.sum(tl.where(valid, z - origin, 0.0), 1)
        z = tl.where(columns == target_column, float("-inf"), z)
        if RANK:
            wins = (z > z_target) | (z != z) | ((z == z_target) & (columns < target_column))
            beaten_by += tl.sum((wins & valid & (columns != target_column)).to(tl.int32), 1)
        if ARGMAX:
            key = tl.where(z != z, float("inf"), z)
            top = tl.max(key, 1)
            column = tl.min(tl.where(key == top[:, None], columns, MAX_INT), 1)
            best = tl.where(top > best_key, column, best)
            best_key = tl.maximum(best_key, top)
        m_new = tl.maximum(m, tl.max(z, 1))
        reference = finite_or_zero(m_new)
        rescale = tl.exp2((m - reference) * LOG2_E)
        shifted = z - reference[:, None]
        e = tl.exp2(shifted * LOG2_E)
        if ENTROPY:
            weighted = (weighted + s * tl.where(m == float("-inf"), 0.0, m - reference)) * rescale
            weighted += tl.sum(tl.where(z == float("-inf"), 0.0, e * shifted), 1)
        s = s * rescale + tl.sum(e, 1)
        m = m_new

    group_m = m
    m = tl.max(group_m, 0)
    shift = tl.where(group_m == float("-inf"), 0.0, group_m - finite_or_zero(m))
    rescale = tl.where(group_m == float("-inf"), 0.0, tl.exp2(shift * LOG2_E))
    # A NaN leaves group_m at -inf when nothing else was seen: s still carries it.
    rescale = tl.where(s != s, 1.0, rescale)
    group_s = s
    s = tl.sum(group_s * rescale, 0)

    gap = m - z_target
    back = gap - m
    gap_low = (m - (gap - back)) - (z_target + back)  # what rounding took from it (Knuth's TwoSum)
    ratio = s * precise_exp(gap) * (1.0 + tl.where(gap_low == gap_low, gap_low, 0.0))
    d = gap + tl.log(s)
    tail = log1p(tl.where(d < 0.0, ratio, tl.exp(-d)))
    loss = tl.where(d > 0.0, d, 0.0) + tl.where(d == d, tail, d)
    above_m = tl.where(d > 0.0, tl.log(s) + tail, loss - gap)  # lse - m
    lse = tl.where(d > 0.0, m + above_m, z_target + loss)
    tl.store(lse_ptr + row, tl.where(ignored, 0.0, lse))
    tl.store(logprob_ptr + row, tl.where(ignored, 0.0, -loss))
    # What rounding took from lse: 0.0005 when all logits are near 1e4.
    lse_low = tl.where(d > 0.0, (m - lse) + above_m, (z_target - lse) + loss)
    tl.store(lse_low_ptr + row, tl.where(ignored, 0.0, lse_low))
    if ENTROPY:
        # -sum p log p = p_t loss + sum over the others of e^(m - lse) e_j (lse - z_j): no term is
        # negative.
        weighted = tl.sum((weighted + group_s * shift) * rescale, 0)
        others = tl.exp(-above_m) * (s * above_m - weighted)
        others = tl.where(m == float("-inf"), 0.0, others)
        target_part = tl.where(loss == float("inf"), 0.0, tl.exp(-loss) * loss)
        tl.store(entropy_ptr + row, tl.where(ignored, 0.0, target_part + others))
    if MEAN_LOGPROB:
        mean = tl.sum(total, 0) / vocab_size + tl.where(origin == z_target, -loss, -lse)
        tl.store(mean_logprob_ptr + row, tl.where(ignored, 0.0, mean))
    if RANK:
        rank = tl.where(z_target == z_target, tl.sum(beaten_by, 0), vocab_size - 1)
        tl.store(rank_ptr + row, tl.where(in_range & (ignored == 0), rank, -1).to(tl.int64))
    if ARGMAX:
        best_of_all = tl.max(best_key, 0)
        winner = tl.min(tl.where(best_key == best_of_all, best, MAX_INT), 0)
        target_key = tl.where(z_target != z_target, float("inf"), z_target)
        ahead = (target_key > best_of_all) | (
            (target_key == best_of_all) & (target_column < winner)
        )
        winner = tl.where(ahead & in_range, target_column, winner)
        tl.store(argmax_ptr + row, tl.where(ignored, -1, winner).to(tl.int64))
