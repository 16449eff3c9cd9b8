"""The plain-PyTorch streaming backend: the CPU's default, and any device without Triton.

Logits are walked in blocks that stay in cache, through one buffer; rows longer than a block are
split and merged. Nothing of N x V elements is allocated but the gradient.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from functools import cache
from itertools import product
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import checks
from .blocks import (
    Head,
    block_gradient,
    block_statistics,
    block_sums,
    compute_dtype,
    lowest_exponent,
)
from .huge_pages import advise_huge_pages
from .stats import (
    Coefficients,
    Part,
    RowGradient,
    TokenStats,
    finish,
    finish_from_zero,
    is_scored,
    merge,
    row_gradient,
)

# 4 MiB of fp32: with less the calls cost more, with more the cache misses.
_CACHED_ELEMENTS = 1 << 20
_COMPILED_ELEMENTS = 1 << 23  # a compiled block keeps nothing in cache, and has guards to check
_DEVICE_ELEMENTS = 1 << 26  # an accelerator wants few launches; 256 MiB

# Where sums of exp z, no maximum subtracted, and their ratio to the target's stay normal numbers.
_SMALLEST_SUM, _LARGEST_SUM, _LARGEST_TARGET = 1e-20, 1e18, 40.0


class Options(NamedTuple):
    vocab_size: int
    head: Head
    compiled: bool


class Block(NamedTuple):
    where: tuple[int | slice, ...]  # into the leading dimensions
    rows: slice  # the same rows, counted flat
    start: int  # columns start to stop
    stop: int

    def of(self, x: Tensor) -> Tensor:
        """[R, columns]; [..., columns] where the leading dimensions do not merge."""
        x = x[self.where]
        return x if self.stop - self.start == x.shape[-1] else x[..., self.start : self.stop]


def row_statistics(
    input: Tensor,
    target: Tensor,
    ignore_index: int,
    options: Options,
    **wanted: bool,  # entropy, mean_logprob, rank, argmax
) -> tuple[TokenStats, Tensor]:
    """The statistics of every row, flat, and what rounding took from lse."""
    x = _flat(input)
    target, skipped, broken = _targets(target, ignore_index, options.vocab_size)
    index = target[:, None] if x.dim() == 2 else target.view(*x.shape[:-1], 1)
    target_logit = options.head.apply_(x.gather(-1, index).to(compute_dtype(x.dtype))).view(-1)
    if broken is not None:
        target_logit.masked_fill_(broken, float("nan"))
    if _on_host(x) and options.compiled and not any(wanted.values()):
        stats, lse_low = _less_target(x, target, target_logit, skipped, options, wanted)
    elif _on_host(x) and not (wanted["entropy"] or wanted["mean_logprob"] or wanted["argmax"]):
        stats, lse_low = _from_zero(x, target, target_logit, skipped, options, wanted)
    else:
        stats, lse_low = _by_maximum(x, target, target_logit, options, wanted)
    if skipped is None:
        return stats, lse_low
    return _blank(stats, skipped), lse_low.masked_fill(skipped, 0.0)


def logits_gradient(
    input: Tensor,
    target: Tensor,
    lse: Tensor,
    logprob: Tensor,
    lse_low: Tensor,
    coefficients: Coefficients,
    ignore_index: int,
    options: Options,
    *,
    inplace: bool,
) -> Tensor:
    """dL/dinput, in a new tensor or over `input`."""
    out = input if inplace else advise_huge_pages(torch.empty_like(input))
    x, grad = _flat(input), _flat(out)
    if x.dim() != grad.dim():
        x, grad = input, out
    target, skipped, _ = _targets(target, ignore_index, options.vocab_size)
    rows = row_gradient(logprob, lse_low, coefficients)
    rows = RowGradient(*(None if r is None else r[:, None] for r in rows))  # type: ignore[arg-type]
    lse, target = lse[:, None], target[:, None]
    clamp = _on_host(x) and _sample(x, lse, options)[0] < lowest_exponent(lse.dtype)
    gradient = _compile(_write_gradient) if options.compiled else _write_gradient
    elements = _elements_per_block(x, options)
    buffer = None if options.compiled else _buffer(x, options, elements)
    if options.vocab_size < grad.shape[-1]:
        grad[..., options.vocab_size :].zero_()
    # Compiled, a comparison per element costs more than a scatter afterwards.
    apart = options.compiled and x.dim() == 2 and options.head.is_identity
    for block in _blocks(x.shape[:-1], options.vocab_size, elements):
        column, inside = _column(target, block, options)
        skip = None if skipped is None else skipped[block.rows, None]
        of_rows, out_block = rows.of(block.rows), block.of(grad)
        gradient(
            block.of(x),
            None if apart and inside is None else column,
            inside,
            lse[block.rows],
            of_rows,
            options.head,
            buffer,
            clamp,
            skip,
            out_block,
        )
        if apart and inside is None:
            at_target = (
                of_rows.at_target if skip is None else of_rows.at_target.masked_fill(skip, 0)
            )
            out_block.scatter_(1, column, at_target.to(out_block.dtype))
    return out


def _from_zero(
    x: Tensor,
    target: Tensor,
    target_logit: Tensor,
    skipped: Tensor | None,
    options: Options,
    wanted: dict[str, bool],
) -> tuple[TokenStats, Tensor]:
    """From sums of exp z itself: one pass, and no maximum to find or subtract.

    Rows in which that leaves the range of normal numbers (logits beyond 40, inf, NaN, a target so
    likely that all others vanish) are done again from their maximum.
    """
    lowest, highest = _sample(x, None, options)
    clamp = max(-lowest, highest) > -lowest_exponent(target_logit.dtype)
    part = _sum_rows(x, target, target_logit, options, wanted, clamp, by_maximum=False)
    stats, lse_low = finish_from_zero(part, target_logit)
    smallest, largest = map(float, part.s.aminmax())
    first, last = map(float, target_logit.aminmax())
    if smallest > _SMALLEST_SUM and largest < _LARGEST_SUM and max(-first, last) < _LARGEST_TARGET:
        return stats, lse_low
    fine = (part.s > _SMALLEST_SUM) & (part.s < _LARGEST_SUM)
    fine &= target_logit.abs() < _LARGEST_TARGET
    _redo(fine, stats, lse_low, x, target, target_logit, skipped, options, wanted)
    return stats, lse_low


def _less_target(
    x: Tensor,
    target: Tensor,
    target_logit: Tensor,
    skipped: Tensor | None,
    options: Options,
    wanted: dict[str, bool],
) -> tuple[TokenStats, Tensor]:
    """From sums over all classes, less the target's term: the loop a compiler makes best.

    The difference is exact enough while the target is the less likely half; the other rows are
    done again.
    """
    sums = _compile(block_sums)
    part = _merge_blocks(
        x,
        options,
        _COMPILED_ELEMENTS,
        lambda block, block_x: Part(*sums(block_x, options.head), *[None] * 5),
    )
    others = part.s - (target_logit - part.m).exp()
    fine = (others > 0.5 * part.s) & target_logit.isfinite()
    stats, lse_low = finish(part._replace(s=others), target_logit, target, options.vocab_size)
    _redo(fine, stats, lse_low, x, target, target_logit, skipped, options, wanted)
    return stats, lse_low


def _redo(
    fine: Tensor,
    stats: TokenStats,
    lse_low: Tensor,
    x: Tensor,
    target: Tensor,
    target_logit: Tensor,
    skipped: Tensor | None,
    options: Options,
    wanted: dict[str, bool],
) -> None:
    """Overwrites the statistics of rows that are not `fine`, nor skipped, with those by maximum."""
    again = ~fine if skipped is None else ~(fine | skipped)
    if not again.any():
        return
    plain = options._replace(compiled=False)
    for rows in again.nonzero()[:, 0].split(max(1, _CACHED_ELEMENTS // options.vocab_size)):
        some = x[torch.unravel_index(rows, x.shape[:-1])]
        redone, low = _by_maximum(some, target[rows], target_logit[rows], plain, wanted)
        for whole, changed in zip((*stats, lse_low), (*redone, low), strict=True):
            if whole is not None and changed is not None:
                whole[rows] = changed


def _by_maximum(
    x: Tensor, target: Tensor, target_logit: Tensor, options: Options, wanted: dict[str, bool]
) -> tuple[TokenStats, Tensor]:
    # A target of +inf makes its row NaN, as torch has it; log(1 + exp(-inf)) would make the loss 0.
    target_logit.masked_fill_(target_logit == float("inf"), float("nan"))
    part = _sum_rows(x, target, target_logit, options, wanted, _on_host(x), by_maximum=True)
    return finish(part, target_logit, target, options.vocab_size)


def _sum_rows(
    x: Tensor,
    target: Tensor,
    target_logit: Tensor,
    options: Options,
    wanted: dict[str, bool],
    clamp: bool,
    by_maximum: bool,
) -> Part:
    """The sums of every row over all classes but the target."""
    statistics = _compile(block_statistics) if options.compiled else block_statistics
    elements = _elements_per_block(x, options)
    buffer = None if options.compiled else _buffer(x, options, elements)
    target, target_logit = target[:, None], target_logit[:, None]

    def of_block(block: Block, block_x: Tensor) -> Part:
        column, inside = _column(target, block, options)
        z_target = target_logit[block.rows]
        work = None if buffer is None else _part_of(buffer, block_x)
        part: Part = statistics(
            block_x, column, inside, z_target, options.head, work, clamp, by_maximum, **wanted
        )
        return part if part.argmax is None else part._replace(argmax=part.argmax + block.start)

    return _merge_blocks(x, options, elements, of_block)


def _merge_blocks(
    x: Tensor, options: Options, elements: int, of_block: Callable[[Block, Tensor], Part]
) -> Part:
    """The sums of every row, from those of its blocks."""
    parts: list[Part] = []
    row_part: Part | None = None
    for block in _blocks(x.shape[:-1], options.vocab_size, elements):
        part = of_block(block, _two_dimensional(block.of(x)))
        row_part = part if row_part is None else merge(row_part, part)
        if block.stop == options.vocab_size:
            parts.append(row_part)
            row_part = None
    return _concatenate(parts)


def _write_gradient(
    x: Tensor,
    column: Tensor | None,
    inside: Tensor | None,
    lse: Tensor,
    rows: RowGradient,
    head: Head,
    buffer: Tensor | None,
    clamp: bool,
    skipped: Tensor | None,
    out: Tensor,
) -> None:
    work = None
    if buffer is not None:
        writable = out.dtype == buffer.dtype and out.dim() == 2 and out.stride(1) == 1
        work = out if writable else _part_of(buffer, x)
    grad = block_gradient(_two_dimensional(x), column, inside, lse, rows, head, work, clamp)
    if skipped is not None:
        grad = grad.masked_fill_(skipped, 0.0)
    if grad is not out:
        out.copy_(grad.view(out.shape))


def _flat(x: Tensor) -> Tensor:
    """[rows, V] where strides allow it without a copy, else as it came."""
    if x.dim() == 2:
        return x
    try:
        return x.view(-1, x.shape[-1])
    except RuntimeError:
        return x


def _two_dimensional(block: Tensor) -> Tensor:
    return block if block.dim() == 2 else block.reshape(-1, block.shape[-1])


def _elements_per_block(x: Tensor, options: Options) -> int:
    if not _on_host(x):
        return _DEVICE_ELEMENTS
    return _COMPILED_ELEMENTS if options.compiled else _CACHED_ELEMENTS


_scratch = threading.local()


def _buffer(x: Tensor, options: Options, elements: int) -> Tensor:
    """A block to work in.

    The CPU keeps one per thread: touching fresh pages would cost more than the arithmetic.
    """
    size = min(prod(x.shape[:-1]) * options.vocab_size, elements)
    dtype = compute_dtype(x.dtype)
    if not _on_host(x) or dtype != torch.float32:
        return torch.empty(size, dtype=dtype, device=x.device)
    kept: Tensor | None = getattr(_scratch, "buffer", None)
    if kept is None or kept.numel() < size:
        # Else it could not be written to outside of inference mode.
        with torch.inference_mode(False):
            kept = _scratch.buffer = torch.empty(elements, dtype=dtype, device=x.device)
    return kept[:size]


def _part_of(buffer: Tensor, block: Tensor) -> Tensor:
    columns = block.shape[-1]
    return buffer[: block.numel()].view(-1, columns)


def _blocks(leading: torch.Size, vocab_size: int, elements: int) -> Iterator[Block]:
    """Blocks of at most `elements`: many whole rows, or a piece of one row.

    The pieces of a row follow one another.
    """
    columns = min(vocab_size, elements)
    limit = elements // columns
    dim, inner = len(leading) - 1, 1
    while dim > 0 and inner * leading[dim] <= limit:
        inner *= leading[dim]
        dim -= 1
    step = max(1, limit // inner)
    row = 0
    for outer in product(*(range(size) for size in leading[:dim])):
        for first in range(0, leading[dim], step):
            last = min(first + step, leading[dim])
            rows = slice(row, row + (last - first) * inner)
            row = rows.stop
            for start in range(0, vocab_size, columns):
                yield Block(
                    (*outer, slice(first, last)), rows, start, min(start + columns, vocab_size)
                )


def _targets(
    target: Tensor, ignore_index: int, vocab_size: int
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(targets, the rows ignored, the rows out of range).

    The targets have some class in every row, so that gather needs no branch.
    All [rows]; None where there are none.
    """
    target = target.reshape(-1).long()
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
    return x.device.type == "cpu"


def _column(
    target: Tensor,  # [rows, 1]
    block: Block,
    options: Options,
) -> tuple[Tensor, Tensor | None]:
    """The targets' columns in a block, and which are inside it when it is a piece of a row."""
    column = target[block.rows]
    if block.stop - block.start == options.vocab_size:
        return column, None
    inside = (column >= block.start) & (column < block.stop)
    return (column - block.start).clamp(0, block.stop - block.start - 1), inside


def _sample(x: Tensor, reference: Tensor | None, options: Options) -> tuple[float, float]:
    """Least and largest of a sample of z, or of z - reference [rows, 1].

    A CPU's exp is 30 to 100 times slower where its result is subnormal: masked vocabularies. The
    sample decides whether to clamp, and only speed depends on it.
    """
    if options.compiled or x.dim() != 2:
        return -math.inf, math.inf  # clamping is free there, or a sample is not
    rows, columns = max(1, x.shape[0] // 64), max(1, options.vocab_size // 64)
    sample = x[::rows, : options.vocab_size : columns]
    if not options.head.is_identity:
        sample = options.head.apply_(sample.to(compute_dtype(x.dtype), copy=True))
    if reference is not None:
        sample = sample - reference[::rows]
    lowest, highest = sample.aminmax()
    return float(lowest), float(highest)


def _concatenate(parts: list[Part]) -> Part:
    if len(parts) == 1:
        return parts[0]
    return Part(
        *(
            torch.cat(list(f)) if isinstance(f[0], Tensor) else f[0]
            for f in zip(*parts, strict=True)
        )
    )  # type: ignore[arg-type]


def _blank(stats: TokenStats, ignored: Tensor) -> TokenStats:
    """Rows that are ignored hold 0; -1 where 0 would be a rank or a class."""
    return TokenStats(
        *(
            s if s is None else s.masked_fill(ignored, 0 if s.is_floating_point() else -1)
            for s in stats
        )  # type: ignore[arg-type]
    )


@cache
def _compile(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.no_grad()(torch.compile(function, dynamic=True))
