"""A head whose parameters lie in pieces on several ranks: gathered once, not for each chunk.

A group of its own under FSDP2 (`fully_shard(head)`): one forward of the module holds all chunks. So
its hooks gather the weight once, free it, and gather it again for backward, whose gradients they
reduce and scatter. DTensors of `distribute_tensor`: `full_tensor()` is part of the graph, so that
each rank's piece gets its piece of the gradient.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.func import functional_call

from .. import checks
from ..checks.values import is_dtensor

Result = TypeVar("Result")
_OPERANDS = ("input", "target")


def call(function: Callable[..., Result], arguments: dict[str, Any]) -> Result:
    """Return `function(**arguments)` with the head in `linear_weight` gathered.

    While torch.compile traces, the call is a graph break: a tracer would go through the head's
    calls on chunks whose number depends on the targets, and autograd within them.
    """
    arguments = {name: arguments[name] for name in inspect.signature(function).parameters}
    if torch.compiler.is_compiling():
        untraced: Callable[..., Result] = torch.compiler.disable(function)
        return untraced(**arguments)
    head = arguments["linear_weight"]
    checks.head_arguments(head, arguments["linear_bias"], None, plain=True)
    if not checks.is_fully_sharded(head):
        operands = checks.replicated_operands({name: arguments[name] for name in _OPERANDS})
        return function(**arguments | operands | _gathered(head))
    checks.hidden_states(arguments["input"])
    checks.no_hooks_but_fsdp(head)
    forward = head.forward
    linear = type(head).forward is nn.Linear.forward and "forward" not in vars(head)

    def of_all_chunks(hidden: Tensor) -> Result:
        given = _linear(head.weight, head.bias) if linear else _called(forward)
        return function(**arguments | given | dict(input=hidden))

    with _as_forward(head, of_all_chunks):
        result: Result = head(arguments["input"])
    return result


class Gathered:
    """A module called with whole tensors in the place of its DTensors."""

    def __init__(self, module: nn.Module, tensors: dict[str, Tensor]) -> None:
        self.module, self.tensors = module, tensors
        self.gathered = list(tensors.values())
        if hasattr(module, "out_features"):
            self.out_features = module.out_features

    def __call__(self, hidden: Tensor) -> Any:
        return functional_call(self.module, self.tensors, (hidden,))


def _gathered(head: nn.Module) -> dict[str, Any]:
    sharded = {n: p for n, p in head.named_parameters() if is_dtensor(p)}
    whole: dict[str, Tensor] = {n: p.full_tensor() for n, p in sharded.items()}  # type: ignore[attr-defined]
    if type(head) is nn.Linear and "forward" not in vars(head) and not head._forward_hooks:
        return _linear(whole.get("weight", head.weight), whole.get("bias", head.bias))
    return _called(Gathered(head, whole))


def _linear(weight: Tensor, bias: Tensor | None) -> dict[str, Any]:
    return dict(linear_weight=weight, linear_bias=bias)


def _called(head: Callable[[Tensor], Any]) -> dict[str, Any]:
    return dict(linear_weight=head)


@contextmanager
def _as_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Let a module's hooks run once around `forward` in the place of its own."""
    before = {name: vars(module)[name] for name in ("forward",) if name in vars(module)}
    vars(module)["forward"] = forward
    try:
        yield
    finally:
        del vars(module)["forward"]
        vars(module).update(before)
