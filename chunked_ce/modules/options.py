"""What the modules share: names of options, and their text in `repr`."""

from __future__ import annotations

from typing import Any

from torch import nn

SHARED_OPTIONS = (
    "shift", "z_loss_weight", "softcap", "logit_scale", "vocab_size", "spread_rest", "group",
    "return_stats", "backend",
)  # fmt: skip
COMMON_ARGUMENTS = ("weight", "ignore_index", "reduction", "label_smoothing")


def differing_arguments(
    module: nn.Module, defaults: dict[str, Any], options: dict[str, Any]
) -> list[str]:
    """Return the arguments that differ from the defaults."""
    values = {name: getattr(module, name) for name in defaults}
    differ = {name: value for name, value in values.items() if value != defaults[name]}
    return [f"{name}={value!r}" for name, value in (differ | options).items()]
