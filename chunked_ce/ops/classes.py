"""Logits [..., K] of the classes that a target names, and their gradients."""

from __future__ import annotations

from torch import Tensor

from .. import backends
from ..core.class_logits import gather_gradient, gather_logits
from ..core.gradient import Coefficients
from ..core.head import Head
from ..core.reduction import is_scored
from .library import NO_CLASS, Classes


def check_classes(indices: Tensor, vocab_size: int) -> None:
    """Raise IndexError on a CPU where a class is neither one of the vocabulary nor padding."""
    on_host = indices.device.type == "cpu"
    backends.check_targets(
        indices, vocab_size, NO_CLASS, on_host=on_host, per_row=indices.shape[-1]
    )


def class_logits(
    input: Tensor, target: Tensor, indices: Tensor, ignore_index: int, vocab_size: int, head: Head
) -> Tensor:
    """Return the logits [..., K] of classes: 0 in ignored rows, NaN for classes out of range."""
    existing, out_of_range = _existing_classes(indices, vocab_size)
    ignored = ~is_scored(target, ignore_index)
    z = gather_logits(input, existing, head).masked_fill_(out_of_range, float("nan"))
    return z.masked_fill_(ignored[..., None], 0.0)


def class_gradient(
    input: Tensor,
    target: Tensor,
    classes: Classes,
    lse: Tensor,
    logprob: Tensor,
    lse_low: Tensor,
    coefficients: Coefficients,
    upstream: Tensor,  # [..., K] gradient of the logits of the classes
    ignore_index: int,
    vocab_size: int,
    head: Head,
) -> tuple[Tensor, Tensor]:
    """Return (classes, gradient of their logits before the head), both [..., K]."""
    assert classes.indices is not None and classes.prob is None
    k = classes.indices.shape[-1]
    existing, out_of_range = _existing_classes(classes.indices, vocab_size)
    weights = None
    if coefficients.u is not None and classes.weight is not None:
        weights = classes.weight.to(lse.dtype)[existing].view(-1, k)
    values = gather_gradient(
        input.gather(-1, existing).view(-1, k), existing.reshape(-1, k), upstream.reshape(-1, k),
        target.long().reshape(-1), lse, logprob, lse_low, coefficients, weights,
        is_scored(target, ignore_index).reshape(-1), head,
    )  # fmt: skip
    values = values.view(existing.shape).masked_fill(out_of_range, float("nan"))
    return existing, values.to(input.dtype)


def prob_gradient(
    input: Tensor,
    classes: Classes,
    lse: Tensor,
    lse_low: Tensor,
    mean_logprob_grad: Tensor,
    vocab_size: int,
    softcap: float | None,
    logit_scale: float,
) -> Tensor:
    """Return the gradient of `prob`: d mean_logprob / d prob = weight scale (z - lse) / V."""
    assert classes.prob is not None
    x = input.detach()[..., :vocab_size].to(lse.dtype, copy=True)
    z = Head(softcap, logit_scale).apply_(x).sub_(lse[..., None]).sub_(lse_low[..., None])
    grad = z.mul_((mean_logprob_grad * classes.prob_scale)[..., None])
    grad = grad if classes.weight is None else grad.mul_(classes.weight)
    return grad.to(classes.prob.dtype)


def _existing_classes(indices: Tensor, vocab_size: int) -> tuple[Tensor, Tensor]:
    """Return (classes clamped to the vocabulary, which entries are out of range and no padding)."""
    existing = indices.clamp(0, vocab_size - 1)
    return existing, (indices != existing) & (indices != NO_CLASS)
