"""Operators of `grad_in_forward`: loss and gradient from one read of the logits.

chunked_ce::loss_and_grad   the loss of each token, and the gradient of the weighted sum
chunked_ce::loss_and_grad_  the same; writes the gradient over the logits
chunked_ce::scale_          multiply a gradient by its upstream gradient on the device
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import backends, checks
from ..core.head import Head, compute_dtype
from ..core.reduction import Reduction
from .library import SHARED_SCHEMA, library, no_double_backward

_ARGUMENTS = (
    "Tensor target, Tensor? token_weight, Tensor? divisor, "
    "float label_smoothing, float z_loss_weight, " + SHARED_SCHEMA
)
library.define(f"loss_and_grad(Tensor input, {_ARGUMENTS}) -> (Tensor loss, Tensor grad)")
library.define(f"loss_and_grad_(Tensor(a!) input, {_ARGUMENTS}) -> Tensor")
library.define("scale_(Tensor(a!) grad, Tensor upstream, str backend) -> ()")


def one_pass_loss(
    input: Tensor,
    target: Tensor,
    reduction: Reduction,
    *options: Any,  # label_smoothing, ..., backend, inplace_backward
) -> Tensor:
    """Return the reduced loss. Its gradient is computed too, in new memory or over `input`."""
    loss: Tensor = _OnePass.apply(input, target, reduction, *options)  # type: ignore[no-untyped-call]
    return loss


class _OnePass(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        input, target, reduction, *options, inplace = arguments
        ctx.backend, ctx.spent = options[-1], False
        operands = (input, target, reduction.weight, reduction.divisor, *options)
        with torch._C._AutoDispatchBelowAutograd():
            if inplace:
                loss, grad = torch.ops.chunked_ce.loss_and_grad_(*operands), input
            else:
                loss, grad = torch.ops.chunked_ce.loss_and_grad(*operands)
        ctx.save_for_backward(grad)
        reduced: Tensor = reduction.reduce(loss)
        return reduced

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            checks.double_backward()
        checks.not_sharded([upstream])
        if ctx.spent:
            checks.second_backward()
        (grad,) = ctx.saved_tensors
        ctx.spent = True
        grad = grad.detach()
        torch.ops.chunked_ce.scale_(grad, upstream, ctx.backend)
        return grad, *(None,) * 10


def _loss_and_gradient(inplace: bool, input: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    target, weight, divisor, smoothing, z_loss_weight, *shared = arguments
    ignore_index, vocab_size, softcap, logit_scale, backend = shared
    backends.check_targets(target, vocab_size, ignore_index)
    if target.numel() == 0:
        loss = input.new_empty(target.shape, dtype=compute_dtype(input.dtype))
        return loss, torch.empty_like(input)
    loss, grad = backends.loss_and_gradient(
        backend, input.detach(), target, weight, divisor, smoothing, z_loss_weight,
        ignore_index, vocab_size, Head(softcap, logit_scale), inplace=inplace,
    )  # fmt: skip
    return loss.view(target.shape), grad


def _loss_and_grad(*arguments: Any) -> tuple[Tensor, Tensor]:
    return _loss_and_gradient(False, *arguments)


def _loss_and_grad_(input: Tensor, *arguments: Any) -> Tensor:
    target, *_, ignore_index, vocab_size, _, _, backend = arguments
    on_host = backend != "triton" and target.device.type == "cpu"
    backends.check_targets(target, vocab_size, ignore_index, on_host=on_host)
    # Tell autograd of the write. Do it first, so that an interrupted write is refused too.
    torch.autograd.graph.increment_version(input)
    loss, _ = _loss_and_gradient(True, input, *arguments)
    return loss


def _fake_loss_and_grad_(input: Tensor, target: Tensor, *_: Any) -> Tensor:
    return input.new_empty(target.shape, dtype=compute_dtype(input.dtype))


library.impl("loss_and_grad", _loss_and_grad, "CompositeExplicitAutograd")
library.impl("loss_and_grad_", _loss_and_grad_, "CompositeExplicitAutograd")
library.impl("scale_", backends.scale_, "CompositeExplicitAutograd")
torch.library.register_fake(
    "chunked_ce::loss_and_grad",
    lambda input, *rest: (_fake_loss_and_grad_(input, *rest), torch.empty_like(input)),
    lib=library,
)
torch.library.register_fake("chunked_ce::loss_and_grad_", _fake_loss_and_grad_, lib=library)
torch.library.register_fake("chunked_ce::scale_", lambda *_: None, lib=library)
torch.library.register_autograd("chunked_ce::loss_and_grad", no_double_backward, lib=library)
