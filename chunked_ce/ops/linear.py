"""The lm_head and the loss in one, a chunk of tokens at a time: operators and autograd.

chunked_ce::linear_loss         the weighted loss and its gradients, 6 N D V FLOPs
chunked_ce::linear_stats        statistics of tokens, 2 N D V
chunked_ce::linear_stats_grad   their gradients for any upstream one, computing the logits again

Memory: one chunk of logits, the gradients, and a sum in `acc_dtype` where chunks are added up.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

from .. import backends, checks
from ..core.head import COMPUTE_DTYPE, Head
from ..core.reduction import apply_weight, is_scored
from . import flops
from .chunks import Gradients, chunks_of, gradient_like, scale_gradients, walk
from .classes import check_classes
from .library import (
    CLASSES_SCHEMA,
    FLAGS_SCHEMA,
    NUM_FLOATING,
    OUTPUTS_SCHEMA,
    SHARED_SCHEMA,
    STATS_SCHEMA,
    UPSTREAM_SCHEMA,
    Classes,
    keep_stats,
    library,
    new_outputs,
    new_stats,
    no_double_backward,
    select_stats,
    stats_list,
)
from .logits import rows_gradient, upstream_coefficients
from .statistics import fill_outputs

_HEAD = "Tensor input, Tensor linear_weight, Tensor? linear_bias, Tensor target, "
_CHUNKS = ", int rows_per_chunk, bool drop_ignored, ScalarType acc_dtype, ScalarType logits_dtype"
library.define(
    f"linear_loss({_HEAD}Tensor? token_weight, Tensor? divisor, float label_smoothing, "
    f"float z_loss_weight, {SHARED_SCHEMA}{_CHUNKS}, bool[] wanted, bool reuse, {STATS_SCHEMA}) -> "
    "(Tensor loss, Tensor input_grad, Tensor weight_grad, Tensor bias_grad, Tensor[] stats)"
)
library.define(
    f"linear_stats({_HEAD}{CLASSES_SCHEMA}, {SHARED_SCHEMA}{_CHUNKS}, {FLAGS_SCHEMA}) -> "
    + OUTPUTS_SCHEMA
)
library.define(
    f"linear_stats_grad({_HEAD}{CLASSES_SCHEMA}, {UPSTREAM_SCHEMA}, {SHARED_SCHEMA}{_CHUNKS}, "
    "bool[] wanted) -> "
    "(Tensor input_grad, Tensor weight_grad, Tensor bias_grad)"
)


def _linear_loss(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    token_weight: Tensor | None,
    divisor: Tensor | None,
    label_smoothing: float,
    z_loss_weight: float,
    ignore_index: int,
    vocab_size: int,
    softcap: float | None,
    logit_scale: float,
    backend: str,
    rows_per_chunk: int,
    drop_ignored: bool,
    acc_dtype: torch.dtype,
    logits_dtype: torch.dtype,
    wanted: list[bool],
    reuse: bool,
    stats: list[bool],
) -> tuple[Any, ...]:
    backends.check_targets(target, vocab_size, ignore_index, on_host=target.device.type == "cpu")
    input, weight, head = input.detach(), weight.detach(), Head(softcap, logit_scale)
    chunks = chunks_of(target, ignore_index, rows_per_chunk, drop_ignored, vocab_size, logits_dtype)
    ignored = None if drop_ignored else ~is_scored(target, ignore_index)
    total = input.new_zeros((), dtype=COMPUTE_DTYPE[input.dtype])
    gradients = Gradients(input, weight, bias, vocab_size, wanted, acc_dtype, chunks)
    of_rows = new_stats(input, target.numel(), stats) if stats else None
    for index, x, logits in walk(input, weight, bias, vocab_size, chunks, ignored, logits_dtype):
        of_chunk = None if of_rows is None else select_stats(of_rows, index)
        of_tokens = None if token_weight is None else token_weight[index]
        if any(wanted):
            loss, grad = backends.loss_and_gradient(
                backend, logits, target[index], of_tokens, divisor, label_smoothing, z_loss_weight,
                ignore_index, vocab_size, head, inplace=True, stats=of_chunk,
            )  # fmt: skip
            gradients.add(index, x, grad)
            del grad
        else:
            loss = backends.row_losses(
                backend, logits, target[index], label_smoothing, z_loss_weight, ignore_index,
                vocab_size, head, stats=of_chunk,
            )  # fmt: skip
        if of_rows is not None:
            keep_stats(of_rows, index, of_chunk)
        total += (loss if of_tokens is None else apply_weight(loss, of_tokens)).sum()
        del x, logits  # the last chunk ends before the gradients are rounded
    value = total if divisor is None else total / divisor
    return value, *gradients.finish(), [] if of_rows is None else stats_list(of_rows)


def _linear_stats(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    *arguments: Any,
) -> tuple[Tensor, ...]:
    classes, shared, flags = Classes(*arguments[:5]), arguments[5:14], arguments[14:]
    ignore_index, vocab_size, softcap, logit_scale, backend, rows, drop_ignored, _, dtype = shared
    backends.check_targets(target, vocab_size, ignore_index, on_host=target.device.type == "cpu")
    if classes.indices is not None:
        check_classes(classes.indices, vocab_size)
    outputs = new_outputs(input, target, classes, *flags)
    chunks = chunks_of(target, ignore_index, rows, drop_ignored, vocab_size, dtype)
    ignored = None if drop_ignored else ~is_scored(target, ignore_index)
    input, weight = input.detach(), weight.detach()
    walked = walk(input, weight, bias, vocab_size, chunks, ignored, dtype)
    fill_outputs(
        outputs, ((index, logits) for index, _, logits in walked), target, classes, flags,
        (ignore_index, vocab_size, Head(softcap, logit_scale), backend),
    )  # fmt: skip
    return outputs


def _linear_stats_grad(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    *arguments: Any,
) -> tuple[Tensor, ...]:
    classes, upstream, shared = Classes(*arguments[:5]), arguments[5:13], arguments[13:22]
    ignore_index, vocab_size, _, _, _, rows, drop_ignored, acc_dtype, dtype = shared
    chunks = chunks_of(target, ignore_index, rows, drop_ignored, vocab_size, dtype)
    ignored = None if drop_ignored else ~is_scored(target, ignore_index)
    gradients = Gradients(input, weight, bias, vocab_size, arguments[22], acc_dtype, chunks)
    for index, x, logits in walk(input, weight, bias, vocab_size, chunks, ignored, dtype):
        of_chunk: list[Any] = [None if n is None else n[index] for n in upstream]
        grad = rows_gradient(
            logits, target[index], classes.select_rows(index), *of_chunk, *shared[:5], inplace=True
        )
        gradients.add(index, x, grad)
        del x, logits, grad
    return gradients.finish()


def _fake_linear_loss(
    input: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, *rest: Any
) -> tuple[Any, ...]:
    *_, wanted, _, stats = rest
    loss = input.new_empty((), dtype=COMPUTE_DTYPE[input.dtype])
    given = zip((input, weight, bias), wanted, strict=True)
    of_rows = stats_list(new_stats(input, target.numel(), stats))
    return loss, *(gradient_like(t, w) for t, w in given), of_rows


def _fake_linear_stats(
    input: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    return new_outputs(input, target, Classes(*rest[:5]), *rest[-4:])


def _fake_linear_stats_grad(
    input: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any
) -> tuple[Tensor, ...]:
    given = zip((input, weight, bias), rest[-1], strict=True)
    return tuple(gradient_like(t, w) for t, w in given)


class _LinearLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor | tuple[Tensor, ...]:
        *given, _, reuse, stats = arguments
        wanted = list(ctx.needs_input_grad[:3])
        with torch._C._AutoDispatchBelowAutograd():
            loss, *grads, found = torch.ops.chunked_ce.linear_loss(*given, wanted, reuse, stats)
        ctx.options, ctx.wanted, ctx.reuse = given[6:], wanted, reuse
        ctx.grads = grads  # not saved: backward gives them away
        ctx.save_for_backward(*given[:6])
        if stats:
            ctx.mark_non_differentiable(*found)
        return (loss, *found) if stats else loss

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, *of_stats: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            checks.double_backward()
        checks.not_sharded([upstream])
        given, grads = ctx.saved_tensors, ctx.grads
        if ctx.reuse:
            ctx.grads = None
        if grads is None:  # handed over, and scaled: a second backward computes them again
            with torch._C._AutoDispatchBelowAutograd():
                _, *grads, _ = torch.ops.chunked_ce.linear_loss(
                    *given, *ctx.options, ctx.wanted, ctx.reuse, []
                )
        scaled = scale_gradients(grads, ctx.wanted, upstream, ctx.options[6], reuse=ctx.reuse)
        return *scaled, *(None,) * 17


class _LinearStats(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, ...]:
        input, weight, bias, target, *given = arguments
        ctx.classes, ctx.options, ctx.wanted = Classes(*given[:5]), given[5:14], given[14:16]
        with torch._C._AutoDispatchBelowAutograd():
            outputs: tuple[Tensor, ...] = torch.ops.chunked_ce.linear_stats(*arguments)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*outputs[NUM_FLOATING:])
        class_weight, prob, *_, indices = ctx.classes
        ctx.classes = ctx.classes._replace(weight=None, prob=None, indices=None)
        ctx.save_for_backward(
            input, weight, bias, target, class_weight, prob, indices, *outputs[:4], outputs[5]
        )
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            checks.double_backward()
        *given, class_weight, prob, indices, lse, logprob, lse_low, entropy, weight_sum = (
            ctx.saved_tensors
        )
        classes = ctx.classes._replace(weight=class_weight, prob=prob, indices=indices)
        _, vocab_size, *_ = ctx.options
        upstream = upstream_coefficients(
            grads, entropy, weight_sum, given[3], classes, vocab_size, *ctx.wanted
        )
        wanted = list(ctx.needs_input_grad[:3])
        found = torch.ops.chunked_ce.linear_stats_grad(
            *given, *classes, lse, logprob, lse_low, *upstream, *ctx.options, wanted
        )
        return *(g if w else None for g, w in zip(found, wanted, strict=True)), *(None,) * 19


def _register_flops() -> None:
    """Tell torch's FlopCounterMode of the operators, where it is imported: that takes 0.3 s."""
    counter = sys.modules.get("torch.utils.flop_counter")
    if counter is not None and torch.ops.chunked_ce.linear_loss not in counter.flop_registry:
        flops.register(counter)


def _needs_gradient(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _differentiable_linear_loss(*arguments: Any) -> Any:
    _register_flops()
    if _needs_gradient(*arguments[:3]):
        if torch._C._are_functorch_transforms_active():  # of a compiled program, within it
            checks.compiled_transform()
        found = _LinearLoss.apply(*arguments)  # type: ignore[no-untyped-call]
        loss, *stats = found if isinstance(found, tuple) else (found,)
        return loss, *(loss.new_empty(0) for _ in range(3)), stats
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.chunked_ce.linear_loss(*arguments)


def _differentiable_linear_stats(*arguments: Any) -> Any:
    _register_flops()
    if _needs_gradient(*arguments[:3]):
        if torch._C._are_functorch_transforms_active():  # of a compiled program, within it
            checks.compiled_transform()
        return _LinearStats.apply(*arguments)  # type: ignore[no-untyped-call]
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.chunked_ce.linear_stats(*arguments)


library.impl("linear_loss", _linear_loss, "CompositeExplicitAutograd")
library.impl("linear_loss", _differentiable_linear_loss, "Autograd")
library.impl("linear_stats", _linear_stats, "CompositeExplicitAutograd")
library.impl("linear_stats", _differentiable_linear_stats, "Autograd")
library.impl("linear_stats_grad", _linear_stats_grad, "CompositeExplicitAutograd")
torch.library.register_fake("chunked_ce::linear_loss", _fake_linear_loss, lib=library)
torch.library.register_fake("chunked_ce::linear_stats", _fake_linear_stats, lib=library)
torch.library.register_fake("chunked_ce::linear_stats_grad", _fake_linear_stats_grad, lib=library)
torch.library.register_autograd("chunked_ce::linear_stats_grad", no_double_backward, lib=library)
