"""The plain-PyTorch streaming backend: the CPU's default, and any device without Triton.

Logits are walked in blocks that stay in cache, through one buffer; rows longer than a block are
split and merged. Nothing of N x V elements is allocated but the gradient.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import checks
from .blocks import (
    LONG_ROW,
    Head,
    block_gradient,
    block_statistics,
    block_sums,
    compute_dtype,
    lowest_exponent,
)
from .from_zero import all_in_range, in_range, relative_to_zero, sample
from .row_blocks import Block, Scratch, blocks, flat, mergeable, two_dimensional
from .stats import (
    UNIFORM,
    ClassWeights,
    Coefficients,
    Part,
    RowGradient,
    RowStatistics,
    blank,
    concatenate,
    finish,
    finish_from_zero,
    is_scored,
    merge,
    row_gradient,
    token_loss,
    token_loss_coefficients,
)

# 2 MiB of fp32: with less the calls cost more; with more the cache misses, which matters most where
# half precision is converted.
CACHED_ELEMENTS = LONG_ROW
# Compiled, nothing stays in cache, and each block has guards to check and threads to wait for: as
# few as there can be where loops hold nothing in full.
_COMPILED_ELEMENTS = 1 << 23
_FUSED_ELEMENTS = 1 << 27
DEVICE_ELEMENTS = 1 << 26  # an accelerator wants few launches; 256 MiB


class Options(NamedTuple):
    vocab_size: int
    head: Head
    compiled: bool
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
    if _on_host(x) and options.compiled and not any(wanted.values()):
        rows = _less_target(x, target, target_logit, skipped, options, wanted)
    elif _on_host(x) and not (wanted["entropy"] or wanted["mean_logprob"] or wanted["argmax"]):
        rows = _from_zero(x, target, target_logit, skipped, options, wanted)
    else:
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
    part = _sum_rows(x, target, target_logit, options, wanted, _on_host(x), by_maximum=True)
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
    rows = row_gradient(logprob, lse_low, coefficients)
    reference: Tensor | None = lse
    if _on_host(x) and not options.compiled and rows.slope is None:
        reference, factor = relative_to_zero(lse, lse_low)
    else:
        factor = (-lse_low).exp()
    reference = None if reference is None else reference[:, None]
    rows, target = rows.of(factor).as_columns(), target[:, None]
    lowest = lowest_exponent(lse.dtype)
    clamp = _on_host(x) and sample(x, reference, options.vocab_size, options.head)[0] < lowest
    write = _compile(_write_gradient) if options.compiled else _write_gradient
    weights_of = _weights_by_block(x, weights, options)
    if options.vocab_size < grad.shape[-1]:
        grad[..., options.vocab_size :].zero_()
    # Compiled, a comparison per element costs more than writing the targets afterwards.
    apart = options.compiled and x.dim() == 2 and options.head.is_identity
    elements = _elements_per_block(x, options)
    row_major = x.dim() == 2 and x.stride(1) == grad.stride(1) == 1
    weighted = rows.u is not None and not weights.are_one
    plain = options.head.is_identity and rows.slope is None and not weighted
    in_grad = not options.compiled and out.dtype == lse.dtype  # is where the work is done
    in_grad = in_grad and grad.dim() == 2 and grad.stride(1) == 1
    if apart and row_major and not weighted:
        elements = _FUSED_ELEMENTS
    elif in_grad and plain and _on_host(x):
        elements *= 4  # where nothing is as large as a block, what takes the time are fresh pages
    scratch = None if in_grad else _scratch(x, options, elements)
    for block in blocks(x.shape[:-1], options.vocab_size, elements, mergeable(x, grad)):
        column, inside = _column(target, block, options)
        skip = None if skipped is None else block.of_rows(skipped)[:, None]
        of_rows = RowGradient(*(None if r is None else block.of_rows(r) for r in rows))  # type: ignore[arg-type]
        out_block = block.of(grad)
        x_block = out_block if inplace else block.of(x)  # a compiler must see that they are one
        into = out_block
        if options.compiled and not row_major:  # inductor may lose what is written to such a view
            x_block = two_dimensional(x_block).clone(memory_format=torch.contiguous_format)
            into = x_block
        buffer = out_block if in_grad else None
        if scratch is not None:
            buffer = scratch.like(x_block)
        write(
            x_block,
            None if apart and inside is None else column,
            inside,
            None if reference is None else block.of_rows(reference),
            of_rows,
            options.head,
            buffer,
            clamp,
            weights_of(block) if rows.u is not None else None,
            skip,
            into,
        )
        if into is not out_block:
            out_block.copy_(into.view(out_block.shape))
        if apart and inside is None:
            at_target = of_rows.at_target if skip is None else of_rows.at_target.where(~skip, 0.0)
            row = torch.arange(column.shape[0], device=x.device)[:, None]
            out_block[row, column] = at_target.to(out_block.dtype)
    if scratch is not None:
        scratch.leave()
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

    That in a new tensor or over `input`. On the CPU memory is not what takes the time: two passes.
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


def _from_zero(
    x: Tensor,
    target: Tensor,
    target_logit: Tensor,
    skipped: Tensor | None,
    options: Options,
    wanted: dict[str, bool],
) -> RowStatistics:
    """From sums of exp z itself: one pass, and no maximum to find or subtract.

    Rows in which that leaves the range of normal numbers (logits beyond 40, inf, NaN, a target so
    likely that all others vanish) are done again from their maximum.
    """
    e_target = target_logit.exp()
    targets_are_fine = all_in_range(e_target)
    if not (targets_are_fine or in_range(e_target).any()):  # as in GPT-2: logits near -80
        return _by_maximum(x, target, target_logit, options, wanted, UNIFORM)
    lowest, highest = sample(x, None, options.vocab_size, options.head)
    clamp = max(-lowest, highest) > -lowest_exponent(target_logit.dtype)
    part = _sum_rows(x, target, target_logit, options, wanted, clamp, by_maximum=False)
    rows = finish_from_zero(part, e_target)
    if targets_are_fine and all_in_range(part.s):
        return rows
    fine = in_range(e_target) & in_range(part.s)
    _redo(fine, rows, x, target, target_logit, skipped, options, wanted)
    return rows


def _less_target(
    x: Tensor,
    target: Tensor,
    target_logit: Tensor,
    skipped: Tensor | None,
    options: Options,
    wanted: dict[str, bool],
) -> RowStatistics:
    """From sums over all classes, less the target's term: the loop a compiler makes best.

    The difference is exact enough while the target is the less likely half; the other rows are
    done again.
    """
    sums = _compile(block_sums)
    part = _merge_blocks(
        x,
        options,
        _FUSED_ELEMENTS if options.head.is_identity else _COMPILED_ELEMENTS,
        lambda block, block_x: Part(*sums(block_x, options.head), *[None] * 5),
    )
    assert part.m is not None
    others = part.s - (target_logit - part.m).exp()
    fine = (others > 0.5 * part.s) & target_logit.isfinite()
    rows = finish(part._replace(s=others), target_logit, target, options.vocab_size)
    _redo(fine, rows, x, target, target_logit, skipped, options, wanted)
    return rows


def _redo(
    fine: Tensor,
    statistics: RowStatistics,
    x: Tensor,
    target: Tensor,
    target_logit: Tensor,
    skipped: Tensor | None,
    options: Options,
    wanted: dict[str, bool],
) -> None:
    """Overwrites the statistics of rows that are not `fine`, nor skipped, with those by maximum."""
    again = ~fine if skipped is None else ~(fine | skipped)
    count = int(again.sum())
    plain = options._replace(compiled=False)
    if 2 * count > again.numel():  # all of them in place take less time than copies of many
        redone = _by_maximum(x, target, target_logit, plain, wanted, UNIFORM)
        _overwrite(statistics, again, redone, again)
    elif count:
        for rows in again.nonzero()[:, 0].split(max(1, CACHED_ELEMENTS // options.vocab_size)):
            some = x[torch.unravel_index(rows, x.shape[:-1])]
            redone = _by_maximum(some, target[rows], target_logit[rows], plain, wanted, UNIFORM)
            _overwrite(statistics, rows, redone, slice(None))


def _overwrite(
    statistics: RowStatistics, rows: Tensor, others: RowStatistics, their_rows: Tensor | slice
) -> None:
    pairs = zip(
        (*statistics.stats, statistics.lse_low), (*others.stats, others.lse_low), strict=True
    )
    for mine, theirs in pairs:
        if mine is not None and theirs is not None:
            mine[rows] = theirs[their_rows]


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
    part = _sum_rows(
        x, target, target_logit, options, wanted, _on_host(x), by_maximum=True, weights=weights
    )
    at_target = weights.at(target, part.s.dtype) if wanted["mean_logprob"] else None
    return finish(part, target_logit, target, options.vocab_size, at_target)


def _sum_rows(
    x: Tensor,
    target: Tensor,
    target_logit: Tensor,
    options: Options,
    wanted: dict[str, bool],
    clamp: bool,
    by_maximum: bool,
    weights: ClassWeights = UNIFORM,
) -> Part:
    """The sums of every row over all classes but the target."""
    statistics = _compile(block_statistics) if options.compiled else block_statistics
    elements = _elements_per_block(x, options)
    scratch = _scratch(x, options, elements)
    weights_of = _weights_by_block(x, weights, options)
    target, target_logit = target[:, None], target_logit[:, None]

    def of_block(block: Block, x_block: Tensor) -> Part:
        column, inside = _column(target, block, options)
        part: Part = statistics(
            x_block,
            column,
            inside,
            block.of_rows(target_logit),
            options.head,
            None if scratch is None else scratch.like(x_block),
            clamp,
            by_maximum,
            weights_of(block),
            **wanted,
        )
        return part if part.argmax is None else part._replace(argmax=part.argmax + block.start)

    part = _merge_blocks(x, options, elements, of_block)
    if scratch is not None:
        scratch.leave()
    return part


def _merge_blocks(
    x: Tensor, options: Options, elements: int, of_block: Callable[[Block, Tensor], Part]
) -> Part:
    """The sums of every row, from those of its blocks."""
    parts: list[Part] = []
    row_part: Part | None = None
    for block in blocks(x.shape[:-1], options.vocab_size, elements, mergeable(x)):
        part = of_block(block, two_dimensional(block.of(x)))
        row_part = part if row_part is None else merge(row_part, part)
        if block.stop == options.vocab_size:
            parts.append(row_part)
            row_part = None
    return concatenate(parts)


def _write_gradient(
    x: Tensor,
    column: Tensor | None,
    inside: Tensor | None,
    reference: Tensor | None,
    rows: RowGradient,
    head: Head,
    buffer: Tensor | None,
    clamp: bool,
    weights: Tensor | None,
    skipped: Tensor | None,
    out: Tensor,
) -> None:
    x = two_dimensional(x)
    grad = block_gradient(x, column, inside, reference, rows, head, buffer, clamp, weights)
    if skipped is not None:
        grad = grad.masked_fill_(skipped, 0.0)
    if grad is not out:
        out.copy_(grad.view(out.shape))


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


def _elements_per_block(x: Tensor, options: Options) -> int:
    if not _on_host(x):
        return DEVICE_ELEMENTS
    return _COMPILED_ELEMENTS if options.compiled else CACHED_ELEMENTS


def _scratch(x: Tensor, options: Options, elements: int) -> Scratch | None:
    if options.compiled:
        return None
    return Scratch.of_blocks(x, options.vocab_size, elements)


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


@cache
def _compile(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compiled for each dtype, option and kind of batch that comes; beyond torch's usual 8 of them
    the function would run as it is, with temporaries as large as a block."""
    many: dict[str, Any] = {}
    if "recompile_limit" in inspect.signature(torch.compile).parameters:
        many["recompile_limit"] = 64
    return torch.no_grad()(torch.compile(function, dynamic=True, **many))
