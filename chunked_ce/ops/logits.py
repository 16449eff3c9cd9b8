"""The registered operators: schemas, shapes for tracing, autograd. torch.compile looks no further.

chunked_ce::token_stats  statistics of rows of logits, differentiable in the logits
chunked_ce::token_grad   their gradient, in a new tensor
chunked_ce::token_grad_  the same, written over the logits
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
from .classes import check_classes, class_gradient, class_logits, prob_gradient
from .library import (
    CLASSES_SCHEMA,
    FLAGS,
    FLAGS_SCHEMA,
    NUM_FLOATING,
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
    if is_dispatched(input, target, *_class_tensors(arguments)):
        return Outputs(*torch.ops.chunked_ce.token_stats(input, target, *arguments))
    if _wants_gradient(input, arguments[1]):
        return Outputs(*_TokenStats.apply(input, target, *arguments))  # type: ignore[no-untyped-call]
    return _statistics(input, target, *arguments)


def is_dispatched(*tensors: Tensor | None) -> bool:
    """Return whether a call on these tensors goes through torch's dispatcher.

    Tracers, modes, subclasses, profilers and lazy signs need the dispatcher. Other calls bypass
    it. That saves 40 of 160 us of a call on a few rows on a CPU.
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
    """Return whether `t` is an ordinary tensor: no subclass, no batch of vmap, no lazy sign."""
    exact = type(t) in (Tensor, torch.nn.Parameter) and torch._C._has_storage(t)
    return exact and not (t.is_meta or t.is_neg())


def _class_tensors(classes: Sequence[Any]) -> tuple[Tensor | None, ...]:
    """Return the tensors among the fields of `Classes`, which come first in `classes`."""
    return classes[0], classes[1], classes[4]


def _wants_gradient(input: Tensor, prob: Tensor | None) -> bool:
    return torch.is_grad_enabled() and (
        input.requires_grad or (prob is not None and prob.requires_grad)
    )


def _token_stats(*arguments: Any) -> tuple[Tensor, ...]:
    return _as_tensors(_statistics(*arguments))


def _as_tensors(outputs: Sequence[Any]) -> tuple[Tensor, ...]:
    """Replace None by an empty tensor, because an operator returns only tensors."""
    new = outputs[0].new_empty
    return tuple(
        new(0, dtype=None if i < NUM_FLOATING else torch.int64) if t is None else t
        for i, t in enumerate(outputs)
    )


def _statistics(input: Tensor, target: Tensor, *arguments: Any) -> Outputs:
    classes, shared, flags = Classes(*arguments[:5]), arguments[5:10], arguments[10:14]
    ignore_index, vocab_size, softcap, logit_scale, backend = shared
    backends.check_targets(target, vocab_size, ignore_index)
    if target.numel() == 0:
        return Outputs(*new_outputs(input, target, classes, *flags))
    if classes.indices is not None:
        check_classes(classes.indices, vocab_size)
    head, wanted = Head(softcap, logit_scale), dict(zip(FLAGS, flags, strict=True))
    input = input.detach()
    rows = backends.row_statistics(
        backend, input, target, ignore_index, vocab_size, head, class_weights(classes, vocab_size),
        **wanted,
    )  # fmt: skip
    picked = None
    if classes.indices is not None:
        picked = class_logits(input, target, classes.indices, ignore_index, vocab_size, head)
    return make_outputs(rows, picked, target.shape)


def make_outputs(rows: RowStatistics, picked: Tensor | None, shape: torch.Size) -> Outputs:
    (lse, logprob, entropy, mean_logprob, rank, argmax), lse_low, weight_sum = rows
    flat = (lse, logprob, lse_low, entropy, mean_logprob, weight_sum, picked, rank, argmax)
    if len(shape) == 1:
        return Outputs(*flat)
    shaped = (out if out is None or out is picked else out.view(shape) for out in flat)
    return Outputs(*shaped)  # type: ignore[arg-type]


def upstream_coefficients(
    grads: Sequence[Tensor | None],
    entropy: Tensor,
    weight_sum: Tensor,
    target: Tensor,
    classes: Classes,
    vocab_size: int,
    wants_entropy: bool,
    wants_mean_logprob: bool,
) -> tuple[Tensor | None, ...]:
    """Return a, b, c, u [...] and the gradient of `class_logits`, from the gradients of outputs.

    An output that was not requested is empty, and a tracer may give it an empty gradient.
    """
    lse, logprob, _, entropy_grad, mean_logprob_grad, _, class_grad, *_ = checks.not_sharded(grads)
    weighted = wants_mean_logprob and classes.has_weights
    target_weight = None
    if weighted:
        existing = target.long().clamp(0, vocab_size - 1).reshape(-1)
        target_weight = class_weights(classes, vocab_size).gather(existing, weight_sum.dtype)
        target_weight = None if target_weight is None else target_weight.view(target.shape)
    entropy_grad = entropy_grad if wants_entropy else None
    mean_logprob_grad = mean_logprob_grad if wants_mean_logprob else None
    numbers = coefficients(
        lse, logprob, entropy_grad, mean_logprob_grad, entropy, vocab_size, target_weight,
        weight_sum if weighted else None,
    )  # fmt: skip
    return *numbers, None if classes.indices is None else class_grad


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
    class_grad: Tensor | None,  # [..., K], of the classes' logits
    ignore_index: int,
    vocab_size: int,
    softcap: float | None,
    logit_scale: float,
    backend: str,
    *,
    inplace: bool,
) -> Tensor:
    """Return dL/dinput, in a new tensor or written over `input`."""
    head = Head(softcap, logit_scale)
    numbers = Coefficients(*(None if n is None else _flatten(n).contiguous() for n in (a, b, c, u)))
    stats = (_flatten(lse), _flatten(logprob), _flatten(lse_low))
    grad_of_classes = None
    if classes.indices is not None and class_grad is not None and classes.indices.numel():
        grad_of_classes = class_gradient(
            input, target, classes, *stats, numbers, class_grad, ignore_index, vocab_size, head
        )
    grad = backends.logits_gradient(
        backend, input, target, *stats, numbers, ignore_index, vocab_size, head,
        class_weights(classes, vocab_size), inplace=inplace,
    )  # fmt: skip
    if grad_of_classes is not None:
        grad.scatter_(-1, *grad_of_classes)
    return grad


def class_weights(classes: Classes, vocab_size: int) -> ClassWeights:
    weight, prob, scale, shift, _ = classes
    if weight is None and prob is None:
        return UNIFORM
    return ClassWeights(weight, prob, vocab_size * scale, shift)


def _flatten(t: Tensor) -> Tensor:
    return t if t.dim() == 1 else t.reshape(-1)


def _token_grad(*arguments: Any) -> Tensor:
    return _gradient(False, *arguments)


def _token_grad_(input: Tensor, *arguments: Any) -> None:
    # Tell autograd of the write. Do it first, so that an interrupted write is refused too.
    torch.autograd.graph.increment_version(input)
    _gradient(True, input, *arguments)


class _TokenStats(torch.autograd.Function):
    """Autograd of token_stats. torch.library.register_autograd would take 60 us more per call."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Sequence[Tensor | None]:
        input, target, *options = arguments
        ctx.classes, ctx.shared = Classes(*options[:5]), options[5:10]
        ctx.wanted, ctx.inplace_backward = options[10:12], options[14]
        outputs: Sequence[Tensor | None]
        if is_dispatched(input, target, *_class_tensors(options)):
            with torch._C._AutoDispatchBelowAutograd():
                outputs = torch.ops.chunked_ce.token_stats(*arguments)
        else:
            outputs = _statistics(*arguments)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*(out for out in outputs[NUM_FLOATING:] if out is not None))
        weight, prob, *_, indices = ctx.classes
        ctx.classes = ctx.classes._replace(weight=None, prob=None, indices=None)
        ctx.save_for_backward(input, target, weight, prob, indices, *outputs[:4], outputs[5])
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        input, target, weight, prob, indices, *stats, entropy, weight_sum = ctx.saved_tensors
        classes = ctx.classes._replace(weight=weight, prob=prob, indices=indices)
        _, vocab_size, *_ = ctx.shared
        upstream = upstream_coefficients(
            grads, entropy, weight_sum, target, classes, vocab_size, *ctx.wanted
        )
        arguments = (input, target, *classes, *stats, *upstream, *ctx.shared)
        prob_grad = None
        if ctx.needs_input_grad[3] and grads[4] is not None:
            if torch.is_grad_enabled():
                checks.double_backward()
            lse, _, lse_low = stats
            prob_grad = prob_gradient(input, classes, lse, lse_low, grads[4], *ctx.shared[1:4])
        no_gradient = (None, None, prob_grad, *(None,) * 13)
        if not ctx.needs_input_grad[0]:
            return None, *no_gradient
        if ctx.inplace_backward:
            if torch.is_grad_enabled():  # create_graph: a gradient over the logits has no history
                checks.double_backward()
            torch.ops.chunked_ce.token_grad_(*arguments)
            return input.detach(), *no_gradient
        if torch.is_grad_enabled():
            return torch.ops.chunked_ce.token_grad(*arguments), *no_gradient
        if not is_dispatched(input, target, *_class_tensors(arguments[2:7]), *stats, *upstream):
            return _token_grad(*arguments), *no_gradient
        with torch._C._AutoDispatchBelowAutograd():
            return torch.ops.chunked_ce.token_grad(*arguments), *no_gradient


def _differentiable_token_stats(input: Tensor, target: Tensor, *arguments: Any) -> Any:
    if _wants_gradient(input, arguments[1]):
        if torch._C._are_functorch_transforms_active():  # inside a compiled program
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
