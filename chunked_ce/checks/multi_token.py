"""Streams of hidden states that predict several tokens ahead, their heads and weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..core.head import COMPUTE_DTYPE
from .linear import hidden_states
from .values import dense, number, same_device, shape, target_indices

__all__ = ["depth_weight", "heads_of_streams", "streams"]


def streams(input: Any, target: Any) -> list[Tensor]:
    """Return the K streams [..., T, D] of hidden states, which fit the tokens."""
    target_indices(target)
    if isinstance(input, Tensor):
        hidden_states(input)
        if input.dim() < 2:
            raise ValueError(
                f"input has shape {shape(input)}, expected the streams' hidden states "
                "[K, ..., T, D]: pass input[None] for one stream"
            )
    elif not isinstance(input, Sequence):
        raise TypeError(
            f"input must be a Tensor [K, ..., T, D] or a sequence of K Tensors [..., T, D], got "
            f"{type(input).__name__}"
        )
    found = list(input)
    if not found:
        raise ValueError("input has no streams of hidden states: pass at least one")
    for k, x in enumerate(found):
        _stream(f"input[{k}]", x, found[0], target, same=isinstance(input, Tensor))
    return found


def _stream(name: str, x: Any, first: Tensor, target: Tensor, *, same: bool) -> None:
    hidden_states(x, name)
    if x.dim() != target.dim() + 1 or x.shape[:-2] != target.shape[:-1] or target.dim() == 0:
        raise ValueError(
            f"{name} has shape {shape(x)}, but target {shape(target)} holds the tokens [..., T]: "
            "expected a stream of hidden states [..., T, D]"
        )
    tokens = target.shape[-1]
    if x.shape[-2] > tokens or (same and x.shape[-2] != tokens):
        raise ValueError(
            f"{name} has {x.shape[-2]} positions, but target {shape(target)} has {tokens} tokens: "
            "pass the tokens of all positions"
        )
    if x.dtype != first.dtype or x.shape[-1] != first.shape[-1]:
        raise ValueError(
            f"{name} has shape {shape(x)} and dtype {x.dtype}, but input[0] {shape(first)} and "
            f"{first.dtype}: expected the same hidden size and dtype of all streams"
        )
    same_device(name, x, first)


def heads_of_streams(weight: Any, bias: Any, count: int) -> tuple[list[tuple[Any, Any]], bool]:
    """Return (head, bias) of each stream, and whether all share one."""
    each = isinstance(weight, (list, tuple, nn.ModuleList))
    each = each or (isinstance(weight, Tensor) and weight.dim() == 3)
    if not each:
        if isinstance(bias, (list, tuple)):
            raise TypeError("linear_bias is a sequence, but linear_weight is one head: pass [V]")
        return [(weight, bias)] * count, True
    biases = [None] * count if bias is None else bias
    if isinstance(biases, Tensor) and biases.dim() != 2:
        raise ValueError(
            f"linear_bias has shape {shape(biases)}, expected [K, V] beside a head for each stream"
        )
    for name, values in (("linear_weight", weight), ("linear_bias", biases)):
        if len(values) != count:
            raise ValueError(
                f"{name} holds {len(values)} heads, but input has {count} streams: pass one for "
                "each, or one head for all"
            )
    return list(zip(weight, biases, strict=True)), False


def depth_weight(value: Any, streams: Sequence[Tensor]) -> Tensor | None:
    """Return the weight of each stream's loss [K]."""
    if value is None:
        return None
    count, device = len(streams), streams[0].device
    if isinstance(value, Tensor):
        dense("depth_weight", value)
        if not value.is_floating_point():
            raise TypeError(f"depth_weight has dtype {value.dtype}, expected a floating one")
        same_device("depth_weight", value, streams[0])
        given = list(value.shape)
    elif isinstance(value, (list, tuple)):
        given = [len(value)]
        numbers = [number("depth_weight", v) for v in value]
        value = torch.tensor(numbers, device=device, dtype=COMPUTE_DTYPE[streams[0].dtype])
    else:
        raise TypeError(
            f"depth_weight must be a Tensor [K] or a sequence of K numbers, got "
            f"{type(value).__name__}"
        )
    if given != [count]:
        raise ValueError(f"depth_weight has shape {given}, expected one for each stream, [{count}]")
    weights: Tensor = value
    return weights
