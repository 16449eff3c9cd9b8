"""Which statistics are asked for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ..core.row_stats import LOGGED
from .values import brief, flag, reshaped, same_device, shape


def flags(**values: Any) -> tuple[Any, ...]:
    """Return the values, True or False each."""
    for name, value in values.items():
        flag(name, value)
    return tuple(values.values())


def one_target_per_row(input: Tensor, target: Tensor) -> None:
    """`input` [..., V] and `target` [...], class dimension last."""
    if target.shape != input.shape[:-1]:
        raise ValueError(
            f"target has shape {shape(target)}, but input of shape {shape(input)} has one row "
            f"per target of shape {shape(input[..., 0])}"
            f"{reshaped('target', target, input.shape[:-1]) or ': give one class index per row'}"
        )
    same_device("target", target, input)


def return_stats(value: Any) -> tuple[bool, ...]:
    """Return whether each of LOGGED is asked for; () for no statistics at all."""
    expected = f'True, False, or a tuple of names such as ("{LOGGED[0]}",)'
    if isinstance(value, bool):
        return (False,) * len(LOGGED) if value else ()
    if isinstance(value, str):
        raise TypeError(f"return_stats is {brief(value)}, expected {expected}: pass ({value!r},)")
    if not isinstance(value, (Sequence, set, frozenset)):
        raise TypeError(f"return_stats must be {expected}, got {type(value).__name__}")
    for name in value:
        if name not in LOGGED:
            raise ValueError(
                f"return_stats names {brief(name)}, expected of {', '.join(LOGGED)}; lse and "
                "logprob are always returned, and mean_logprob by token_stats"
            )
    return tuple(name in value for name in LOGGED)
