"""Checks of binary cross-entropy, and of perplexity."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ...evaluation.meter import Perplexity, perplexity
from ...functional.binary import binary_cross_entropy_with_logits
from .against_eager import TOKENS, VOCAB, batch_on, compare, compare_loss, eager_rank


def check_binary(device: torch.device, backend: str, dtype: torch.dtype) -> str:
    """Labels [N, V] from 0 to 1, weights of logits and of positive labels."""
    batch = batch_on(device, dtype)
    weight, pos_weight = batch.positive.unbind(-1)
    labels = torch.rand(TOKENS, VOCAB, generator=torch.Generator().manual_seed(1)).to(device)
    leaf = batch.logits.detach().requires_grad_()
    loss = binary_cross_entropy_with_logits(
        leaf, labels, weight, pos_weight=pos_weight, backend=backend
    )

    def truth(logits: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(
            logits, labels.double(), weight.double(), pos_weight=pos_weight.double()
        )

    return compare_loss(loss, [leaf], truth, dtype)


def check_binary_by_index(device: torch.device, backend: str, dtype: torch.dtype) -> str:
    """Labels [N, 3] by their indices, some of them padding, one named twice."""
    batch = batch_on(device, dtype)
    target = batch.target[:, None] + torch.tensor([0, 1, 0], device=device)
    target = target.masked_fill(batch.target[:, None] == -100, -100)
    leaf = batch.logits.detach().requires_grad_()
    loss = binary_cross_entropy_with_logits(leaf, target, reduction="sum", backend=backend)
    labels = torch.zeros(TOKENS, VOCAB, dtype=torch.float64, device=device)
    labels.scatter_(-1, target.clamp(min=0), (target != -100).double())

    def truth(logits: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(logits, labels, reduction="sum")

    return compare_loss(loss, [leaf], truth, dtype)


def check_perplexity(device: torch.device, backend: str, dtype: torch.dtype) -> str:
    """Of a batch at once, and in two updates; both choose their backend themselves."""
    batch = batch_on(device, dtype)
    logits, meter = batch.logits, Perplexity()
    for part in (slice(0, 10), slice(10, TOKENS)):
        meter.update(logits[part], batch.target[part], rank=True)
    report = meter.report()
    rank = eager_rank(logits, batch.target)[batch.target != -100]
    if (report.tokens, report.top1) != (rank.numel(), int((rank == 0).sum())):
        raise ArithmeticError("the count of tokens, or of first choices, is not eager's")
    true = F.cross_entropy(logits.double(), batch.target).exp()
    reciprocal = (1.0 / (rank + 1).double()).sum()
    got = {
        "perplexity": perplexity(logits, batch.target),
        "Perplexity": meter.compute(),
        "reciprocal_rank_sum": reciprocal.new_tensor(report.reciprocal_rank_sum),
    }
    truth = {"perplexity": true, "Perplexity": true, "reciprocal_rank_sum": reciprocal}
    return compare(got, truth, dtype)
