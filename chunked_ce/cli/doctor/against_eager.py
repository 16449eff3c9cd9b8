"""The small batch of every check, its truth in float64, and the comparison."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ...core.row_stats import TokenStats

TOKENS, HIDDEN, VOCAB = 37, 48, 1003  # no multiple of anything
EXISTING = VOCAB - 3  # every target is below, so that a head may be taken for a padded one
UPSTREAM = 3.0  # gradient of a loss
_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
_FLOATS = ("lse", "logprob", "entropy", "mean_logprob")

Check = Callable[[torch.device, str, torch.dtype], str]  # (device, backend, dtype) -> how far off


class Batch(NamedTuple):
    hidden: Tensor
    weight: Tensor
    bias: Tensor
    target: Tensor
    upstream: Tensor  # [N], a gradient of each token's loss
    positive: Tensor  # [V, 2], weights of classes; its rows' first N, of tokens

    @property
    def logits(self) -> Tensor:
        return self.hidden @ self.weight.T


def batch_on(device: torch.device, dtype: torch.dtype) -> Batch:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    target = torch.randint(EXISTING, (TOKENS,), generator=generator)
    target[::5] = -100
    return Batch(
        normal(TOKENS, HIDDEN).to(device, dtype),
        (normal(VOCAB, HIDDEN) / HIDDEN**0.5).to(device, dtype),
        normal(VOCAB).mul(0.5).to(device, dtype),
        target.to(device),
        normal(TOKENS).to(device),
        torch.rand(VOCAB, 2, generator=generator).add(0.5).to(device),
    )


def eager(logits: Tensor, target: Tensor) -> dict[str, Tensor]:
    """A token's statistics from the whole softmax; 0 where it is ignored."""
    log_p = logits.log_softmax(-1)
    ignored = target == -100
    index = target.masked_fill(ignored, 0)[:, None]
    stats = {
        "lse": logits.logsumexp(-1),
        "logprob": log_p.gather(-1, index)[:, 0],
        "entropy": -(log_p.exp() * log_p).sum(-1),
        "mean_logprob": log_p.mean(-1),
    }
    return {name: value.masked_fill(ignored, 0.0) for name, value in stats.items()}


def eager_rank(logits: Tensor, target: Tensor) -> Tensor:
    """How many classes beat the target's; on a tie the lower index wins. -1 where ignored."""
    index = target.clamp(min=0)[:, None]
    of_target = logits.gather(-1, index)
    lower = torch.arange(logits.shape[-1], device=logits.device) < index
    rank = ((logits > of_target) | ((logits == of_target) & lower)).sum(-1)
    return rank.masked_fill(target == -100, -1)


def named(stats: TokenStats) -> dict[str, Tensor]:
    return {name: getattr(stats, name) for name in _FLOATS}


def weighted(stats: dict[str, Tensor], upstream: Tensor) -> Tensor:
    return sum((value.to(upstream.dtype) * upstream).sum() for value in stats.values())  # type: ignore[return-value]


def wide(leaves: Sequence[Tensor]) -> list[Tensor]:
    return [leaf.detach().double().requires_grad_() for leaf in leaves]


def with_gradients(
    values: dict[str, Tensor], of: Tensor, leaves: Sequence[Tensor]
) -> dict[str, Tensor]:
    """The values and what `of` them says about the leaves: logits, or hidden states and head."""
    names = ("hidden states' gradient", "weight's gradient", "bias's gradient")
    if len(leaves) == 1:
        names = ("gradient",)  # type: ignore[assignment]
    grads = dict(zip(names, torch.autograd.grad(of, leaves), strict=False))
    return {name: value.detach() for name, value in values.items()} | grads


def compare_loss(
    loss: Tensor,
    leaves: Sequence[Tensor],
    truth: Callable[..., Tensor],  # of the leaves in float64
    dtype: torch.dtype,
    values: torch.dtype = torch.float32,
) -> str:
    """A loss and its gradients, as :func:`compare` does."""
    got = with_gradients({"loss": loss}, UPSTREAM * loss, leaves)
    true_leaves = wide(leaves)
    true_loss = truth(*true_leaves)
    true = with_gradients({"loss": true_loss}, UPSTREAM * true_loss, true_leaves)
    return compare(got, true, dtype, values)


def compare(
    got: dict[str, Tensor],
    truth: dict[str, Tensor],
    dtype: torch.dtype,  # of the gradients
    values: torch.dtype = torch.float32,  # in which the others were rounded
) -> str:
    """Raises ArithmeticError where one is further off, in its norm, than rounding explains."""
    worst = 0.0
    for name, right in truth.items():
        difference = torch.linalg.vector_norm(got[name].double() - right)
        off = float(difference / torch.linalg.vector_norm(right))
        allowed = _TOLERANCE[dtype if name.endswith("gradient") else values]
        if not off <= allowed:  # nor NaN
            raise ArithmeticError(f"{name} is off by {off:.2g}, and {allowed:.2g} is allowed")
        worst = max(worst, off)
    return f"ok, off by {worst:.1g}"
