"""Targets that are shifted by one token, and where packed documents begin."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .values import TARGET_DTYPES, brief, dense, flag, names, same_device, shape


def shift(
    value: object, target: Any, position_ids: Any, cu_seqlens: Any, input: Tensor, dim: int
) -> None:
    """Check what `shift=True` needs, of a `target` that fits `input` with its classes in `dim`."""
    flag("shift", value)
    documents = dict(position_ids=position_ids, cu_seqlens=cu_seqlens)
    given = [name for name, t in documents.items() if t is not None]
    if not value:
        raise ValueError(
            f"{given[0]} says which labels shift=True leaves out, but shift is False: "
            "pass shift=True"
        )
    _shifted_target(target, input, dim)
    if len(given) > 1:
        raise ValueError("position_ids and cu_seqlens say the same: give one of them")
    if position_ids is not None:
        _position_ids(position_ids, target)
    if cu_seqlens is not None:
        _cu_seqlens(cu_seqlens, target)


def _shifted_target(target: Any, input: Tensor, dim: int) -> None:
    if not isinstance(target, Tensor) or target.is_floating_point():
        raise ValueError(
            "shift=True takes class indices [..., T] as target, but target holds class "
            "probabilities: move them by one position yourself, and pass shift=False"
        )
    if dim not in (-1, input.dim() - 1):
        raise ValueError(
            f"shift=True takes logits [..., T, V] with the classes last, but dim={dim} for input "
            f"of shape {shape(input)}: pass dim=-1, with input.movedim({dim}, -1)"
        )
    if target.dim() == 0 or target.dim() != input.dim() - 1:
        raise ValueError(
            f"shift=True takes a target [..., T], one token for each row of input [..., T, :], "
            f"but target has shape {shape(target)} and input {shape(input)}"
        )


def _integers(name: str, value: Any, expected: str, dtypes: tuple[torch.dtype, ...]) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be {expected}, got {type(value).__name__}")
    dense(name, value)
    if value.dtype not in dtypes:
        raise TypeError(f"{name} has dtype {value.dtype}, expected one of {names(dtypes)}")


def _position_ids(value: Any, target: Tensor) -> None:
    _integers("position_ids", value, "a Tensor of target's shape", TARGET_DTYPES)
    if value.shape != target.shape:
        raise ValueError(
            f"position_ids have shape {shape(value)}, expected target's, {shape(target)}: "
            "if all rows share them, pass position_ids.expand_as(target)"
        )
    same_device("position_ids", value, target)


def _cu_seqlens(value: Any, target: Tensor) -> None:
    expected = "a Tensor of the documents' offsets, [num_docs + 1]"
    _integers("cu_seqlens", value, expected, (torch.int32, torch.int64))
    if value.dim() != 1 or value.shape[0] == 0:
        raise ValueError(f"cu_seqlens has shape {shape(value)}, expected [num_docs + 1]")
    same_device("cu_seqlens", value, target)
    if torch.compiler.is_compiling() or type(value) is not Tensor or value.device.type != "cpu":
        return  # where reading values would wait, or there are none
    offsets, tokens = value.tolist(), target.numel()
    falls = [i for i in range(1, len(offsets)) if offsets[i] < offsets[i - 1]]
    if offsets[0] != 0 or offsets[-1] != tokens or falls:
        where = f"falls from {offsets[falls[0] - 1]} to {offsets[falls[0]]}" if falls else ""
        raise ValueError(
            f"cu_seqlens is {brief(offsets)} and {where or 'covers other tokens'}, expected "
            f"offsets that begin with 0, never fall and end with {tokens}, the tokens of target"
        )
