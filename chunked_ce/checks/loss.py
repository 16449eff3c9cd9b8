"""Logits, targets and the options of a loss."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .group import group_of_mean
from .mistakes import no_probabilities, no_sigmoid
from .stats import return_stats
from .targets import class_probabilities, classes_last, nothing_to_ignore, top_k
from .values import (
    LARGEST,
    are_probabilities,
    brief,
    flag,
    floating,
    in_order,
    integer,
    is_int,
    may_be_read,
    names,
    number,
    reshaped,
    same_device,
    shape,
    target_indices,
    without_classes,
)
from .weights import num_items, token_weight

REDUCTIONS = ("mean", "sum", "none")


def logits(input: Tensor, target: object = None) -> None:
    in_order(input, target)
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


def softcap(value: Any, name: str = "softcap") -> float | None:
    if value is None:
        return None
    amount = number(name, value)
    if amount < 1 / LARGEST:
        raise ValueError(f"{name} is {amount}, expected a number above 0, or None for no cap")
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


def class_dimension(input: Tensor, dim: object) -> int:
    """Where the classes of `input` are, from 0 on; a single row [V] has them in dimension 0."""
    if not is_int(dim):
        raise TypeError(f"dim must be an int, got {type(dim).__name__}")
    n = input.dim()
    if n == 1:
        if dim not in (0, 1, -1):
            raise ValueError(
                f"dim is {dim}, but an input of shape {shape(input)} has its classes in dimension 0"
            )
        dim = 0
    if not -n <= dim < n:
        raise ValueError(
            f"dim is {dim}, but input of shape {shape(input)} has dimensions {-n} to {n - 1}"
        )
    if input.shape[dim] == 0:
        raise ValueError(
            f"input of shape {shape(input)} has no classes: dimension {dim % n} must be at least 1"
        )
    return dim % n


def check_target(input: Tensor, target: Any, dim: int) -> None:
    """`target` is one that `input` with its classes in `dim` can have; its values are not read."""
    if isinstance(target, (tuple, list)):
        top_k(input, target, dim)
    elif are_probabilities(target):
        class_probabilities(input, target, dim)
    else:
        target_indices(target)
        _indices(input, target, dim)


def _indices(input: Tensor, target: Tensor, dim: int) -> None:
    expected = without_classes(input, dim)
    if target.shape == expected:
        same_device("target", target, input)
        return
    classes_last(input, target.shape, input.shape[:-1], target, dim)
    if target.shape == input.shape:
        raise ValueError(
            f"target of dtype {target.dtype} has input's shape {shape(input)}, expected class "
            f"indices of shape {list(expected)}: of one-hot rows pass target.argmax({dim}), "
            "of class probabilities target.float(); "
            "for several labels a row see binary_cross_entropy_with_logits"
        )
    raise ValueError(
        f"target has shape {shape(target)}, but input of shape {shape(input)} with its classes in "
        f"dimension {dim} has one class index for each of {list(expected)}"
        f"{reshaped('target', target, expected)}"
    )


def no_class_ignored(ignore_index: Any, target: object) -> None:
    """As `torch.nn.functional.cross_entropy`: beside probabilities only what is no class."""
    if are_probabilities(target) and is_int(ignore_index) and ignore_index >= 0:
        nothing_to_ignore(ignore_index, "leave it -100")


def spread_rest(value: object, target: object) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"spread_rest must be True or False, got {type(value).__name__}")
    if value and not isinstance(target, (tuple, list)):
        raise ValueError(
            "spread_rest=True says what happens to the classes that a pair (indices, "
            "probabilities) does not name, but target is no such pair: leave it False"
        )


def linear_ignore_index(ignored: Any, target: object) -> int:
    """-100 for None; beside probabilities only None, as `F.linear_cross_entropy` has it."""
    if are_probabilities(target) and ignored is not None:
        nothing_to_ignore(ignored, "leave it None")
    return -100 if ignored is None else ignore_index(ignored)


def deprecated(**values: object) -> None:
    for name, value in values.items():
        if value is not None:
            raise TypeError(
                f"{name} is {value!r}, but torch has deprecated it and it is not taken here: "
                "use reduction='mean', 'sum' or 'none', by name"
            )


def grad_in_forward(value: object, token_weight: object, num_items: object) -> None:
    flag("grad_in_forward", value)
    for name, t in (("token_weight", token_weight), ("num_items", num_items)):
        if value and isinstance(t, Tensor) and t.requires_grad:
            raise ValueError(
                f"grad_in_forward=True computes the gradient of input alone, but {name} requires "
                f"one too: pass {name}.detach(), or grad_in_forward=False"
            )


def inplace_backward(value: object, input: Tensor) -> None:
    """Whether backward may write the gradient over these logits."""
    flag("inplace_backward", value)
    if not (value and input.requires_grad and torch.is_grad_enabled()):
        return
    if torch.compiler.is_compiling():  # where it is not done
        return
    owner = input if input._base is None else input._base
    if owner.is_leaf and owner.requires_grad:
        raise ValueError(
            "inplace_backward=True would overwrite a leaf tensor, whose values you still own: "
            "pass logits that a model computed, or inplace_backward=False"
        )
    if _overlaps(input):
        raise ValueError(
            "inplace_backward=True needs one memory location per logit, "
            f"but input of shape {shape(input)} is expanded or overlaps "
            f"(strides {input.stride()}): pass inplace_backward=False"
        )


def _overlaps(tensor: Tensor) -> bool:
    """Whether two indices may share an address: a stride within the extent of the smaller ones."""
    if tensor.numel() == 0:
        return False
    extent = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride < extent:
                return True
            extent += (size - 1) * stride
    return False


def input_and_target(input: Tensor, target: Any, dim: object, ignored: Any) -> tuple[int, int]:
    """Return where the classes are, of logits and a target that fit one another; ignore_index."""
    logits(input, target)
    where = class_dimension(input, dim)
    check_target(input, target, where)
    no_class_ignored(ignored, target)
    return where, ignore_index(ignored)


class LossOptions(NamedTuple):
    label_smoothing: float
    z_loss_weight: float
    num_items: int | Tensor | None
    reduction: str
    spread_rest: bool
    token_weight: Tensor | None
    stats: tuple[bool, ...] = ()  # whether to return each of LOGGED; (): no statistics
    group: Any = None  # of ranks whose tokens count in the mean


def loss_options(
    input: Tensor,
    target: Any,
    rows: torch.Size,
    reduction_name: str,
    label_smoothing_amount: Any,
    z_loss: Any,
    spread: bool,
    weights: Tensor | None,
    items: Any,
    wanted: Any = False,
    group: Any = None,
) -> LossOptions:
    """Check what the losses from logits and from hidden states share; `rows`: of the targets."""
    reduction(reduction_name)
    spread_rest(spread, target)
    if weights is not None:
        token_weight(weights, rows, input)
    if items is not None:
        items = num_items(items, reduction_name, input)
    if group is not None:
        group = group_of_mean(group, reduction_name, items, weights)
    stats = () if wanted is False else return_stats(wanted)
    smoothing, z_weight = label_smoothing(label_smoothing_amount), z_loss_weight(z_loss)
    return LossOptions(smoothing, z_weight, items, reduction_name, spread, weights, stats, group)


def looks_like_logits(input: Tensor, *, binary: bool = False) -> None:
    """Look at one row of `input` [..., V], where that makes nothing wait, and then at some more."""
    if binary and input.dim() > 1 and input.shape[-1] == 1:
        input = input[..., 0]
    if torch.compiler.is_compiling() or input.dim() == 0 or input.shape[-1] < 2:
        return
    if not input.numel():
        return
    # A tensor of another type may have no values to look at.
    if type(input) not in (Tensor, torch.nn.Parameter) or input.is_meta or not may_be_read(input):
        return
    row = input.detach()
    while row.dim() > 1:
        row = row[0]
    if min(row[:: max(1, len(row) // 32)].tolist()) >= 0:  # of logits some are negative
        no_sigmoid(input) if binary else no_probabilities(input)
