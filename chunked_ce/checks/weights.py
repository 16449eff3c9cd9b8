"""Weights of classes and of tokens, and what a mean divides by."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .values import LOGIT_DTYPES, dense, integer, names, same_device, shape, to_tensor


def weight_of_classes(weight: object) -> None:
    """Class weights, for whatever number of classes."""
    if weight is None:
        return
    if not isinstance(weight, Tensor):
        raise TypeError(
            f"weight must be a Tensor of class weights, got {type(weight).__name__}"
            f"{to_tensor('weight', weight)}"
        )
    dense("weight", weight)
    if weight.dtype not in LOGIT_DTYPES:
        raise TypeError(
            f"weight has dtype {weight.dtype}, expected one of {names(LOGIT_DTYPES)}: "
            "use weight.float()"
        )
    if weight.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            "weight requires a gradient, which class weights do not get: pass weight.detach()"
        )


def weight_of_head(weight: object, num_classes: int, vocab_size: object) -> None:
    """Class weights of a head whose sizes are known."""
    weight_of_classes(weight)
    if not isinstance(weight, Tensor):
        return
    if weight.dim() != 1 or weight.shape[0] not in (num_classes, vocab_size):
        raise ValueError(
            f"weight has shape {shape(weight)}, expected one weight per class, [{num_classes}]"
        )


def class_weight(weight: Tensor | None, input: Tensor, vocab_size: int) -> Tensor | None:
    """[vocab_size] class weights; those of padding columns are dropped."""
    weight_of_classes(weight)
    if weight is None:
        return None
    # Not `in`, which compares sizes that torch.compile traces by identity.
    given = weight.shape[0] if weight.dim() == 1 else None
    if given is None or (given != vocab_size and given != input.shape[-1]):
        raise ValueError(
            f"weight has shape {shape(weight)}, expected one weight per class, [{vocab_size}] "
            "(for one weight per token, see token_weight)"
        )
    same_device("weight", weight, input)
    return weight[:vocab_size]


def head_class_weight(weight: Tensor, linear_weight: Tensor, vocab_size: int) -> Tensor | None:
    """The same for a head [V, d1, ..., D]."""
    return class_weight(weight, linear_weight[..., 0].movedim(0, -1), vocab_size)


def token_weight(weight: Any, rows: torch.Size, input: Tensor) -> None:
    if weight is None:
        return
    if not isinstance(weight, Tensor):
        raise TypeError(
            f"token_weight must be a Tensor, got {type(weight).__name__}"
            f"{to_tensor('token_weight', weight)}"
        )
    dense("token_weight", weight)
    if not weight.is_floating_point():
        raise TypeError(
            f"token_weight has dtype {weight.dtype}, expected a floating dtype: "
            "use token_weight.float()"
        )
    if weight.shape != rows:
        raise ValueError(
            f"token_weight has shape {shape(weight)}, expected one weight per target, "
            f"{list(rows)} (for one weight per class, see weight)"
        )
    same_device("token_weight", weight, input)


def num_items(value: Any, reduction: str, input: Tensor) -> int | Tensor | None:
    if value is None:
        return None
    if reduction != "mean":
        raise ValueError(
            f"num_items is what reduction='mean' divides by, but reduction is {reduction!r}: "
            "leave it None"
        )
    if isinstance(value, Tensor):
        if value.dim() != 0:
            raise ValueError(
                f"num_items has shape {shape(value)}, expected an int or a 0-dimensional tensor: "
                "sum it first"
            )
        if value.is_meta and not input.is_meta:
            raise ValueError("num_items is on meta, where it has no value: pass an int")
        dense("num_items", value)
        if value.is_complex() or value.dtype == torch.bool:
            raise TypeError(f"num_items has dtype {value.dtype}, expected a number of tokens")
        tensor: Tensor = value
        return tensor
    count = integer("num_items", value, "an int or a 0-dimensional tensor")
    if count <= 0:
        raise ValueError(
            f"num_items is {count}, expected at least 1: skip a batch that has no tokens"
        )
    return count
