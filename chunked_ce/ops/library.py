"""The torch.library of the operators, and the common parts of their schemas."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import checks
from ..core.head import compute_dtype
from ..core.row_stats import TokenStats

library = torch.library.Library("chunked_ce", "DEF")
SHARED_SCHEMA = (
    "int ignore_index, SymInt vocab_size, float? softcap, float logit_scale, str backend"
)
CLASSES_SCHEMA = (
    "Tensor? class_weight, Tensor? prob, float prob_scale, float prob_shift, Tensor? class_indices"
)
FLAGS = ("entropy", "mean_logprob", "rank", "argmax")
FLAGS_SCHEMA = "bool entropy, bool mean_logprob, bool rank, bool argmax"
OUTPUTS_SCHEMA = (
    "(Tensor lse, Tensor logprob, Tensor lse_low, Tensor entropy, Tensor mean_logprob, "
    "Tensor weight_sum, Tensor class_logits, Tensor rank, Tensor argmax)"
)
UPSTREAM_SCHEMA = (
    "Tensor lse, Tensor logprob, Tensor lse_low, "
    "Tensor? a, Tensor? b, Tensor? c, Tensor? u, Tensor? class_logits_grad"
)
NO_CLASS = -100
NUM_FLOATING = 7  # number of floating outputs; the integer outputs after them have no gradient


class Outputs(NamedTuple):
    """Outputs of the statistics' operators, [...] each. Those not requested are None or empty."""

    lse: Tensor
    logprob: Tensor
    lse_low: Tensor
    entropy: Tensor | None
    mean_logprob: Tensor | None
    weight_sum: Tensor | None  # sum of the class weights without the target's
    class_logits: Tensor | None  # [..., K]
    rank: Tensor | None
    argmax: Tensor | None

    def to_token_stats(self, wanted: tuple[bool, ...]) -> TokenStats:
        """Return the TokenStats. wanted: include entropy, mean_logprob, rank, argmax?"""
        others = (self.entropy, self.mean_logprob, self.rank, self.argmax)
        included = (out if want else None for out, want in zip(others, wanted, strict=True))
        return TokenStats(self.lse, self.logprob, *included)


class Classes(NamedTuple):
    """Class arguments of an operator: weights of `mean_logprob`, and indices of classes to read.

    `mean_logprob` is sum_j weight_j (prob_scale prob_j + prob_shift / V) (z_j - lse).
    """

    weight: Tensor | None = None  # [V]
    prob: Tensor | None = None  # [..., V]
    prob_scale: float = 1.0
    prob_shift: float = 0.0
    indices: Tensor | None = None  # [..., K], padded with NO_CLASS

    @property
    def has_weights(self) -> bool:
        """Return whether the weights of `mean_logprob` are not all 1."""
        return self.weight is not None or self.prob is not None

    def select_rows(self, index: slice | Tensor) -> Classes:
        """Return the Classes of some of the rows [N]."""
        prob, indices = (None if t is None else t[index] for t in (self.prob, self.indices))
        return self._replace(prob=prob, indices=indices)


def no_double_backward(ctx: Any, *grads: Tensor) -> None:
    """Raise the error of a double backward."""
    checks.double_backward()


def new_outputs(
    input: Tensor,
    target: Tensor,
    classes: Classes,
    entropy: bool,
    mean_logprob: bool,
    rank: bool,
    argmax: bool,
) -> tuple[Tensor, ...]:
    """Return new memory for the outputs of a statistics' operator."""
    floats, integers = compute_dtype(input.dtype), torch.int64

    def new(dtype: torch.dtype, wanted: bool = True) -> Tensor:
        return input.new_empty(target.shape if wanted else 0, dtype=dtype)

    return (
        *(new(floats), new(floats), new(floats), new(floats, entropy), new(floats, mean_logprob)),
        new(floats, mean_logprob and classes.has_weights),
        input.new_empty(0 if classes.indices is None else classes.indices.shape, dtype=floats),
        *(new(integers, rank), new(integers, argmax)),
    )


def flat_classes(classes: Classes) -> Classes:
    """Return the Classes of [...] tokens for tokens [N]."""
    of_class, prob, scale, shift, at = classes
    return Classes(  # torch.compile of torch 2.6 cannot trace _replace
        of_class,
        None if prob is None else prob.reshape(-1, prob.shape[-1]),
        scale,
        shift,
        None if at is None else at.reshape(-1, at.shape[-1]),
    )


def in_target_shape(outputs: tuple[Tensor, ...], target: Tensor) -> Outputs:
    """Return an operator's outputs [N] in the shape of `target`."""
    n = target.numel()
    return Outputs(*(o.view(target.shape + o.shape[1:]) if o.shape[0] == n else o for o in outputs))
