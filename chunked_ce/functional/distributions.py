"""Targets of more than one class: class probabilities, or a teacher's K likeliest classes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.class_logits import is_first_occurrence
from ..ops.library import NO_CLASS, Classes, Outputs

NEVER = NO_CLASS
"""An ignore_index that is no class."""


class _Distribution:
    """Share what holds for all targets of more than one class: no row is ignored by its index."""

    ignore_index = NEVER
    is_plain = False
    counts = None


@dataclass(frozen=True)
class ClassProbabilities(_Distribution):
    prob: Tensor  # [..., V]
    weight: Tensor | None
    label_smoothing: float

    @property
    def wants_mean_logprob(self) -> bool:
        return True

    @property
    def index(self) -> Tensor:
        return self.prob.detach().max(-1).indices  # argmax is slow along a strided dimension

    @property
    def classes(self) -> Classes:
        s = self.label_smoothing
        return Classes(self.weight, self.prob, 1.0 - s, s)

    def cross_entropy(self, outputs: Outputs) -> Tensor:
        assert outputs.mean_logprob is not None
        return -outputs.mean_logprob


@dataclass(frozen=True)
class TopK(_Distribution):
    """Hold probabilities of K classes a row. The others have 0, or an equal share of the rest."""

    indices: Tensor  # [..., K]; NEVER where there are fewer
    prob: Tensor  # [..., K]
    vocab_size: int
    weight: Tensor | None
    label_smoothing: float
    spread_rest: bool

    @property
    def exists(self) -> Tensor:
        """Return which entries are classes and not padding, [..., K]."""
        return self.indices != NEVER

    @property
    def most_likely(self) -> Tensor:
        """Return which of the K classes has the largest probability, [..., 1]."""
        return self.prob.detach().masked_fill(~self.exists, -torch.inf).argmax(-1, keepdim=True)

    @property
    def index(self) -> Tensor:
        return self.indices.gather(-1, self.most_likely)[..., 0]

    @property
    def classes(self) -> Classes:
        weight = self.weight if self.wants_mean_logprob else None
        return Classes(weight=weight, indices=self.indices)

    @property
    def wants_mean_logprob(self) -> bool:
        return self.spread_rest or self.label_smoothing > 0

    def cross_entropy(self, outputs: Outputs) -> Tensor:
        z, mean_logprob = outputs.class_logits, outputs.mean_logprob
        assert z is not None
        dtype, smoothing = z.dtype, self.label_smoothing
        prob = self.prob.masked_fill(~self.exists, 0.0)
        q = prob.to(dtype)
        every_class = torch.full_like(
            outputs.lse, smoothing / self.vocab_size
        )  # its share of label smoothing
        if self.spread_rest:
            assert mean_logprob is not None
            is_first = self.exists & is_first_occurrence(self.indices)
            others = self.vocab_size - is_first.sum(-1)
            # In the teacher's dtype: float32 keeps too few digits of 1 - 0.999.
            prob_in_full = prob.to(torch.promote_types(prob.dtype, dtype))
            share = self._missing(prob_in_full, mean_logprob).masked_fill(others == 0, 0.0)
            share = (share / others.clamp(min=1)).to(dtype)
            q = q - share[..., None] * is_first
            every_class = (1.0 - smoothing) * share + every_class
        if self.weight is not None:
            q = q * self.weight.to(dtype)[self.indices.clamp(0, self.vocab_size - 1)]
        # Relative to the most likely class, which has all digits, unless its logit is -inf.
        most_likely_logit = z.gather(-1, self.most_likely)
        from_most_likely = (z - most_likely_logit) + outputs.logprob[..., None]
        logprob = torch.where(
            most_likely_logit.isfinite(), from_most_likely, z - outputs.lse[..., None]
        )
        q = (1.0 - smoothing) * q
        # q < 0 at a logit of -inf: the mean below is infinite there, and counts this class too.
        # A row with NaN stays NaN, even in a class of weight 0.
        adds_nothing = ((q == 0) & ~(self.exists & logprob.isnan())) | (
            (q < 0) & (logprob == -torch.inf)
        )
        loss = -(q * logprob).masked_fill(adds_nothing, 0.0).sum(-1)
        if self.wants_mean_logprob:
            assert mean_logprob is not None
            smoothing_loss = every_class * self.vocab_size * mean_logprob
            loss = loss - (
                smoothing_loss
                if smoothing > 0
                else smoothing_loss.masked_fill(every_class == 0, 0.0)
            )
        return loss

    def _missing(self, q: Tensor, mean_logprob: Tensor) -> Tensor:
        """Return 1 - the sum of `q` [..., K] as [...], exact where the largest is near 1."""
        largest = q.gather(-1, self.most_likely)
        others = q.scatter(-1, self.most_likely, 0.0).sum(-1)
        rest = (1.0 - largest)[..., 0] - others
        # A difference that may be the rounding of the probabilities makes no loss infinite.
        is_rounding = (rest <= torch.finfo(self.prob.dtype).eps) & (mean_logprob == -torch.inf)
        return rest.masked_fill((rest <= 0) | is_rounding, 0.0)
