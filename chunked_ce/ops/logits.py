"""The registered operators: schemas, shapes for tracing, autograd.

torch.compile sees these and looks no further.

chunked_ce::token_stats  statistics of rows of logits, differentiable in the logits
chunked_ce::token_grad   their gradient, in a new tensor
chunked_ce::token_grad_  the same over the logits, whose version counter says so
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import backends, checks
from ..core.gradient import Coefficients, coefficients
from ..core.head import Head
from ..core.row_stats import UNIFORM, ClassWeights, RowStatistics
from .classes import check_classes, gradient_at_classes, logits_at_classes, prob_gradient
from .library import (
    CLASSES_SCHEMA,
    FLAGS,
    FLAGS_SCHEMA,
    INTEGERS,
    OUTPUTS_SCHEMA,
    SHARED_SCHEMA,
    UPSTREAM_SCHEMA,
    Classes,
    Outputs,
    library,
    new_outputs,
    no_double_backward,
)

_GRADIENT = f"Tensor target, {CLASSES_SCHEMA}, {UPSTREAM_SCHEMA}, {SHARED_SCHEMA}"

library.define(
    f"token_stats(Tensor input, Tensor target, {CLASSES_SCHEMA}, {SHARED_SCHEMA}, {FLAGS_SCHEMA}, "
    f"bool inplace_backward) -> {OUTPUTS_SCHEMA}"
)
library.define(f"token_grad(Tensor input, {_GRADIENT}) -> Tensor")
library.define(f"token_grad_(Tensor(a!) input, {_GRADIENT}) -> ()")


def token_stats(input: Tensor, target: Tensor, *arguments: Any) -> Outputs:
    """Call chunked_ce::token_stats."""
    if is_dispatched(input, target, *_tensors(arguments)):
        return Outputs(*torch.ops.chunked_ce.token_stats(input, target, *arguments))
    if _wants_gradient(input, arguments[1]):
        return Outputs(*_TokenStats.apply(input, target, *arguments))  # type: ignore[no-untyped-call]
    return _statistics(input, target, *arguments)


def is_dispatched(*tensors: Tensor | None) -> bool:
    """Return whether a call on these tensors goes through torch's dispatcher.

    A tracer, a mode, a subclass or a profiler listens there, and a lazy sign is resolved. Else
    going past it saves 40 of 160 us, which counts for a few rows on a CPU.
    """
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._autograd._profiler_enabled()
        or torch._C._get_tracing_state() is not None
        or torch._C._are_functorch_transforms_active()
        or not all([t is None or _is_plain(t) for t in tensors])
    )


def _is_plain(t: Tensor) -> bool:
    """Whether its values lie where it says: no subclass, no batch of vmap, no lazy sign."""
    exact = type(t) in (Tensor, torch.nn.Parameter) and torch._C._has_storage(t)
    return exact and not (t.is_meta or t.is_neg())


def _tensors(classes: Sequence[Any]) -> tuple[Tensor | None, ...]:
    """Of the fields of `Classes`, which come first, those that are tensors."""
    return classes[0], classes[1], classes[4]


def _wants_gradient(input: Tensor, prob: Tensor | None) -> bool:
    return torch.is_grad_enabled() and (
        input.requires_grad or (prob is not None and prob.requires_grad)
    )


def _token_stats(*arguments: Any) -> tuple[Tensor, ...]:
    return _as_tensors(_statistics(*arguments))


def _as_tensors(outputs: Sequence[Any]) -> tuple[Tensor, ...]:
    """What an operator returns is a Tensor always; an empty one was not asked for."""
    return tuple(
        outputs[0].new_empty(0, dtype=None if i < INTEGERS else torch.int64) if t is None else t
        for i, t in enumerate(outputs)
    )


def _statistics(input: Tensor, target: Tensor, *arguments: Any) -> Outputs:
    classes, shared, flags = Classes(*arguments[:5]), arguments[5:10], arguments[10:14]
    ignore_index, vocab_size, softcap, logit_scale, backend = shared
    backends.check_targets(target, vocab_size, ignore_index)
    if target.numel() == 0:
        return Outputs(*new_outputs(input, target, classes, *flags))
    if classes.at is not None:
        check_classes(classes.at, vocab_size)
    head, wanted = Head(softcap, logit_scale), dict(zip(FLAGS, flags, strict=True))
    input = input.detach()
    rows = backends.row_statistics(
        backend, input, target, ignore_index, vocab_size, head, class_weights(classes, vocab_size),
        **wanted,
    )  # fmt: skip
    at = None
    if classes.at is not None:
        at = logits_at_classes(input, target, classes.at, ignore_index, vocab_size, head)
    return outputs_of(rows, at, target.shape)


def outputs_of(rows: RowStatistics, at: Tensor | None, shape: torch.Size) -> Outputs:
    lse, logprob, entropy, mean_logprob, rank, argmax = rows.stats
    flat = (lse, logprob, rows.lse_low, entropy, mean_logprob, rows.mass, at, rank, argmax)
    if len(shape) == 1:
        return Outputs(*flat)
    shaped = (out if out is None or out is at else out.view(shape) for out in flat)
    return Outputs(*shaped)  # type: ignore[arg-type]


def upstream_of(
    grads: Sequence[Tensor | None],
    entropy: Tensor,
    mass: Tensor,
    target: Tensor,
    classes: Classes,
    vocab_size: int,
    wants_entropy: bool,
    wants_mean_logprob: bool,
) -> tuple[Tensor | None, ...]:
    """a, b, c, u [...] and the gradient of `at_classes`, from those of an operator's outputs.

    An output that was not asked for is empty, and a tracer may give it an empty gradient.
    """
    checks.plain_upstream(*grads)
    lse, logprob, _, of_entropy, of_mean_logprob, _, of_classes, *_ = grads
    weighted = wants_mean_logprob and classes.are_weighted
    at_target = None
    if weighted:
        existing = target.long().clamp(0, vocab_size - 1)
        at_target = class_weights(classes, vocab_size).at(existing.reshape(-1), mass.dtype)
        at_target = None if at_target is None else at_target.view(target.shape)
    of_entropy = of_entropy if wants_entropy else None
    of_mean_logprob = of_mean_logprob if wants_mean_logprob else None
    numbers = coefficients(
        lse, logprob, of_entropy, of_mean_logprob, entropy, vocab_size, at_target,
        mass if weighted else None,
    )  # fmt: skip
    return *numbers, None if classes.at is None else of_classes


def _fake_token_stats(input: Tensor, target: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    return new_outputs(input, target, Classes(*arguments[:5]), *arguments[10:14])


def _gradient(inplace: bool, input: Tensor, target: Tensor, *arguments: Any) -> Tensor:
    if target.numel() == 0:
        return torch.empty_like(input)
    classes, upstream, shared = Classes(*arguments[:5]), arguments[5:13], arguments[13:]
    return rows_gradient(input.detach(), target, classes, *upstream, *shared, inplace=inplace)


def rows_gradient(
    input: Tensor,
    target: Tensor,
    classes: Classes,
    lse: Tensor,
    logprob: Tensor,
    lse_low: Tensor,
    a: Tensor | None,
    b: Tensor | None,
    c: Tensor | None,
    u: Tensor | None,
    at_classes: Tensor | None,
    ignore_index: int,
    vocab_size: int,
    softcap: float | None,
    logit_scale: float,
    backend: str,
    *,
    inplace: bool,
) -> Tensor:
    """dL/dinput, in a new tensor or over `input`."""
    head = Head(softcap, logit_scale)
    numbers = Coefficients(*(None if n is None else _flat(n).contiguous() for n in (a, b, c, u)))
    stats = (_flat(lse), _flat(logprob), _flat(lse_low))
    at = None
    if classes.at is not None and at_classes is not None and classes.at.numel():
        at = gradient_at_classes(
            input, target, classes, *stats, numbers, at_classes, ignore_index, vocab_size, head
        )
    grad = backends.logits_gradient(
        backend, input, target, *stats, numbers, ignore_index, vocab_size, head,
        class_weights(classes, vocab_size), inplace=inplace,
    )  # fmt: skip
    if at is not None:
        grad.scatter_(-1, *at)
    return grad


def class_weights(classes: Classes, vocab_size: int) -> ClassWeights:
    weight, prob, scale, shift, _ = classes
    if weight is None and prob is None:
        return UNIFORM
    return ClassWeights(weight, prob, vocab_size * scale, shift)


def _flat(t: Tensor) -> Tensor:
    return t if t.dim() == 1 else t.reshape(-1)


def _token_grad(*arguments: Any) -> Tensor:
    return _gradient(False, *arguments)


def _token_grad_(input: Tensor, *arguments: Any) -> None:
    # Autograd does not see a kernel's write. Before it: what an interruption leaves is not used.
    torch.autograd.graph.increment_version(input)
    _gradient(True, input, *arguments)


class _TokenStats(torch.autograd.Function):
    """torch.library.register_autograd would do the same at 60 microseconds more a call."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Sequence[Tensor | None]:
        input, target, *given = arguments
        ctx.classes, ctx.shared = Classes(*given[:5]), given[5:10]
        ctx.wanted, ctx.inplace_backward = given[10:12], given[14]
        outputs: Sequence[Tensor | None]
        if is_dispatched(input, target, *_tensors(given)):
            with torch._C._AutoDispatchBelowAutograd():
                outputs = torch.ops.chunked_ce.token_stats(*arguments)
        else:
            outputs = _statistics(*arguments)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*(out for out in outputs[INTEGERS:] if out is not None))
        weight, prob, *_, at = ctx.classes
        ctx.classes = ctx.classes._replace(weight=None, prob=None, at=None)
        ctx.save_for_backward(input, target, weight, prob, at, *outputs[:4], outputs[5])
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        input, target, weight, prob, at, *stats, entropy, mass = ctx.saved_tensors
        classes = ctx.classes._replace(weight=weight, prob=prob, at=at)
        _, vocab_size, *_ = ctx.shared
        upstream = upstream_of(grads, entropy, mass, target, classes, vocab_size, *ctx.wanted)
        arguments = (input, target, *classes, *stats, *upstream, *ctx.shared)
        of_prob = None
        if ctx.needs_input_grad[3] and grads[4] is not None:
            if torch.is_grad_enabled():
                checks.double_backward()
            lse, _, lse_low = stats
            of_prob = prob_gradient(input, classes, lse, lse_low, grads[4], *ctx.shared[1:4])
        no_gradient = (None, None, of_prob, *(None,) * 13)
        if not ctx.needs_input_grad[0]:
            return None, *no_gradient
        if ctx.inplace_backward:
            if torch.is_grad_enabled():  # create_graph: a gradient over the logits has no history
                checks.double_backward()
            torch.ops.chunked_ce.token_grad_(*arguments)
            return input.detach(), *no_gradient
        if torch.is_grad_enabled():
            return torch.ops.chunked_ce.token_grad(*arguments), *no_gradient
        if not is_dispatched(input, target, *_tensors(arguments[2:7]), *stats, *upstream):
            return _token_grad(*arguments), *no_gradient
        with torch._C._AutoDispatchBelowAutograd():
            return torch.ops.chunked_ce.token_grad(*arguments), *no_gradient


def _differentiable_token_stats(input: Tensor, target: Tensor, *arguments: Any) -> Any:
    if _wants_gradient(input, arguments[1]):
        if torch._C._are_functorch_transforms_active():  # of a compiled program, within it
            checks.compiled_transform()
        return _as_tensors(_TokenStats.apply(input, target, *arguments))  # type: ignore[no-untyped-call]
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.chunked_ce.token_stats(input, target, *arguments)


library.impl("token_stats", _token_stats, "CompositeExplicitAutograd")
library.impl("token_stats", _differentiable_token_stats, "Autograd")
library.impl("token_grad", _token_grad, "CompositeExplicitAutograd")
library.impl("token_grad_", _token_grad_, "CompositeExplicitAutograd")
torch.library.register_fake("chunked_ce::token_stats", _fake_token_stats, lib=library)
torch.library.register_fake(
    "chunked_ce::token_grad", lambda input, *_: torch.empty_like(input), lib=library
)
torch.library.register_fake("chunked_ce::token_grad_", lambda input, *_: None, lib=library)
torch.library.register_autograd("chunked_ce::token_grad", no_double_backward, lib=library)
