"""Deferred logits as a tensor, for callers that gather, pad and concatenate a model's outputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from .deferred import DeferredLogits

_METADATA = {
    getattr(Tensor, name).__get__
    for name in ("shape", "dtype", "device", "ndim", "layout", "requires_grad", "is_nested")
} | {Tensor.size, Tensor.dim, Tensor.numel, Tensor.is_floating_point}


class EvaluatedLogits(Tensor):
    """Logits [..., V] of an evaluation without gradients, computed once, by their first use.

    A tensor without memory. Its shape, dtype and device are known. Every other function is called
    with the logits themselves, and so returns an ordinary tensor.
    """

    deferred: DeferredLogits

    @staticmethod
    def __new__(cls, deferred: DeferredLogits) -> EvaluatedLogits:
        empty: EvaluatedLogits = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, deferred.shape, dtype=deferred.dtype, device=deferred.device
        )
        empty.deferred = deferred
        return empty

    def tensor(self) -> Tensor:
        """Return the logits, as :meth:`DeferredLogits.tensor` gives them."""
        return self.deferred.tensor()

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if function in _METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return function(*args, **(kwargs or {}))
        return cls.__torch_dispatch__(function, types, args, kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        args, kwargs = tree_map(_as_tensor, (args, kwargs or {}))
        return function(*args, **kwargs)


def _as_tensor(value: Any) -> Any:
    return value.tensor() if isinstance(value, EvaluatedLogits) else value


def as_tensors(outputs: Any) -> Any:
    """Return a model's outputs, with deferred logits as tensors that compute themselves."""
    if isinstance(outputs, tuple) and type(outputs) is tuple:
        return tuple(map(_deferred_as_tensor, outputs))
    if hasattr(outputs, "logits"):
        outputs.logits = _deferred_as_tensor(outputs.logits)
    return outputs


def _deferred_as_tensor(value: Any) -> Any:
    return EvaluatedLogits(value) if isinstance(value, DeferredLogits) else value
