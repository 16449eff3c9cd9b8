"""The floor under a loss written in torch: the fewest calls, or compiled loops, of its arithmetic.

No check, no range, no token ignored. The time beyond that can be saved; the floor cannot.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .cases import Loss


class _Calls:
    """exp and sums by torch's operations, in float32 memory that is kept from call to call."""

    def __init__(self) -> None:
        self._memory = torch.empty(0)

    def lse(self, logits: Tensor) -> Tensor:
        if self._memory.shape != logits.shape:
            self._memory = torch.empty(logits.shape, device=logits.device)
        return torch.exp(self._float32(logits), out=self._memory).sum(1, keepdim=True).log_()

    def gradient(self, logits: Tensor, lse: Tensor, scale: Tensor, out: Tensor) -> None:
        p = out if out.dtype == torch.float32 else self._memory
        torch.exp(self._float32(logits), out=p).mul_(scale * (-lse).exp_())
        if p is not out:
            out.copy_(p)

    def _float32(self, logits: Tensor) -> Tensor:
        return logits if logits.dtype == torch.float32 else self._memory.copy_(logits)


@torch.compile(dynamic=True)
def _maximum_and_sum(logits: Tensor) -> tuple[Tensor, Tensor]:
    z = logits.float()
    m = z.amax(1, keepdim=True)
    return m, (z - m).exp().sum(1, keepdim=True)


@torch.compile(dynamic=True)
def _scaled_softmax(logits: Tensor, lse: Tensor, scale: Tensor, out: Tensor) -> None:
    out.copy_((logits.float() - lse).exp() * scale)


class _Loops:
    """The two loops that torch.compile makes, one for each pass."""

    def lse(self, logits: Tensor) -> Tensor:
        m, s = _maximum_and_sum(logits)
        return s.log_().add_(m)

    def gradient(self, logits: Tensor, lse: Tensor, scale: Tensor, out: Tensor) -> None:
        _scaled_softmax(logits, lse, scale, out)


class _Mean(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor, by: _Calls | _Loops) -> Tensor:
        lse = by.lse(logits)  # [N, 1]
        ctx.save_for_backward(logits, target, lse)
        ctx.by = by
        return (lse - logits.gather(1, target[:, None])).mean()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        logits, target, lse = ctx.saved_tensors
        scale, grad = upstream / len(target), torch.empty_like(logits)
        ctx.by.gradient(logits, lse, scale, grad)
        grad[torch.arange(len(target)), target] -= scale.to(grad.dtype)
        return grad, None, None


def bare_calls() -> Loss:
    by = _Calls()
    return lambda logits, target: _Mean.apply(logits, target, by)  # type: ignore[no-untyped-call]


def bare_loops(logits: Tensor, target: Tensor) -> Tensor:
    return _Mean.apply(logits, target, _Loops())  # type: ignore[no-untyped-call,no-any-return]
