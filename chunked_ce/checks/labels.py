"""Labels of binary cross-entropy: dense, or by index."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .values import (
    LOGIT_DTYPES,
    TARGET_DTYPES,
    dense,
    floating,
    in_order,
    names,
    same_device,
    shape,
    to_tensor,
    with_k,
)


def label_logits(input: Tensor, target: object) -> None:
    in_order(input, target)
    floating("input", input, " of logits")


def labels(input: Tensor, target: Any) -> None:
    """`target` is labels [...] as `input`, or class indices [..., K]; their values are not read."""
    if not isinstance(target, Tensor):
        raise TypeError(
            f"target must be a Tensor of labels, got {type(target).__name__}"
            f"{to_tensor('target', target)}"
        )
    dense("target", target)
    if target.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            "target requires a gradient, which labels do not get: pass target.detach()"
        )
    if target.dtype in LOGIT_DTYPES:
        if target.shape != input.shape:
            raise ValueError(
                f"target has shape {shape(target)}, but labels of dtype {target.dtype} must have "
                f"the shape of input, {shape(input)} (class indices [..., K] have an integer dtype)"
            )
    elif target.dtype not in TARGET_DTYPES:
        raise TypeError(
            f"target has dtype {target.dtype}, expected one of {names(LOGIT_DTYPES)} for labels "
            "from 0 to 1 (use target.float()), or an integer dtype for class indices"
        )
    elif input.dim() == 0 or target.dim() != input.dim() or target.shape[-1] == 0:
        _no_indices(input, target)
    elif target.shape == input.shape:
        raise ValueError(
            f"target of dtype {target.dtype} has input's shape {shape(input)}, like a multi-hot "
            "matrix, but integers are taken for class indices [..., K]: use target.float()"
        )
    elif target.shape[:-1] != input.shape[:-1]:
        _no_indices(input, target)
    same_device("target", target, input)


def no_label_ignored(ignore_index: int, target: Tensor) -> None:
    if target.is_floating_point() and ignore_index != -100:
        raise ValueError(
            f"ignore_index is {ignore_index}, but target of dtype {target.dtype} holds a label for "
            "every logit, and no indices to leave out: leave it -100, and give those logits "
            "weight 0"
        )


def _no_indices(input: Tensor, target: Tensor) -> None:
    raise ValueError(
        f"target has dtype {target.dtype} and shape {shape(target)}, but class indices for input "
        f"of shape {shape(input)} have shape {with_k(input.shape[:-1])}, K at least 1 (for labels "
        "of input's shape use target.float())"
    )


def label_weight(name: str, weight: Any, input: Tensor) -> None:
    if weight is None:
        return
    if not isinstance(weight, Tensor):
        raise TypeError(
            f"{name} must be a Tensor or None, got {type(weight).__name__}{to_tensor(name, weight)}"
        )
    dense(name, weight)
    if weight.dtype not in LOGIT_DTYPES:
        raise TypeError(
            f"{name} has dtype {weight.dtype}, expected one of {names(LOGIT_DTYPES)}: "
            f"use {name}.float()"
        )
    if weight.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{name} requires a gradient, which it does not get: pass {name}.detach()")
    last = input.shape[input.dim() - weight.dim() :] if weight.dim() <= input.dim() else None
    if last is None or any(w != 1 and w != n for w, n in zip(weight.shape, last, strict=True)):
        raise ValueError(
            f"{name} has shape {shape(weight)}, which does not broadcast to input of shape "
            f"{shape(input)}: give one number per class, {[*input.shape[-1:]]}"
        )
    same_device(name, weight, input)
