"""Binary cross-entropy in plain PyTorch: blocks that stay in cache, nothing of N x V but the
result."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from .backend_torch import CACHED_ELEMENTS, DEVICE_ELEMENTS
from .blocks import compute_dtype
from .huge_pages import advise_huge_pages
from .row_blocks import Block, blocks, two_dimensional


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
    out = advise_huge_pages(torch.empty_like(input, dtype=compute_dtype(input.dtype)))
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
    grad = advise_huge_pages(torch.empty_like(input))
    dtype = compute_dtype(input.dtype)
    for block, x, (y, w, v) in _walk(input, labels, weight, pos_weight):
        part = block.of(grad)
        slope = slopes(x.to(dtype), y, w, v)
        part.copy_(slope.mul_(two_dimensional(block.of(upstream))).view(part.shape))
    return grad


def losses(
    z: Tensor, labels: Tensor | None, weight: Tensor | None, pos_weight: Tensor | None
) -> Tensor:
    """w [(1 - y) softplus(z) + v y softplus(-z)], of which no term cancels for y 0 or 1."""
    if labels is None:
        loss = logsigmoid(-z).neg_()
    elif _are_hard(labels):
        loss = logsigmoid(labels.to(z.dtype).mul(2.0).sub_(1.0).mul_(z)).neg_()
        loss = loss if pos_weight is None else _times(loss, _of_label(labels, pos_weight))
    else:
        y = labels.to(z.dtype)
        positive, negative = y if pos_weight is None else y * pos_weight, 1.0 - y
        small = z.abs().neg_().exp_().log1p_()
        below = (small - z.clamp(max=0.0)).mul_(positive).masked_fill_(positive == 0, 0.0)
        above = small.add_(z.clamp(min=0.0)).mul_(negative).masked_fill_(negative == 0, 0.0)
        loss = above.add_(below)
    return loss if weight is None else _times(loss, weight)


def _times(loss: Tensor, weight: Tensor) -> Tensor:
    """In place; what has no weight costs nothing, even if that is infinite."""
    return loss.mul_(weight).masked_fill_(weight == 0, 0.0)


def slopes(
    z: Tensor, labels: Tensor | None, weight: Tensor | None, pos_weight: Tensor | None
) -> Tensor:
    """w [(1 - y) sigmoid(z) - v y sigmoid(-z)]"""
    if labels is None:
        slope = z.sigmoid()
    elif _are_hard(labels):
        sign = labels.to(z.dtype).mul(-2.0).add_(1.0)
        slope = (sign * z).sigmoid_().mul_(sign)
        slope = slope if pos_weight is None else slope.mul_(_of_label(labels, pos_weight))
    else:
        y = labels.to(z.dtype)
        positive = y if pos_weight is None else y * pos_weight
        slope = z.sigmoid().mul_(1.0 - y).sub_(z.neg().sigmoid_().mul_(positive))
    return slope if weight is None else slope.mul_(weight)


def _are_hard(labels: Tensor) -> bool:
    """Whether all are 0 or 1, which takes one exponential each; as far as looking is free."""
    return labels.device.type == "cpu" and bool(((labels == 0) | (labels == 1)).all())


def _of_label(labels: Tensor, pos_weight: Tensor) -> Tensor:
    return torch.where(labels == 0, 1.0, pos_weight)


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
