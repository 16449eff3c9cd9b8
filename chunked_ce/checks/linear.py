"""Hidden states, the head's weight, chunks."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .loss import check_target as any_target
from .values import (
    TARGET_DTYPES,
    are_probabilities,
    brief,
    dense,
    flag,
    floating,
    integer,
    is_dtensor,
    reshaped,
    same_device,
    shape,
    target_indices,
    to_tensor,
)


def linear_input(
    input: Tensor, weight: Tensor, bias: Tensor | None, target: Any, *, dims: bool
) -> None:
    """Hidden states, head and target that fit one another."""
    if not (isinstance(weight, Tensor) and weight.dim() == 2 and weight.is_floating_point()):
        head_weight(weight, target, dims=dims)
    hidden_states(input)
    linear_weight(weight, input, dims=dims)
    linear_bias(bias, weight)
    linear_target(input, weight, target)


class HeadNames(NamedTuple):
    """What a function calls its hidden states and the head's weight and bias."""

    input: str = "input"
    weight: str = "linear_weight"
    bias: str = "linear_bias"


NAMES = HeadNames()


def no_module(weight: object, names: HeadNames = NAMES) -> None:
    """Refuse a module where its weight is wanted."""
    if isinstance(weight, torch.nn.Module):
        raise TypeError(
            f"{names.weight} is a module, {type(weight).__name__}, expected its weight [V, D]: "
            f"pass lm_head.weight (and {names.bias}=lm_head.bias, if it has one)"
        )


def head_weight(weight: Any, target: object, *, dims: bool) -> None:
    """Refuse modules, and what was meant for another place."""
    no_module(weight)
    holds_indices = isinstance(weight, Tensor) and weight.dtype in TARGET_DTYPES
    if holds_indices and are_probabilities(target):
        raise TypeError(f"linear_weight has dtype {weight.dtype}, like class indices: {_ORDER}")
    if not dims and isinstance(weight, Tensor) and isinstance(target, Tensor):
        if weight.dim() > 2 and target.shape == weight.shape[:-1]:
            raise ValueError(f"linear_weight has shape {shape(weight)}, expected [V, D]: {_ORDER}")


_ORDER = "the arguments are (input, linear_weight, target): hidden states, lm_head.weight, labels"


def hidden_states(input: Tensor, name: str = "input") -> None:
    floating(name, input, " of hidden states")
    if input.dim() == 0:
        raise ValueError(f"{name} is a 0-dimensional tensor, expected hidden states [..., D]")
    if input.shape[-1] == 0:
        raise ValueError(
            f"{name} of shape {shape(input)} has hidden states of 0 numbers: expected at least 1"
        )


def linear_weight(weight: Tensor, input: Tensor, *, dims: bool, names: HeadNames = NAMES) -> None:
    """[V, D], or [V, d1, ..., D] where `dims` may be."""
    name = names.weight
    if is_dtensor(weight):
        raise TypeError(
            f"{name} is a DTensor, whose shards are elsewhere: gather it first "
            f"({name}.full_tensor(), or module.unshard() with FSDP2)"
        )
    floating(name, weight, "", "dequantise it, or convert it to input's dtype")
    if weight.dim() < 2 or (weight.dim() > 2 and not dims):
        expected = "[V, D] or [V, d1, ..., D]" if dims else "[V, D]"
        raise ValueError(
            f"{name} has shape {shape(weight)}, expected {expected}: pass lm_head.weight "
            "(under FSDP inside the module that owns it, where it is whole)"
        )
    if weight.shape[-1] != input.shape[-1]:
        raise ValueError(
            f"{name} of shape {shape(weight)} takes hidden states of "
            f"{weight.shape[-1]} numbers, but {names.input} has shape {shape(input)}: "
            "pass the weight as [V, D], as torch.nn.Linear keeps it"
        )
    if any(size == 0 for size in weight.shape):
        raise ValueError(f"{name} of shape {shape(weight)} has no classes, or no heads")
    if weight.dim() > 2 and input.dim() != 2:
        raise ValueError(
            f"{name} of shape {shape(weight)} has more than two dimensions and wants "
            f"input [N, D], but input has shape {shape(input)}"
        )
    same_device(name, weight, input)


def linear_bias(bias: object, weight: Tensor, name: str = "linear_bias") -> None:
    if bias is None:
        return
    if not isinstance(bias, Tensor):
        raise TypeError(
            f"{name} must be a Tensor or None, got {type(bias).__name__}{to_tensor(name, bias)}"
        )
    dense(name, bias)
    if bias.shape != weight.shape[:-1]:
        raise ValueError(
            f"{name} has shape {shape(bias)}, expected one number per class, "
            f"{shape(weight[..., 0])}"
        )
    same_device(name, bias, weight)


def linear_target(input: Tensor, weight: Tensor, target: Any) -> None:
    if isinstance(target, (tuple, list)) or are_probabilities(target):
        if weight.dim() > 2:
            raise ValueError(
                f"linear_weight of shape {shape(weight)} has more than two dimensions and wants "
                "class indices as target: for probabilities call it once for each head"
            )
        logits = input.new_empty(()).expand(*input.shape[:-1], weight.shape[0])
        any_target(logits, target, logits.dim() - 1)
        if isinstance(target, Tensor) and target.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                "target requires a gradient, which linear_cross_entropy does not give: "
                "pass target.detach(), or the logits to cross_entropy"
            )
        return
    target_indices(target)
    expected = input.shape[:-1] + weight.shape[1:-1]
    if target.shape != expected:
        mend = reshaped("target", target, expected)
        if target.shape == weight.shape[:-1]:  # as Liger's fused loss has them
            mend = f": {_ORDER}"
        raise ValueError(
            f"target has shape {shape(target)}, but input of shape {shape(input)} and "
            f"linear_weight of shape {shape(weight)} have one class index for each of "
            f"[{', '.join(map(str, expected))}]{mend}"
        )
    same_device("target", target, input)


def same_dtype(input: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    for name, t in (("linear_weight", weight), ("linear_bias", bias)):
        if t is not None and t.dtype != input.dtype:
            raise TypeError(
                f"{name} has dtype {t.dtype}, but input has dtype {input.dtype}: "
                "convert one of them, or use torch.autocast"
            )


def linear_vocab_size(value: Any, weight: Tensor) -> int:
    """The number of classes that exist: `value`, or all rows of `linear_weight`."""
    if value is None:
        return weight.shape[0]
    size = integer("vocab_size", value, "an int or None")
    if not 1 <= size <= weight.shape[0]:
        raise ValueError(
            f"vocab_size is {size}, but linear_weight of shape {shape(weight)} has "
            f"{weight.shape[0]} classes: give a number from 1 to that, or None for all of them"
        )
    return size


def acc_dtype(value: object, weight: Tensor) -> torch.dtype:
    """The dtype in which chunks' gradients of the weight are added."""
    if not isinstance(value, torch.dtype) or not value.is_floating_point:
        raise TypeError(f"acc_dtype must be a floating dtype, got {brief(value)}")
    return value if value.itemsize > weight.dtype.itemsize else weight.dtype


def logits_dtype(value: object, weight: Tensor) -> torch.dtype:
    """The dtype of a chunk's logits: the operands', or float32 where these are narrower."""
    if value is None:
        return weight.dtype
    if not isinstance(value, torch.dtype):
        raise TypeError(f"logits_dtype must be a floating dtype or None, got {brief(value)}")
    if value not in (weight.dtype, torch.float32) or value.itemsize < weight.dtype.itemsize:
        narrower = value.itemsize < weight.dtype.itemsize
        raise ValueError(
            f"logits_dtype is {value}, {'narrower than' if narrower else 'but'} the operands' "
            f"{weight.dtype}: give torch.float32 for half-precision operands, or None for theirs"
        )
    return value


def rows_per_chunk(
    chunk_bytes: object, token_chunk_size: object, row_bytes: int, default: int
) -> int:
    """Tokens whose logits are held at a time."""
    if token_chunk_size is not None:
        if chunk_bytes is not None:
            raise ValueError("chunk_bytes and token_chunk_size say the same: give one of them")
        size = integer("token_chunk_size", token_chunk_size, "an int or None")
        if size < 1:
            raise ValueError(f"token_chunk_size is {size}, expected at least 1")
        return size
    if chunk_bytes is None:
        return default
    size = integer("chunk_bytes", chunk_bytes, "an int or None")
    if size < row_bytes:
        raise ValueError(
            f"chunk_bytes is {size}, but the logits of one token take {row_bytes} bytes: "
            f"give at least that, or None for {default} tokens"
        )
    return size // row_bytes


def drop_ignored(value: object, device: torch.device) -> bool:
    """None: where finding the tokens that count makes nothing wait."""
    if value is None:
        return device.type == "cpu" and not torch.compiler.is_compiling()
    flag("drop_ignored", value)
    return bool(value)
