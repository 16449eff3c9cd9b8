"""Check counts and sums of what was scored."""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from ...checks.loss import ignore_index
from ...checks.values import TARGET_DTYPES, integer, shape


def text_count(name: str, value: Any) -> int | None:
    if value is None:
        return None
    count = integer(name, value, "an int or None")
    if count < 0:
        raise ValueError(f"{name} is {count}, expected at least 0")
    return count


def nats(name: str, value: Any) -> Tensor:
    """Return a sum of losses as a 0-d tensor on its device."""
    _zero_dimensional(name, value)
    if not isinstance(value, Tensor):
        if not isinstance(value, Real) or isinstance(value, bool):
            raise TypeError(
                f"{name} must be a number or a 0-dimensional tensor, got {type(value).__name__}"
            )
        return torch.tensor(value, dtype=torch.float64)
    if value.is_complex() or value.dtype == torch.bool:
        raise TypeError(f"{name} has dtype {value.dtype}, expected a sum of losses in nats")
    return value


def token_count(tokens: Any, name: str = "tokens") -> Tensor:
    """Return a count as a 0-d tensor on its device."""
    _zero_dimensional(name, tokens)
    if isinstance(tokens, Tensor):
        if tokens.dtype not in TARGET_DTYPES:
            raise TypeError(
                f"{name} has dtype {tokens.dtype}, expected an integer dtype: it is a count"
            )
        return tokens
    tokens = integer(name, tokens, "an int or a 0-dimensional integer tensor")
    if tokens < 0:
        raise ValueError(f"{name} is {tokens}, expected at least 0")
    return torch.tensor(tokens, dtype=torch.int64)


def meter_ignore_index(value: Any) -> int:
    """Return the ignored index; None, torchmetrics' default, is -100."""
    return ignore_index(-100 if value is None else value)


def meter(other: Any) -> Any:
    if not hasattr(other, "state_dict") or not hasattr(other, "nll_sum"):
        raise TypeError(f"other must be a Perplexity, got {type(other).__name__}")
    return other


def meter_state(
    state: Any, sums: tuple[str, ...], counts: tuple[str, ...], on_host: tuple[str, ...]
) -> dict[str, Any]:
    """Return the values of a checkpoint, or of JSON, as 0-d tensors, ints and None."""
    names = sums + counts
    if not isinstance(state, Mapping):
        raise TypeError(f"state_dict must be a mapping, got {type(state).__name__}")
    if set(state) != set(names):
        raise ValueError(
            f"state_dict has keys {', '.join(map(str, state)) or 'none'}, expected "
            f"{', '.join(names)}: pass what Perplexity.state_dict() returned"
        )
    checked: dict[str, Any] = {}
    for name in names:
        value = state[name]
        if value is None and name not in ("nll_sum", "tokens"):
            checked[name] = None
        elif name in on_host:
            checked[name] = text_count(name, value)
        else:
            checked[name] = nats(name, value) if name in sums else token_count(value, name)
    return checked


def _zero_dimensional(name: str, value: Any) -> None:
    if isinstance(value, Tensor) and value.dim() != 0:
        raise ValueError(
            f"{name} has shape {shape(value)}, expected a number or a 0-dimensional tensor: "
            "sum it first"
        )
