"""The product of hidden states with an output head's weight, found and deferred during a call.

A mode of this thread sees each `F.linear`. Nothing of a model is changed, so nothing has to be
restored: it may be wrapped, hooked, shared by threads, or fail.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, _get_current_function_mode

from ..checks.values import LOGIT_DTYPES
from .deferred import DeferredLogits
from .head import Head


class HeadProduct(TorchFunctionMode):
    """Note the weights that are multiplied by, or defer the product with one of them."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[weakref.ref[Tensor]] = []
        self.deferred: Tensor | None = None
        self.watching = False

    def __exit__(self, *exception: Any) -> None:
        """Leave torch's stack of modes, if a signal has not taken this one off it already.

        Torch takes a mode off for a call in a generator, which a signal may leave unfinished; the
        mode is put back when the generator is freed, and then watches nothing.
        """
        if _get_current_function_mode() is self:
            super().__exit__(*exception)

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        product = self.watching and function is F.linear and len(args) > 1
        if product and all(map(_is_plain, args[:2])):
            input, weight = args[:2]
            if args[1] is self.deferred:
                bias = args[2] if len(args) > 2 else kwargs.get("bias")
                return DeferredLogits(Head.capture(input, weight, bias, self._stop), input)
            self.seen.append(weakref.ref(weight))
        return function(*args, **kwargs)

    def _stop(self) -> None:  # once the call itself uses its logits
        self.deferred = None

    def last_weight(self, vocab_size: int) -> Tensor | None:
        """Return the last weight seen that has `vocab_size` rows or more."""
        weights = (weight() for weight in reversed(self.seen))
        return next((w for w in weights if w is not None and w.shape[0] >= vocab_size), None)

    def defer(self, weight: Tensor | None, call: Callable[[], Any]) -> Any:
        """Return `call()`, in which a product with `weight` is :class:`DeferredLogits`."""
        if weight is None:
            return call()
        self.deferred = weight
        return self.watch(call)

    def watch(self, call: Callable[[], Any]) -> Any:
        """Return `call()`, whose products are noted."""
        with self:
            try:
                self.watching = True
                return call()
            finally:  # not by a call: a mode that another Ctrl-C leaves behind does nothing
                self.watching, self.deferred = False, None


def _is_plain(tensor: Any) -> bool:
    """Return whether it is a strided tensor of floats: no shard, no quantized weight."""
    plain = type(tensor) in (Tensor, nn.Parameter) and tensor.layout == torch.strided
    return plain and tensor.dtype in LOGIT_DTYPES
