"""Which calls of an enabled model may defer their logits."""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple

from torch import nn


class Call(NamedTuple):
    """Hold what was passed to a model's forward, and by which name its parameters go."""

    positions: dict[str, int]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def has(self, name: str) -> bool:
        """Return whether an argument other than None was passed, by name or by position."""
        position = self.positions.get(name, len(self.args))
        given = self.args[position] if position < len(self.args) else self.kwargs.get(name)
        return given is not None


class Deferring(NamedTuple):
    """Hold which calls the user of a model wants deferred."""

    evaluation: bool
    without_labels: bool

    def __str__(self) -> str:
        when = "in training and evaluation" if self.evaluation else "in training"
        return f"{when} with labels" + ", and without labels" * self.without_labels

    def wants(self, call: Call, training: bool, compiling: bool) -> bool:
        """Return whether to defer. Generation and traced calls without labels use their logits."""
        if call.has("labels"):
            return training or self.evaluation
        return self.without_labels and not compiling and not call.has("past_key_values")


def positions(model: nn.Module) -> dict[str, int]:
    """Return the place of each parameter of a model's forward, after `self`."""
    names = list(inspect.signature(type(model).forward).parameters)[1:]
    return {name: index for index, name in enumerate(names)}
