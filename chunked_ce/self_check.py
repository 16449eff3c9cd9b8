"""Every operator against eager torch in float64, in seconds, on whatever device.

The public functions on small batches, some tokens ignored, with upstream gradients other than 1:
values and gradients. What `chunked-ce doctor` runs; the tests go further.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .functional import cross_entropy, token_stats
from .linear import linear_cross_entropy, linear_token_stats
from .stats import TokenStats

_TOKENS, _HIDDEN, _VOCAB = 37, 48, 1003  # no multiple of anything
_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}

Check = Callable[[torch.device, str, torch.dtype], str]  # (device, backend, dtype) -> how far off


class _Batch(NamedTuple):
    hidden: Tensor
    weight: Tensor
    target: Tensor
    upstream: Tensor  # [N], a gradient of each token's loss

    @property
    def logits(self) -> Tensor:
        return self.hidden @ self.weight.T


def _batch(device: torch.device, dtype: torch.dtype) -> _Batch:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    target = torch.randint(_VOCAB, (_TOKENS,), generator=generator)
    target[::5] = -100
    return _Batch(
        normal(_TOKENS, _HIDDEN).to(device, dtype),
        (normal(_VOCAB, _HIDDEN) / _HIDDEN**0.5).to(device, dtype),
        target.to(device),
        normal(_TOKENS).to(device),
    )


def _eager(logits: Tensor, target: Tensor) -> dict[str, Tensor]:
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


def _compare(
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


def _with_gradients(
    values: dict[str, Tensor], of: Tensor, leaves: Sequence[Tensor]
) -> dict[str, Tensor]:
    """The values and what `of` them says about the leaves; of two, hidden states and weight."""
    names = ("gradient",) if len(leaves) == 1 else ("hidden states' gradient", "weight's gradient")
    grads = dict(zip(names, torch.autograd.grad(of, leaves), strict=True))
    return {name: value.detach() for name, value in values.items()} | grads


def _weighted(stats: dict[str, Tensor], upstream: Tensor) -> Tensor:
    return sum((value.to(upstream.dtype) * upstream).sum() for value in stats.values())  # type: ignore[return-value]


def _named(stats: TokenStats) -> dict[str, Tensor]:
    floats = ("lse", "logprob", "entropy", "mean_logprob")
    return {name: getattr(stats, name) for name in floats}


def _check_token_stats(device: torch.device, backend: str, dtype: torch.dtype) -> str:
    batch = _batch(device, dtype)
    leaf = batch.logits.detach().requires_grad_()
    stats = token_stats(
        leaf, batch.target, entropy=True, mean_logprob=True, rank=True, argmax=True,
        backend=backend,
    )  # fmt: skip
    named = _named(stats)
    got = _with_gradients(named, _weighted(named, batch.upstream), [leaf])
    wide = leaf.detach().double().requires_grad_()
    named = _eager(wide, batch.target)
    truth = _with_gradients(named, _weighted(named, batch.upstream.double()), [wide])
    _compare_integers(stats, wide.detach(), batch.target)
    return _compare(got, truth, dtype)


def _compare_integers(stats: TokenStats, logits: Tensor, target: Tensor) -> None:
    """On a tie the lower index wins."""
    assert stats.rank is not None and stats.argmax is not None
    index = target.clamp(min=0)[:, None]
    of_target = logits.gather(-1, index)
    lower = torch.arange(logits.shape[-1], device=logits.device) < index
    rank = ((logits > of_target) | ((logits == of_target) & lower)).sum(-1)
    for name, got, right in (
        ("rank", stats.rank, rank),
        ("argmax", stats.argmax, logits.argmax(-1)),
    ):
        if not torch.equal(got, right.masked_fill(target == -100, -1)):
            raise ArithmeticError(f"{name} is not eager's")


def _check_loss(inplace_backward: bool = False, grad_in_forward: bool = False) -> Check:
    def check(device: torch.device, backend: str, dtype: torch.dtype) -> str:
        batch = _batch(device, dtype)
        leaf = batch.logits.detach().requires_grad_()
        logits = leaf + torch.zeros((), dtype=dtype, device=device)  # may be overwritten
        loss = cross_entropy(
            logits, batch.target, label_smoothing=0.1, z_loss_weight=1e-3, backend=backend,
            inplace_backward=inplace_backward,
            grad_in_forward=grad_in_forward,
        )  # fmt: skip
        got = _with_gradients({"loss": loss}, 3.0 * loss, [leaf])
        wide = leaf.detach().double().requires_grad_()
        true_loss = _true_loss(wide, batch.target)
        truth = _with_gradients({"loss": true_loss}, 3.0 * true_loss, [wide])
        return _compare(got, truth, dtype)

    return check


def _true_loss(logits: Tensor, target: Tensor) -> Tensor:
    """The mean, with label smoothing of 0.1 and a z-loss of 1e-3."""
    stats = _eager(logits, target)
    losses = -0.9 * stats["logprob"] - 0.1 * stats["mean_logprob"] + 1e-3 * stats["lse"].square()
    return losses.sum() / (target != -100).sum()


def _check_linear_loss(device: torch.device, backend: str, dtype: torch.dtype) -> str:
    batch = _batch(device, dtype)
    leaves = batch.hidden.requires_grad_(), batch.weight.requires_grad_()
    loss = linear_cross_entropy(
        leaves[0],
        leaves[1], batch.target, label_smoothing=0.1, z_loss_weight=1e-3, token_chunk_size=10,
        backend=backend,
    )  # fmt: skip
    got = _with_gradients({"loss": loss}, 3.0 * loss, leaves)
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    true_loss = _true_loss(wide[0] @ wide[1].T, batch.target)
    truth = _with_gradients({"loss": true_loss}, 3.0 * true_loss, wide)
    return _compare(got, truth, dtype, values=dtype)  # each chunk's logits are rounded to it


def _check_linear_stats(device: torch.device, backend: str, dtype: torch.dtype) -> str:
    batch = _batch(device, dtype)
    leaves = batch.hidden.requires_grad_(), batch.weight.requires_grad_()
    stats = linear_token_stats(
        leaves[0],
        leaves[1], batch.target, entropy=True, mean_logprob=True, token_chunk_size=10,
        backend=backend,
    )  # fmt: skip
    named = _named(stats)
    got = _with_gradients(named, _weighted(named, batch.upstream), leaves)
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    named = _eager(wide[0] @ wide[1].T, batch.target)
    truth = _with_gradients(named, _weighted(named, batch.upstream.double()), wide)
    return _compare(got, truth, dtype, values=dtype)


CHECKS: dict[str, Check] = {
    "token_stats": _check_token_stats,
    "cross_entropy": _check_loss(),
    "cross_entropy, inplace_backward": _check_loss(inplace_backward=True),
    "cross_entropy, grad_in_forward": _check_loss(grad_in_forward=True),
    "cross_entropy, both": _check_loss(inplace_backward=True, grad_in_forward=True),
    "linear_cross_entropy": _check_linear_loss,
    "linear_token_stats": _check_linear_stats,
}
