"""Binary cross-entropy over many labels: operators and autograd; the labels dense, or by index.

chunked_ce::binary_loss  its sum, or the loss of each logit
chunked_ce::binary_grad  the gradient of the logits

Labels by index [N, K] stand for a multi-hot [N, V]. The kernels take every label for 0 and leave
the few positive ones out. Their K terms are computed here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from .. import backends, checks
from ..backends import cpu_binary
from ..backends import torch_binary as binary_torch
from ..core.class_logits import is_first
from ..core.head import compute_dtype
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
        return input.new_zeros(input.shape if by_element else (), dtype=compute_dtype(input.dtype))
    run = _backend(backend)
    x, labels, w, v = _rows(input.detach(), target, weight, pos_weight)
    loss: Tensor
    if labels is not None and by_element:
        loss = run.elementwise(x, labels, w, v)
        return loss.view(input.shape)
    if labels is not None:
        loss = run.total(x, labels, w, v, None)
        return loss
    backends.check_targets(target, x.shape[-1], ignore_index, free=target.device.type == "cpu")
    classes, given = _positives(target, x, ignore_index)
    z = x.gather(-1, classes).to(compute_dtype(x.dtype))
    factors = _factors(classes, z, w, v)
    terms = (logsigmoid(z).neg_() * factors).masked_fill_(factors == 0, 0.0)
    if by_element:
        loss = run.elementwise(x, None, w, None)
        return _put(loss, classes, given, terms).view(input.shape)
    # Padding and repetitions go where nothing is left out: past the last class.
    left_out = classes.masked_fill(~given, x.shape[-1]).flatten(0, -2).int().sort(-1).values
    loss = run.total(x, None, w, None, left_out)
    return loss + terms.masked_fill(~given, 0.0).sum(dtype=torch.float64).to(loss.dtype)


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
    classes, given = _positives(target, x, ignore_index)
    z = x.gather(-1, classes).to(compute_dtype(x.dtype))
    slopes = z.neg().sigmoid_().neg_().mul_(_factors(classes, z, w, v))
    grad = run.gradient(x, None, w, None, upstream)
    return _put(grad, classes, given, slopes * upstream.gather(-1, classes)).view(input.shape)


def _backend(name: str) -> Any:
    if name == "triton":
        from ..backends import triton_binary as binary_triton

        return binary_triton
    if name == "cpu":
        return cpu_binary
    return binary_torch


def _rows(
    input: Tensor, target: Tensor, *weights: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """(logits, labels, weights), [..., V] all; the labels None where they are indices."""
    labels = target if target.is_floating_point() else None
    x, *others = (
        None if t is None else t.expand(input.shape if input.dim() > 1 else (1, input.numel()))
        for t in (input, labels, *weights)
    )
    assert x is not None
    labels, weight, pos_weight = others
    return x, labels, weight, pos_weight


def _positives(target: Tensor, x: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """([..., K] classes, which of them count): not padding, nor named before in their row."""
    target = target.long() if target.dim() == x.dim() else target.long()[None]
    given = (target != ignore_index) & is_first(target)
    return target.masked_fill(~given, 0).clamp(0, x.shape[-1] - 1), given


def _factors(
    classes: Tensor, z: Tensor, weight: Tensor | None, pos_weight: Tensor | None
) -> Tensor:
    """[..., K] what the terms of positive labels are multiplied by."""
    factors = torch.ones_like(z)
    for t in (weight, pos_weight):
        if t is not None:
            factors = factors * t.gather(-1, classes).to(z.dtype)
    return factors


def _put(t: Tensor, classes: Tensor, given: Tensor, values: Tensor) -> Tensor:
    """t [..., V] with `values` at those of `classes` that are `given`, without asking which."""
    # The others do again what the first of their row does; where none is given, nothing.
    first = given.int().argmax(-1, keepdim=True)
    classes = torch.where(given, classes, classes.gather(-1, first))
    values = torch.where(given, values, values.gather(-1, first)).to(t.dtype)
    values = torch.where(given.any(-1, keepdim=True), values, t.gather(-1, classes))
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
        checks.plain_upstream(upstream)
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
    dtype = compute_dtype(input.dtype)
    return torch.empty_like(input, dtype=dtype) if by_element else input.new_empty((), dtype=dtype)


library.impl("binary_loss", _binary_loss, "CompositeExplicitAutograd")
library.impl("binary_loss", _differentiable_binary_loss, "Autograd")
library.impl("binary_grad", _binary_grad, "CompositeExplicitAutograd")
torch.library.register_fake("chunked_ce::binary_loss", _fake_binary_loss, lib=library)
torch.library.register_fake(
    "chunked_ce::binary_grad", lambda input, *_: torch.empty_like(input), lib=library
)
torch.library.register_autograd("chunked_ce::binary_grad", no_double_backward, lib=library)
