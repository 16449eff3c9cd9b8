"""Divergences of two rows of logits in plain PyTorch, block by block."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..core.divergence import (
    Divergence,
    LogProbs,
    PairStats,
    class_slopes,
    class_terms,
    log_probs,
    shift_of,
)
from ..core.head import COMPUTE_DTYPE, sum_dtype
from .torch_blocks import blocks


def pair_stats(
    input: Tensor,  # [..., V] logits of the student
    teacher: Tensor,  # [..., at least vocab_size]
    ignored: Tensor | None,  # [rows]
    how: Divergence,
    vocab_size: int,
) -> PairStats:
    """Return the statistics of every pair of rows, flat."""
    dtype, rows = COMPUTE_DTYPE[input.dtype], input.shape[:-1].numel()
    maxima = torch.full((2, rows), -torch.inf, dtype=dtype, device=input.device)
    sums = torch.zeros(2, rows, dtype=sum_dtype(input.device), device=input.device)
    for flat, _, views in blocks(vocab_size, input, teacher):
        for view, most, sum in zip(views, maxima, sums, strict=True):
            _add_exponentials(view.to(dtype), most[flat], sum[flat], how.temperature)
    (most, of_teacher), (log_sum, teacher_log_sum) = maxima, sums.log()
    norms = (most, log_sum, of_teacher, teacher_log_sum)
    shift = shift_of(*norms, temperature=how.temperature)
    stats = PairStats(*sums, *(n.to(dtype, copy=True) for n in (*norms, shift)))
    return pair_terms(input, teacher, ignored, stats, how, vocab_size)


def pair_terms(
    input: Tensor,
    teacher: Tensor,
    ignored: Tensor | None,  # [rows]
    stats: PairStats,
    how: Divergence,
    vocab_size: int,
) -> PairStats:
    """Return the statistics with `loss` and `student_kl` of these classes, flat."""
    sums = torch.zeros(2, *stats.max.shape, dtype=sum_dtype(input.device), device=input.device)
    for flat, _, views in blocks(vocab_size, input, teacher):
        terms = class_terms(_log_probs(views, stats, flat, how), how)
        for sum, term in zip(sums, terms, strict=True):
            sum[flat] += term.sum(1)
    loss, student_kl = (sum.to(stats.max.dtype, copy=True) for sum in sums)
    return stats._replace(loss=loss, student_kl=student_kl).masked(ignored)


def pair_gradient(
    input: Tensor,
    teacher: Tensor,
    ignored: Tensor | None,  # [rows]
    stats: PairStats,
    upstream: Tensor,  # [rows]
    how: Divergence,
    vocab_size: int,
    *,
    inplace: bool = False,
) -> Tensor:
    """Return dL/dinput, in a new tensor or over `input`."""
    grad = input if inplace else torch.empty_like(input)
    weight = upstream / how.temperature
    for flat, _, (x, y, out) in blocks(vocab_size, input, teacher, grad):
        logs = _log_probs((x, y), stats, flat, how)
        value = class_slopes(logs, stats.student_kl[flat, None], how) * weight[flat, None]
        out.copy_(value if ignored is None else value.masked_fill_(ignored[flat, None], 0.0))
    grad[..., vocab_size:].zero_()
    return grad


def _add_exponentials(z: Tensor, most: Tensor, sum: Tensor, temperature: float) -> None:
    """Add a block z [R, C] to the running maxima and sums [R]."""
    m = torch.maximum(most, z.amax(1))
    base = m.clamp(min=torch.finfo(z.dtype).min)  # of a row of -inf alone
    sum.mul_(((most - base) / temperature).exp_())
    sum.add_(((z - base[:, None]) / temperature).exp_().sum(1))
    most.copy_(m)


def _log_probs(views: Sequence[Tensor], stats: PairStats, flat: slice, how: Divergence) -> LogProbs:
    z, y = (view.to(stats.max.dtype) for view in views)
    return log_probs(z, y, PairStats(*(t[flat, None] for t in stats)), how.temperature)
