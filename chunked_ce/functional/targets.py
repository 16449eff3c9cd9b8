"""What a loss may be given as target: a class, class probabilities, or a teacher's top k classes.

Each says what to ask an operator for, and makes of the answer the cross-entropy of each token:
-sum_j w_j q_j (z_j - lse), with q the smoothed target, w the class weights.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from .. import checks
from ..core.class_logits import is_first_occurrence
from ..core.head import compute_dtype
from ..core.reduction import Reduction, apply_weight, is_scored, make_reduction, smooth_labels
from ..ops.library import NO_CLASS, Classes, Outputs

AnyTarget = Tensor | tuple[Tensor, Tensor]

NEVER = NO_CLASS
"""An ignore_index that is no class."""


class Target(Protocol):
    @property
    def index(self) -> Tensor:
        """[...] the class, or the likeliest: the one whose probability may be near 1."""

    @property
    def ignore_index(self) -> int:
        """Value of `index` in rows that do not count."""

    @property
    def classes(self) -> Classes: ...

    @property
    def wants_mean_logprob(self) -> bool: ...

    @property
    def is_plain(self) -> bool:
        """Whether the one-pass operators can take it."""

    @property
    def counts(self) -> Tensor | None:
        """[...] what each token counts for in a mean; None: 1."""

    def cross_entropy(self, outputs: Outputs) -> Tensor:
        """[...] of each token, 0 where ignored."""


@dataclass(frozen=True)
class ClassIndices:
    index: Tensor
    ignore_index: int
    vocab_size: int
    weight: Tensor | None
    label_smoothing: float

    @property
    def classes(self) -> Classes:
        return Classes(weight=self.weight if self.wants_mean_logprob else None)

    @property
    def wants_mean_logprob(self) -> bool:
        return self.label_smoothing > 0

    @property
    def is_plain(self) -> bool:
        return self.weight is None

    @property
    def counts(self) -> Tensor | None:
        if self.weight is None:
            return None
        existing = self.index.long().clamp(0, self.vocab_size - 1)
        of_class = self.weight[existing]
        return torch.where(is_scored(self.index, self.ignore_index), of_class, 0.0)

    def cross_entropy(self, outputs: Outputs) -> Tensor:
        loss, counts = -outputs.logprob, self.counts
        if counts is not None:
            loss = apply_weight(loss, counts.to(loss.dtype))
        return smooth_labels(loss, outputs.mean_logprob, self.label_smoothing)


class _Distribution:
    """Of targets that are more than one class: none is ignored by its index, all count alike."""

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
    """Probabilities of K classes a row; 0, or an equal share of the rest, for all others."""

    indices: Tensor  # [..., K]; NEVER where there are fewer
    prob: Tensor  # [..., K]
    vocab_size: int
    weight: Tensor | None
    label_smoothing: float
    spread_rest: bool

    @property
    def given(self) -> Tensor:
        return self.indices != NEVER

    @property
    def likeliest(self) -> Tensor:
        """[..., 1] which of the K."""
        return self.prob.detach().masked_fill(~self.given, -torch.inf).argmax(-1, keepdim=True)

    @property
    def index(self) -> Tensor:
        return self.indices.gather(-1, self.likeliest)[..., 0]

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
        dtype, s = z.dtype, self.label_smoothing
        prob = self.prob.masked_fill(~self.given, 0.0)
        q = prob.to(dtype)
        floor = torch.full_like(outputs.lse, s / self.vocab_size)  # of every class
        if self.spread_rest:
            assert mean_logprob is not None
            first = self.given & is_first_occurrence(self.indices)
            others = self.vocab_size - first.sum(-1)
            # In the teacher's digits, of which 1 - 0.999 needs more than float32 has.
            exact = prob.to(torch.promote_types(prob.dtype, dtype))
            share = self._rest(exact, mean_logprob).masked_fill(others == 0, 0.0)
            share = (share / others.clamp(min=1)).to(dtype)
            q = q - share[..., None] * first
            floor = (1.0 - s) * share + floor
        if self.weight is not None:
            q = q * self.weight.to(dtype)[self.indices.clamp(0, self.vocab_size - 1)]
        # From the likeliest class, for that has all digits; unless its logit is -inf.
        at_index = z.gather(-1, self.likeliest)
        near = (z - at_index) + outputs.logprob[..., None]
        logprob = torch.where(at_index.isfinite(), near, z - outputs.lse[..., None])
        q = (1.0 - s) * q
        # At a logit of -inf the mean below is infinite: less than the even share of that is none.
        # A row that is broken is NaN, whatever weighs 0 in it.
        nothing = ((q == 0) & ~(self.given & logprob.isnan())) | ((q < 0) & (logprob == -torch.inf))
        loss = -(q * logprob).masked_fill(nothing, 0.0).sum(-1)
        if self.wants_mean_logprob:
            assert mean_logprob is not None
            even = floor * self.vocab_size * mean_logprob
            loss = loss - (even if s > 0 else even.masked_fill(floor == 0, 0.0))
        return loss

    def _rest(self, q: Tensor, mean_logprob: Tensor) -> Tensor:
        """[...] what `q` [..., K] lacks of 1: from 1 - the largest, exact where that is near 1."""
        largest = q.gather(-1, self.likeliest)
        others = q.scatter(-1, self.likeliest, 0.0).sum(-1)
        rest = (1.0 - largest)[..., 0] - others
        # What may be the probabilities' own rounding makes no loss infinite.
        rounding = (rest <= torch.finfo(self.prob.dtype).eps) & (mean_logprob == -torch.inf)
        return rest.masked_fill((rest <= 0) | rounding, 0.0)


def wanted_of(spec: Target) -> tuple[bool, bool, bool, bool]:
    """Return which statistics a target needs: entropy, mean_logprob, rank, argmax."""
    return False, spec.wants_mean_logprob, False, False


def describe_target(
    input: Tensor,
    target: AnyTarget,
    dim: int,
    weight: Tensor | None,
    label_smoothing: float,
    z_loss_weight: float,
    ignore_index: int,
    vocab_size: int,
    spread_rest: bool,
    reduction: str,
    token_weight: Tensor | None,
    num_items: int | Tensor | None,
) -> tuple[Target, Reduction]:
    """Return what the operators are asked for, and how the tokens' losses become one."""
    spec = target_of(target, dim, weight, label_smoothing, ignore_index, vocab_size, spread_rest)
    dtype = compute_dtype(input.dtype)
    spec, token_weight = with_token_weight(spec, token_weight, z_loss_weight, dtype)
    return spec, make_reduction(
        reduction, spec.index, spec.ignore_index, token_weight, num_items, dtype, spec.counts
    )


def target_of(
    target: AnyTarget,
    dim: int,  # where probabilities have their classes
    weight: Tensor | None,
    label_smoothing: float,
    ignore_index: int,
    vocab_size: int,
    spread_rest: bool,
) -> Target:
    if not isinstance(target, Tensor):
        indices, prob = target
        indices = indices.long()
        return TopK(
            indices.masked_fill(indices == ignore_index, NEVER), prob, vocab_size, weight,
            label_smoothing, spread_rest,
        )  # fmt: skip
    if target.is_floating_point():
        prob = target.movedim(dim, -1)[..., :vocab_size]
        checks.sums_to_one(prob)
        return ClassProbabilities(prob, weight, label_smoothing)
    return ClassIndices(target, ignore_index, vocab_size, weight, label_smoothing)


def with_token_weight(
    target: Target, token_weight: Tensor | None, z_loss_weight: float, dtype: torch.dtype
) -> tuple[Target, Tensor | None]:
    """Class weights as token weights in `dtype`, where they scale a token's whole loss."""
    if not isinstance(target, ClassIndices) or target.label_smoothing or z_loss_weight:
        return target, token_weight
    counts = target.counts
    if counts is None:
        return target, token_weight
    counts = counts.to(dtype)
    both = counts if token_weight is None else counts * token_weight.to(dtype)
    return replace(target, weight=None), both
