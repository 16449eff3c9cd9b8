"""From the parts of a row to its statistics: merging, and what the target adds."""

import triton
import triton.language as tl

from .streaming import LN_2, class_weights, merge, nothing, row_loss, row_start
from .token_stats import MAX_INT, better, load_target


@triton.jit(
    do_not_specialize=[  # so that another number of rows or of classes compiles nothing new
        "rows",
        "segments",
        "vocab_size",
        "ignore_index",
        "offset",
        "inner_rows",
        "stride_outer",
        "stride_inner",
        "stride_v",
        "q_offset",
        "q_stride_outer",
        "q_stride_inner",
        "q_stride_v",
    ]
)
def finish_kernel(
    x_ptr,
    target_ptr,
    w_ptr,
    q_ptr,
    floats_ptr,
    integers_ptr,
    lse_ptr,
    logprob_ptr,
    lse_low_ptr,
    entropy_ptr,
    mean_logprob_ptr,
    mass_ptr,
    rank_ptr,
    argmax_ptr,  # all [rows]; the last five are written only when asked for
    rows,
    segments,
    vocab_size,
    ignore_index,
    offset,
    inner_rows,
    stride_outer,
    stride_inner,
    stride_v,
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
    ENTROPY: tl.constexpr,
    MEAN_LOGPROB: tl.constexpr,
    RANK: tl.constexpr,
    ARGMAX: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Merges the parts of each row and writes its statistics, ROWS rows a program."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    here = row < rows
    target = tl.load(target_ptr + row, mask=here, other=0).to(tl.int64)
    scored = target != ignore_index
    DTYPE: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    softcap = tl.full([], softcap, DTYPE)
    logit_scale = tl.full([], logit_scale, DTYPE)
    start = row_start(row, offset, inner_rows, stride_outer, stride_inner)
    z_target = load_target(
        x_ptr + start, target, stride_v, vocab_size, scored & here,
        softcap, logit_scale, HAS_SOFTCAP, HAS_SCALE,
    )  # fmt: skip
    field = tl.cast(rows, tl.int64) * segments
    m, s, weighted = nothing([ROWS], DTYPE)
    total = tl.zeros([ROWS], DTYPE)
    mass = tl.zeros([ROWS], DTYPE)
    beaten_by = tl.zeros([ROWS], tl.int32)
    key = tl.full([ROWS], float("-inf"), DTYPE)
    best = tl.full([ROWS], MAX_INT, tl.int32)
    for segment in range(0, segments):
        part = row.to(tl.int64) * segments + segment
        part_m = tl.load(floats_ptr + part, mask=here, other=0.0)
        part_s = tl.load(floats_ptr + field + part, mask=here, other=0.0)
        part_weighted = tl.zeros([ROWS], DTYPE)
        if ENTROPY:
            part_weighted += tl.load(floats_ptr + 2 * field + part, mask=here, other=0.0)
        if MEAN_LOGPROB:
            total += tl.load(floats_ptr + 3 * field + part, mask=here, other=0.0)
            if (w_ptr is not None) or (q_ptr is not None):
                mass += tl.load(floats_ptr + 5 * field + part, mask=here, other=0.0)
        if RANK:
            beaten_by += tl.load(integers_ptr + part, mask=here, other=0)
        if ARGMAX:
            part_key = tl.load(floats_ptr + 4 * field + part, mask=here, other=float("-inf"))
            part_best = tl.load(integers_ptr + field + part, mask=here, other=MAX_INT)
            key, best = better(key, best, part_key, part_best)
        m, s, weighted = merge(m, s, weighted, part_m, part_s, part_weighted)

    loss, lse, lse_low, above = row_loss(m, s, z_target)
    tl.store(lse_ptr + row, tl.where(scored, lse, 0.0), mask=here)
    tl.store(logprob_ptr + row, tl.where(scored, -loss, 0.0), mask=here)
    tl.store(lse_low_ptr + row, tl.where(scored, lse_low, 0.0), mask=here)
    if ENTROPY:
        # -sum p log p = p_t loss + sum over the others of e^(m - lse) e_j (lse - z_j): no term is
        # negative.
        others = tl.exp2(-above) * (s * above - weighted) * LN_2
        target_part = tl.where(loss == float("inf"), 0.0, tl.exp(-loss) * loss)
        tl.store(entropy_ptr + row, tl.where(scored, target_part + others, 0.0), mask=here)
    in_range = (target >= 0) & (target < vocab_size)
    if MEAN_LOGPROB:
        from_origin = tl.where(z_target == float("-inf"), -lse, -loss)
        if (w_ptr is None) and (q_ptr is None):
            mean = total / vocab_size + from_origin
        else:
            if q_ptr is not None:
                q_ptr += row_start(row, q_offset, inner_rows, q_stride_outer, q_stride_inner)
            of_target = class_weights(
                w_ptr, q_ptr, target, here & scored & in_range, q_stride_v,
                tl.full([], q_scale, DTYPE), tl.full([], q_shift, DTYPE), False, DTYPE,
            )  # fmt: skip
            tl.store(mass_ptr + row, mass, mask=here)
            mass += of_target
            mean = (total + tl.where(mass == 0.0, 0.0, mass * from_origin)) / vocab_size
        tl.store(mean_logprob_ptr + row, tl.where(scored, mean, 0.0), mask=here)
    if RANK:
        rank = tl.where(z_target == z_target, beaten_by, vocab_size - 1)
        tl.store(rank_ptr + row, tl.where(in_range & scored, rank, -1).to(tl.int64), mask=here)
    if ARGMAX:
        target_key = tl.where(z_target != z_target, float("inf"), z_target)
        ahead = (target_key > key) | ((target_key == key) & (target < best))
        winner = tl.where(ahead & in_range, target, best.to(tl.int64))
        tl.store(argmax_ptr + row, tl.where(scored, winner, -1), mask=here)
