"""Statistics of rows of logits, computed from parts of the vocabulary that merge.

A part of a row has these sums over its classes, the target left out:

    m = max z    s = sum exp(z - m)    ez_sum = sum exp(z - m) (z - m)    logit_sum = sum (z - m)

Two parts merge by moving both to the larger maximum (Milakov & Gimelshein, arXiv:1805.02867). The
target is added at the end. With d = m + log s - z_target the loss is log(1 + exp(d)), so a
confident token's loss of 1e-8 is not rounded to 0. All gradients have one form, with four numbers a
row:

    dL/dz_j = p_j (a + b (z_j - lse)) + c ([j = target] - p_j) + u w_j [j != target]

w_j is 1, or the weight from :class:`ClassWeights`. Then logit_sum = sum w_j (z_j - m).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class TokenStats(NamedTuple):
    """Hold the statistics of rows of logits, each of shape [...].

    The dtype is float32 (float64 for float64 logits), or int64 for `rank` and `argmax`. Rows with
    the target `ignore_index` have 0, or -1 in `rank` and `argmax`. Statistics not requested are
    None.

    Attributes:
        lse: log Σ exp z_j.
        logprob: z_target - lse, the log-probability of the target.
        entropy: -Σ p_j log p_j, in nats.
        mean_logprob: mean over the vocabulary of z_j - lse.
        rank: number of classes that beat the target; the lower index wins a tie.
        argmax: the winning class.

    Example:
        >>> import torch, chunked_ce
        >>> stats = chunked_ce.token_stats(torch.zeros(2, 8), torch.tensor([3, -100]))
        >>> [round(x, 4) for x in stats.lse.tolist()]  # ln 8; the second row is ignored
        [2.0794, 0.0]
        >>> stats.entropy is None
        True
    """

    lse: Tensor  # log sum exp z
    logprob: Tensor  # z_target - lse
    entropy: Tensor | None = None  # -sum p log p, in nats
    mean_logprob: Tensor | None = None  # mean over the vocabulary of z_j - lse
    rank: Tensor | None = None  # number of classes that beat the target; the lower index wins a tie
    argmax: Tensor | None = None  # the winning class


LOGGED = ("entropy", "rank", "argmax")
"""Statistics that a loss returns on request, besides `lse` and `logprob`."""


def logged_flags(stats: TokenStats | None) -> dict[str, bool]:
    """Return which of LOGGED a TokenStats has."""
    return {name: stats is not None and getattr(stats, name) is not None for name in LOGGED}


def detach_stats(stats: TokenStats) -> TokenStats:
    """Return statistics that have no gradient."""
    return TokenStats(*(None if s is None else s.detach() for s in stats))  # type: ignore[arg-type]


def copy_stats(stats: TokenStats | None, found: TokenStats, names: Sequence[str]) -> None:
    """Write the statistics of `found` that have these names into the memory of `stats`."""
    for name in names if stats is not None else ():
        if (memory := getattr(stats, name)) is not None:
            memory.copy_(getattr(found, name))


class ClassWeights(NamedTuple):
    """Weights w_j = weight_j (scale prob_j + shift) in `mean_logprob` (1/V) sum w_j (z_j - lse)."""

    weight: Tensor | None = None  # [V]; None: 1
    prob: Tensor | None = None  # [..., V], the shape of the logits; None: scale prob + shift is 1
    scale: float = 1.0
    shift: float = 0.0

    def gather(self, target: Tensor, dtype: torch.dtype) -> Tensor | None:
        """Return the weight of each row's target class, [rows], or None if all weights are 1."""
        w = None
        if self.prob is not None:
            w = self.prob.gather(-1, target.view(*self.prob.shape[:-1], 1)).view(-1).to(dtype)
            w = w * self.scale + self.shift
        if self.weight is not None:
            class_weight = self.weight[target].to(dtype)
            w = class_weight if w is None else w * class_weight
        return w


UNIFORM = ClassWeights()
"""Weights that are all 1. Compare with `is`."""


class Part(NamedTuple):
    """Sums over some classes of each row, the target left out. All fields are [rows]."""

    m: Tensor
    s: Tensor
    ez_sum: Tensor | None
    logit_sum: Tensor | None
    weight_sum: int | Tensor | None  # sum of w_j
    num_better: Tensor | None  # number of classes that beat the target
    best_class: Tensor | None  # class of the largest logit


def merge(left: Part, right: Part) -> Part:
    """Return the sums over both parts. `left` has the lower class indices."""
    num_better = None
    if left.num_better is not None and right.num_better is not None:
        num_better = left.num_better + right.num_better
    m = torch.maximum(left.m, right.m)
    shift_left, scale_left = _rebase(left.m, m)
    shift_right, scale_right = _rebase(right.m, m)
    ez_sum = logit_sum = weight_sum = best_class = None
    if left.ez_sum is not None and right.ez_sum is not None:
        ez_sum = scale_left * (left.ez_sum + left.s * shift_left)
        ez_sum = ez_sum + scale_right * (right.ez_sum + right.s * shift_right)
    if left.logit_sum is not None and right.logit_sum is not None:
        assert left.weight_sum is not None and right.weight_sum is not None
        weight_sum = left.weight_sum + right.weight_sum
        logit_sum = (
            left.logit_sum
            + left.weight_sum * shift_left
            + right.logit_sum
            + right.weight_sum * shift_right
        )
    if left.best_class is not None and right.best_class is not None:
        right_wins = (right.m > left.m) | (right.m.isnan() & ~left.m.isnan())
        best_class = torch.where(right_wins, right.best_class, left.best_class)
    return Part(
        m,
        left.s * scale_left + right.s * scale_right,
        ez_sum,
        logit_sum,
        weight_sum,
        num_better,
        best_class,
    )


def _rebase(m: Tensor, new_m: Tensor) -> tuple[Tensor, Tensor]:
    """Return (shift, exp(shift)) that makes sums relative to `m` relative to `new_m`.

    An empty part (m = -inf) has scale 0.
    """
    empty = m == float("-inf")
    shift = (m - new_m).masked_fill(empty, 0.0)
    return shift, shift.exp().masked_fill(empty, 0.0)


def concatenate(parts: list[Part]) -> Part:
    """Return one Part from the parts of consecutive groups of rows."""
    if len(parts) == 1:
        return parts[0]
    return Part(
        *(
            torch.cat(list(f)) if isinstance(f[0], Tensor) else f[0]
            for f in zip(*parts, strict=True)
        )
    )  # type: ignore[arg-type]


class RowStatistics(NamedTuple):
    """Results of a backend: the statistics, and numbers that the gradient needs."""

    stats: TokenStats
    lse_low: Tensor  # rounding error of lse: 0.0005 when all logits are near 1e4
    weight_sum: Tensor | None = None  # sum of w_j without the target; None: w_j = 1


def finish(
    part: Part,
    target_logit: Tensor,
    target: Tensor,
    vocab_size: int,
    target_weight: Tensor | None = None,
) -> RowStatistics:
    """Return the statistics of whole rows.

    `part` covers every class but the target. The target's logit is finite, -inf or NaN.
    """
    gap = part.m - target_logit
    log_s = part.s.log()
    d = gap + log_s
    # A small exp(d) is computed from its factors, because rounding d would cost |d| ulp. gap_low is
    # the rounding error of gap (Knuth's TwoSum).
    back = gap - part.m
    gap_low = (part.m - (gap - back)) - (target_logit + back)
    ratio = part.s * gap.exp() * (1.0 + gap_low.nan_to_num(0.0))
    tail = torch.where(d < 0, ratio, (-d).exp()).log1p()
    loss = d.clamp(min=0) + tail
    above_m = torch.where(d > 0, log_s + tail, loss - gap)  # lse - m
    lse = torch.where(d > 0, part.m + above_m, target_logit + loss)
    lse_low = torch.where(d > 0, (part.m - lse) + above_m, (target_logit - lse) + loss)
    entropy = mean_logprob = rank = argmax = None
    if part.ez_sum is not None:
        # -sum p log p with a separate term for the target. No term is negative.
        others = (-above_m).exp() * (part.s * above_m - part.ez_sum)
        p_log_p = (-loss).exp() * loss
        entropy = others.masked_fill(part.m == float("-inf"), 0.0) + p_log_p.masked_fill(
            loss == float("inf"), 0.0
        )
    if part.logit_sum is not None:
        assert part.weight_sum is not None
        other_terms = part.logit_sum - part.weight_sum * above_m if vocab_size > 1 else 0.0
        target_term = loss
        if target_weight is not None:
            if isinstance(part.weight_sum, Tensor) and isinstance(other_terms, Tensor):
                other_terms = other_terms.masked_fill((part.weight_sum == 0) & above_m.isinf(), 0.0)
            target_term = (target_weight * loss).masked_fill(target_weight == 0, 0.0)
        mean_logprob = (other_terms - target_term) / vocab_size
    if part.num_better is not None:
        rank = part.num_better.where(~target_logit.isnan(), vocab_size - 1)
    if part.best_class is not None:
        ahead = (target_logit > part.m) | ((target_logit == part.m) & (target < part.best_class))
        argmax = torch.where(ahead, target, part.best_class)
    weight_sum = None if target_weight is None else part.weight_sum
    assert not isinstance(weight_sum, int)
    return RowStatistics(
        TokenStats(lse, -loss, entropy, mean_logprob, rank, argmax), lse_low, weight_sum
    )


def zero_ignored(stats: TokenStats, ignored: Tensor) -> TokenStats:
    """Set ignored rows to 0, or to -1 in `rank` and `argmax`."""
    return TokenStats(
        *(
            s if s is None else s.masked_fill(ignored, 0 if s.is_floating_point() else -1)
            for s in stats
        )  # type: ignore[arg-type]
    )
