"""Loss and gradient of a row in one pass, if the weights of the losses are known beforehand.

Let s be the label smoothing, y the z-loss weight, and w = token_weight / divisor:

    loss = -(1 - s) logprob - s mean_logprob + y lse²
    dL/dz_j = p_j w (2 y lse + s (V - 1) / V) + c ([j = target] - p_j) - (w s / V) [j != target]
    c = -w (1 - s + s / V)

A row is read from memory once, so a 16-bit logit moves 4 bytes. A short row stays in registers ("on
chip"). A long row is streamed twice. So few rows run at once that the second read hits the L2.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .arguments import NOT_SPECIALIZED, RowOutputs
from .online_softmax import LOG2_E, Factors, Sums, log2_e_like, merge, row_loss, typed_head
from .rows import Row, body_row, group_starts, lane_ids, row_start, row_window
from .token_grad import Affine, gradient, make_affine, write_edges, write_span
from .token_stats import read_target, sum_body, sum_edges


class LossTerms(NamedTuple):
    """The weights of the loss's terms, and how many classes there are."""

    smoothing: Any
    z_loss_weight: Any
    vocab_size: Any


class ChipRow(NamedTuple):
    """The body of a row, held in registers."""

    x: Any  # [GROUPS, WIDTH]
    read: Any  # mask of the logits that were read
    sums: Any
    logit_sum: Any


@triton.jit
def token_loss(z, logit_sum, z_target, terms, OPTIONS: tl.constexpr):
    """Return the token's loss before its weight.

    z: RowLoss; logit_sum: the sum over all classes but the target.
    """
    loss = z.loss
    smoothing = terms.smoothing
    if OPTIONS.MEAN_LOGPROB:
        mean = logit_sum / terms.vocab_size + tl.where(z_target == float("-inf"), -z.lse, -loss)
        # With smoothing 1 and a masked target, 0 * inf would be NaN.
        target_loss = tl.where(smoothing == 1.0, 0.0, (1.0 - smoothing) * loss)
        loss = target_loss - smoothing * mean
    return loss + terms.z_loss_weight * z.lse * z.lse


@triton.jit
def token_affine(z, weight_ptr, divisor_ptr, terms, OPTIONS: tl.constexpr):
    """Return (Affine of a row, gradient at its target). weight_ptr points to the row's weight."""
    w = tl.full([], 1.0, z.lse.dtype)
    if OPTIONS.HAS_TOKEN_WEIGHT:
        w *= tl.load(weight_ptr)
    if OPTIONS.HAS_DIVISOR:
        w /= tl.load(divisor_ptr)
    a, c, u = w * 2.0 * terms.z_loss_weight * z.lse, -w, tl.zeros([], z.lse.dtype)
    if OPTIONS.HAS_U:
        u = -w * terms.smoothing / terms.vocab_size
        a, c = a - u * (terms.vocab_size - 1), w * (terms.smoothing - 1.0) + u
    return make_affine(z.lse, z.lse_low, -z.loss, a, tl.zeros([], z.lse.dtype), c, u, OPTIONS)


@triton.jit
def load_chip_row(row, window, readable, origin, m, TILE: tl.constexpr, OPTIONS: tl.constexpr):
    """Return the ChipRow of a row that fits a tile; m: the maximum of the edges."""
    groups = group_starts(TILE)
    position = groups + lane_ids(TILE.WIDTH)
    valid = body_positions(window, TILE)
    read = valid & (position < readable) if OPTIONS.PADDED else valid & (groups < readable)
    x = tl.load(row.ptr + position, mask=read, other=float("-inf"))
    z = x.to(origin.dtype)
    logit_sum = tl.zeros([], origin.dtype)
    if OPTIONS.MEAN_LOGPROB:
        logit_sum += tl.sum(tl.where(read, z - origin, 0.0))
    m = tl.maximum(tl.max(z) * LOG2_E, m)
    e = tl.exp2(tl.fma(z, log2_e_like(z), -tl.broadcast_to(m, z.shape)))
    return ChipRow(x, read, Sums(m, tl.sum(e), tl.zeros([], origin.dtype)), logit_sum)


@triton.jit
def body_positions(window, TILE: tl.constexpr):
    """Return the mask of a tile's positions in the body, without the target's group."""
    groups = group_starts(TILE)
    inside = (groups < window.body) & (groups != window.group)
    return tl.broadcast_to(inside, [TILE.GROUPS, TILE.WIDTH])


@triton.jit
def write_chip_row(grad, chip_row, window, affine, head, TILE: tl.constexpr, OPTIONS: tl.constexpr):
    """Write the gradient of a ChipRow."""
    value = gradient(chip_row.x.to(affine.lse.dtype), affine, affine.uniform, head, OPTIONS)
    if OPTIONS.HAS_U:  # else exp(-inf) is 0
        value = tl.where(chip_row.read, value, 0.0)
    address = grad.ptr + group_starts(TILE) + lane_ids(TILE.WIDTH)
    valid = body_positions(window, TILE)
    tl.store(address, value.to(grad.ptr.dtype.element_ty), mask=valid)


@triton.jit
def row_loss_and_grad(
    x, grad, x_body, grad_body, window, target, scored, columns, columns_in_memory,
    out, weight_ptr, divisor_ptr, terms, head, TILE: tl.constexpr, OPTIONS: tl.constexpr,
):  # fmt: skip
    """Write the loss and the gradient of one row. x and grad start at column 0."""
    one = tl.full([], 1.0, target.logit.dtype)
    factors = Factors(x.ptr, x.ptr, x.stride_v, one, one)  # unused: there are no class weights
    sums, extra = sum_edges(x, window, columns, target, head, factors, TILE.WIDTH, OPTIONS)
    prefix = window.prefix
    readable = tl.minimum(columns - prefix, window.body)
    if OPTIONS.ON_CHIP:
        chip_row = load_chip_row(x_body, window, readable, target.origin, sums.m, TILE, OPTIONS)
        body_sums, body_logit_sum = chip_row.sums, chip_row.logit_sum
    else:
        body_sums, body_extra = sum_body(
            x_body, readable, prefix, window.group, target, head, factors, OPTIONS.PADDED, TILE,
            OPTIONS,
        )  # fmt: skip
        body_logit_sum = body_extra.logit_sum
    sums = merge(sums, body_sums)
    z = row_loss(sums.m, sums.s, target.logit)
    loss = token_loss(z, extra.logit_sum + body_logit_sum, target.logit, terms, OPTIONS)
    tl.store(out.loss, tl.where(scored, loss, 0.0))
    if OPTIONS.HAS_STATS:
        tl.store(out.lse, tl.where(scored, z.lse, 0.0))
        tl.store(out.logprob, tl.where(scored, -z.loss, 0.0))
    affine, at_target = token_affine(z, weight_ptr, divisor_ptr, terms, OPTIONS)
    exponent = tl.where(scored, affine.exponent, 0.0)
    scale = tl.where(scored, affine.scale, 0.0)
    affine = Affine(affine.lse, exponent, scale, affine.slope, affine.uniform)
    # In place this is safe: all sums over the row are already in `affine`.
    write_edges(
        x, grad, window, columns_in_memory, columns, target.column, at_target, affine, head,
        factors, TILE.WIDTH, OPTIONS,
    )  # fmt: skip
    if OPTIONS.ON_CHIP:
        write_chip_row(grad_body, chip_row, window, affine, head, TILE, OPTIONS)
    else:
        write_span(
            x_body, grad_body, window.body, columns - prefix, window.group, scored, affine, head,
            factors, TILE, OPTIONS,
        )  # fmt: skip


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def loss_and_grad_kernel(
    x,  # Address of logits
    grad,  # Address, may be x
    target_ptr,  # [rows] integers
    out,  # RowOutputs, written
    weight_ptr,  # [rows], read where HAS_TOKEN_WEIGHT
    divisor_ptr,  # [], read where HAS_DIVISOR
    rows, inner_rows, columns_in_memory, vocab_size, ignore_index,
    smoothing: "fp64", z_loss_weight: "fp64", softcap: "fp64", logit_scale: "fp64",
    TILE: tl.constexpr, OPTIONS: tl.constexpr,
):  # fmt: skip
    """Compute one row (on chip), or the rows p, p + programs, ... (streamed) of program p."""
    DTYPE: tl.constexpr = tl.float64 if x.ptr.dtype.element_ty == tl.float64 else tl.float32
    head = typed_head(softcap, logit_scale, DTYPE)
    smoothing, z_weight = tl.full([], smoothing, DTYPE), tl.full([], z_loss_weight, DTYPE)
    terms = LossTerms(smoothing, z_weight, vocab_size)
    first = tl.program_id(0)
    last = first + 1 if OPTIONS.ON_CHIP else rows
    for number in range(first, last, 1 if OPTIONS.ON_CHIP else tl.num_programs(0)):
        row = tl.cast(number, tl.int32)
        target_class = tl.load(target_ptr + row).to(tl.int64)
        scored = target_class != ignore_index
        columns = tl.where(scored, vocab_size, 0)  # an ignored row is not read
        x_start, grad_start = row_start(row, inner_rows, x), row_start(row, inner_rows, grad)
        x_row, grad_row = (
            Row(x.ptr + x_start, x.stride_v),
            Row(grad.ptr + grad_start, grad.stride_v),
        )
        target = read_target(x_row, target_class, columns, head, OPTIONS)
        window = row_window(
            x_start, columns_in_memory, target.column, TILE.WIDTH, OPTIONS.CONTIGUOUS
        )
        x_body = body_row(
            x, x_start, window.prefix, TILE.WIDTH, OPTIONS.CONTIGUOUS, OPTIONS.CONTIGUOUS
        )
        grad_body = body_row(
            grad, grad_start, window.prefix, TILE.WIDTH, OPTIONS.GRAD_CONTIGUOUS,
            OPTIONS.GRAD_ALIGNED,
        )  # fmt: skip
        row_loss_and_grad(
            x_row, grad_row, x_body, grad_body, window, target, scored, columns,
            columns_in_memory, RowOutputs(out.loss + row, out.lse + row, out.logprob + row),
            weight_ptr + row, divisor_ptr, terms, head, TILE, OPTIONS,
        )  # fmt: skip
