"""FLOPs of the linear operators, for torch's FlopCounterMode: it sees no product in them."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

_PLACES = {"linear_loss": (9, 17), "linear_stats": (10, None), "linear_stats_grad": (18, 26)}
"""Where an operator's arguments hold `vocab_size`, and which gradients are wanted."""


def register(counter: Any) -> None:
    """Register the operators' formulas in the module `counter`, and in modes that are active.

    2 N D V for the logits, and as many for each of the gradients of hidden states and weight.
    Tokens that are left out of the products count too: a formula sees shapes only.
    """
    modes = [getattr(mode, "counter", mode) for mode in _get_current_dispatch_mode_stack()]
    for name, (classes, wanted) in _PLACES.items():
        operator = getattr(torch.ops.chunked_ce, name)
        counter.register_flop_formula(operator)(_formula(classes, wanted))
        for mode in modes:  # it has copied the formulas
            if isinstance(mode, counter.FlopCounterMode):
                mode.flop_registry[operator] = counter.flop_registry[operator]


def _formula(classes: int, wanted: int | None) -> Any:
    def flops(*arguments: Any, **_: Any) -> int:  # tensors come as their shapes
        products = 1 if wanted is None else 1 + sum(arguments[wanted][:2])
        count: int = 2 * math.prod(arguments[0]) * arguments[classes] * products
        return count

    return flops
