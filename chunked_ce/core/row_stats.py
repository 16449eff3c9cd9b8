"""The statistics of a row of logits, how two parts of a row merge, and the gradient's four numbers.

Over the classes of a row other than its target, a part of the vocabulary contributes

    m = max z    s = sum exp(z - m)    weighted = sum exp(z - m) (z - m)    total = sum (z - m)

Two parts merge by moving both to the larger maximum (Milakov & Gimelshein, arXiv:1805.02867). The
target joins at the end: with d = m + log s - z_target the loss is log(1 + exp(d)), which keeps a
confident token's 1e-8. All gradients then have one form, with four numbers a row:

    dL/dz_j = p_j (a + b (z_j - lse)) + c ([j = target] - p_j) + u w_j [j != target]

w_j is 1, or what :class:`ClassWeights` say; then total = sum w_j (z_j - m).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class TokenStats(NamedTuple):
    """Hold what :func:`chunked_ce.token_stats` finds out about rows of logits, [...] each.

    float32 (float64 for float64 logits) or int64. Rows whose target is `ignore_index` hold 0, and
    -1 in `rank` and `argmax`. What was not asked for is None.

    Attributes:
        lse: log Σ exp z_j.
        logprob: z_target - lse, the log-probability of the target.
        entropy: -Σ p_j log p_j, in nats.
        mean_logprob: mean over the vocabulary of z_j - lse.
        rank: number of classes that beat the target, int64; on a tie the lower index wins.
        argmax: the winning class, int64.

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
    rank: Tensor | None = None  # classes that beat the target; on a tie the lower index wins
    argmax: Tensor | None = None  # the winning class


class ClassWeights(NamedTuple):
    """w_j of `mean_logprob` = (1/V) sum w_j (z_j - lse): weight_j (scale prob_j + shift)."""

    weight: Tensor | None = None  # [V]; None: 1
    prob: Tensor | None = None  # [..., V], as the logits; None: scale prob + shift is 1
    scale: float = 1.0
    shift: float = 0.0

    def at(self, target: Tensor, dtype: torch.dtype) -> Tensor | None:
        """Those of a class per row [rows]; None: 1."""
        w = None
        if self.prob is not None:
            w = self.prob.gather(-1, target.view(*self.prob.shape[:-1], 1)).view(-1).to(dtype)
            w = w * self.scale + self.shift
        if self.weight is not None:
            of_class = self.weight[target].to(dtype)
            w = of_class if w is None else w * of_class
        return w


UNIFORM = ClassWeights()
"""All weights are 1. Compared by identity."""


class Part(NamedTuple):
    """Sums over some of the classes of each row, the target left out. All [rows]."""

    m: Tensor
    s: Tensor
    weighted: Tensor | None
    total: Tensor | None
    mass: int | Tensor | None  # sum of the w_j in `total`
    beaten_by: Tensor | None
    argmax: Tensor | None


def merge(left: Part, right: Part) -> Part:
    """The sums over both parts; `left` holds the lower class indices."""
    beaten_by = None
    if left.beaten_by is not None and right.beaten_by is not None:
        beaten_by = left.beaten_by + right.beaten_by
    m = torch.maximum(left.m, right.m)
    shift_left, scale_left = _move(left.m, m)
    shift_right, scale_right = _move(right.m, m)
    weighted = total = mass = argmax = None
    if left.weighted is not None and right.weighted is not None:
        weighted = scale_left * (left.weighted + left.s * shift_left)
        weighted = weighted + scale_right * (right.weighted + right.s * shift_right)
    if left.total is not None and right.total is not None:
        assert left.mass is not None and right.mass is not None
        mass = left.mass + right.mass
        total = left.total + left.mass * shift_left + right.total + right.mass * shift_right
    if left.argmax is not None and right.argmax is not None:
        right_wins = (right.m > left.m) | (right.m.isnan() & ~left.m.isnan())
        argmax = torch.where(right_wins, right.argmax, left.argmax)
    return Part(
        m, left.s * scale_left + right.s * scale_right, weighted, total, mass, beaten_by, argmax
    )


def _move(m: Tensor, to: Tensor) -> tuple[Tensor, Tensor]:
    """(shift, exp(shift)) that carries sums relative to `m` over to `to`.

    An empty part (-inf) adds nothing.
    """
    empty = m == float("-inf")
    shift = (m - to).masked_fill(empty, 0.0)
    return shift, shift.exp().masked_fill(empty, 0.0)


def concatenate(parts: list[Part]) -> Part:
    """The sums of all rows, from those of some rows after another."""
    if len(parts) == 1:
        return parts[0]
    return Part(
        *(
            torch.cat(list(f)) if isinstance(f[0], Tensor) else f[0]
            for f in zip(*parts, strict=True)
        )
    )  # type: ignore[arg-type]


class RowStatistics(NamedTuple):
    """What a backend finds out about rows; the gradient wants more of it than users do."""

    stats: TokenStats
    lse_low: Tensor  # what rounding took from lse: 0.0005 when all logits are near 1e4
    mass: Tensor | None = None  # sum of w_j over classes but the target; None: w_j = 1


def finish(
    part: Part,
    target_logit: Tensor,
    target: Tensor,
    vocab_size: int,
    target_weight: Tensor | None = None,
) -> RowStatistics:
    """The statistics of whole rows.

    `part` covers every class but the target, whose logit is finite, -inf or NaN.
    """
    gap = part.m - target_logit
    log_s = part.s.log()
    d = gap + log_s
    # exp(d) from its factors where it is small, for rounding d would cost |d| ulp; and with what
    # rounding took from gap (Knuth's TwoSum).
    back = gap - part.m
    gap_low = (part.m - (gap - back)) - (target_logit + back)
    ratio = part.s * gap.exp() * (1.0 + gap_low.nan_to_num(0.0))
    tail = torch.where(d < 0, ratio, (-d).exp()).log1p()
    loss = d.clamp(min=0) + tail
    above_m = torch.where(d > 0, log_s + tail, loss - gap)  # lse - m
    lse = torch.where(d > 0, part.m + above_m, target_logit + loss)
    lse_low = torch.where(d > 0, (part.m - lse) + above_m, (target_logit - lse) + loss)
    entropy = mean_logprob = rank = argmax = None
    if part.weighted is not None:
        # -sum p log p, the target apart: no term is negative.
        others = (-above_m).exp() * (part.s * above_m - part.weighted)
        p_log_p = (-loss).exp() * loss
        entropy = others.masked_fill(part.m == float("-inf"), 0.0) + p_log_p.masked_fill(
            loss == float("inf"), 0.0
        )
    if part.total is not None:
        assert part.mass is not None
        of_others = part.total - part.mass * above_m if vocab_size > 1 else 0.0
        of_target = loss
        if target_weight is not None:
            if isinstance(part.mass, Tensor) and isinstance(of_others, Tensor):
                of_others = of_others.masked_fill((part.mass == 0) & above_m.isinf(), 0.0)
            of_target = (target_weight * loss).masked_fill(target_weight == 0, 0.0)
        mean_logprob = (of_others - of_target) / vocab_size
    if part.beaten_by is not None:
        rank = part.beaten_by.where(~target_logit.isnan(), vocab_size - 1)
    if part.argmax is not None:
        ahead = (target_logit > part.m) | ((target_logit == part.m) & (target < part.argmax))
        argmax = torch.where(ahead, target, part.argmax)
    mass = None if target_weight is None else part.mass
    assert not isinstance(mass, int)
    return RowStatistics(TokenStats(lse, -loss, entropy, mean_logprob, rank, argmax), lse_low, mass)


def blank(stats: TokenStats, ignored: Tensor) -> TokenStats:
    """Rows that are ignored hold 0; -1 where 0 would be a rank or a class."""
    return TokenStats(
        *(
            s if s is None else s.masked_fill(ignored, 0 if s.is_floating_point() else -1)
            for s in stats
        )  # type: ignore[arg-type]
    )
