"""Binary cross-entropy over many labels: operators and autograd. Labels are dense or indices.

chunked_ce::binary_loss  the sum of the losses, or the loss of each logit
chunked_ce::binary_grad  the gradient of the logits

Label indices [N, K] stand for a multi-hot [N, V]. The kernels treat all labels as 0 and leave the
positive classes out. This file adds the terms of the positive classes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from .. import backends, checks
from ..backends import cpu_binary
from ..backends import torch_binary as binary_torch
from ..core.class_logits import is_first_occurrence
from ..core.head import COMPUTE_DTYPE, sum_dtype
from .library import library, no_double_backward

_LABELS = "Tensor input, Tensor target, Tensor? weight, Tensor? pos_weight, "

library.define(f"binary_loss({_LABELS}int ignore_index, bool by_element, str backend) -> Tensor")
library.define(f"binary_grad({_LABELS}Tensor upstream, int ignore_index, str backend) -> Tensor")


def _binary_loss(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    pos_weight: Tensor | None,
    ignore_index: int,
    by_element: bool,
    backend: str,
) -> Tensor:
    if input.numel() == 0:
        return input.new_zeros(input.shape if by_element else (), dtype=COMPUTE_DTYPE[input.dtype])
    run = _backend(backend)
    x, labels, w, v = _rows(input.detach(), target, weight, pos_weight)
    loss: Tensor
    if labels is not None and by_element:
        loss = run.elementwise(x, labels, w, v)
        return loss.view(input.shape)
    if labels is not None:
        loss = run.loss_sum(x, labels, w, v, None)
        return loss
    backends.check_targets(target, x.shape[-1], ignore_index, on_host=target.device.type == "cpu")
    classes, valid = _positive_classes(target, x, ignore_index)
    z = x.gather(-1, classes).to(COMPUTE_DTYPE[x.dtype])
    factors = _factors(classes, z, w, v)
    terms = (logsigmoid(z).neg_() * factors).masked_fill_(factors == 0, 0.0)
    if by_element:
        loss = run.elementwise(x, None, w, None)
        return _scatter_values(loss, classes, valid, terms).view(input.shape)
    # Padding and repetitions move past the last class, where they leave nothing out.
    left_out = classes.masked_fill(~valid, x.shape[-1]).flatten(0, -2).int().sort(-1).values
    loss = run.loss_sum(x, None, w, None, left_out)
    return loss + terms.masked_fill(~valid, 0.0).sum(dtype=sum_dtype(loss.device)).to(loss.dtype)


def _binary_grad(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    pos_weight: Tensor | None,
    upstream: Tensor,
    ignore_index: int,
    backend: str,
) -> Tensor:
    if input.numel() == 0:
        return torch.empty_like(input)
    run = _backend(backend)
    x, labels, w, v = _rows(input.detach(), target, weight, pos_weight)
    upstream = upstream.expand(input.shape)
    upstream = upstream if input.dim() > 1 else upstream.reshape(1, -1)
    if labels is not None:
        grad: Tensor = run.gradient(x, labels, w, v, upstream)
        return grad.view(input.shape)
    classes, valid = _positive_classes(target, x, ignore_index)
    z = x.gather(-1, classes).to(COMPUTE_DTYPE[x.dtype])
    slopes = z.neg().sigmoid_().neg_().mul_(_factors(classes, z, w, v))
    grad = run.gradient(x, None, w, None, upstream)
    slopes = slopes * upstream.gather(-1, classes)
    return _scatter_values(grad, classes, valid, slopes).view(input.shape)


def _backend(name: str) -> Any:
    """Return the module of a backend."""
    if name == "triton":
        from ..backends import triton_binary as binary_triton

        return binary_triton
    if name == "cpu":
        return cpu_binary
    return binary_torch


def _rows(
    input: Tensor, target: Tensor, *weights: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Return (logits, labels, weight, pos_weight) as [..., V]. Label indices become None."""
    labels = target if target.is_floating_point() else None
    x, *others = (
        None if t is None else t.expand(input.shape if input.dim() > 1 else (1, input.numel()))
        for t in (input, labels, *weights)
    )
    assert x is not None
    labels, weight, pos_weight = others
    return x, labels, weight, pos_weight


def _positive_classes(target: Tensor, x: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """Return (classes [..., K], valid): padding and repetitions in a row are not valid."""
    target = target.long() if target.dim() == x.dim() else target.long()[None]
    valid = (target != ignore_index) & is_first_occurrence(target)
    return target.masked_fill(~valid, 0).clamp(0, x.shape[-1] - 1), valid


def _factors(
    classes: Tensor, z: Tensor, weight: Tensor | None, pos_weight: Tensor | None
) -> Tensor:
    """Return the factors [..., K] of the terms of positive labels."""
    factors = torch.ones_like(z)
    for t in (weight, pos_weight):
        if t is not None:
            factors = factors * t.gather(-1, classes).to(z.dtype)
    return factors


def _scatter_values(t: Tensor, classes: Tensor, valid: Tensor, values: Tensor) -> Tensor:
    """Write `values` into t [..., V] at the valid `classes`, without a host synchronization."""
    # Invalid entries repeat the first valid one of their row. A row without one keeps its values.
    first = valid.int().argmax(-1, keepdim=True)
    classes = torch.where(valid, classes, classes.gather(-1, first))
    values = torch.where(valid, values, values.gather(-1, first)).to(t.dtype)
    values = torch.where(valid.any(-1, keepdim=True), values, t.gather(-1, classes))
    return t.scatter_(-1, classes, values)


class _Binary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        *ctx.options, _, ctx.backend = arguments[4:]
        ctx.save_for_backward(*arguments[:4])
        with torch._C._AutoDispatchBelowAutograd():
            loss: Tensor = torch.ops.chunked_ce.binary_loss(*arguments)
        return loss

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        checks.not_sharded([upstream])
        grad = torch.ops.chunked_ce.binary_grad(
            *ctx.saved_tensors, upstream, *ctx.options, ctx.backend
        )
        return grad, *(None,) * 6


def _differentiable_binary_loss(input: Tensor, *arguments: Any) -> Any:
    if torch.is_grad_enabled() and input.requires_grad:
        if torch._C._are_functorch_transforms_active():  # of a compiled program, within it
            checks.compiled_transform()
        return _Binary.apply(input, *arguments)  # type: ignore[no-untyped-call]
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.chunked_ce.binary_loss(input, *arguments)


def _fake_binary_loss(input: Tensor, *arguments: Any) -> Tensor:
    by_element = arguments[4]
    dtype = COMPUTE_DTYPE[input.dtype]
    return torch.empty_like(input, dtype=dtype) if by_element else input.new_empty((), dtype=dtype)


library.impl("binary_loss", _binary_loss, "CompositeExplicitAutograd")
library.impl("binary_loss", _differentiable_binary_loss, "Autograd")
library.impl("binary_grad", _binary_grad, "CompositeExplicitAutograd")
torch.library.register_fake("chunked_ce::binary_loss", _fake_binary_loss, lib=library)
torch.library.register_fake(
    "chunked_ce::binary_grad", lambda input, *_: torch.empty_like(input), lib=library
)
torch.library.register_autograd("chunked_ce::binary_grad", no_double_backward, lib=library)
