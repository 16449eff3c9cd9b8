"""What an output head was called with, kept until somebody wants its logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import checks


def version(tensor: Tensor) -> int:
    """Return how often a tensor was written to; 0 for inference tensors, which do not count it."""
    if not torch.compiler.is_compiling() and tensor.is_inference():
        return 0
    return tensor._version


def address(tensor: Tensor) -> int:
    """Return where the data is; 0 for subclasses, in torch.func, while compiling."""
    if torch.compiler.is_compiling() or type(tensor) not in (Tensor, torch.nn.Parameter):
        return 0
    try:
        return tensor.data_ptr()
    except RuntimeError:  # torch.func's tensors have none
        return 0


class Head(NamedTuple):
    """Hold what deferred logits are computed from, and what must be unchanged by then."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    versions: list[int]
    addresses: list[int]
    autocast: torch.dtype | None
    with_grad: bool
    on_use: Callable[[], None]

    @classmethod
    def capture(
        cls, hidden: Tensor, weight: Tensor, bias: Tensor | None, on_use: Callable[[], None]
    ) -> Head:
        """Keep an output head's arguments, and the modes it was called in."""
        device, tensors = hidden.device.type, [t for t in (hidden, weight, bias) if t is not None]
        autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        state = [version(t) for t in tensors], [address(t) for t in tensors]
        return cls(hidden, weight, bias, *state, autocast, torch.is_grad_enabled(), on_use)

    def logits(self) -> Tensor:
        """Compute the logits in the modes of the original call."""
        self.on_use()
        tensors = [t for t in (self.hidden, self.weight, self.bias) if t is not None]
        freed = any(t.numel() and not t.untyped_storage().size() for t in tensors)
        moved = any(
            before and before != address(t)
            for before, t in zip(self.addresses, tensors, strict=True)
        )
        written = self.versions != [version(t) for t in tensors]
        checks.head_unchanged(not (freed or moved or written))
        with self.original_autocast():
            return F.linear(self.hidden, self.weight, self.bias)

    def original_autocast(self) -> torch.autocast:
        """Return autocast as it was when the logits were deferred."""
        enabled = self.autocast is not None
        return torch.autocast(self.hidden.device.type, dtype=self.autocast, enabled=enabled)
