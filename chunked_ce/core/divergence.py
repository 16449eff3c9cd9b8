"""Divergences of two distributions over the vocabulary, from two rows of logits.

With p = softmax(z / T) of the student, q = softmax(y / T) of the teacher and d = log q - log p:

    forward  KL(q‖p) = Σ q f(d)                     gradient in z / T: p - q
    reverse  KL(p‖q) = Σ p f(-d)                    p (-d - KL(p‖q))
    jsd      beta KL(q‖m) + (1 - beta) KL(p‖m)      (1 - beta) p (log p - log m - KL(p‖m))

with the mixture m = beta q + (1 - beta) p (Agarwal et al., arXiv:2306.13649). Each class adds
f(d) = d - 1 + exp(-d) and not d: -1 + exp(-d) sums to 0 over a row, and f is never below 0. So
nothing cancels, and the divergence of two nearly equal rows keeps its digits.

d is the difference of the logits less that of their lse, which keeps the digits of equal logits.
Where one row lies far above the other, each is taken from its own maximum first: a common offset
of one row costs no digits.
"""

from __future__ import annotations

from math import factorial
from typing import NamedTuple

import torch
from torch import Tensor

from .head import sum_dtype

KINDS = ("forward", "reverse", "jsd")
FAR_APART = 16.0  # maxima that differ by more: z and y are taken from them
_SERIES = tuple(1.0 / factorial(n) for n in range(2, 14))


class Divergence(NamedTuple):
    """Which divergence: its kind, the teacher's share of the mixture, the temperature."""

    kind: str
    beta: float
    temperature: float


class PairStats(NamedTuple):
    """What a loss of two rows and its gradient need, [rows] each. Ignored rows hold 0."""

    loss: Tensor
    student_kl: Tensor  # KL(p‖q), of "jsd" KL(p‖m); 0 for "forward"
    max: Tensor  # of z
    log_sum: Tensor  # log Σ exp((z - max) / T)
    teacher_max: Tensor
    teacher_log_sum: Tensor
    shift: Tensor  # lse of y / T less that of z / T, both of logits less their bases

    def masked(self, ignored: Tensor | None) -> PairStats:
        """Return the statistics with 0 where a row is ignored."""
        if ignored is None:
            return self
        return PairStats(*(t.masked_fill(ignored, 0.0) for t in self))


class LogProbs(NamedTuple):
    """log p, log q and their difference d, which has digits that the two have lost."""

    p: Tensor
    q: Tensor
    d: Tensor


def bases(max: Tensor, teacher_max: Tensor) -> tuple[Tensor, Tensor]:
    """Return what z and what y are less by, before d is made of them."""
    apart = (teacher_max - max).abs() > FAR_APART
    return max.masked_fill(~apart, 0.0), teacher_max.masked_fill(~apart, 0.0)


def shift_of(
    max: Tensor, log_sum: Tensor, teacher_max: Tensor, teacher_log_sum: Tensor, temperature: float
) -> Tensor:
    """Return `PairStats.shift` in the dtype of sums, which is wider than that of maxima."""
    base, teacher_base = bases(max, teacher_max)
    wide = log_sum.dtype
    above = (teacher_max.to(wide) - teacher_base) - (max.to(wide) - base)
    return above / temperature + (teacher_log_sum - log_sum)


def merge_shards(parts: PairStats, how: Divergence) -> PairStats:
    """Return the statistics [rows] of rows whose classes lie on several shards [shards, rows].

    A shard is a class of the row of shards: with a and b its shares of p and of q,
    KL(q‖p) = KL(b‖a) + Σ b KL(q on the shard‖p on the shard), each shard's softmax its own.
    Shares carry the rounding of their log-sums, so a divergence D is off by 1e-6 sqrt(D) in fp32.
    The mixture of "jsd" is another on each shard; its sums are NaN until they are made anew.
    """
    dtype, wide = parts.max.dtype, sum_dtype(parts.max.device)
    parts = PairStats(*(t.to(wide) for t in parts))
    most, teacher_most = parts.max.amax(0), parts.teacher_max.amax(0)
    log_a = (parts.max - most) / how.temperature + parts.log_sum
    log_b = (parts.teacher_max - teacher_most) / how.temperature + parts.teacher_log_sum
    log_sum, teacher_log_sum = log_a.logsumexp(0), log_b.logsumexp(0)
    norms = (most, log_sum, teacher_most, teacher_log_sum)
    shift = shift_of(*norms, temperature=how.temperature)
    loss = torch.full_like(most, torch.nan)
    if how.kind != "jsd":
        log_a, log_b = log_a - log_sum, log_b - teacher_log_sum
        among, _ = class_terms(LogProbs(log_a, log_b, log_b - log_a), how)
        share = (log_b if how.kind == "forward" else log_a).exp()
        nothing = (log_a == -torch.inf) | (log_b == -torch.inf)  # no softmax on the shard
        loss = (among + (share * parts.loss).masked_fill(nothing, 0.0)).sum(0)
    return PairStats(*(t.to(dtype) for t in (loss, loss, *norms, shift)))


def log_probs(
    z: Tensor,  # [R, C]
    y: Tensor,  # [R, C]
    stats: PairStats,  # [R, 1] each
    temperature: float,
) -> LogProbs:
    base, teacher_base = bases(stats.max, stats.teacher_max)
    return LogProbs(
        (z - stats.max) / temperature - stats.log_sum,
        (y - stats.teacher_max) / temperature - stats.teacher_log_sum,
        ((y - teacher_base) - (z - base)) / temperature - stats.shift,
    )


def class_terms(logs: LogProbs, how: Divergence) -> tuple[Tensor, Tensor]:
    """Return what each class adds to the loss and to `student_kl`."""
    p, q = logs.p.exp(), logs.q.exp()
    if how.kind == "forward":
        return _terms(q, logs.d, p), torch.zeros_like(p)
    if how.kind == "reverse":
        loss = _terms(p, -logs.d, q)
        return loss, loss
    of_student, of_teacher = _above_mixture(logs.d, how.beta)
    mixture = how.beta * q + (1.0 - how.beta) * p
    student_kl = _terms(p, of_student, mixture)
    loss = how.beta * _terms(q, of_teacher, mixture) + (1.0 - how.beta) * student_kl
    return loss, student_kl


def class_slopes(logs: LogProbs, student_kl: Tensor, how: Divergence) -> Tensor:
    """Return dL/d(z / T) of each class."""
    p = logs.p.exp()
    if how.kind == "forward":  # p - q, without cancellation where they are near
        near = -torch.expm1(logs.d)
        return torch.where(logs.d.abs() < 1.0, p * near, p - logs.q.exp())
    slope = -logs.d - student_kl
    if how.kind == "jsd":
        slope = (1.0 - how.beta) * (_above_mixture(logs.d, how.beta)[0] - student_kl)
    return torch.where(p == 0, 0.0, p * slope)


def _above_mixture(d: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """Return log p - log m and log q - log m."""
    # m is the larger of p and q times 1 + share (exp(-|d|) - 1); share: of the other one.
    share = torch.full_like(d, beta).masked_fill_(d > 0, 1.0 - beta)
    larger = -torch.log1p(share * torch.expm1(-d.abs()))
    return torch.where(d > 0, larger - d, larger), torch.where(d > 0, larger, larger + d)


def _terms(probability: Tensor, d: Tensor, other: Tensor) -> Tensor:
    """Return probability f(d), `other` being probability exp(-d), where probability is 0 too."""
    series = torch.full_like(d, _SERIES[-1])
    for term in _SERIES[-2::-1]:
        series = term - d * series
    near = probability * (d * d * series)
    far = probability * (d - 1.0) + other  # exp(-d) may be too large a number
    return torch.where(probability == 0, other, torch.where(d.abs() < 0.5, near, far))
