"""The torch.library of the operators, and the common parts of their schemas."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import checks
from ..core.head import COMPUTE_DTYPE
from ..core.row_stats import TokenStats, detach_stats

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
STATS_SCHEMA = "bool[] stats"  # [], or whether to return each of LOGGED besides lse and logprob
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

    def logged(self, stats: Sequence[bool]) -> TokenStats:
        """Return the statistics that a loss returns, detached. stats: which of LOGGED."""
        entropy, rank, argmax = stats
        return detach_stats(self.to_token_stats((entropy, False, rank, argmax)))


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
    floats, integers = COMPUTE_DTYPE[input.dtype], torch.int64

    def new(dtype: torch.dtype, wanted: bool = True) -> Tensor:
        return input.new_empty(target.shape if wanted else 0, dtype=dtype)

    return (
        *(new(floats), new(floats), new(floats), new(floats, entropy), new(floats, mean_logprob)),
        new(floats, mean_logprob and classes.has_weights),
        input.new_empty(0 if classes.indices is None else classes.indices.shape, dtype=floats),
        *(new(integers, rank), new(integers, argmax)),
    )


def new_stats(like: Tensor, rows: int, stats: Sequence[bool]) -> TokenStats | None:
    """Return memory for the statistics [rows] that a loss returns, filled as for ignored rows.

    None if `stats` is empty.
    """
    if not stats:
        return None
    floats = COMPUTE_DTYPE[like.dtype]
    lse, logprob = (like.new_zeros(rows, dtype=floats) for _ in range(2))
    entropy, rank, argmax = stats
    return TokenStats(
        lse,
        logprob,
        like.new_zeros(rows, dtype=floats) if entropy else None,
        None,
        like.new_full((rows,), -1, dtype=torch.int64) if rank else None,
        like.new_full((rows,), -1, dtype=torch.int64) if argmax else None,
    )


def select_stats(stats: TokenStats, index: slice | Tensor) -> TokenStats:
    """Return the memory for a chunk of the rows: a view, or new memory that `keep_stats` copies."""
    return TokenStats(*(None if t is None else t[index] for t in stats))  # type: ignore[arg-type]


def keep_stats(stats: TokenStats, index: slice | Tensor, of_chunk: TokenStats | None) -> None:
    """Write a chunk's statistics back to its rows."""
    if of_chunk is None or isinstance(index, slice):
        return
    for t, chunk in zip(stats, of_chunk, strict=True):
        if t is not None and chunk is not None:
            t[index] = chunk


def stats_list(stats: TokenStats | None) -> list[Tensor]:
    """Return the statistics as an operator returns them."""
    return [] if stats is None else [t for t in stats if t is not None]


def stats_from_list(found: Sequence[Tensor], wanted: Sequence[bool], target: Tensor) -> TokenStats:
    """Return an operator's list as TokenStats in the shape of `target`, detached."""
    views = [t.detach().view(target.shape) for t in found]
    entropy, rank, argmax = [views.pop(2) if want else None for want in wanted]
    return TokenStats(views[0], views[1], entropy, None, rank, argmax)


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
