"""Gradient of row statistics, from four numbers a row.

    dL/dz_j = p_j (a + b (z_j - lse)) + c ([j = target] - p_j) + u w_j [j != target]

w_j is 1, or the weight from :class:`ClassWeights`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .row_stats import TokenStats


class Coefficients(NamedTuple):
    """a, b, c, u of the gradient, [rows] each. None means zeros."""

    a: Tensor | None
    b: Tensor | None
    c: Tensor | None
    u: Tensor | None


def coefficients(
    lse_grad: Tensor | None,
    logprob_grad: Tensor | None,
    entropy_grad: Tensor | None,
    mean_logprob_grad: Tensor | None,
    entropy: Tensor,
    vocab_size: int,
    target_weight: Tensor | None = None,
    weight_sum: Tensor | None = None,
) -> Coefficients:
    """Return a, b, c, u from the upstream gradients [rows] of the statistics."""
    a, b, c, u = lse_grad, None, logprob_grad, None
    if entropy_grad is not None:
        b = -entropy_grad
        a = _add(a, -entropy_grad * entropy)
    if mean_logprob_grad is not None:
        # The target's share goes into c, because c (1 - p) does not cancel near p = 1.
        u = mean_logprob_grad / vocab_size
        a = _add(a, -u * (vocab_size - 1 if weight_sum is None else weight_sum))
        c = _add(c, u if target_weight is None else u * target_weight)
    return Coefficients(a, b, c, u)


def _add(x: Tensor | None, y: Tensor) -> Tensor:
    """Return x + y, where None means 0."""
    return y if x is None else x + y


def token_loss_coefficients(
    stats: TokenStats, weight: Tensor, label_smoothing: float, z_loss_weight: float, vocab_size: int
) -> Coefficients:
    """Return the coefficients of `token_loss` times `weight` [rows]."""
    return coefficients(
        2.0 * z_loss_weight * stats.lse * weight if z_loss_weight > 0 else None,
        (label_smoothing - 1.0) * weight,
        None,
        -label_smoothing * weight if label_smoothing > 0 else None,
        stats.lse,
        vocab_size,
    )


class RowGradient(NamedTuple):
    """The gradient as the backends apply it: e (scale + slope (z - lse)) + u w; else `at_target`.

    e is proportional to p. All fields are [rows].
    """

    scale: Tensor
    slope: Tensor | None
    u: Tensor | None
    at_target: Tensor

    def rescale(self, factor: Tensor) -> RowGradient:
        """Return the numbers for e = p / factor instead of e = p."""
        slope = None if self.slope is None else self.slope * factor
        return self._replace(scale=self.scale * factor, slope=slope)

    def as_columns(self) -> RowGradient:
        """Return the numbers with shape [rows, 1]."""
        return RowGradient(*(None if part is None else part[:, None] for part in self))  # type: ignore[arg-type]


def row_gradient(logprob: Tensor, lse_low: Tensor, coefficients: Coefficients) -> RowGradient:
    """Return the numbers of a row's gradient for e = p."""
    a, b, c, u = coefficients
    scale = at_target = None
    if c is not None:
        scale = -c
        at_target = scale * logprob.expm1()
    if a is not None or b is not None:
        p_target = logprob.exp()
        if a is not None:
            scale, at_target = _add(scale, a), _add(at_target, a * p_target)
        if b is not None:
            at_target = _add(at_target, (b * p_target * logprob).masked_fill(p_target == 0, 0.0))
            scale = _add(scale, -b * lse_low)  # corrects the backends' z - lse
    if scale is None or at_target is None:
        scale = at_target = torch.zeros_like(logprob)
    return RowGradient(scale, b, u, at_target)
