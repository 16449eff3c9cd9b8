"""A weight [V, d1, ..., D]: one head [V, D] for each of a token's targets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..core.reduction import Reduction
from ..core.row_stats import TokenStats
from .targets import ClassIndices, Target


def loss_of_heads(
    loss_of: Callable[[Tensor, Tensor | None, Reduction, Target], tuple[Tensor, TokenStats | None]],
    weight: Tensor,
    bias: Tensor | None,
    how: Reduction,
    spec: Target,
) -> tuple[Tensor, TokenStats | None]:
    """Return the sum of the heads' losses, or that of each target; and the statistics of all."""
    found = [loss_of(*head) for head in several_heads(weight, bias, how, spec)]
    losses = torch.stack([loss for loss, _ in found], -1)
    loss = losses.view(spec.index.shape) if how.name == "none" else losses.sum()
    of_heads = [stats for _, stats in found if stats is not None]
    return loss, _join(of_heads, spec.index.shape) if of_heads else None


def _join(of_heads: list[TokenStats], shape: torch.Size) -> TokenStats:
    """Return the heads' statistics [N] as one [N, d1, ...]."""
    return TokenStats(
        *(
            None if each[0] is None else torch.stack(each, -1).view(shape)
            for each in zip(*of_heads, strict=True)
        )  # type: ignore[arg-type]
    )


def several_heads(
    weight: Tensor, bias: Tensor | None, how: Reduction, spec: Target
) -> list[tuple[Tensor, Tensor | None, Reduction, Target]]:
    """Return each head [V, D] of a weight [V, d1, ..., D], with what belongs to it."""
    heads = weight.flatten(1, -2).unbind(1)

    def of_each(t: Tensor | None) -> Sequence[Tensor | None]:
        return [None] * len(heads) if t is None else t.flatten(1).unbind(1)

    assert isinstance(spec, ClassIndices)
    return [
        (head, of_head, how._replace(weight=of_tokens), replace(spec, index=labels))
        for head, of_head, labels, of_tokens in zip(
            heads, of_each(bias), spec.index.flatten(1).unbind(1), of_each(how.weight), strict=True
        )
    ]
