"""Checks of the statistics of tokens, from logits and from hidden states."""

from __future__ import annotations

import torch
from torch import Tensor

from ...core.row_stats import TokenStats
from ...functional.linear_stats import linear_token_stats
from ...functional.logits_stats import token_stats
from .against_eager import (
    batch_on,
    compare,
    eager,
    eager_rank,
    named,
    weighted,
    wide,
    with_gradients,
)


def check_token_stats(device: torch.device, backend: str, dtype: torch.dtype) -> str:
    batch = batch_on(device, dtype)
    leaf = batch.logits.detach().requires_grad_()
    stats = token_stats(
        leaf, batch.target, entropy=True, mean_logprob=True, rank=True, argmax=True,
        backend=backend,
    )  # fmt: skip
    got = with_gradients(named(stats), weighted(named(stats), batch.upstream), [leaf])
    (logits,) = wide([leaf])
    true = eager(logits, batch.target)
    truth = with_gradients(true, weighted(true, batch.upstream.double()), [logits])
    _compare_integers(stats, logits.detach(), batch.target)
    return compare(got, truth, dtype)


def check_linear_token_stats(device: torch.device, backend: str, dtype: torch.dtype) -> str:
    batch = batch_on(device, dtype)
    leaves = batch.hidden.requires_grad_(), batch.weight.requires_grad_()
    stats = linear_token_stats(
        *leaves, batch.target, entropy=True, mean_logprob=True, token_chunk_size=10,
        backend=backend,
    )  # fmt: skip
    got = with_gradients(named(stats), weighted(named(stats), batch.upstream), leaves)
    hidden, weight = true_leaves = wide(leaves)
    true = eager(hidden @ weight.T, batch.target)
    truth = with_gradients(true, weighted(true, batch.upstream.double()), true_leaves)
    return compare(got, truth, dtype, values=dtype)  # each chunk's logits are rounded to it


def _compare_integers(stats: TokenStats, logits: Tensor, target: Tensor) -> None:
    assert stats.rank is not None and stats.argmax is not None
    argmax = logits.argmax(-1).masked_fill(target == -100, -1)
    for name, got, right in (
        ("rank", stats.rank, eager_rank(logits, target)),
        ("argmax", stats.argmax, argmax),
    ):
        if not torch.equal(got, right):
            raise ArithmeticError(f"{name} is not eager's")
