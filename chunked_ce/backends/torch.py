"""The backend in plain PyTorch: simple, and for any device.

Logits are processed in blocks, and each block is copied in fp32. The parts of a row are merged.
Only the gradient has N x V elements.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .. import checks
from ..core.gradient import Coefficients, RowGradient, row_gradient, token_loss_coefficients
from ..core.head import COMPUTE_DTYPE, IDENTITY, Head
from ..core.reduction import is_scored, token_loss
from ..core.row_stats import (
    UNIFORM,
    ClassWeights,
    Part,
    RowStatistics,
    TokenStats,
    concatenate,
    copy_stats,
    finish,
    logged_flags,
    merge,
    zero_ignored,
)
from .torch_blocks import blocks


class Options(NamedTuple):
    """Options of one call."""

    vocab_size: int
    head: Head
    shard: bool = False  # targets out of range lie in another shard


class _Targets(NamedTuple):
    """Targets of all rows, [rows] each."""

    column: Tensor  # -1 if the target is not among these classes
    logit: Tensor  # -inf if in another shard; NaN if it is inf, so that the row is NaN as in torch
    ignored: Tensor


def row_statistics(
    input: Tensor,
    target: Tensor,
    ignore_index: int,
    vocab_size: int,
    head: Head,
    weights: ClassWeights = UNIFORM,
    **wanted: bool,  # entropy, mean_logprob, rank, argmax
) -> RowStatistics:
    """Return the statistics of every row, [rows]."""
    options = Options(vocab_size, head)
    targets = _targets(input, target, ignore_index, options)
    part = _sum_rows(input, targets, options, wanted, weights)
    column = targets.column.clamp(min=0)
    target_weight = weights.gather(column, part.s.dtype) if wanted["mean_logprob"] else None
    rows = finish(part, targets.logit, column, options.vocab_size, target_weight)
    low = rows.lse_low.masked_fill(targets.ignored, 0.0)
    return rows._replace(stats=zero_ignored(rows.stats, targets.ignored), lse_low=low)


def row_part(
    input: Tensor,
    target: Tensor,
    ignore_index: int,
    vocab_size: int,
    head: Head,
    **wanted: bool,  # entropy, mean_logprob, argmax
) -> tuple[Part, Tensor]:
    """Return the sums of every row over a shard, and the target's logit (-inf if elsewhere)."""
    options = Options(vocab_size, head, shard=True)
    targets = _targets(input, target, ignore_index, options)
    return _sum_rows(input, targets, options, wanted | dict(rank=False)), targets.logit


def logits_gradient(
    input: Tensor,
    target: Tensor,
    lse: Tensor,
    logprob: Tensor,
    lse_low: Tensor,
    coefficients: Coefficients,
    ignore_index: int,
    vocab_size: int,
    head: Head,
    weights: ClassWeights = UNIFORM,
    *,
    inplace: bool,
    shard: bool = False,
) -> Tensor:
    """Return dL/dinput, in a new tensor or written over `input`."""
    options = Options(vocab_size, head, shard)
    out = input if inplace else torch.empty_like(input)
    column, _, ignored = _targets(input, target, ignore_index, options)
    numbers = row_gradient(logprob, lse_low, coefficients).rescale((-lse_low).exp())
    for rows, columns, (x, grad, prob) in blocks(options.vocab_size, input, out, weights.prob):
        block_numbers = RowGradient(*(None if n is None else n[rows] for n in numbers))  # type: ignore[arg-type]
        w = 1.0 if numbers.u is None else _class_weights(x, columns, weights, prob)
        is_target = _is_target(column[rows], columns)
        block = block_gradient(x, is_target, lse[rows], block_numbers.as_columns(), options.head, w)
        grad.copy_(block.masked_fill_(ignored[rows, None], 0.0))
    out[..., options.vocab_size :].zero_()
    return out


def loss_and_gradient(
    input: Tensor,
    target: Tensor,
    token_weight: Tensor | None,
    divisor: Tensor | None,
    label_smoothing: float,
    z_loss_weight: float,
    ignore_index: int,
    vocab_size: int,
    head: Head,
    *,
    inplace: bool,
    stats: TokenStats | None = None,  # memory [rows] each, written
) -> tuple[Tensor, Tensor]:
    """Return each token's loss [rows], and the gradient of loss * token_weight / divisor.

    The losses are not weighted. The gradient is in a new tensor or written over `input`. It takes
    two passes.
    """
    found, lse_low, _ = row_statistics(
        input, target, ignore_index, vocab_size, head, UNIFORM,
        mean_logprob=label_smoothing > 0, **logged_flags(stats),
    )  # fmt: skip
    copy_stats(stats, found, found._fields)
    weight = torch.ones_like(found.lse)
    if token_weight is not None:
        weight = weight * token_weight.reshape(-1)
    if divisor is not None:
        weight = weight / divisor
    numbers = token_loss_coefficients(found, weight, label_smoothing, z_loss_weight, vocab_size)
    grad = logits_gradient(
        input, target, found.lse, found.logprob, lse_low, numbers, ignore_index, vocab_size,
        head, inplace=inplace,
    )  # fmt: skip
    return token_loss(found, label_smoothing, z_loss_weight), grad


def scale_(grad: Tensor, upstream: Tensor) -> None:
    """Multiply grad [..., V] in place by upstream [...] or []. Zeros (ignored rows) stay 0."""
    factor = upstream.to(COMPUTE_DTYPE[grad.dtype]).expand(grad.shape[:-1]).reshape(-1, 1)
    for rows, _, (block,) in blocks(grad.shape[-1], grad):
        block.copy_((block * factor[rows]).masked_fill_(block == 0, 0.0))


def _targets(input: Tensor, target: Tensor, ignore_index: int, options: Options) -> _Targets:
    """Return the columns and logits of the targets, and which are ignored."""
    target = target.reshape(-1).long()
    ignored = ~is_scored(target, ignore_index)
    outside = (target < 0) | (target >= options.vocab_size)
    if _on_host(target) and not options.shard:
        checks.targets_in_range(target, options.vocab_size, ignore_index)
    index = target.masked_fill(outside, 0).view(*input.shape[:-1], 1)
    logit = options.head.apply_(input.gather(-1, index).to(COMPUTE_DTYPE[input.dtype])).view(-1)
    logit.masked_fill_(outside, -math.inf if options.shard else math.nan)
    logit.masked_fill_(logit == math.inf, math.nan)
    return _Targets(target.masked_fill(outside, -1), logit, ignored)


def _on_host(x: Tensor) -> bool:
    """Return whether a value of `x` can be read without a synchronization."""
    return x.is_cpu


def _sum_rows(
    input: Tensor,
    targets: _Targets,
    options: Options,
    wanted: dict[str, bool],
    weights: ClassWeights = UNIFORM,
) -> Part:
    """Return the sums of every row over all classes but the target."""
    parts: list[Part] = []
    for rows, columns, (x, prob) in blocks(options.vocab_size, input, weights.prob):
        w = _class_weights(x, columns, weights, prob) if wanted["mean_logprob"] else 1.0
        column, logit = targets.column[rows], targets.logit[rows]
        part = _block_part(x, columns, column, logit, options.head, w, **wanted)
        if columns.start == 0:
            parts.append(part)
        else:
            parts[-1] = merge(parts[-1], part)
    return concatenate(parts)


def _block_part(
    x: Tensor,  # [R, C] logits
    columns: slice,
    column: Tensor,  # [R]
    target_logit: Tensor,  # [R]
    head: Head,
    weights: Tensor | float,  # [R, C] of `mean_logprob`
    *,
    entropy: bool,
    mean_logprob: bool,
    rank: bool,
    argmax: bool,
) -> Part:
    """Return the sums of a block over all classes but the target."""
    num_better = best_class = ez_sum = logit_sum = weight_sum = None
    is_target = _is_target(column, columns)
    z = _transform(x, head).masked_fill_(is_target, -math.inf)
    if rank:  # classes that are greater, NaN, or equal with a lower index beat the target
        lower = torch.arange(columns.start, columns.stop, device=x.device) < column[:, None]
        better = ~(z <= target_logit[:, None]) | ((z == target_logit[:, None]) & lower)
        num_better = (better & ~is_target).sum(1)
    m = z.amax(1)
    if argmax:
        best_class = z.max(1).indices + columns.start
    # If all logits are -inf, subtracting the lowest finite number gives -inf, not NaN.
    z.sub_(m.clamp(min=torch.finfo(z.dtype).min)[:, None])
    if mean_logprob:
        w = torch.ones_like(z).mul_(weights).masked_fill_(is_target, 0.0)
        weight_sum, logit_sum = w.sum(1), (w * z).masked_fill_(w == 0, 0.0).sum(1)
    e = z.exp() if entropy else z.exp_()
    if entropy:
        ez_sum = z.mul_(e).masked_fill_(e == 0, 0.0).sum(1)
    return Part(m, e.sum(1), ez_sum, logit_sum, weight_sum, num_better, best_class)


def block_gradient(
    x: Tensor,  # [R, C] logits
    is_target: Tensor,  # [R, C]
    lse: Tensor,  # [R]
    rows: RowGradient,  # [R, 1] each
    head: Head,
    weights: Tensor | float,  # [R, C] of `rows.u`
) -> Tensor:
    """Return the gradient of a block."""
    z = _transform(x, head).sub_(lse[:, None])
    if rows.slope is None:
        grad = z.exp_().mul_(rows.scale)
    else:
        p = z.exp()
        grad = z.mul_(rows.slope).add_(rows.scale).mul_(p).masked_fill_(p == 0, 0.0)
    if rows.u is not None:
        grad.add_(rows.u * weights)
    torch.where(is_target, rows.at_target, grad, out=grad)
    return grad if head == IDENTITY else grad.mul_(head.derivative(x))


def _transform(x: Tensor, head: Head) -> Tensor:
    """Return a contiguous copy of a block's logits after the head's transforms."""
    return head.apply_(
        x.to(COMPUTE_DTYPE[x.dtype], copy=True, memory_format=torch.contiguous_format)
    )


def _is_target(column: Tensor, columns: slice) -> Tensor:
    """Return the mask [R, C] of the target columns [R]."""
    classes = torch.arange(columns.start, columns.stop, dtype=torch.int32, device=column.device)
    return classes == column[:, None].int()


def _class_weights(
    x: Tensor, columns: slice, weights: ClassWeights, prob: Tensor | None
) -> Tensor | float:
    """Return the class weights w_j of a block: [R, C], [C] or 1."""
    dtype = COMPUTE_DTYPE[x.dtype]
    w: Tensor | float = 1.0
    if prob is not None:
        w = prob.to(dtype) * weights.scale + weights.shift
    return w if weights.weight is None else weights.weight[columns].to(dtype) * w
