"""Logits that nobody has computed yet.

Between its output head and its loss a model may scale, cap, slice or cast the logits. Deferred
logits record that, and a loss or a statistic reads the recording. Any other use computes the
logits. The result is then the same, and only the memory is spent after all.
"""

from __future__ import annotations

import builtins
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from . import checks
from .head import Head
from .lazy import functions_named
from .reductions import Reductions


class DeferredLogits(Reductions):
    """Logits [..., V] of hidden states [..., D], a weight [V, D] and a bias, not computed.

    Multiplication and division by a number, tanh, `float()`, a move to a device, another shape of
    the tokens, slices of them and of the first classes give deferred logits again. So do a loop
    over them and `split`.

    Over the classes, `logsumexp(-1)`, `argmax(-1)`, `gather(-1, ids)` of one id a token, and the
    same `gather` of `log_softmax(-1)` or `softmax(-1)` are read off
    :func:`chunked_ce.linear_token_stats`. So is an entropy, written as
    `-(logp.exp() * logp).sum(-1)` or `logits.logsumexp(-1) - (p * logits).sum(-1)`. The statistics
    of a `gather` are kept and serve the others.

    Every other use, as a method, an operator or an argument of a torch function, computes the
    logits once and goes on with them. So does a use that torch.compile traces. They are
    differentiable as the head's are. But `torch.autograd.Function.apply` sees no tensor in this
    object and would lose its gradient without a word: call `tensor()` first. Kernels of others
    raise, because the strides are 0 and there is no `data_ptr()`.

    A loss read off the recording leaves no gradient on the logits, so `retain_grad`,
    `register_hook` and `requires_grad_` are refused once it is taken.

    Raises:
        RuntimeError: the logits are asked for after the head's weight or the hidden states changed,
            as by `optimizer.step()`. A write in place through `.data` is not noticed. Or a hook on
            logits whose loss is taken.
    """

    def __init__(
        self,
        head: Head,
        hidden: Tensor,
        parent: DeferredLogits | None = None,
        operation: Callable[[Tensor], Tensor] | None = None,
        factors: tuple[builtins.float, builtins.float | None] = (1.0, None),
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
        classes: int | None = None,
        of_tokens: Callable[[Tensor], Tensor] | None = None,
        of_all: bool = False,
    ) -> None:
        self.head, self._hidden = head, hidden
        self._parent, self._operation = parent, operation
        self.factors = factors  # (scale, cap): scale * x, or cap * tanh(scale * x)
        self.dtype = head.autocast or hidden.dtype if dtype is None else dtype
        self.device = hidden.device if device is None else device
        self._classes = head.width if classes is None else classes
        self._of_tokens = of_tokens  # the operation on a statistic [...]; None: it changes rows
        self._of_all = of_all  # whether all of the parent's tokens are used, here or beside
        self._real: Tensor | None = None
        self._loss_taken = False

    @property
    def shape(self) -> torch.Size:
        return torch.Size((*self._hidden.shape[:-1], self._classes))

    def tensor(self) -> Tensor:
        """Return the logits, computed at the first call and part of autograd's graph."""
        if self._real is None:
            with torch.set_grad_enabled(self.head.with_grad):
                if self._parent is None or self._operation is None:
                    self._real = self.head.logits()
                else:
                    self._real = self._operation(self._parent.tensor())
        return self._real

    def linear(self) -> tuple[Tensor, Head, dict[str, Any]] | None:
        """Return (hidden states, head, further arguments) for a loss of :mod:`chunked_ce`.

        None where the logits exist already and may have been changed.
        """
        if self._computed():
            return None
        self._take_loss()
        return self._arguments()

    def _arguments(self) -> tuple[Tensor, Head, dict[str, Any]]:
        scale, softcap = scale_and_softcap(*self.factors)
        transforms = dict(logit_scale=scale, softcap=softcap, vocab_size=self._classes)
        return self._hidden, self.head, {"linear_bias": self.head.bias, **transforms}

    def _computed(self) -> bool:
        return self._real is not None or (self._parent is not None and self._parent._computed())

    def _take_loss(self) -> None:
        self._loss_taken = True
        if self._parent is not None:
            self._parent._take_loss()

    def _record(
        self, operation: Callable[[Tensor], Tensor], **changes: Any
    ) -> DeferredLogits | Tensor:
        if self._real is not None:
            return operation(self._real)
        state: dict[str, Any] = dict(
            hidden=self._hidden, factors=self.factors, dtype=self.dtype, device=self.device,
            classes=self._classes,
        )  # fmt: skip
        return type(self)(self.head, parent=self, operation=operation, **{**state, **changes})

    def _scaled(self, factor: float, operation: Callable[[Tensor], Tensor]) -> Any:
        scale, cap = self.factors
        factors = (scale * factor, None) if cap is None else (scale, cap * factor)
        return self._record(operation, factors=factors)

    def mul(self, other: Any) -> Any:
        if _is_factor(other):
            return self._scaled(other, lambda x: x * other)
        return self.tensor() * other

    def div(self, other: Any, **rounding: Any) -> Any:
        if _is_factor(other) and not rounding:
            return self._scaled(1 / other, lambda x: x / other)
        return self.tensor().div(other, **rounding)

    def tanh(self) -> Any:
        if self.factors[1] is not None:  # capped already
            return self.tensor().tanh()
        return self._record(torch.tanh, factors=(self.factors[0], 1.0))

    def float(self) -> Any:
        if self.dtype == torch.float32 and self._real is None:
            return self
        return self._record(Tensor.float, dtype=torch.float32, of_tokens=_same, of_all=True)

    def to(self, *args: Any, **kwargs: Any) -> Any:
        if not kwargs and args == (torch.float32,):
            return self.float()
        if not kwargs and args == (self.dtype,) and self._real is None:
            return self
        device = _device(*args, **kwargs)
        if device is None or self._real is not None:
            return self.tensor().to(*args, **kwargs)
        move = lambda x: x.to(*args, **kwargs)  # noqa: E731
        moved = self._record(move, device=device, of_tokens=move)
        return self if device == self.device else moved

    def contiguous(self) -> Any:
        return self._record(Tensor.contiguous, of_tokens=_same, of_all=True)

    def __getitem__(self, index: Any) -> Any:
        recorded = None if self._real is not None else _split(index, self.dim(), self._classes)
        if recorded is None:
            return self.tensor()[index]
        token_index, classes = recorded
        of_tokens = (lambda s: s[token_index[:-1]]) if classes == self._classes else None
        changes = dict(hidden=self._hidden[token_index], classes=classes, of_tokens=of_tokens)
        return self._record(lambda x: x[index], **changes)

    __mul__ = __rmul__ = mul
    __truediv__ = div

    def reshape(self, *shape: Any) -> Any:
        if self._is_deferred():
            no_memory = torch.empty((), device="meta").expand(self.shape)
            new = no_memory.reshape(*shape).shape
            if new[-1:] == self.shape[-1:] and no_memory.numel():
                hidden = self._hidden.reshape(*new[:-1], self._hidden.shape[-1])
                of_tokens = lambda s: s.reshape(new[:-1])  # noqa: E731
                changes = dict(hidden=hidden, of_tokens=of_tokens, of_all=True)
                return self._record(lambda x: x.reshape(new), **changes)
        return self.tensor().reshape(*shape)

    def view(self, *shape: Any) -> Any:
        if not self._is_deferred() or any(isinstance(n, torch.dtype) for n in shape):
            return self.tensor().view(*shape)
        return self.reshape(*shape)

    def split(self, size: Any, dim: int = 0) -> tuple[Any, ...]:
        if type(size) is not int or size < 1 or dim != 0 or not self._has_rows():
            return tuple(self.tensor().split(size, dim))
        starts = range(0, len(self) or 1, size)
        return tuple(self._pieces(slice(start, start + size) for start in starts))

    def __iter__(self) -> Iterator[Any]:
        return iter(self._pieces(range(len(self))) if self._has_rows() else self.tensor())

    def _pieces(self, indices: Iterable[int | slice]) -> list[Any]:
        pieces = [self[index] for index in indices]
        for piece in pieces:
            piece._of_all = True
        return pieces

    def _has_rows(self) -> bool:
        return self.ndim > 1 and self._is_deferred()

    def _is_deferred(self) -> bool:
        return self._real is None and not torch.compiler.is_compiling()

    def __getattr__(self, name: str) -> Any:
        checks.gradient_of_logits(name, self._loss_taken)
        return super().__getattr__(name)


def scale_and_softcap(
    scale: builtins.float, cap: builtins.float | None
) -> tuple[builtins.float, builtins.float | None]:
    """Return the losses' `logit_scale` and `softcap` of cap * tanh(scale * x), or of scale * x."""
    if cap is None:
        return scale, None
    return scale * cap, abs(cap)  # softcap * tanh(logit_scale * x / softcap), whatever cap's sign


def _same(statistic: Tensor) -> Tensor:
    return statistic


def _is_factor(value: object) -> bool:
    """Return whether a loss can fold a number into `logit_scale` or `softcap`."""
    number = isinstance(value, (int, builtins.float)) and not isinstance(value, bool)
    return number and 1e-6 <= abs(value) <= 1e6  # type: ignore[arg-type]


def _device(*args: Any, **kwargs: Any) -> torch.device | None:
    """Return the device that `Tensor.to(*args, **kwargs)` moves to, if it does nothing else."""
    if len(args) != 1 or kwargs.keys() - {"non_blocking"} or isinstance(args[0], torch.dtype):
        return None
    return None if isinstance(args[0], Tensor) else torch.empty(0).to(args[0]).device


def _split(index: Any, dims: int, classes: int) -> tuple[Any, int] | None:
    """Return (the index of the hidden states, how many of the classes it leaves).

    None where `index` is not of slices and integers that keep the first classes, in order.
    """
    items = index if isinstance(index, tuple) else (index,)
    ellipses = sum(i is ... for i in items)  # torch has rules of its own for two
    if any(type(i) not in (int, slice, type(...)) for i in items) or ellipses > 1:
        return None
    split = items.index(...) if ellipses else len(items)
    whole = [slice(None)] * (dims - len(items) + ellipses)
    items = (*items[:split], *whole, *items[split + ellipses :])
    kept = range(classes)[items[-1]] if isinstance(items[-1], slice) else range(0)
    if len(items) > dims or not kept or kept.start or kept.step != 1:
        return None
    return (*items[:-1], slice(None)), len(kept)


_NAMES = ("tanh", "mul", "div", "reshape", "split", "log_softmax", "softmax", "logsumexp")
DeferredLogits.recorded = {
    **functions_named(*_NAMES, "gather", "take_along_dim", "argmax"),
    torch.multiply: "mul",
    torch.true_divide: "div",
}
