"""How messages show values, and the checks that all others are made of."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any, NoReturn, TypeGuard

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..core.reduction import is_scored

LOGIT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


TARGET_DTYPES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def shape(tensor: Tensor) -> str:
    return "[" + ", ".join(str(size) for size in tensor.shape) + "]"


def with_k(rows: torch.Size) -> str:
    """[rows, K]"""
    return "[" + "".join(f"{size}, " for size in rows) + "K]"


def names(values: tuple[object, ...]) -> str:
    return ", ".join(str(value).removeprefix("torch.") for value in values)


def brief(value: object) -> str:
    """`value` in a line of an error message."""
    text = " ".join(repr(value).split())
    return text if len(text) < 40 else text[:36] + "..."


def may_be_read(values: Tensor) -> bool:
    """Whether reading values makes nothing wait, or the user has asked for it."""
    return values.is_cpu or os.environ.get("CHUNKED_CE_CHECK_TARGETS") == "1"


def is_dtensor(value: object) -> bool:
    return type(value).__name__ == "DTensor"  # its module takes long to import


def no_dtensor(name: str, value: object) -> None:
    """Refuse a DTensor beside plain tensors, which no operator can mix."""
    if is_dtensor(value):
        raise TypeError(
            f"{name} is a DTensor, but input is a plain tensor: pass {name}.full_tensor(), or "
            f"{name}.to_local() where this rank's rows are what input holds"
        )


def not_sharded(gradients: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
    """Return the gradients of plain outputs, none of which may be a DTensor."""
    if any(map(is_dtensor, gradients)):
        raise TypeError(
            "the upstream gradient is a DTensor, but the loss is a plain tensor: pass its "
            ".full_tensor() to backward, or use .to_local() of the DTensor that the loss meets"
        )
    return gradients


def is_int(value: object) -> TypeGuard[int]:
    return isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool)


def integer(name: str, value: Any, expected: str) -> int:
    """`value` as an int of 64 bits; numpy's integers are ints too."""
    if not isinstance(value, (int, torch.SymInt)) and isinstance(value, Integral):
        value = int(value)
    if not is_int(value):
        raise TypeError(f"{name} must be {expected}, got {type(value).__name__}")
    if not -(2**63) <= value < 2**63:
        raise ValueError(f"{name} is {brief(value)}, expected a number of 64 bits")
    return value


LARGEST = 1e30  # as large as fp32 can still be multiplied with


def number(name: str, value: Any) -> float:
    numbers = (float, int, Real, torch.SymFloat, torch.SymInt)  # abstract ones take a microsecond
    if not isinstance(value, numbers) or isinstance(value, bool):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if not -LARGEST <= value <= LARGEST:  # type: ignore[operator]
        raise ValueError(f"{name} is {brief(value)}, expected a finite number up to {LARGEST}")
    return float(value)


def to_tensor(name: str, value: object) -> str:
    """Return how a message says to make a Tensor of `value`; "" where it does not know."""
    if type(value).__name__ == "ndarray":
        return f": pass torch.from_numpy({name})"
    if isinstance(value, (list, tuple, int, float)):
        return f": pass torch.tensor({name})"
    if isinstance(value, torch.nn.Module):
        return ": pass the tensor that it computes or holds"
    return f": pass {name}.tensor()" if hasattr(type(value), "tensor") else ""  # deferred logits


def reshaped(name: str, tensor: Tensor, expected: Sequence[int]) -> str:
    """Return how a message says to give `tensor` a shape that it nearly has; "" where not."""
    if list(tensor.shape) == [*expected, 1]:
        return f": pass {name}.squeeze(-1)"
    if tensor.numel() != math.prod(expected) or tensor.dim() == len(expected):
        return ""
    if len(expected) == 1:
        return f": pass {name}.flatten()"
    return f": pass {name}.view({', '.join(map(str, expected))})"


def dense(name: str, tensor: Tensor) -> None:
    """Refuse DTensors, sparse and nested tensors, and forward-mode tangents."""
    no_dtensor(name, tensor)
    if tensor.layout != torch.strided or tensor.is_nested:
        kind = "nested" if tensor.is_nested else str(tensor.layout)
        raise TypeError(f"{name} is a {kind} tensor, expected a dense one: convert it to dense")
    if tensor.is_floating_point() and not torch.compiler.is_compiling():
        if forward_ad.unpack_dual(tensor).tangent is not None:
            forward_mode(name)


def floating(name: str, tensor: Any, what: str, mend: str = "convert it with .float()") -> None:
    """A dense Tensor of a dtype we compute with, and no forward-mode tangent."""
    if not isinstance(tensor, Tensor):
        mend = to_tensor(name, tensor)
        raise TypeError(f"{name} must be a Tensor{what}, got {type(tensor).__name__}{mend}")
    if is_dtensor(tensor):
        raise TypeError(
            f"{name} is a DTensor, of which every rank holds a part: pass "
            f"{name}.to_local() where the rows are sharded, {name}.full_tensor() to gather it, or "
            "call chunked_ce.distributed.vocab_parallel_cross_entropy (or "
            "vocab_parallel_token_stats) where the classes are"
        )
    dense(name, tensor)
    if tensor.dtype not in LOGIT_DTYPES:
        raise TypeError(
            f"{name} has dtype {tensor.dtype}, expected one of {names(LOGIT_DTYPES)}: {mend}"
        )


def forward_mode(name: str) -> NoReturn:
    raise NotImplementedError(
        f"{name} carries a forward-mode tangent, but chunked_ce computes reverse-mode "
        "derivatives only: use torch.nn.functional's losses"
    )


def flag(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {type(value).__name__}")


def same_device(name: str, tensor: Tensor, input: Tensor) -> None:
    if tensor.device != input.device:
        raise ValueError(
            f"{name} is on {tensor.device}, but input is on {input.device}: "
            "move it with .to(input.device)"
        )


def are_probabilities(target: object) -> bool:
    return isinstance(target, Tensor) and (target.is_floating_point() or target.is_complex())


def in_order(input: object, target: object) -> None:
    """Refuse logits and targets that came in each other's place."""
    if are_probabilities(target) and isinstance(input, Tensor) and not input.is_floating_point():
        assert isinstance(target, Tensor)
        raise TypeError(
            f"input has dtype {input.dtype} and target has dtype {target.dtype}, as if they were "
            "swapped: the arguments are (input, target), logits first"
        )


def target_indices(target: object) -> None:
    if not isinstance(target, Tensor):
        raise TypeError(
            f"target must be a Tensor of class indices, got {type(target).__name__}"
            f"{to_tensor('target', target)}"
        )
    dense("target", target)
    if target.is_floating_point() or target.is_complex():
        raise TypeError(
            f"target has dtype {target.dtype}, expected class indices of an integer dtype: "
            "use target.long() if it holds indices"
        )
    if target.dtype not in TARGET_DTYPES:
        raise TypeError(
            f"target has dtype {target.dtype}, expected one of {names(TARGET_DTYPES)}: "
            "use target.long()"
        )


def without_classes(input: Tensor, dim: int) -> torch.Size:
    return input.shape[:dim] + input.shape[dim + 1 :]


def targets_in_range(target: Tensor, vocab_size: int, ignore_index: int, per_row: int = 1) -> None:
    """`IndexError` that names the first offending row, of so many targets each."""
    rows = target.reshape(-1).long()
    bad = ((rows < 0) | (rows >= vocab_size)) & is_scored(rows, ignore_index)
    if not bad.any():
        return
    first = int(bad.long().argmax())
    value = int(rows[first])
    padding = f"ignore_index={value}" if value < 0 else "its class as ignore_index"
    raise IndexError(
        f"target {value} in row {first // per_row} is out of range: "
        f"expected a class from 0 to {vocab_size - 1} or ignore_index={ignore_index} "
        f"(if it is padding, pass {padding})"
    )
