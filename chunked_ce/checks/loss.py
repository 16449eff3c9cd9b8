"""Logits, targets and the options of a loss."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..stats import is_scored
from .values import (
    LARGEST,
    TARGET_DTYPES,
    brief,
    dense,
    flag,
    floating,
    integer,
    is_int,
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
    if input.shape[-1] == 0:
        raise ValueError(
            f"input of shape {shape(input)} has no classes: its last dimension must be at least 1"
        )


def target_indices(target: Tensor) -> None:
    if not isinstance(target, Tensor):
        raise TypeError(f"target must be a Tensor of class indices, got {type(target).__name__}")
    dense("target", target)
    if target.is_floating_point() or target.is_complex():
        raise TypeError(
            f"target has dtype {target.dtype}, expected class indices of an integer dtype: "
            "use target.long() if it holds indices (class probabilities are not supported yet)"
        )
    if target.dtype not in TARGET_DTYPES:
        raise TypeError(
            f"target has dtype {target.dtype}, expected one of {names(TARGET_DTYPES)}: "
            "use target.long()"
        )


def one_target_per_row(input: Tensor, target: Tensor) -> None:
    """`input` [..., V] and `target` [...], class dimension last."""
    if target.shape != input.shape[:-1]:
        raise ValueError(
            f"target has shape {shape(target)}, but input of shape {shape(input)} has one row "
            f"per target of shape {shape(input[..., 0])}: give one class index per row of logits"
        )
    same_device("target", target, input)


def class_dimension(input: Tensor, target: Tensor, dim: int) -> None:
    """`dim` says where the classes of `input` are, as in `F.cross_entropy`.

    Today that must be the last dimension.
    """
    if not is_int(dim):
        raise TypeError(f"dim must be an int, got {type(dim).__name__}")
    n = input.dim()
    if n == 1:
        if dim not in (0, 1, -1):
            raise ValueError(
                f"dim is {dim}, but an input of shape {shape(input)} has its classes in dimension 0"
            )
        return
    if not -n <= dim < n:
        raise ValueError(
            f"dim is {dim}, but input of shape {shape(input)} has dimensions {-n} to {n - 1}"
        )
    if dim % n == n - 1:
        return
    classes_last = target.shape == input.shape[:-1]
    as_torch = target.shape == input.shape[:dim] + input.shape[dim:][1:]
    if classes_last and not as_torch:
        raise ValueError(
            f"input of shape {shape(input)} and target of shape {shape(target)} have the classes "
            f"in the last dimension, but dim={dim} (torch's default is 1): pass dim=-1"
        )
    raise NotImplementedError(
        f"input of shape {shape(input)} with its classes in dimension {dim} is not supported yet: "
        "move them last with input.movedim(dim, -1) and pass dim=-1"
    )


def targets_in_range(target: Tensor, vocab_size: int, ignore_index: int) -> None:
    """`IndexError` that names the first offending row."""
    target = target.reshape(-1).long()
    bad = ((target < 0) | (target >= vocab_size)) & is_scored(target, ignore_index)
    if not bad.any():
        return
    row = int(bad.long().argmax())
    raise IndexError(
        f"target {int(target[row])} in row {row} is out of range: "
        f"expected a class from 0 to {vocab_size - 1} or ignore_index={ignore_index} "
        "(use ignore_index for padding)"
    )


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


def class_weight(weight: object) -> None:
    if weight is not None:
        raise NotImplementedError(
            f"weight is a {type(weight).__name__}, but class weights are not supported yet: "
            "pass None (for one weight per token, see token_weight)"
        )


def token_weight(weight: Any, input: Tensor, target: Tensor) -> None:
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
    if weight.shape != target.shape:
        raise ValueError(
            f"token_weight has shape {shape(weight)}, expected one weight per target, "
            f"{shape(target)} (for one weight per class, see weight)"
        )
    same_device("token_weight", weight, input)


def num_items(value: Any, reduction: str) -> int | Tensor | None:
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
