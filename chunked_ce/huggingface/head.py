"""What an output head was called with, kept until somebody wants its logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..functional.heads import logits_of_a_token
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


def width_of(module: torch.nn.Module, call: Callable[[Tensor], Tensor], hidden: Tensor) -> int:
    """Return how many logits a head makes of a token: its `out_features`, or counted."""
    width = getattr(module, "out_features", None)
    if type(width) is not int:
        width = logits_of_a_token(call, hidden)[1].shape[-1]
    return width


class Head(NamedTuple):
    """Hold what deferred logits are computed from, and what must be unchanged by then."""

    hidden: Tensor
    weight: Tensor | Callable[[Tensor], Tensor]  # what makes logits of hidden states
    bias: Tensor | None
    width: int  # number of logits of a token
    tensors: list[Tensor]
    versions: list[int]
    addresses: list[int]
    autocast: torch.dtype | None
    with_grad: bool
    on_use: Callable[[], None]

    @classmethod
    def capture(
        cls, hidden: Tensor, weight: Tensor, bias: Tensor | None, on_use: Callable[[], None]
    ) -> Head:
        """Return that of a linear layer."""
        tensors = [weight] if bias is None else [weight, bias]
        return cls._now(hidden, weight, bias, weight.shape[0], tensors, on_use)

    @classmethod
    def of_call(
        cls,
        hidden: Tensor,
        call: Callable[[Tensor], Tensor],
        width: int,
        parameters: list[Tensor],
        on_use: Callable[[], None],
    ) -> Head:
        """Return that of a head that is called for its logits."""
        return cls._now(hidden, call, None, width, parameters, on_use)

    @classmethod
    def _now(
        cls, hidden: Tensor, weight: Any, bias: Tensor | None, width: int, tensors: list[Tensor],
        on_use: Callable[[], None],
    ) -> Head:  # fmt: skip
        device, given = hidden.device.type, [hidden, *tensors]
        autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        state = [version(t) for t in given], [address(t) for t in given]
        grad = torch.is_grad_enabled()
        return cls(hidden, weight, bias, width, given, *state, autocast, grad, on_use)

    def logits(self) -> Tensor:
        """Compute the logits in the modes of the original call."""
        self.on_use()
        self.check_unchanged()
        with self.original_autocast():
            if isinstance(self.weight, Tensor):
                return F.linear(self.hidden, self.weight, self.bias)
            return self.weight(self.hidden)

    def check_unchanged(self) -> None:
        """Raise if the tensors were written to, moved or freed since the original call."""
        tensors = self.tensors
        freed = any(t.numel() and not t.untyped_storage().size() for t in tensors)
        moved = any(
            before and address(t) not in (0, before)
            for before, t in zip(self.addresses, tensors, strict=True)
        )
        written = self.versions != [version(t) for t in tensors]
        checks.head_unchanged(not (freed or moved or written))

    def original_autocast(self) -> torch.autocast:
        """Return autocast as it was when the logits were deferred."""
        enabled = self.autocast is not None
        return torch.autocast(self.hidden.device.type, dtype=self.autocast, enabled=enabled)
