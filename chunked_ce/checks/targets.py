"""Targets of cross-entropy: class indices, class probabilities, a teacher's top-k classes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .values import (
    LOGIT_DTYPES,
    dense,
    names,
    same_device,
    shape,
    target_indices,
    with_k,
    without_classes,
)


def classes_last(
    input: Tensor, came: torch.Size, as_last: torch.Size, target: Tensor, dim: int
) -> None:
    """What fits only with the classes in the last dimension."""
    if came == as_last and dim != input.dim() - 1:
        raise ValueError(
            f"input of shape {shape(input)} and target of shape {shape(target)} have the classes "
            f"in the last dimension, but dim={dim} (torch's default is 1): pass dim=-1"
        )


def class_probabilities(input: Tensor, target: Tensor, dim: int) -> None:
    dense("target", target)
    if target.shape != input.shape:
        if target.shape == without_classes(input, dim) or target.shape == input.shape[:-1]:
            raise TypeError(
                f"target has dtype {target.dtype} and shape {shape(target)}, like class indices: "
                "use target.long() (class probabilities have input's shape, "
                f"{shape(input)})"
            )
        raise ValueError(
            f"target has dtype {target.dtype}, like class probabilities, and shape "
            f"{shape(target)}, but these have input's shape, {shape(input)}"
        )
    if target.dtype not in LOGIT_DTYPES:
        raise TypeError(
            f"target has dtype {target.dtype}, expected one of {names(LOGIT_DTYPES)} for class "
            "probabilities"
        )
    same_device("target", target, input)


def top_k(input: Tensor, target: Any, dim: int) -> None:
    if target and not any(isinstance(t, Tensor) for t in target):
        target_indices(target)
    if len(target) != 2 or not all(isinstance(t, Tensor) for t in target):
        raise TypeError(
            f"target is a {type(target).__name__} of {len(target)}, expected a pair of Tensors: "
            "class indices [..., K] and their probabilities [..., K]"
        )
    indices, prob = target
    target_indices(indices)
    dense("target probabilities", prob)
    if prob.dtype not in LOGIT_DTYPES:
        raise TypeError(
            f"target probabilities have dtype {prob.dtype}, expected one of {names(LOGIT_DTYPES)}: "
            "pass (indices, probabilities)"
        )
    if prob.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            "target probabilities require a gradient, which a top-k target does not give: "
            "pass probabilities.detach()"
        )
    rows = without_classes(input, dim)
    if indices.shape[:-1] != rows:
        classes_last(input, indices.shape[:-1], input.shape[:-1], indices, dim)
    for name, t in (("indices", indices), ("probabilities", prob)):
        if t.shape[:-1] != rows or t.dim() == 0 or t.shape[-1] == 0:
            raise ValueError(
                f"target {name} have shape {shape(t)}, expected K at least 1 for each row of input "
                f"of shape {shape(input)}: {with_k(rows)}"
            )
        same_device(f"target {name}", t, input)
    if indices.shape != prob.shape:
        raise ValueError(
            f"target indices have shape {shape(indices)}, but their probabilities {shape(prob)}: "
            "give one for each"
        )


def nothing_to_ignore(ignore_index: object, mend: str) -> None:
    raise ValueError(
        f"ignore_index is {ignore_index}, but target holds class probabilities, which name no "
        f"class to leave out: {mend}, and leave rows out with token_weight 0"
    )
