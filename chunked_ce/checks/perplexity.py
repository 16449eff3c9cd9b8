"""Counts and sums of what was scored."""

from __future__ import annotations

from numbers import Real
from typing import Any

import torch
from torch import Tensor

from .values import TARGET_DTYPES, integer, shape


def text_count(name: str, value: Any) -> int | None:
    if value is None:
        return None
    count = integer(name, value, "an int or None")
    if count < 0:
        raise ValueError(f"{name} is {count}, expected at least 0")
    return count


def nll_and_tokens(nll_sum: Any, tokens: Any) -> tuple[Tensor, Tensor]:
    """As 0-d tensors, where they are."""
    for name, value in (("nll_sum", nll_sum), ("tokens", tokens)):
        if isinstance(value, Tensor) and value.dim() != 0:
            raise ValueError(
                f"{name} has shape {shape(value)}, expected a number or a 0-dimensional tensor: "
                "sum it first"
            )
    if not isinstance(nll_sum, Tensor):
        if not isinstance(nll_sum, Real) or isinstance(nll_sum, bool):
            raise TypeError(
                f"nll_sum must be a number or a 0-dimensional tensor, got {type(nll_sum).__name__}"
            )
        nll_sum = torch.tensor(nll_sum, dtype=torch.float64)
    elif nll_sum.is_complex() or nll_sum.dtype == torch.bool:
        raise TypeError(f"nll_sum has dtype {nll_sum.dtype}, expected a sum of losses in nats")
    if not isinstance(tokens, Tensor):
        tokens = integer("tokens", tokens, "an int or a 0-dimensional integer tensor")
        if tokens < 0:
            raise ValueError(f"tokens is {tokens}, expected at least 0")
        tokens = torch.tensor(tokens, dtype=torch.int64)
    elif tokens.dtype not in TARGET_DTYPES:
        raise TypeError(
            f"tokens has dtype {tokens.dtype}, expected an integer dtype: it is a count"
        )
    return nll_sum, tokens
