"""Logits, targets and the options of a loss."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .values import (
    LARGEST,
    brief,
    dense,
    flag,
    floating,
    integer,
    names,
    number,
    same_device,
    shape,
)

REDUCTIONS = ("mean", "sum", "none")


def logits(input: Tensor) -> None:
    floating("input", input, " of logits")
    if input.dim() == 0:
        raise ValueError("input is a 0-dimensional tensor, expected logits of shape [..., V]")


def ignore_index(value: Any) -> int:
    return integer("ignore_index", value, "an int (-100 ignores no class)")


def vocab_size(value: Any, input: Tensor) -> int:
    """The number of classes that exist: `value`, or all columns of `input`."""
    columns = input.shape[-1]
    if value is None:
        return columns
    size = integer("vocab_size", value, "an int or None")
    if not 1 <= size <= columns:
        raise ValueError(
            f"vocab_size is {size}, but input of shape {shape(input)} has {columns} columns: "
            f"give a number from 1 to {columns}, or None for all of them"
        )
    return size


def softcap(value: Any) -> float | None:
    if value is None:
        return None
    amount = number("softcap", value)
    if amount < 1 / LARGEST:
        raise ValueError(f"softcap is {amount}, expected a number above 0, or None for no cap")
    return amount


def logit_scale(value: Any) -> float:
    return number("logit_scale", value)


def label_smoothing(value: Any) -> float:
    amount = number("label_smoothing", value)
    if not 0 <= amount <= 1:
        raise ValueError(f"label_smoothing is {amount}, expected a number from 0 to 1")
    return amount


def z_loss_weight(value: Any) -> float:
    amount = number("z_loss_weight", value)
    if amount < 0:
        raise ValueError(
            f"z_loss_weight is {amount}, expected a number of at least 0 (1e-4 is usual)"
        )
    return amount


def reduction(value: object) -> None:
    if not isinstance(value, str) or value not in REDUCTIONS:
        raise ValueError(f"reduction is {brief(value)}, expected one of {names(REDUCTIONS)}")


def flags(**values: object) -> None:
    for name, value in values.items():
        flag(name, value)


def known_options(given: dict[str, Any], known: tuple[str, ...]) -> None:
    for name in given:
        if name not in known:
            raise TypeError(f"{name} is no option of this loss, expected of {names(known)}")


def token_weight(weight: Any, rows: torch.Size, input: Tensor) -> None:
    if weight is None:
        return
    if not isinstance(weight, Tensor):
        raise TypeError(f"token_weight must be a Tensor, got {type(weight).__name__}")
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
