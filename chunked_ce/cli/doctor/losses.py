"""Checks of the cross-entropies, from logits and from hidden states, with each kind of target."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ...functional.linear import linear_cross_entropy
from ...functional.logits import cross_entropy
from ...functional.targets import AnyTarget
from .against_eager import EXISTING, TOKENS, VOCAB, Batch, Check, batch_on, compare_loss, eager

_TOP = 5  # classes that a teacher names


class _Case(NamedTuple):
    """One call of a loss, and the same of eager logits [N, V] in float64."""

    target: AnyTarget
    options: dict[str, Any]
    truth: Callable[[Tensor], Tensor]


def _smoothed(batch: Batch) -> _Case:
    def truth(logits: Tensor) -> Tensor:
        stats = eager(logits, batch.target)
        z_loss = 1e-3 * stats["lse"].square()
        losses = -0.9 * stats["logprob"] - 0.1 * stats["mean_logprob"] + z_loss
        return losses.sum() / (batch.target != -100).sum()

    return _Case(batch.target, {"label_smoothing": 0.1, "z_loss_weight": 1e-3}, truth)


def _capped(batch: Batch) -> _Case:
    """Of a padded head."""

    def truth(logits: Tensor) -> Tensor:
        return F.cross_entropy(2.0 * torch.tanh(1.5 * logits[:, :EXISTING] / 2.0), batch.target)

    options = {"softcap": 2.0, "logit_scale": 1.5, "vocab_size": EXISTING}
    return _Case(batch.target, options, truth)


def _token_weights(batch: Batch) -> _Case:
    weight = batch.positive[:TOKENS, 1]

    def truth(logits: Tensor) -> Tensor:
        return (
            F.cross_entropy(logits, batch.target, reduction="none") * weight.double()
        ).sum() / 11

    return _Case(batch.target, {"token_weight": weight, "num_items": 11}, truth)


def _class_weights(batch: Batch) -> _Case:
    weight = batch.positive[:, 0]

    def truth(logits: Tensor) -> Tensor:
        return F.cross_entropy(logits, batch.target, weight.double(), label_smoothing=0.1)

    return _Case(batch.target, {"weight": weight, "label_smoothing": 0.1}, truth)


def _probabilities(batch: Batch) -> _Case:
    prob = _normal(batch, TOKENS, VOCAB).softmax(-1)

    def truth(logits: Tensor) -> Tensor:
        return F.cross_entropy(logits, prob.double(), label_smoothing=0.1)

    return _Case(prob, {"label_smoothing": 0.1}, truth)


def _top_k(spread_rest: bool) -> Callable[[Batch], _Case]:
    def case(batch: Batch) -> _Case:
        teacher = (2.0 * _normal(batch, TOKENS, VOCAB)).softmax(-1)
        prob, classes = teacher.topk(_TOP)
        padding = torch.zeros_like(classes, dtype=torch.bool)
        padding[3, 2:], padding[::5] = True, True  # of some classes; of whole tokens, ignored
        prob, scored = prob.masked_fill(padding, 0.0), ~padding.all(-1)
        rest = (
            (1.0 - prob.double().sum(-1, keepdim=True)) if spread_rest else torch.zeros_like(prob)
        )
        others = VOCAB - (~padding).sum(-1, keepdim=True)
        dense = (rest[:, :1].double() / others).expand(-1, VOCAB)
        given = dense.gather(-1, classes).where(padding, prob.double())
        dense = dense.scatter(-1, classes, given)[scored]
        target = classes.masked_fill(padding, -100), prob
        options = {"spread_rest": True} if spread_rest else {}
        return _Case(target, options, lambda logits: F.cross_entropy(logits[scored], dense))

    return case


def _normal(batch: Batch, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(*shape, generator=generator).to(batch.target.device)


def _from_logits(case_of: Callable[[Batch], _Case], how: dict[str, Any] | None = None) -> Check:
    def check(device: torch.device, backend: str, dtype: torch.dtype) -> str:
        batch = batch_on(device, dtype)
        case = case_of(batch)
        leaf = batch.logits.detach().requires_grad_()
        logits = leaf + torch.zeros((), dtype=dtype, device=device)  # may be overwritten
        options = case.options | (how or {})
        loss = cross_entropy(logits, case.target, **options, backend=backend)
        return compare_loss(loss, [leaf], case.truth, dtype)

    return check


def _from_hidden_states(case_of: Callable[[Batch], _Case]) -> Check:
    def check(device: torch.device, backend: str, dtype: torch.dtype) -> str:
        batch = batch_on(device, dtype)
        case = case_of(batch)
        leaves = [t.requires_grad_() for t in (batch.hidden, batch.weight, batch.bias)]
        options = case.options | {"linear_bias": leaves[2], "token_chunk_size": 10}
        loss = linear_cross_entropy(leaves[0], leaves[1], case.target, **options, backend=backend)
        # Each chunk's logits are rounded to dtype.
        return compare_loss(
            loss, leaves, lambda *head: case.truth(F.linear(*head)), dtype, values=dtype
        )

    return check


def _check_dimensions(device: torch.device, backend: str, dtype: torch.dtype) -> str:
    """Logits [2, V, 3, 6], classes in dimension 1 as in torch."""
    batch = batch_on(device, dtype)
    target = batch.target[:36].view(2, 3, 6)
    leaf = batch.logits[:36].detach().view(2, 3, 6, VOCAB).movedim(-1, 1).requires_grad_()
    loss = cross_entropy(leaf, target, backend=backend)
    return compare_loss(loss, [leaf], lambda logits: F.cross_entropy(logits, target), dtype)


_KINDS: dict[str, Callable[[Batch], _Case]] = {
    "": _smoothed,
    ", softcap": _capped,
    ", token weights": _token_weights,
    ", class weights": _class_weights,
    ", probabilities": _probabilities,
    ", top k": _top_k(spread_rest=False),
    ", top k and the rest": _top_k(spread_rest=True),
}
_SCHEDULES: dict[str, dict[str, Any]] = {
    "inplace_backward": {"inplace_backward": True},
    "grad_in_forward": {"grad_in_forward": True},
    "both": {"inplace_backward": True, "grad_in_forward": True},
}

CHECKS: dict[str, Check] = {
    **{f"cross_entropy{kind}": _from_logits(case) for kind, case in _KINDS.items()},
    "cross_entropy, [N, V, d1, d2]": _check_dimensions,
    **{f"cross_entropy, {how}": _from_logits(_smoothed, o) for how, o in _SCHEDULES.items()},
    **{f"linear_cross_entropy{kind}": _from_hidden_states(case) for kind, case in _KINDS.items()},
}
