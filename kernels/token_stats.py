"""Row statistics in one read of the logits.

lse and logprob, and on request entropy, mean_logprob, rank, argmax.

A row is summed in segments of SEGMENT columns, whose parts `finish_kernel` merges in ascending
order (finish.py). How many segments one program walks is the launch's choice: no result depends on
it.
"""

import triton
import triton.language as tl

from .streaming import (
    LOG2_E,
    apart,
    at,
    body_start,
    class_weights,
    group_starts,
    head_transform,
    lanes,
    log2_e_of,
    merge,
    nothing,
    row_start,
    row_window,
    step,
    target_group,
)

MAX_INT = tl.constexpr(2147483647)
# Of a part, floats: m, s, and on request sum exp2(z - m) (z - m), sum w (z - origin), largest key,
# sum w; integers: how many beat the target, the class of the largest key. The target is in none of
# them but sum w (z - origin).


@triton.jit
def load_target(
    x_ptr, target, stride_v, vocab_size, scored, softcap, logit_scale,
    HAS_SOFTCAP: tl.constexpr, HAS_SCALE: tl.constexpr,
):  # fmt: skip
    """The target's logit; NaN where it is +inf, as torch has it, or the target out of range."""
    read = scored & (target >= 0) & (target < vocab_size)
    DTYPE: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    x = tl.load(x_ptr + target * stride_v, mask=read, other=float("nan")).to(DTYPE)
    z = head_transform(x, softcap, logit_scale, HAS_SOFTCAP, HAS_SCALE)
    return tl.where(z == float("inf"), float("nan"), z)


@triton.jit
def add_exponentials(z, m, s, weighted, ENTROPY: tl.constexpr):
    """Adds a tile z [G, W] to each group's running maximum and sums [G]."""
    m_new = tl.maximum(m, tl.max(z, 1) * LOG2_E)
    shifted = tl.fma(z, log2_e_of(z), -tl.broadcast_to(m_new[:, None], z.shape))
    e = tl.exp2(shifted)
    rescale = tl.exp2(m - m_new)
    if ENTROPY:
        weighted = (weighted + s * (m - m_new)) * rescale
        weighted += tl.sum(tl.where(z == float("-inf"), 0.0, e * shifted), 1)
    return m_new, s * rescale + tl.sum(e, 1), weighted


@triton.jit
def add_weighted(
    z, columns, valid, origin, total, mass, w_ptr, q_ptr, q_stride_v, q_scale, q_shift, target,
    Q_CONTIGUOUS: tl.constexpr,
):  # fmt: skip
    """Adds w (z - origin) to each group's total, and w but the target's to its mass [G]."""
    if (w_ptr is None) and (q_ptr is None):
        total += tl.sum(tl.where(valid, z - origin, 0.0), 1)
    else:
        w = class_weights(
            w_ptr, q_ptr, columns, valid, q_stride_v, q_scale, q_shift, Q_CONTIGUOUS, z.dtype
        )
        total += tl.sum(tl.where(w == 0.0, 0.0, w * (z - origin)), 1)
        mass += tl.sum(tl.where(columns == target, 0.0, w), 1)
    return total, mass


@triton.jit
def add_ranks(z, columns, valid, z_target, target, beaten_by, key, best,
              RANK: tl.constexpr, ARGMAX: tl.constexpr):  # fmt: skip
    """Counts classes that beat the target, and keeps the best class of each group [G]."""
    if RANK:
        wins = (z > z_target) | (z != z) | ((z == z_target) & (columns < target))
        beaten_by += tl.sum((wins & valid & (columns != target)).to(tl.int32), 1)
    if ARGMAX:
        k = tl.where(z != z, float("inf"), z)
        top = tl.max(k, 1)
        column = tl.min(tl.where((k == top[:, None]) & valid, columns, MAX_INT), 1)
        best = tl.where((top > key) | (best == MAX_INT), column, best)
        key = tl.maximum(key, top)
    return beaten_by, key, best


@triton.jit
def add_groups(m, s, weighted):
    """The sums [G] of all groups as one."""
    top = tl.max(m, 0)
    scale = tl.exp2(m - top)
    return top, tl.sum(s * scale, 0), tl.sum((weighted + s * (m - top)) * scale, 0)


@triton.jit
def best_of(key, best):
    """(largest key [G], its class: the lowest where several have it)."""
    top = tl.max(key, 0)
    return top, tl.min(tl.where(key == top, best, MAX_INT), 0)


@triton.jit
def better(key, best, other_key, other_best):
    """The larger key and its class; on a tie the lower class."""
    wins = (other_key > key) | ((other_key == key) & (other_best < best))
    return tl.maximum(key, other_key), tl.where(wins, other_best, best)


@triton.jit
def sum_body(
    x_ptr, length, first_column, group, stride_v, origin, z_target, target, softcap, logit_scale,
    w_ptr, q_ptr, q_stride_v, q_scale, q_shift,
    HAS_SOFTCAP: tl.constexpr, HAS_SCALE: tl.constexpr, ENTROPY: tl.constexpr,
    MEAN_LOGPROB: tl.constexpr, RANK: tl.constexpr, ARGMAX: tl.constexpr, PADDED: tl.constexpr,
    CONTIGUOUS: tl.constexpr, Q_CONTIGUOUS: tl.constexpr, GROUPS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """The sums of `length` positions of a row's body, all but the target's group.

    w_ptr and q_ptr: of the first position, or None. PADDED: `length` need not be a multiple of
    WIDTH.
    """
    m, s, weighted = nothing([GROUPS], origin.dtype)
    total = tl.zeros([GROUPS], origin.dtype)
    mass = tl.zeros([GROUPS], origin.dtype)
    beaten_by = tl.zeros([GROUPS], tl.int32)
    key = tl.full([GROUPS], float("-inf"), origin.dtype)
    best = tl.full([GROUPS], MAX_INT, tl.int32)
    tile = group_starts(GROUPS, WIDTH) + lanes(WIDTH)
    for i in range(0, length, GROUPS * WIDTH):
        groups = i + group_starts(GROUPS, WIDTH)
        valid = tl.broadcast_to((groups < length) & (groups != group), [GROUPS, WIDTH])
        if PADDED:
            valid &= i + tile < length
        x = tl.load(x_ptr + at(tile, stride_v, CONTIGUOUS), mask=valid, other=float("-inf"))
        # An offset from the loop's counter would make that, and its comparisons, 64 bits wide.
        x_ptr += step(GROUPS * WIDTH, stride_v, CONTIGUOUS)
        z = x.to(origin.dtype)
        if HAS_SOFTCAP or HAS_SCALE:
            # Mask after the transform: softcap would make a padding of -inf finite.
            z = head_transform(z, softcap, logit_scale, HAS_SOFTCAP, HAS_SCALE)
            z = tl.where(valid, z, float("-inf"))
        if MEAN_LOGPROB:
            total, mass = add_weighted(
                z, i + tile, valid, origin, total, mass, w_ptr, q_ptr, q_stride_v, q_scale,
                q_shift, -1, Q_CONTIGUOUS,
            )  # fmt: skip
        beaten_by, key, best = add_ranks(
            z, first_column + i + tile, valid, z_target, target, beaten_by, key, best,
            RANK, ARGMAX,
        )  # fmt: skip
        m, s, weighted = add_exponentials(z, m, s, weighted, ENTROPY)
    m, s, weighted = add_groups(m, s, weighted)
    key, best = best_of(key, best)
    return m, s, weighted, tl.sum(total, 0), tl.sum(mass, 0), tl.sum(beaten_by, 0), key, best


@triton.jit
def sum_apart(
    x_ptr, head, body, columns, group, stride_v, origin, z_target, target, softcap, logit_scale,
    w_ptr, q_ptr, q_stride_v, q_scale, q_shift,
    HAS_SOFTCAP: tl.constexpr, HAS_SCALE: tl.constexpr, ENTROPY: tl.constexpr,
    MEAN_LOGPROB: tl.constexpr, RANK: tl.constexpr, ARGMAX: tl.constexpr,
    Q_CONTIGUOUS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """The sums of a row's head, tail and the target's group. w_ptr and q_ptr: of column 0."""
    edge, valid = apart(head, body, columns, group, WIDTH)
    valid &= edge < columns
    x = tl.load(x_ptr + edge.to(tl.int64) * stride_v, mask=valid, other=0.0).to(origin.dtype)
    z = head_transform(x, softcap, logit_scale, HAS_SOFTCAP, HAS_SCALE)
    total = tl.zeros([4], origin.dtype)
    mass = tl.zeros([4], origin.dtype)
    if MEAN_LOGPROB:
        total, mass = add_weighted(
            z, edge, valid, origin, total, mass, w_ptr, q_ptr, q_stride_v, q_scale, q_shift,
            target, Q_CONTIGUOUS,
        )  # fmt: skip
    valid &= edge != target
    z = tl.where(valid, z, float("-inf"))
    beaten_by, key, best = add_ranks(
        z, edge, valid, z_target, target, tl.zeros([4], tl.int32),
        tl.full([4], float("-inf"), origin.dtype), tl.full([4], MAX_INT, tl.int32), RANK, ARGMAX,
    )  # fmt: skip
    m, s, weighted = nothing([4], origin.dtype)
    m, s, weighted = add_exponentials(z, m, s, weighted, ENTROPY)
    m, s, weighted = add_groups(m, s, weighted)
    key, best = best_of(key, best)
    return m, s, weighted, tl.sum(total, 0), tl.sum(mass, 0), tl.sum(beaten_by, 0), key, best


@triton.jit(
    do_not_specialize=[  # so that another number of rows or of classes compiles nothing new
        "rows",
        "segments",
        "segments_per_program",
        "vocab_size",
        "ignore_index",
        "offset",
        "inner_rows",
        "stride_outer",
        "stride_inner",
        "q_offset",
        "q_stride_outer",
        "q_stride_inner",
    ]
)
def token_stats_kernel(
    x_ptr,  # [rows, V] logits, rows addressed by (offset, stride_outer, stride_inner)
    target_ptr,  # [rows] integers
    w_ptr,  # [V] or None: class weights of mean_logprob, times
    q_ptr,  # [rows, V] or None: q_scale q + q_shift
    floats_ptr,  # [2 or 6, rows, segments]: a part's floats, as above
    integers_ptr,  # [2, rows, segments], touched only for RANK and ARGMAX
    rows,
    segments,
    segments_per_program,
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
    CONTIGUOUS: tl.constexpr,
    Q_CONTIGUOUS: tl.constexpr,
    Q_ALIGNED: tl.constexpr,  # its rows start at the same place in a group as the logits'
    GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
    SEGMENT: tl.constexpr,
):
    row = tl.program_id(0)
    target = tl.load(target_ptr + row).to(tl.int64)
    scored = target != ignore_index
    DTYPE: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    softcap = tl.full([], softcap, DTYPE)
    logit_scale = tl.full([], logit_scale, DTYPE)
    q_scale = tl.full([], q_scale, DTYPE)
    q_shift = tl.full([], q_shift, DTYPE)
    start = row_start(row, offset, inner_rows, stride_outer, stride_inner)
    z_target = load_target(
        x_ptr + start, target, stride_v, vocab_size, scored,
        softcap, logit_scale, HAS_SOFTCAP, HAS_SCALE,
    )  # fmt: skip
    # Sums of z are taken from the target's logit, so that a large common offset cancels.
    origin = tl.where(z_target == float("-inf"), 0.0, z_target)
    if MEAN_LOGPROB:  # a target in another shard is NaN here: then from the first class's logit
        first = tl.load(x_ptr + start, mask=scored, other=0.0).to(DTYPE)
        first = head_transform(first, softcap, logit_scale, HAS_SOFTCAP, HAS_SCALE)
        first = tl.where(tl.abs(first) < float("inf"), first, 0.0)
        origin = tl.where(origin == origin, origin, first)
    columns = tl.where(scored, vocab_size, 0)  # an ignored row is not read
    head, body = row_window(start, columns, WIDTH, CONTIGUOUS)
    target_column = tl.where((target >= 0) & (target < columns), target, -1).to(tl.int32)
    group = target_group(target_column, head, body, WIDTH)
    body_ptr = x_ptr + body_start(start, head, stride_v, WIDTH, CONTIGUOUS)
    # In the kernel, for up to Triton 3.6 a device function cannot return None.
    w_body, q_row, q_body = w_ptr, q_ptr, q_ptr
    if w_ptr is not None:
        w_body += head
    if q_ptr is not None:
        q_start = row_start(row, q_offset, inner_rows, q_stride_outer, q_stride_inner)
        q_row += q_start
        q_body += body_start(q_start, head, q_stride_v, WIDTH, Q_ALIGNED)
    first_segment = tl.program_id(1) * segments_per_program
    last_segment = tl.minimum(first_segment + segments_per_program, segments)
    for segment in range(first_segment, last_segment):
        begin = segment * SEGMENT
        w_here, q_here = w_body, q_body
        if w_ptr is not None:
            w_here += begin
        if q_ptr is not None:
            q_here += at(begin, q_stride_v, Q_CONTIGUOUS)
        m, s, weighted, total, mass, beaten_by, key, best = sum_body(
            body_ptr + at(begin, stride_v, CONTIGUOUS), tl.minimum(body - begin, SEGMENT),
            head + begin, group - begin, stride_v, origin, z_target, target_column,
            softcap, logit_scale, w_here, q_here, q_stride_v, q_scale, q_shift, HAS_SOFTCAP,
            HAS_SCALE, ENTROPY, MEAN_LOGPROB, RANK, ARGMAX, False, CONTIGUOUS, Q_CONTIGUOUS,
            GROUPS, WIDTH,
        )  # fmt: skip
        if segment == 0:
            apart_m, apart_s, apart_weighted, apart_total, apart_mass, beats, top, top_class = (
                sum_apart(
                    x_ptr + start, head, body, columns, group, stride_v, origin, z_target,
                    target_column, softcap, logit_scale, w_ptr, q_row, q_stride_v, q_scale,
                    q_shift, HAS_SOFTCAP, HAS_SCALE, ENTROPY, MEAN_LOGPROB, RANK, ARGMAX,
                    Q_CONTIGUOUS, WIDTH,
                )
            )  # fmt: skip
            m, s, weighted = merge(m, s, weighted, apart_m, apart_s, apart_weighted)
            total += apart_total
            mass += apart_mass
            beaten_by += beats
            key, best = better(key, best, top, top_class)
        part = row.to(tl.int64) * segments + segment
        here = floats_ptr + part
        field = tl.cast(rows, tl.int64) * segments
        tl.store(here, m)
        tl.store(here + field, s)
        if ENTROPY:
            tl.store(here + 2 * field, weighted)
        if MEAN_LOGPROB:
            tl.store(here + 3 * field, total)
        if RANK:
            tl.store(integers_ptr + part, beaten_by)
        if ARGMAX:
            tl.store(here + 4 * field, key)
            tl.store(integers_ptr + field + part, best)
        if MEAN_LOGPROB and ((w_ptr is not None) or (q_ptr is not None)):
            tl.store(here + 5 * field, mass)
