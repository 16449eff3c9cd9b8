"""The two inner functions of the plain-PyTorch backend: a block's statistics and its gradient.

Both are functions of [rows, columns] logits alone, and work in a copy of them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.gradient import RowGradient
from ..core.head import Head, compute_dtype
from ..core.row_stats import Part

LONG_ROW = 1 << 19  # on a CPU a longer row shares no block with another


def block_statistics(
    x: Tensor,  # [R, C]
    column: Tensor,  # [R, 1] column of the target, clamped into the block
    inside: Tensor | None,  # [R, 1] whether the target is in this block; None: always
    target_logit: Tensor,  # [R, 1]
    head: Head,
    clamp: bool,
    weights: Tensor | None,  # [R, C] of `mean_logprob`, overwritten; None: 1
    *,
    entropy: bool,
    mean_logprob: bool,
    rank: bool,
    argmax: bool,
) -> Part:
    """Sums over the block's classes but the target, relative to their maximum."""
    dtype = compute_dtype(x.dtype)
    beaten_by = best = weighted = total = mass = None
    z = _with_target(head.apply_(x.to(dtype, copy=True)), column, inside, float("-inf"))
    if rank:
        beaten_by = _beaten_by(z, column, inside, target_logit)
    if argmax:
        m, best = z.max(1, keepdim=True)
        best = best[:, 0]
    else:
        m = z.amax(1, keepdim=True)
    # A row of -inf alone: subtracting the lowest finite number leaves -inf, not NaN.
    z.sub_(m.clamp(min=torch.finfo(dtype).min))
    if mean_logprob:
        z = _with_target(z, column, inside, 0.0)
        if weights is None:
            total = row_sum(z)
            mass = z.shape[1] - (1 if inside is None else inside[:, 0].to(dtype))
        else:
            weights = _with_target(weights, column, inside, 0.0)
            mass = row_sum(weights)
            total = row_sum((weights * z).masked_fill_(weights == 0, 0.0))  # of -inf too
    if clamp:
        z.clamp_(lowest_exponent(dtype), -lowest_exponent(dtype))
    shifted = z.clamp(min=lowest_exponent(dtype)) if entropy else None
    e = _with_target(z.exp_(), column, inside, 0.0)
    if shifted is not None:
        weighted = row_sum(shifted.mul_(e))
    return Part(m[:, 0], row_sum(e), weighted, total, mass, beaten_by, best)


def block_gradient(
    x: Tensor,  # [R, C]
    column: Tensor,
    inside: Tensor | None,
    reference: Tensor,  # [R, 1], subtracted from z before exp; as are the parts of `rows`
    rows: RowGradient,
    head: Head,
    clamp: bool,
    weights: Tensor | None,  # [R, C], of `rows.u`; None: 1
) -> Tensor:
    dtype = compute_dtype(x.dtype)
    z = head.apply_(x.to(dtype, copy=True)).sub_(reference)
    if clamp:
        z.clamp_(min=lowest_exponent(dtype))
    factor = rows.scale
    if rows.slope is not None:
        finite = z.clamp(min=lowest_exponent(dtype))  # 0 * -inf would be NaN
        factor = finite.mul_(rows.slope).add_(rows.scale)
    p = z.exp_()
    if clamp:  # what was clamped has p = 0
        torch.threshold_(p, 2 * torch.finfo(p.dtype).tiny, 0.0)
    grad = p.mul_(factor)
    if rows.u is not None:
        grad = grad.add_(rows.u) if weights is None else grad.addcmul_(rows.u, weights)
    grad = _with_target(grad, column, inside, rows.at_target)
    return grad if head.is_identity else grad.mul_(head.derivative(x))


def _with_target(z: Tensor, column: Tensor, inside: Tensor | None, value: float | Tensor) -> Tensor:
    """`z` with `value` at the targets, in place."""
    if inside is not None:
        value = torch.where(inside, value, z.gather(1, column))
    return z.scatter_(1, column, value)


def _beaten_by(z: Tensor, column: Tensor, inside: Tensor | None, target_logit: Tensor) -> Tensor:
    """How many classes of the block beat the target, itself masked.

    Those that are greater, NaN, or equal with a lower index.
    """
    equal = z == target_logit
    before = torch.arange(z.shape[1], device=z.device) < column
    if inside is not None:  # the target may lie right of the block, or left of it
        before = torch.where(inside, before, column > 0)
    return (~(z <= target_logit)).sum(1) + (equal & before).sum(1)


def lowest_exponent(dtype: torch.dtype) -> float:
    """Below it exp is subnormal, or 0; above its negative exp is near overflow."""
    return -708.0 if dtype == torch.float64 else -87.0


def row_sum(z: Tensor, keepdim: bool = False) -> Tensor:
    """Sum of each row.

    torch splits a lone sum over its threads, which would round it differently from the same row's
    among others: give it two rows. Not one so long that it is alone whatever the batch.
    """
    always_alone = not torch.compiler.is_compiling() and z.is_cpu and z.shape[1] > LONG_ROW
    if z.shape[0] > 1 or always_alone:
        return z.sum(1, keepdim)
    return z.expand(2, -1).sum(1, keepdim)[:1]
