"""The floor under a loss written in torch: the fewest calls, or compiled loops, of its arithmetic.

No check, no range, no token ignored. What ours takes beyond that is ours to save; that is not.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from .measure import Loss

CALLS, LOOPS = "bare torch calls", "bare compiled loops"


class Arithmetic(Protocol):
    def lse(self, logits: Tensor) -> Tensor:
        """[N, 1]"""

    def gradient(self, logits: Tensor, lse: Tensor, scale: Tensor, out: Tensor) -> None:
        """`scale` [] times the softmax."""


class _Calls(NamedTuple):
    memory: Tensor  # fp32, of the logits' shape

    def lse(self, logits: Tensor) -> Tensor:
        return torch.exp(self._fp32(logits), out=self.memory).sum(1, keepdim=True).log_()

    def gradient(self, logits: Tensor, lse: Tensor, scale: Tensor, out: Tensor) -> None:
        p = out if out.dtype == torch.float32 else self.memory
        torch.exp(self._fp32(logits), out=p).mul_(scale * (-lse).exp_())
        if p is not out:
            out.copy_(p)

    def _fp32(self, logits: Tensor) -> Tensor:
        return logits if logits.dtype == torch.float32 else self.memory.copy_(logits)


@torch.compile(dynamic=True)
def _maximum_and_sum(logits: Tensor) -> tuple[Tensor, Tensor]:
    z = logits.float()
    m = z.amax(1, keepdim=True)
    return m, (z - m).exp().sum(1, keepdim=True)


@torch.compile(dynamic=True)
def _scaled_softmax(logits: Tensor, lse: Tensor, scale: Tensor, out: Tensor) -> None:
    out.copy_((logits.float() - lse).exp() * scale)


class _Loops:
    def lse(self, logits: Tensor) -> Tensor:
        m, s = _maximum_and_sum(logits)
        return s.log_().add_(m)

    def gradient(self, logits: Tensor, lse: Tensor, scale: Tensor, out: Tensor) -> None:
        _scaled_softmax(logits, lse, scale, out)


class _Mean(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor, by: Arithmetic) -> Tensor:
        lse = by.lse(logits)
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


def bare_calls(logits: Tensor) -> Loss:
    """Of logits of this shape, from torch's operations, called one after the other."""
    by = _Calls(torch.empty(logits.shape))
    return lambda logits, target: _Mean.apply(logits, target, by)  # type: ignore[no-untyped-call]


def bare_loops(logits: Tensor, target: Tensor) -> Tensor:
    """From two loops that torch.compile makes, one for each pass."""
    return _Mean.apply(logits, target, _Loops())  # type: ignore[no-untyped-call,no-any-return]
