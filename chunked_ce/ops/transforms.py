"""Public functions under torch.func's transforms: grad, vjp, jacrev, vmap and their nestings.

A transform wraps tensors, and a kernel cannot read wrapped tensors. torch unwraps them one
transform at a time for an autograd.Function with `setup_context` and `vmap`. So a call becomes such
a Function. At the innermost level its forward is the same call on plain tensors. Its backward is a
second Function. That one runs the call again and computes the gradients with ordinary autograd. It
has no derivative, so second derivatives and forward mode raise.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._C._functorch import TransformType
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from .. import checks
from ..checks.values import forward_mode
from ..core.row_stats import detach_stats

Dims = Sequence[int | None]

_WRITES = ("inplace_backward", "grad_in_forward")
"""Options that write over tensors to save memory. Other transforms may still need the tensors."""

Result = TypeVar("Result")


def is_active() -> bool:
    """Return whether a transform is active outside of torch.compile."""
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


def call(
    function: Callable[..., Result], arguments: dict[str, Any], rows: Sequence[str] = ()
) -> Result:
    """Return `function(**arguments)` under the active transforms.

    rows: names of arguments [rows, ...] that may have more leading dimensions, if all outputs then
        have these dimensions too. A batch of such arguments is one call. A batch of other arguments
        is one call per sample.
    """
    stack = torch._C._functorch.get_interpreter_stack() or ()
    if any(level.key() == TransformType.Functionalize for level in stack):
        checks.functionalized()
    # As `locals()` they hold more than the function's own.
    arguments = {name: arguments[name] for name in inspect.signature(function).parameters}
    checks.no_transforms("a loss with group", arguments.get("group") is not None)
    invocation = _Call(function, arguments, rows)
    outputs = _Forward.apply(invocation, *invocation.tensors)  # type: ignore[no-untyped-call]
    result: Any = invocation.result(outputs)
    if arguments.get("return_stats", False) is not False:
        loss, stats = result
        result = (loss, detach_stats(stats))
    found: Result = result
    return found


class _Call:
    """A function and its arguments other than tensors."""

    def __init__(
        self, function: Callable[..., Any], arguments: dict[str, Any], rows: Sequence[str]
    ) -> None:
        self.function, self.rows = function, rows
        leaves, self.spec = tree_flatten(arguments)
        self.leaves = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        self.places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        self.tensors = [leaves[i] for i in self.places]
        names = [name for name, value in arguments.items() for _ in tree_flatten(value)[0]]
        self.names = [names[i] for i in self.places]
        self.output_spec: TreeSpec | None = None
        self.output_places: list[int] = []

    def run(self, tensors: Sequence[Tensor], *, writes: bool = True) -> tuple[Tensor, ...]:
        leaves = list(self.leaves)
        for place, tensor in zip(self.places, tensors, strict=True):
            leaves[place] = tensor
        arguments = tree_unflatten(leaves, self.spec)
        if not writes:
            arguments |= {name: False for name in _WRITES if name in arguments}
        outputs, self.output_spec = tree_flatten(self.function(**arguments))
        self.output_places = [i for i, out in enumerate(outputs) if out is not None]
        return tuple(out for out in outputs if out is not None)

    def result(self, outputs: Sequence[Tensor]) -> Any:
        assert self.output_spec is not None
        leaves: list[Tensor | None] = [None] * self.output_spec.num_leaves
        for place, out in zip(self.output_places, outputs, strict=True):
            leaves[place] = out
        return tree_unflatten(leaves, self.output_spec)

    def batch_together(
        self, dims: Dims, size: int, tensors: Sequence[Tensor]
    ) -> list[Tensor] | None:
        """Return the tensors with the batch first, or None if one call cannot take them."""
        batched = [name for name, dim in zip(self.names, dims, strict=True) if dim is not None]
        if not batched or not set(batched) <= set(self.rows):
            return None
        return [
            _move_batch_first(t, dim, size) if name in self.rows else t
            for name, t, dim in zip(self.names, tensors, dims, strict=True)
        ]


def _move_batch_first(t: Tensor, dim: int | None, size: int) -> Tensor:
    return t.expand(size, *t.shape) if dim is None else t.movedim(dim, 0)


def _select_sample(tensors: Sequence[Tensor | None], dims: Dims, i: int) -> list[Tensor | None]:
    return [
        t if t is None or dim is None else t.select(dim, i)
        for t, dim in zip(tensors, dims, strict=True)
    ]


def _stack(samples: list[tuple[Tensor, ...]]) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    outputs = tuple(torch.stack(each) for each in zip(*samples, strict=True))
    return outputs, (0,) * len(outputs)


class _Forward(torch.autograd.Function):
    @staticmethod
    def forward(invocation: _Call, *tensors: Tensor) -> tuple[Tensor, ...]:
        return invocation.run(tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.call, *tensors = inputs
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*(out for out in output if not out.is_floating_point()))
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        _, *wanted = ctx.needs_input_grad
        if all(grad is None for grad in upstream):
            return None, *(None for _ in wanted)
        grads_found = _Backward.apply(  # type: ignore[no-untyped-call]
            ctx.call, tuple(wanted), *ctx.saved_tensors, *upstream
        )
        grads = iter(grads_found)
        return None, *(next(grads) if want else None for want in wanted)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        forward_mode("an argument")

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], invocation: _Call, *tensors: Tensor) -> Any:
        checks.vmap_size(info.batch_size)
        dims = in_dims[1:]
        batched = invocation.batch_together(dims, info.batch_size, tensors)
        if batched is not None:
            outputs = _Forward.apply(invocation, *batched)  # type: ignore[no-untyped-call]
            return outputs, (0,) * len(outputs)
        return _stack(
            [
                _Forward.apply(invocation, *_select_sample(tensors, dims, i))  # type: ignore[no-untyped-call]
                for i in range(info.batch_size)
            ]
        )


class _Backward(torch.autograd.Function):
    @staticmethod
    def forward(invocation: _Call, wanted: tuple[bool, ...], *operands: Tensor | None) -> Any:
        n = len(wanted)
        tensors = [t.detach() for t in operands[:n] if t is not None]
        with torch.enable_grad():
            inputs = [t.requires_grad_() for t, w in zip(tensors, wanted, strict=True) if w]
            outputs = invocation.run(tensors, writes=False)
        pairs = [
            (out, grad)
            for out, grad in zip(outputs, operands[n:], strict=True)
            if grad is not None and out.requires_grad
        ]
        if not pairs:
            return tuple(map(torch.zeros_like, inputs))
        return torch.autograd.grad(
            [out for out, _ in pairs],
            inputs,
            [grad for _, grad in pairs],
            allow_unused=True,
            materialize_grads=True,
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        checks.double_backward()

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        forward_mode("an argument")

    @staticmethod
    def vmap(
        info: Any,
        in_dims: tuple[Any, ...],
        invocation: _Call,
        wanted: tuple[bool, ...],
        *operands: Any,
    ) -> Any:
        n, size, dims = len(wanted), info.batch_size, in_dims[2:]
        is_by_row = all(
            name in invocation.rows
            for name, want in zip(invocation.names, wanted, strict=True)
            if want
        )
        batched = invocation.batch_together(dims[:n], size, operands[:n]) if is_by_row else None
        if batched is not None:
            upstream = [
                None if grad is None else _move_batch_first(grad, dim, size)
                for grad, dim in zip(operands[n:], dims[n:], strict=True)
            ]
            grads_found = _Backward.apply(invocation, wanted, *batched, *upstream)  # type: ignore[no-untyped-call]
            return grads_found, (0,) * len(grads_found)
        return _stack(
            [
                _Backward.apply(invocation, wanted, *_select_sample(operands, dims, i))  # type: ignore[no-untyped-call]
                for i in range(size)
            ]
        )
