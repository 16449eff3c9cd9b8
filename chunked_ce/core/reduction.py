"""From token statistics to the loss: label smoothing, z-loss, weights and reduction."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .row_stats import TokenStats


def is_scored(target: Tensor, ignore_index: int) -> Tensor:
    """Return which targets are not ignored. They are compared in int64: in uint8, -100 is 156."""
    return (target if target.dtype == torch.int64 else target.long()) != ignore_index


def token_loss(stats: TokenStats, label_smoothing: float, z_loss_weight: float) -> Tensor:
    """Return each token's loss before its weight. Label smoothing needs `mean_logprob`."""
    loss = smooth_labels(-stats.logprob, stats.mean_logprob, label_smoothing)
    return add_z_loss(loss, stats.lse, z_loss_weight)


def smooth_labels(loss: Tensor, mean_logprob: Tensor | None, label_smoothing: float) -> Tensor:
    """Return the loss with label smoothing (Szegedy et al., arXiv:1512.00567)."""
    if label_smoothing == 0:
        return loss
    assert mean_logprob is not None
    if label_smoothing == 1:  # else 0 * inf where the target is masked
        return -mean_logprob
    return (1.0 - label_smoothing) * loss - label_smoothing * mean_logprob


def add_z_loss(loss: Tensor, lse: Tensor, z_loss_weight: float) -> Tensor:
    """Return the loss plus the z-loss (PaLM, arXiv:2204.02311, section 5)."""
    return loss + z_loss_weight * lse.square() if z_loss_weight > 0 else loss


class Reduction(NamedTuple):
    """How the losses of tokens are reduced to one loss."""

    name: str  # "mean", "sum" or "none"
    weight: Tensor | None  # weight of each token, 0 if ignored; None: 1
    divisor: Tensor | None  # divisor [] of the sum; None: 1
    z_divisor: Tensor | None = None  # divisor [] of the sum of z-losses; None: `divisor`

    def reduce(self, loss: Tensor) -> Tensor:
        """Return the loss from the losses of tokens, which are 0 where ignored."""
        if self.weight is not None:
            loss = apply_weight(loss, self.weight)
        if self.name == "none":
            return loss + 0.0  # an ignored token's -0 becomes 0
        return loss.sum() if self.divisor is None else loss.sum() / self.divisor

    def reduce_with_z_loss(
        self, cross_entropy: Tensor, lse: Tensor, z_loss_weight: float
    ) -> Tensor:
        """Return the loss with z-loss. Class weights do not change the divisor of the z-loss."""
        if self.z_divisor is None or z_loss_weight == 0:
            return self.reduce(add_z_loss(cross_entropy, lse, z_loss_weight))
        z_reduction = Reduction(self.name, self.weight, self.z_divisor)
        return self.reduce(cross_entropy) + z_reduction.reduce(z_loss_weight * lse.square())

    def allows_grad_in_forward(self, dtype: torch.dtype) -> bool:
        """Return whether gradients of logits of `dtype` may be computed in forward.

        float16 gradients may not, because small ones need the loss scale of backward. Nor may
        those with a weight or divisor that requires a gradient.
        """
        factors = (self.weight, self.divisor)
        wants_grad = any(t is not None and t.requires_grad for t in factors)
        return dtype != torch.float16 and not wants_grad


def apply_weight(loss: Tensor, weight: Tensor) -> Tensor:
    """Return loss * weight, where an infinite loss of weight 0 counts as 0."""
    return (loss * weight).masked_fill((weight == 0) & loss.isinf(), 0.0)


def make_reduction(
    name: str,
    target: Tensor,
    ignore_index: int,
    token_weight: Tensor | None,
    num_items: int | Tensor | None,
    dtype: torch.dtype,
    counts: Tensor | None = None,
) -> Reduction:
    """Return the Reduction of losses [...] in `dtype`, without a host synchronization.

    counts: [...] factor of each token's weight in the divisor of the mean cross-entropy; None: 1.
        The divisor of the z-losses does not use it.
    """
    weight = divisor = z_divisor = None
    if token_weight is not None:
        weight = torch.where(is_scored(target, ignore_index), token_weight.to(dtype), 0.0)
    if isinstance(num_items, Tensor):
        divisor = num_items.to(target.device, dtype, non_blocking=True)
    elif num_items is not None:
        divisor = torch.full((), num_items, dtype=dtype, device=target.device)
    elif name == "mean":
        if weight is None and counts is None:
            divisor = is_scored(target, ignore_index).count_nonzero()
        else:
            counted = is_scored(target, ignore_index) if weight is None else weight
            divisor = (counted if counts is None else counted * counts.to(dtype)).sum()
            z_divisor = None if counts is None else counted.sum()
    return Reduction(name, weight, divisor, z_divisor)
