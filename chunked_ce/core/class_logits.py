"""Logits of a few classes of each row, and their gradient.

The K classes are given by index, for example a teacher's top-k classes. No tensor has V columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .gradient import Coefficients
from .head import COMPUTE_DTYPE, Head


def gather_logits(input: Tensor, classes: Tensor, head: Head) -> Tensor:
    """Return the logits z [..., K] of `classes` [..., K], which must be in range."""
    return head.apply_(input.gather(-1, classes).to(COMPUTE_DTYPE[input.dtype]))


def gather_gradient(
    x: Tensor,  # [rows, K] logits before the head
    classes: Tensor,
    upstream: Tensor,  # [rows, K] gradient of the result of `gather_logits`
    target: Tensor,  # [rows], like lse, logprob, lse_low and scored
    lse: Tensor,
    logprob: Tensor,
    lse_low: Tensor,
    coefficients: Coefficients,
    weights: Tensor | None,  # [rows, K] class weights of `mean_logprob`; None: 1
    scored: Tensor,
    head: Head,
) -> Tensor:
    """Return dL/dx [rows, K] at `classes`, not yet rounded. Equal classes have equal values."""
    target, lse, logprob, lse_low, scored = (
        t[:, None] for t in (target, lse, logprob, lse_low, scored)
    )
    a, b, c, u = (None if n is None else n[:, None] for n in coefficients)
    z = head.apply_(x.to(lse.dtype, copy=True))
    is_target = classes == target
    log_p = torch.where(is_target, logprob, (z - lse) - lse_low)
    p = log_p.exp()
    grad = _sum_duplicates(classes, upstream.to(lse.dtype))
    if a is not None:
        grad = grad + a * p
    if b is not None:
        grad = grad + (b * p * log_p).masked_fill(p == 0, 0.0)
    if c is not None:
        grad = grad + c * torch.where(is_target, -log_p.expm1(), -p)
    if u is not None:
        grad = grad + (u if weights is None else u * weights).masked_fill(is_target, 0.0)
    return (grad * head.derivative(x)).masked_fill(~scored, 0.0)


def _sum_duplicates(classes: Tensor, values: Tensor) -> Tensor:
    """Return for each entry [rows, K] the sum over the entries of its row with the same class."""
    ordered, order = classes.sort(-1)
    run = torch.zeros_like(ordered)
    run[:, 1:] = (ordered[:, 1:] != ordered[:, :-1]).cumsum(-1)
    sums = torch.zeros_like(values).scatter_add_(-1, run, values.gather(-1, order))
    return torch.empty_like(values).scatter_(-1, order, sums.gather(-1, run))


def is_first_occurrence(indices: Tensor) -> Tensor:
    """Return for each entry [..., K] whether no earlier entry of its row has the same class."""
    ordered, order = indices.sort(dim=-1, stable=True)
    first = torch.ones_like(ordered, dtype=torch.bool)
    first[..., 1:] = ordered[..., 1:] != ordered[..., :-1]
    return torch.empty_like(first).scatter_(-1, order, first)
