"""`group` of the evaluations: ranks share the batches, and each has the report of one process."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from language_models import TINY_VOCAB, Tiny

from chunked_ce import compare_models, evaluate_perplexity


def documents() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, TINY_VOCAB, (n,), generator=generator) for n in (50, 3, 41, 70)]


def perplexity() -> None:
    calls: list[int] = []
    model = Tiny(lambda z: calls.append(1) or z)
    options = dict(context_length=16, stride=11, batch_size=2, per_document=True, rank=True)
    alone = evaluate_perplexity(model, documents(), **options)
    one_rank = len(calls)
    together = evaluate_perplexity(model, documents(), **options, group=dist.group.WORLD)
    assert len(calls) < 2 * one_rank, "a rank scores its own batches alone"
    assert together.tokens == alone.tokens and together.accuracy == alone.accuracy
    assert together.nll_sum == pytest.approx(alone.nll_sum, rel=1e-12)
    for ours, expected in zip(together.per_document, alone.per_document, strict=True):
        assert ours.nll_sum == pytest.approx(expected.nll_sum, rel=1e-12)


def comparison() -> None:
    calls: list[int] = []
    model, base = Tiny(lambda z: calls.append(1) or z * 1.01), Tiny()
    options = dict(context_length=16, stride=11, batch_size=2)
    alone = compare_models(model, base, documents(), **options)
    one_rank = len(calls)
    together = compare_models(model, base, documents(), **options, group=dist.group.WORLD)
    assert len(calls) < 2 * one_rank
    for ours, expected in zip(together.per_token, alone.per_token, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-6, atol=0)
    assert together.mean_kl.value == pytest.approx(alone.mean_kl.value, rel=1e-6)


CASES = {"evaluation: perplexity": perplexity, "evaluation: comparison": comparison}
