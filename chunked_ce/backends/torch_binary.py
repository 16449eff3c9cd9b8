"""Binary cross-entropy in plain PyTorch, block by block. Only the result has N x V elements.

    loss = w [(1 - y) softplus(z) + v y softplus(-z)]
    slope = w [(1 - y) sigmoid(z) - v y sigmoid(-z)]

No term cancels for a label y of 0 or 1.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from ..core.head import COMPUTE_DTYPE, sum_dtype
from .torch_blocks import blocks


def loss_sum(
    input: Tensor,
    labels: Tensor | None,  # as input
    weight: Tensor | None,
    pos_weight: Tensor | None,
    left_out: Tensor | None,  # [rows, K]
) -> Tensor:
    """Return the sum [] of all losses but those left out."""
    sum = torch.zeros((), dtype=sum_dtype(input.device), device=input.device)
    for rows, columns, (x, *terms) in blocks(input.shape[-1], input, labels, weight, pos_weight):
        loss = _losses(x, *terms)
        if left_out is not None:
            row, k = ((left_out[rows] >= columns.start) & (left_out[rows] < columns.stop)).nonzero(
                as_tuple=True
            )
            loss[row, left_out[rows][row, k] - columns.start] = 0.0
        sum += loss.sum()
    return sum.to(COMPUTE_DTYPE[input.dtype])


def elementwise(
    input: Tensor, labels: Tensor | None, weight: Tensor | None, pos_weight: Tensor | None
) -> Tensor:
    """Return the loss of each logit."""
    result = torch.empty_like(input, dtype=COMPUTE_DTYPE[input.dtype])
    for _, _, (out, x, *terms) in blocks(
        input.shape[-1], result, input, labels, weight, pos_weight
    ):
        out.copy_(_losses(x, *terms))
    return result


def gradient(
    input: Tensor,
    labels: Tensor | None,
    weight: Tensor | None,
    pos_weight: Tensor | None,
    upstream: Tensor,  # shape of input; expanded if it is one number
) -> Tensor:
    grad = torch.empty_like(input)
    for _, _, (out, up, x, *terms) in blocks(
        input.shape[-1], grad, upstream, input, labels, weight, pos_weight
    ):
        z = x.to(COMPUTE_DTYPE[x.dtype])
        negative, positive = _factors(z, *terms)
        out.copy_((negative * z.sigmoid() - positive * z.neg().sigmoid_()).mul_(up))
    return grad


def _losses(x: Tensor, *terms: Tensor | None) -> Tensor:
    """Return the losses, with softplus(z) = max(z, 0) + small, small = log(1 + exp(-|z|))."""
    z = x.to(COMPUTE_DTYPE[x.dtype])
    negative, positive = _factors(z, *terms)
    small = logsigmoid(z.abs()).neg_()
    # A factor of 0 times an infinite loss is 0.
    loss = ((small + z.clamp(min=0.0)) * negative).masked_fill_(negative == 0, 0.0)
    loss += ((small - z.clamp(max=0.0)) * positive).masked_fill_(positive == 0, 0.0)
    return loss.masked_fill_(z.isnan(), torch.nan)


def _factors(
    z: Tensor, labels: Tensor | None, weight: Tensor | None, pos_weight: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return w (1 - y) and w v y. 1 - y is computed before an fp64 label is rounded."""
    y = torch.zeros_like(z) if labels is None else labels
    y = y.to(torch.promote_types(y.dtype, z.dtype))
    negative, positive = (1.0 - y).to(z.dtype), y.to(z.dtype)
    if pos_weight is not None:
        positive = positive * pos_weight.to(z.dtype)
    if weight is not None:
        negative, positive = negative * weight.to(z.dtype), positive * weight.to(z.dtype)
    return negative, positive
