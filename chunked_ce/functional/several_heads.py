"""A weight [V, d1, ..., D]: one head [V, D] for each of a token's targets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..core.reduction import Reduction
from .targets import ClassIndices, Target


def loss_of_heads(
    loss_of: Callable[[Tensor, Tensor | None, Reduction, Target], Tensor],
    weight: Tensor,
    bias: Tensor | None,
    how: Reduction,
    spec: Target,
) -> Tensor:
    """Return the sum of the heads' losses, or that of each target."""
    losses = torch.stack([loss_of(*head) for head in several_heads(weight, bias, how, spec)], -1)
    return losses.view(spec.index.shape) if how.name == "none" else losses.sum()


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
