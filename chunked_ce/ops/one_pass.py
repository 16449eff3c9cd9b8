"""Operators of `grad_in_forward`: loss and gradient from one read of the logits.

chunked_ce::loss_and_grad   the loss of each token, and the gradient of the weighted sum
chunked_ce::loss_and_grad_  the same; writes the gradient over the logits
chunked_ce::scale_          multiply a gradient by its upstream gradient on the device
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import backends, checks
from ..core.head import COMPUTE_DTYPE, Head
from ..core.reduction import Reduction
from ..core.row_stats import TokenStats
from .library import (
    SHARED_SCHEMA,
    STATS_SCHEMA,
    library,
    new_stats,
    no_double_backward,
    stats_from_list,
    stats_list,
)

_ARGUMENTS = (
    "Tensor target, Tensor? token_weight, Tensor? divisor, "
    "float label_smoothing, float z_loss_weight, " + SHARED_SCHEMA
)
library.define(
    f"loss_and_grad(Tensor input, {_ARGUMENTS}, {STATS_SCHEMA}) -> "
    "(Tensor loss, Tensor grad, Tensor[] stats)"
)
# An operator that writes over an argument cannot return a list. It writes the statistics too.
library.define(
    f"loss_and_grad_(Tensor(a!) input, {_ARGUMENTS}, Tensor(b!)? lse, Tensor(c!)? logprob, "
    "Tensor(d!)? entropy, Tensor(e!)? rank, Tensor(f!)? argmax) -> Tensor"
)
library.define("scale_(Tensor(a!) grad, Tensor upstream, str backend) -> ()")


def one_pass_loss(
    input: Tensor,
    target: Tensor,
    reduction: Reduction,
    stats: Sequence[bool],  # [], or which of LOGGED to return
    *options: Any,  # label_smoothing, ..., backend, inplace_backward
) -> tuple[Tensor, TokenStats | None]:
    """Return the reduced loss. Its gradient is computed too, in new memory or over `input`."""
    given = (input, target, reduction, stats, *options)
    found = _OnePass.apply(*given)  # type: ignore[no-untyped-call]
    if not stats:
        return found, None
    return found[0], stats_from_list(found[1:], stats, target)


class _OnePass(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor | tuple[Tensor, ...]:
        input, target, reduction, stats, *options, inplace = arguments
        ctx.backend, ctx.spent = options[-1], False
        operands = (input, target, reduction.weight, reduction.divisor, *options)
        with torch._C._AutoDispatchBelowAutograd():
            if inplace:
                of_rows = new_stats(input, target.numel(), stats)
                memory = (None,) * 5 if of_rows is None else (*of_rows[:3], *of_rows[4:])
                loss, grad = torch.ops.chunked_ce.loss_and_grad_(*operands, *memory), input
                found = stats_list(of_rows)
            else:
                loss, grad, found = torch.ops.chunked_ce.loss_and_grad(*operands, stats)
        ctx.save_for_backward(grad)
        reduced: Tensor = reduction.reduce(loss)
        if not stats:
            return reduced
        ctx.mark_non_differentiable(*found)
        return reduced, *found

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, *of_stats: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            checks.double_backward()
        checks.not_sharded([upstream])
        if ctx.spent:
            checks.second_backward()
        (grad,) = ctx.saved_tensors
        ctx.spent = True
        grad = grad.detach()
        torch.ops.chunked_ce.scale_(grad, upstream, ctx.backend)
        return grad, *(None,) * 11


def _loss_and_gradient(
    inplace: bool, stats: TokenStats | None, input: Tensor, *arguments: Any
) -> tuple[Tensor, Tensor]:
    target, weight, divisor, smoothing, z_loss_weight, *shared = arguments
    ignore_index, vocab_size, softcap, logit_scale, backend = shared
    backends.check_targets(target, vocab_size, ignore_index)
    if target.numel() == 0:
        loss = input.new_empty(target.shape, dtype=COMPUTE_DTYPE[input.dtype])
        return loss, torch.empty_like(input)
    loss, grad = backends.loss_and_gradient(
        backend, input.detach(), target, weight, divisor, smoothing, z_loss_weight,
        ignore_index, vocab_size, Head(softcap, logit_scale), inplace=inplace, stats=stats,
    )  # fmt: skip
    return loss.view(target.shape), grad


def _loss_and_grad(input: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, list[Tensor]]:
    target, *_, stats = arguments
    of_rows = new_stats(input, target.numel(), stats)
    loss, grad = _loss_and_gradient(False, of_rows, input, *arguments[:-1])
    return loss, grad, stats_list(of_rows)


def _loss_and_grad_(input: Tensor, *arguments: Any) -> Tensor:
    target, *_, ignore_index, vocab_size, _, _, backend = arguments[:10]
    on_host = backend != "triton" and target.device.type == "cpu"
    backends.check_targets(target, vocab_size, ignore_index, on_host=on_host)
    # Tell autograd of the write. Do it first, so that an interrupted write is refused too.
    torch.autograd.graph.increment_version(input)
    lse, logprob, entropy, rank, argmax = arguments[10:]
    stats = None if lse is None else TokenStats(lse, logprob, entropy, None, rank, argmax)
    loss, _ = _loss_and_gradient(True, stats, input, *arguments[:10])
    return loss


def _fake_loss_and_grad_(input: Tensor, target: Tensor, *_: Any) -> Tensor:
    return input.new_empty(target.shape, dtype=COMPUTE_DTYPE[input.dtype])


def _fake_loss_and_grad(
    input: Tensor, target: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, list[Tensor]]:
    of_rows = new_stats(input, target.numel(), rest[-1])
    return _fake_loss_and_grad_(input, target), torch.empty_like(input), stats_list(of_rows)


library.impl("loss_and_grad", _loss_and_grad, "CompositeExplicitAutograd")
library.impl("loss_and_grad_", _loss_and_grad_, "CompositeExplicitAutograd")
library.impl("scale_", backends.scale_, "CompositeExplicitAutograd")
torch.library.register_fake("chunked_ce::loss_and_grad", _fake_loss_and_grad, lib=library)
torch.library.register_fake("chunked_ce::loss_and_grad_", _fake_loss_and_grad_, lib=library)
torch.library.register_fake("chunked_ce::scale_", lambda *_: None, lib=library)
torch.library.register_autograd("chunked_ce::loss_and_grad", no_double_backward, lib=library)
