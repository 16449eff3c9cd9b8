"""The plain-PyTorch streaming backend: for any device, with nothing built.

Logits are walked in blocks; rows longer than a block are split and merged. Nothing of N x V
elements is allocated but the gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .. import checks
from ..core.gradient import Coefficients, RowGradient, row_gradient, token_loss_coefficients
from ..core.head import Head, compute_dtype
from ..core.row_stats import (
    UNIFORM,
    ClassWeights,
    Part,
    RowStatistics,
    blank,
    concatenate,
    finish,
    is_scored,
    merge,
    token_loss,
)
from .row_blocks import Block, blocks, flat, mergeable, two_dimensional
from .torch_blocks import LONG_ROW, block_gradient, block_statistics

CACHED_ELEMENTS = LONG_ROW  # 2 MiB of fp32
DEVICE_ELEMENTS = 1 << 26  # an accelerator wants few launches; 256 MiB


class Options(NamedTuple):
    vocab_size: int
    head: Head
    shard: bool = False  # a target outside of these classes lies in another shard


def row_statistics(
    input: Tensor,
    target: Tensor,
    ignore_index: int,
    options: Options,
    weights: ClassWeights = UNIFORM,
    **wanted: bool,  # entropy, mean_logprob, rank, argmax
) -> RowStatistics:
    """The statistics of every row, flat."""
    x = _flat(input, weights.prob)
    target, skipped, broken = _targets(target, ignore_index, options)
    index = target[:, None] if x.dim() == 2 else target.view(*x.shape[:-1], 1)
    target_logit = options.head.apply_(x.gather(-1, index).to(compute_dtype(x.dtype))).view(-1)
    if broken is not None:
        target_logit.masked_fill_(broken, float("nan"))
    rows = _by_maximum(x, target, target_logit, options, wanted, weights)
    if skipped is None:
        return rows
    low = rows.lse_low.masked_fill(skipped, 0.0)
    return rows._replace(stats=blank(rows.stats, skipped), lse_low=low)


def row_part(
    input: Tensor,
    target: Tensor,
    ignore_index: int,
    options: Options,
    **wanted: bool,  # entropy, mean_logprob, rank, argmax
) -> tuple[Part, Tensor]:
    """Of every row the sums over a shard's classes, and the target's logit, -inf if elsewhere."""
    x = flat(input)
    target, _, _ = _targets(target, ignore_index, options)
    index = target.clamp(min=0).view(*x.shape[:-1], 1)
    target_logit = options.head.apply_(x.gather(-1, index).to(compute_dtype(x.dtype))).view(-1)
    target_logit.masked_fill_(target < 0, -math.inf)
    target_logit.masked_fill_(target_logit == math.inf, math.nan)  # as in _by_maximum
    part = _sum_rows(x, target, target_logit, options, wanted)
    return part, target_logit


def logits_gradient(
    input: Tensor,
    target: Tensor,
    lse: Tensor,
    logprob: Tensor,
    lse_low: Tensor,
    coefficients: Coefficients,
    ignore_index: int,
    options: Options,
    weights: ClassWeights = UNIFORM,
    *,
    inplace: bool,
) -> Tensor:
    """dL/dinput, in a new tensor or over `input`."""
    out = input if inplace else torch.empty_like(input)
    x = _flat(input, out, weights.prob)
    grad = x if inplace else _flat(out, input, weights.prob)
    target, skipped, _ = _targets(target, ignore_index, options)
    rows = row_gradient(logprob, lse_low, coefficients).of((-lse_low).exp()).as_columns()
    target, reference = target[:, None], lse[:, None]
    weights_of = _weights_by_block(x, weights, options)
    if options.vocab_size < grad.shape[-1]:
        grad[..., options.vocab_size :].zero_()
    elements = _elements_per_block(x)
    for block in blocks(x.shape[:-1], options.vocab_size, elements, mergeable(x, grad)):
        column, inside = _column(target, block, options)
        of_rows = RowGradient(*(None if r is None else block.of_rows(r) for r in rows))  # type: ignore[arg-type]
        of_block = block_gradient(
            two_dimensional(block.of(x)), column, inside, block.of_rows(reference), of_rows,
            options.head, _on_host(x), weights_of(block) if rows.u is not None else None,
        )  # fmt: skip
        if skipped is not None:
            of_block.masked_fill_(block.of_rows(skipped)[:, None], 0.0)
        out_block = block.of(grad)
        out_block.copy_(of_block.view(out_block.shape))
    return out


def loss_and_gradient(
    input: Tensor,
    target: Tensor,
    token_weight: Tensor | None,
    divisor: Tensor | None,
    label_smoothing: float,
    z_loss_weight: float,
    ignore_index: int,
    options: Options,
    *,
    inplace: bool,
) -> tuple[Tensor, Tensor]:
    """Each token's loss before its weight, flat, and the gradient of loss * token_weight / divisor.

    That in a new tensor or over `input`. In two passes.
    """
    stats, lse_low, _ = row_statistics(
        input, target, ignore_index, options,
        entropy=False, mean_logprob=label_smoothing > 0, rank=False, argmax=False,
    )  # fmt: skip
    weight = torch.ones_like(stats.lse)
    if token_weight is not None:
        weight = weight * token_weight.reshape(-1)
    if divisor is not None:
        weight = weight / divisor
    numbers = token_loss_coefficients(
        stats, weight, label_smoothing, z_loss_weight, options.vocab_size
    )
    grad = logits_gradient(
        input, target, stats.lse, stats.logprob, lse_low, numbers, ignore_index, options,
        inplace=inplace,
    )  # fmt: skip
    return token_loss(stats, label_smoothing, z_loss_weight), grad


def scale_(grad: Tensor, upstream: Tensor) -> None:
    """grad [..., V] *= upstream [...] or []."""
    grad = flat(grad)
    rows = grad.shape[:-1]
    factor = upstream.to(compute_dtype(grad.dtype))
    factor = factor.expand(rows) if factor.dim() == 0 else factor.reshape(rows)
    for block in blocks(grad.shape[:-1], grad.shape[-1], CACHED_ELEMENTS):
        part = block.of(grad)
        by = factor if block.where is None else factor[block.where]
        part.copy_((part * by[..., None]).masked_fill_(part == 0, 0.0))  # ignored rows stay 0


def _by_maximum(
    x: Tensor,
    target: Tensor,
    target_logit: Tensor,
    options: Options,
    wanted: dict[str, bool],
    weights: ClassWeights,
) -> RowStatistics:
    # A target of +inf makes its row NaN, as torch has it; log(1 + exp(-inf)) would make the loss 0.
    target_logit.masked_fill_(target_logit == float("inf"), float("nan"))
    part = _sum_rows(x, target, target_logit, options, wanted, weights)
    at_target = weights.at(target, part.s.dtype) if wanted["mean_logprob"] else None
    return finish(part, target_logit, target, options.vocab_size, at_target)


def _sum_rows(
    x: Tensor,
    target: Tensor,
    target_logit: Tensor,
    options: Options,
    wanted: dict[str, bool],
    weights: ClassWeights = UNIFORM,
) -> Part:
    """The sums of every row over all classes but the target."""
    weights_of = _weights_by_block(x, weights, options)
    target, target_logit = target[:, None], target_logit[:, None]
    parts: list[Part] = []
    row_part: Part | None = None
    for block in blocks(x.shape[:-1], options.vocab_size, _elements_per_block(x), mergeable(x)):
        column, inside = _column(target, block, options)
        part = block_statistics(
            two_dimensional(block.of(x)), column, inside, block.of_rows(target_logit), options.head,
            _on_host(x), weights_of(block), **wanted,
        )  # fmt: skip
        if part.argmax is not None:
            part = part._replace(argmax=part.argmax + block.start)
        row_part = part if row_part is None else merge(row_part, part)
        if block.stop == options.vocab_size:
            parts.append(row_part)
            row_part = None
    return concatenate(parts)


def _flat(x: Tensor, *others: Tensor | None) -> Tensor:
    """[rows, V] where its strides and those of the others allow it, else as it came."""
    flattened = flat(x)
    return flattened if all(t is None or flat(t).dim() == 2 for t in others) else x


def _weights_by_block(
    x: Tensor, weights: ClassWeights, options: Options
) -> Callable[[Block], Tensor | None]:
    """[R, columns] class weights of a block, in memory of their own; None: 1."""
    if weights.are_one:
        return lambda block: None
    dtype = compute_dtype(x.dtype)
    weight = None if weights.weight is None else weights.weight.to(dtype)
    prob = None if weights.prob is None else weights.prob.view(*x.shape[:-1], -1)

    def of_block(block: Block) -> Tensor:
        of_classes = None if weight is None else weight[block.start : block.stop]
        if prob is None:
            assert of_classes is not None
            return of_classes.expand(two_dimensional(block.of(x)).shape).clone()
        w = two_dimensional(block.of(prob)).to(dtype, copy=True).mul_(weights.scale)
        w = w.add_(weights.shift) if weights.shift else w
        return w if of_classes is None else w.mul_(of_classes)

    return of_block


def _elements_per_block(x: Tensor) -> int:
    return CACHED_ELEMENTS if _on_host(x) else DEVICE_ELEMENTS


def _targets(
    target: Tensor, ignore_index: int, options: Options
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(targets, the rows ignored, the rows out of range).

    The targets have some class in every row, so that gather needs no branch; of a shard, -1 where
    that lies elsewhere. All [rows]; None where there are none.
    """
    target, vocab_size = target.reshape(-1).long(), options.vocab_size
    if options.shard:
        ignored = ~is_scored(target, ignore_index)
        return target.masked_fill((target < 0) | (target >= vocab_size), -1), ignored, None
    if _on_host(target) and target.numel():  # looking costs nothing here
        low, high = map(int, target.aminmax())
        if low >= 0 and high < vocab_size and not low <= ignore_index <= high:
            return target, None, None
        checks.targets_in_range(target, vocab_size, ignore_index)
    ignored = ~is_scored(target, ignore_index)
    if _on_host(target):
        return target.masked_fill(ignored, 0), ignored, None
    broken = ((target < 0) | (target >= vocab_size)) & ~ignored
    return target.masked_fill(ignored | broken, 0), ignored, broken


def _on_host(x: Tensor) -> bool:
    """Whether reading a value of `x` makes nothing wait, and exp is slow on subnormal results."""
    return x.is_cpu


def _column(
    target: Tensor,  # [rows, 1]
    block: Block,
    options: Options,
) -> tuple[Tensor, Tensor | None]:
    """The targets' columns in a block, and which are inside it when it is a piece of a row."""
    column = block.of_rows(target)
    if block.stop - block.start == options.vocab_size and not options.shard:
        return column, None
    inside = (column >= block.start) & (column < block.stop)
    return (column - block.start).clamp(0, block.stop - block.start - 1), inside
