"""Sums of negative log-likelihoods over a batch."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .. import checks
from ..core.reduction import is_scored
from ..functional.logits_stats import token_stats

State = dict[str, Any]  # sums and counts by name; None, or absent: not known


def batch_sums(input: Tensor, target: Tensor, ignore_index: int, dim: int, rank: bool) -> State:
    """Sum up a batch of logits [..., V], on its device: float64 sums and int64 counts."""
    checks.logits(input)
    dim = checks.class_dimension(input, dim)
    checks.target_indices(target)
    checks.check_target(input, target, dim)
    checks.flags(rank=rank)
    logits = input.movedim(dim, -1)
    stats = token_stats(logits, target, ignore_index=ignore_index, rank=rank)
    nll = -stats.logprob.double()
    sums: State = {
        "nll_sum": nll.sum(),
        "nll_square_sum": nll.square().sum(),
        "tokens": is_scored(target, ignore_index).sum(),
    }
    if stats.rank is not None:
        sums["top1"] = (stats.rank == 0).sum()
        sums["reciprocal_rank_sum"] = reciprocal_rank(stats.rank).sum()
    return sums


def perplexity_of(sums: State) -> Tensor:
    """Return exp(mean NLL), 0-d float64; NaN when nothing was scored."""
    value: Tensor = (sums["nll_sum"] / sums["tokens"]).exp()
    return value


def reciprocal_rank(rank: Tensor) -> Tensor:
    """Return 1 / (1 + rank) in float64, or 0 for the -1 of a token that is not scored."""
    return torch.where(rank < 0, 0.0, 1.0 / (rank + 1).clamp(min=1).double())


def document_stderr(nll: Tensor, squares: Tensor, tokens: Tensor) -> float:
    """Return the standard error of the mean NLL with documents as clusters.

    With d the NLL of a token minus the mean of all n, it is the root of
    SE^2 + (sum over documents of (sum of d)^2 - sum of d^2) / n^2, where SE is that of independent
    tokens: Miller 2024, arXiv:2411.00640.

    Args:
        nll, squares, tokens: float64 [D], each document's sum of NLL, of its square, and count.

    Returns:
        NaN for fewer than two documents.
    """
    count = float(tokens.sum())
    if int((tokens > 0).sum()) < 2:
        return math.nan
    mean = float(nll.sum()) / count
    of_tokens = max(0.0, float(squares.sum()) - count * mean * mean)
    of_documents = float((nll - mean * tokens).square().sum())
    variance = of_tokens / (count * (count - 1)) + (of_documents - of_tokens) / count**2
    return math.sqrt(max(0.0, variance))
