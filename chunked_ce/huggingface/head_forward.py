"""The forward of an enabled model's head, and its deep copy."""

from __future__ import annotations

import copy
from functools import partial
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import checks
from .backward import deferred_class, follow
from .deferred import DeferredLogits
from .head import Head, width_of

if TYPE_CHECKING:
    from .enable import Enabled

STATE = "_chunked_ce"
"""Name of the attribute of a model and of its head that holds :class:`Enabled`."""


def head_forward(self: Any, input: Tensor, *args: Any, **kwargs: Any) -> Tensor | DeferredLogits:
    """Defer the logits of an enabled model's head, or compute them."""
    state: Enabled | None = self.__dict__.get(STATE)
    own = None if state is None else state._forward_before(self)
    forward = partial(type(self).forward, self) if own is None else own
    plain = own is None and checks.is_linear(self)
    sharded = checks.is_sharded(input, *self.parameters())
    traced = not plain and torch.compiler.is_compiling()  # a tracer calls no head within a loss
    if state is None or not state._deferring or sharded or traced:
        computed: Tensor = forward(input, *args, **kwargs)
        return computed
    if checks.freed_after_forward(self):
        state._keep_gathered(self)
    if plain:
        return _defer(state, Head.capture(input, self.weight, self.bias, state._on_use))

    def call(hidden: Tensor) -> Tensor:
        before, state._deferring = state._deferring, False  # so that a layer within it computes
        try:
            logits: Tensor = forward(hidden, *args, **kwargs)
        finally:
            state._deferring = before
        return logits

    width = call.out_features = width_of(self, call, input)  # type: ignore[attr-defined]
    given = (input, call, width, list(self.parameters()), state._on_use)
    return _defer(state, Head.of_call(*given))


def _defer(state: Enabled, head: Head) -> DeferredLogits:
    if not state._returning:
        return DeferredLogits(head, head.hidden)
    follow(state._model, head.hidden)
    return deferred_class()(head, head.hidden)


def head_copied(self: Any, memo: dict[int, Any]) -> Any:
    """Make a deep copy: enabled within a copy of the model, plain if copied alone."""
    state: Enabled = self.__dict__[STATE]
    whole = id(state._model) in memo
    changes = [c for c in state._changes if c[0] is self and (not whole or c[1] == "__deepcopy__")]
    now = {name: vars(self).pop(name) for _, name, _, _ in changes if name in vars(self)}
    for _, _, _, before in changes:
        vars(self).update(before)
    try:
        twin = copy.deepcopy(self, memo)
    finally:
        vars(self).update(now)
    if whole:
        vars(twin)["__deepcopy__"] = MethodType(head_copied, twin)
    return twin
