"""The targets of a loss: a class, class probabilities, or a teacher's K likeliest classes.

Each tells the operator which statistics it needs. From these it computes each token's cross-entropy
-sum_j w_j q_j (z_j - lse), with q the smoothed target and w the class weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from .. import checks
from ..checks.loss import LossOptions
from ..core.head import COMPUTE_DTYPE
from ..core.reduction import Reduction, apply_weight, is_scored, make_reduction, smooth_labels
from ..core.row_stats import TokenStats
from ..ops.library import Classes, Outputs
from .distributions import NEVER, ClassProbabilities, TopK

AnyTarget = Tensor | tuple[Tensor, Tensor]


class Target(Protocol):
    @property
    def index(self) -> Tensor:
        """Return the class, or the most likely one, [...]: its probability may be near 1."""

    @property
    def ignore_index(self) -> int:
        """Return the value of `index` in rows that do not count."""

    @property
    def classes(self) -> Classes: ...

    @property
    def wants_mean_logprob(self) -> bool: ...

    @property
    def is_plain(self) -> bool:
        """Return whether the one-pass operators can take it."""

    @property
    def counts(self) -> Tensor | None:
        """Return how much each token counts in a mean, [...], or None if all count 1."""

    def cross_entropy(self, outputs: Outputs) -> Tensor:
        """Return the loss of each token, [...], 0 where ignored."""


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


def wanted_of(spec: Target, stats: Sequence[bool]) -> tuple[bool, bool, bool, bool]:
    """Return which statistics are needed: entropy, mean_logprob, rank, argmax.

    stats: those of LOGGED that the caller wants too.
    """
    entropy, rank, argmax = stats or (False, False, False)
    return entropy, spec.wants_mean_logprob, rank, argmax


def loss_and_stats(
    statistics: Callable[[tuple[bool, ...]], Outputs],  # of which are wanted
    labels: Target,
    reducer: Reduction,
    options: LossOptions,
    backend: str,
) -> tuple[Tensor, TokenStats | None]:
    """Return the reduced loss, and the statistics if the options ask for them."""
    # Triton's kernel takes smaller tiles for more statistics, which would change bits of the loss.
    apart = backend == "triton" and any(options.stats)
    outputs = statistics(wanted_of(labels, () if apart else options.stats))
    loss = reducer.reduce_with_z_loss(
        labels.cross_entropy(outputs), outputs.lse, options.z_loss_weight
    )
    if not options.stats:
        return loss, None
    found = outputs.logged(options.stats)
    if apart:
        with torch.no_grad():
            others = statistics(wanted_of(labels, options.stats)).logged(options.stats)
        found = TokenStats(found.lse, found.logprob, *others[2:])
    return loss, found


def describe_target(
    input: Tensor,
    target: AnyTarget,
    dim: int,
    weight: Tensor | None,
    ignore_index: int,
    vocab_size: int,
    options: LossOptions,
) -> tuple[Target, Reduction]:
    """Return what the operators are asked for, and how the tokens' losses become one."""
    labels = target_of(
        target, dim, weight, options.label_smoothing, ignore_index, vocab_size, options.spread_rest
    )
    dtype = COMPUTE_DTYPE[input.dtype]
    labels, token_weight = with_token_weight(
        labels, options.token_weight, options.z_loss_weight, dtype
    )
    reducer = make_reduction(
        options.reduction, labels.index, labels.ignore_index, token_weight, options.num_items,
        dtype, labels.counts,
    )  # fmt: skip
    if options.group is not None:
        from ..distributed.collectives import over_ranks

        reducer = over_ranks(reducer, options.group)
    return labels, reducer


def target_of(
    target: AnyTarget,
    dim: int,  # where probabilities have their classes
    weight: Tensor | None,
    label_smoothing: float,
    ignore_index: int,
    vocab_size: int,
    spread_rest: bool,
) -> Target:
    """Return the kind of target that `target` is."""
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
    """Return the target without class weights that scale a whole loss: token weights hold them."""
    if not isinstance(target, ClassIndices) or target.label_smoothing or z_loss_weight:
        return target, token_weight
    counts = target.counts
    if counts is None:
        return target, token_weight
    counts = counts.to(dtype)
    combined = counts if token_weight is None else counts * token_weight.to(dtype)
    # Not by `replace`, nor by `_replace` of tuples: torch 2.6 does not trace them.
    unweighted = ClassIndices(
        target.index, target.ignore_index, target.vocab_size, weight=None, label_smoothing=0.0
    )
    return unweighted, combined
