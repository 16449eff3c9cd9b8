"""Binary cross-entropy in plain PyTorch: blocks that stay in cache, nothing of N x V but the
result."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from ..core.head import compute_dtype
from .row_blocks import Block, blocks, two_dimensional
from .torch import DEVICE_ELEMENTS

# 512 KiB of fp32: what a block's operations allocate comes from memory just freed.
CACHED_ELEMENTS = 1 << 17


def total(
    input: Tensor,
    labels: Tensor | None,  # as input
    weight: Tensor | None,
    pos_weight: Tensor | None,
    left_out: Tensor | None,  # [rows, K]
) -> Tensor:
    """[] sum of all losses but those left out."""
    dtype = compute_dtype(input.dtype)
    sum = torch.zeros((), dtype=torch.float64, device=input.device)
    for block, x, (y, w, v) in _walk(input, labels, weight, pos_weight):
        loss = losses(x.to(dtype), y, w, v)
        if left_out is not None:
            _zero_at(loss, block.of_rows(left_out), block.start, block.stop)
        sum += loss.sum()
    return sum.to(dtype)


def elementwise(
    input: Tensor, labels: Tensor | None, weight: Tensor | None, pos_weight: Tensor | None
) -> Tensor:
    """The loss of each logit."""
    out = torch.empty_like(input, dtype=compute_dtype(input.dtype))
    for block, x, (y, w, v) in _walk(input, labels, weight, pos_weight):
        part = block.of(out)
        part.copy_(losses(x.to(out.dtype), y, w, v).view(part.shape))
    return out


def gradient(
    input: Tensor,
    labels: Tensor | None,
    weight: Tensor | None,
    pos_weight: Tensor | None,
    upstream: Tensor,  # as input, expanded where it is one number
) -> Tensor:
    grad = torch.empty_like(input)
    dtype = compute_dtype(input.dtype)
    for block, x, (y, w, v) in _walk(input, labels, weight, pos_weight):
        part = block.of(grad)
        slope = slopes(x.to(dtype), y, w, v)
        part.copy_(slope.mul_(two_dimensional(block.of(upstream))).view(part.shape))
    return grad


def losses(
    z: Tensor, labels: Tensor | None, weight: Tensor | None, pos_weight: Tensor | None
) -> Tensor:
    """w [(1 - y) softplus(z) + v y softplus(-z)], of which no term cancels for y 0 or 1.

    softplus(z) = max(z, 0) + small, small = log(1 + exp(-|z|)), and without v the rest is
    z (1 - y) where z >= 0, -z y where z < 0: z times 0 for a right answer.
    """
    size = z.abs()
    infinite = z.device.type != "cpu" or not bool(size.amax() < math.inf)  # 0 inf would be NaN
    small = logsigmoid(size).neg_()
    if labels is None:
        loss = small.add_(z.clamp(min=0.0))
    elif pos_weight is None:
        factor = _error_of_sign(z, labels)
        rest = z * factor
        loss = small.add_(rest.masked_fill_(factor == 0, 0.0) if infinite else rest)
    else:
        positive, negative = labels.to(z.dtype) * pos_weight, _lack_of_one(labels, z)
        below = _times(small - z.clamp(max=0.0), positive)
        loss = _times(small.add_(z.clamp(min=0.0)), negative).add_(below)
    return loss if weight is None else _times(loss, weight)


def slopes(
    z: Tensor, labels: Tensor | None, weight: Tensor | None, pos_weight: Tensor | None
) -> Tensor:
    """w [(1 - y) sigmoid(z) - v y sigmoid(-z)], of which no term cancels for y 0 or 1."""
    if labels is None:
        slope = z.sigmoid()
    elif pos_weight is None:
        small = z.abs().neg_().sigmoid_()
        slope = _error_of_sign(z, labels).sub_(small.copysign_(z))
    else:
        slope = z.sigmoid().mul_(_lack_of_one(labels, z))
        slope.sub_(z.neg().sigmoid_().mul_(labels.to(z.dtype) * pos_weight))
    return slope if weight is None else slope.mul_(weight)


def _error_of_sign(z: Tensor, labels: Tensor) -> Tensor:
    """[z >= 0] - y: 0 where the sign of z says what y says."""
    y = labels.to(torch.promote_types(labels.dtype, z.dtype))
    return torch.where(z.signbit(), -y, 1.0 - y).to(z.dtype)


def _lack_of_one(labels: Tensor, z: Tensor) -> Tensor:
    """1 - y: of a label in fp64 near 1 with the digits that rounding to z's dtype would take."""
    y = labels.to(torch.promote_types(labels.dtype, z.dtype))
    return (1.0 - y).to(z.dtype)


def _times(loss: Tensor, weight: Tensor) -> Tensor:
    """In place; what has no weight costs nothing, even if that is infinite."""
    return loss.mul_(weight).masked_fill_(weight == 0, 0.0)


def _walk(
    input: Tensor, *others: Tensor | None
) -> Iterator[tuple[Block, Tensor, list[Tensor | None]]]:
    """Blocks of logits [R, columns], and of what is given beside them."""
    size = CACHED_ELEMENTS if input.device.type == "cpu" else DEVICE_ELEMENTS
    for block in blocks(input.shape[:-1], input.shape[-1], size):
        parts = [None if t is None else two_dimensional(block.of(t)) for t in others]
        yield block, two_dimensional(block.of(input)), parts


def _zero_at(loss: Tensor, columns: Tensor, start: int, stop: int) -> None:
    inside = (columns >= start) & (columns < stop)
    row, k = inside.nonzero(as_tuple=True)
    loss[row, columns[row, k] - start] = 0.0
