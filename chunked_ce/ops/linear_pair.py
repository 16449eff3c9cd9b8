"""Two lm_heads and the divergence of their logits in one, a chunk of tokens at a time.

chunked_ce::linear_pair  each token's loss; and where their weights are known, their weighted sum
                         and the student's gradients of that

Memory: one chunk of each model's logits and the gradients; with a softcap of the student's one
chunk more, in float32 for its derivative. The teacher gets no gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import backends, checks
from ..core.divergence import Divergence
from ..core.head import COMPUTE_DTYPE, IDENTITY, Head
from ..core.reduction import apply_weight, is_scored
from .chunks import Gradients, chunk_indices, gradient_like, scale_gradients, walk
from .library import library

library.define(
    "linear_pair(Tensor input, Tensor linear_weight, Tensor? linear_bias, Tensor teacher_input, "
    "Tensor teacher_weight, Tensor? teacher_bias, Tensor? target, Tensor? token_weight, "
    "int ignore_index, str kind, float beta, float temperature, float cross_entropy_weight, "
    "SymInt vocab_size, float? softcap, float logit_scale, float? teacher_softcap, "
    "float teacher_logit_scale, str backend, int rows_per_chunk, ScalarType acc_dtype, "
    "bool[] wanted, bool reuse) -> "
    "(Tensor loss, Tensor total, Tensor input_grad, Tensor weight_grad, Tensor bias_grad)"
)
_ARGUMENTS = 23
_BACKEND = 10  # its index in the options, which follow the token weights


def _linear_pair(
    input: Tensor,  # [N, D]
    weight: Tensor,
    bias: Tensor | None,
    teacher_input: Tensor,  # [N, another D]
    teacher_weight: Tensor,
    teacher_bias: Tensor | None,
    target: Tensor | None,  # [N]
    token_weight: Tensor | None,  # [N]
    ignore_index: int,
    *options: Any,
) -> tuple[Tensor, ...]:
    how, (cross_entropy_weight, vocab_size) = Divergence(*options[:3]), options[3:5]
    head, teacher_head = Head(*options[5:7]), Head(*options[7:9])
    backend, rows_per_chunk, acc_dtype, wanted, _ = options[9:]
    run = backends.pair_backend(backend)
    if target is not None and cross_entropy_weight:
        backends.check_targets(target, vocab_size, ignore_index, on_host=target.is_cpu)
    ignored = None if target is None else ~is_scored(target, ignore_index)
    input, weight = input.detach(), weight.detach()
    losses = input.new_zeros(len(input), dtype=COMPUTE_DTYPE[input.dtype])
    chunks = chunk_indices(losses, ignore_index, rows_per_chunk, drop_ignored=False)
    gradients = Gradients(input, weight, bias, vocab_size, wanted, acc_dtype, chunks)
    teacher = teacher_input.detach(), teacher_weight.detach(), teacher_bias
    for (index, x, logits), (_, _, of_teacher) in zip(
        walk(input, weight, bias, vocab_size, chunks, ignored),
        walk(*teacher, vocab_size, chunks, ignored),
        strict=True,
    ):
        skip = None if ignored is None else ignored[index]
        derivative = head.derivative(logits) if any(wanted) else 1.0
        head.apply_(logits)
        teacher_head.apply_(of_teacher)
        stats = run.pair_stats(logits, of_teacher, skip, how, vocab_size)
        losses[index] = stats.loss
        of_tokens, of_labels = None if token_weight is None else token_weight[index], None
        if target is not None and cross_entropy_weight:
            weights = None if of_tokens is None else of_tokens * cross_entropy_weight
            given = (backend, logits, target[index], weights, ignore_index, vocab_size)
            loss, of_labels = _cross_entropy(*given, with_gradient=any(wanted))
            losses[index] += cross_entropy_weight * loss
        if any(wanted):
            to_student = (logits, of_teacher, skip, stats, of_tokens, how, vocab_size)
            grad = run.pair_gradient(*to_student, inplace=True)
            grad = grad if of_labels is None else grad.add_(of_labels)
            gradients.add(index, x, grad if head == IDENTITY else grad.mul_(derivative))
            del to_student, grad, of_labels
        del x, logits, of_teacher, derivative  # before the gradients are rounded
    total = losses if token_weight is None else apply_weight(losses, token_weight)
    return losses, total.sum(), *gradients.finish()


def _cross_entropy(
    backend: str,
    logits: Tensor,
    target: Tensor,
    token_weight: Tensor | None,
    ignore_index: int,
    vocab_size: int,
    with_gradient: bool,
) -> tuple[Tensor, Tensor | None]:
    """Return each token's cross-entropy and its weighted gradient, in memory of its own."""
    if with_gradient:
        return backends.loss_and_gradient(
            backend, logits, target, token_weight, None, 0.0, 0.0, ignore_index, vocab_size,
            IDENTITY, inplace=False,
        )  # fmt: skip
    nothing = dict.fromkeys(("entropy", "mean_logprob", "rank", "argmax"), False)
    found = backends.row_statistics(
        backend, logits, target, ignore_index, vocab_size, IDENTITY, **nothing
    )
    return -found.stats.logprob, None


def _fake_linear_pair(input: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> Any:
    dtype, given = COMPUTE_DTYPE[input.dtype], zip((input, weight, bias), rest[-2], strict=True)
    losses, total = input.new_empty(input.shape[0], dtype=dtype), input.new_empty((), dtype=dtype)
    return losses, total, *(gradient_like(t, want) for t, want in given)


class _LinearPair(torch.autograd.Function):
    """With token weights `total` has a gradient, computed in forward; without, each loss has."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor]:
        *given, _, ctx.reuse = arguments
        ctx.wanted, ctx.options = list(ctx.needs_input_grad[:3]), given[8:]
        ctx.is_sum = given[7] is not None
        wanted = ctx.wanted if ctx.is_sum else [False] * 3
        losses, total, *ctx.grads = _call(*given, wanted, ctx.reuse)
        ctx.save_for_backward(*given[:8])
        ctx.mark_non_differentiable(losses if ctx.is_sum else total)
        return losses, total

    @staticmethod
    def backward(ctx: Any, of_losses: Tensor, of_total: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            checks.double_backward()
        *given, token_weight = ctx.saved_tensors
        grads, ctx.grads = ctx.grads, None if ctx.reuse else ctx.grads
        if not ctx.is_sum or grads is None:  # a second backward computes them again
            upstream = token_weight if ctx.is_sum else of_losses.contiguous()
            _, _, *grads = _call(*given, upstream, *ctx.options, ctx.wanted, ctx.reuse)
        scale = of_total if ctx.is_sum else None
        scaled = scale_gradients(grads, ctx.wanted, scale, ctx.options[_BACKEND], reuse=ctx.reuse)
        return *scaled, *(None,) * (_ARGUMENTS - 3)


def _call(*arguments: Any) -> tuple[Tensor, ...]:
    with torch._C._AutoDispatchBelowAutograd():
        found: tuple[Tensor, ...] = torch.ops.chunked_ce.linear_pair(*arguments)
    return found


def _differentiable_linear_pair(*arguments: Any) -> Any:
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in arguments[:3]):
        if torch._C._are_functorch_transforms_active():  # of a compiled program, within it
            checks.compiled_transform()
        losses, total = _LinearPair.apply(*arguments)  # type: ignore[no-untyped-call]
        return losses, total, *(losses.new_empty(0) for _ in range(3))
    return _call(*arguments)


library.impl("linear_pair", _linear_pair, "CompositeExplicitAutograd")
library.impl("linear_pair", _differentiable_linear_pair, "Autograd")
torch.library.register_fake("chunked_ce::linear_pair", _fake_linear_pair, lib=library)
