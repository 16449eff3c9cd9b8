"""Perplexity: of a batch and of many, merged and saved; of documents in sliding windows. Each token counts once."""

from dataclasses import dataclass

import cases
import pytest
import torch
from hypothesis import strategies as st
from row_statistics import Call, Truth, calls
from torch import Tensor, nn

from chunked_ce import Perplexity, evaluate_perplexity, perplexity
from chunked_ce.core.reduction import is_scored

VOCAB = 11


def check_meters(call: Call) -> None:
    """Of a batch, and of the batches that it is cut into, in two meters."""
    x, target = cases.seen(call.x, call.view)[..., : call.vocab], call.target_spec.target
    call.head, call.weight = {}, None
    exact = Truth(call, {})
    nll = -exact.stats["logprob"].detach().where(~exact.broken, torch.nan)
    counted = call.target_spec.counted
    mean = nll.sum() / counted.sum()
    ignore_index = call.target_spec.options.get("ignore_index", -100)
    dim = -2 if x.dim() > 1 and call.inplace else -1
    value = perplexity(x.movedim(-1, dim), target, ignore_index=ignore_index, dim=dim)
    assert value.dtype == torch.float64 and value.dim() == 0
    size = nll.abs().nan_to_num(0.0, 0.0).sum() / counted.sum().clamp(min=1)
    rtol = (
        min(1e-11 * (1 + size), 1.0)
        if call.x.dtype == torch.float64
        else min(2e-6 * (1 + size), 1.0)
    )
    expected = mean.exp()
    if mean.isnan() or mean < 700 or mean > 720:  # exp overflows between
        torch.testing.assert_close(value, expected, rtol=float(rtol), atol=0.0, equal_nan=True)
    flat, labels = x.reshape(-1, x.shape[-1]), target.reshape(-1)
    meters = Perplexity(ignore_index=ignore_index), Perplexity(ignore_index=ignore_index)
    for i, rows in enumerate(torch.arange(labels.numel()).split(max(1, call.block % 5))):
        meters[i % 2].update(flat[rows], labels[rows], rank=True, n_bytes=3, words=1)
    both = meters[0] + meters[1]
    synced, report = both.sync(), both.report()
    # Rows whose classes lie apart are summed in another order among others than alone.
    torch.testing.assert_close(both.compute(), value, rtol=float(rtol), atol=0.0, equal_nan=True)
    assert torch.equal(synced.compute().nan_to_num(), both.compute().nan_to_num())
    assert report.tokens == int(counted.sum()) == int(is_scored(target, ignore_index).sum())
    if not exact.broken.any() and report.tokens:
        rank = exact.integers["rank"][counted]
        assert report.top1 == int((rank == 0).sum())
        assert report.reciprocal_rank_sum == pytest.approx(
            float((1.0 / (1 + rank).double()).sum()), rel=1e-12
        )
    again = Perplexity(ignore_index=ignore_index)
    again.load_state_dict(both.state_dict())
    assert again.report().to_json() == report.to_json()


class Sums(nn.Module):
    """A causal model whose logits tell exactly which tokens it was shown: the sum of what those add."""

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.table = nn.Parameter(table)

    def forward(self, ids: Tensor) -> Tensor:
        return self.table[ids].cumsum(-2)


@dataclass
class Documents:
    ids: list[Tensor]
    table: Tensor  # [VOCAB, VOCAB] multiples of 1/8
    context_length: int
    stride: int
    full_last_window: bool
    batch_size: int
    bos: int | bool

    def starts(self, length: int) -> list[int]:
        """Of a document of `length` tokens, for each target the first token that is shown."""
        firsts, start = [0] * length, 0
        for target in range(1, length):
            if target > start + self.context_length:
                start += self.stride
            firsts[target] = start
        if self.full_last_window and length > 1:
            last = firsts[-1]
            back = max(0, length - 1 - self.context_length)
            firsts = [min(f, back) if f == last else f for f in firsts]
        return firsts


@st.composite
def documents(draw):
    g, context_length = cases.generator(draw), draw(st.integers(2, 9))
    lengths = draw(st.lists(st.integers(2, 40), min_size=1, max_size=5))
    return Documents(
        [torch.randint(0, VOCAB, (n,), generator=g) for n in lengths],
        torch.randint(-16, 17, (VOCAB, VOCAB), generator=g).double() / 8,
        context_length,
        draw(st.integers(1, context_length)),
        draw(st.booleans()),
        draw(st.integers(1, 5)),
        draw(st.sampled_from([False, 0, 3])),
    )


def check_windows(case: Documents) -> None:
    report = evaluate_perplexity(
        Sums(case.table), case.ids, context_length=case.context_length, stride=case.stride,
        full_last_window=case.full_last_window, batch_size=case.batch_size, bos=case.bos,
        per_document=True, per_position=True, per_window=True,
    )  # fmt: skip
    of_documents = []
    for ids in case.ids:
        if case.bos is not False and ids[0] != case.bos:  # which counts once
            ids = torch.cat([torch.tensor([case.bos]), ids])
        nll = 0.0
        for target, start in enumerate(case.starts(len(ids))[1:], 1):
            logits = case.table[ids[start:target]].sum(0)
            nll -= float(logits.log_softmax(0)[ids[target]])
        of_documents.append((nll, len(ids) - 1))
    assert [r.tokens for r in report.per_document] == [n for _, n in of_documents]
    assert [r.nll_sum for r in report.per_document] == pytest.approx([s for s, _ in of_documents])
    for parts in (report.per_document, report.per_position, report.per_window):
        assert sum(r.tokens for r in parts) == report.tokens == sum(n for _, n in of_documents)
        assert sum(r.nll_sum for r in parts) == pytest.approx(report.nll_sum)
    assert report.nll_sum == pytest.approx(sum(s for s, _ in of_documents))


@pytest.mark.cases(60)
def test_meters(explore):
    explore(calls(), check_meters)


@pytest.mark.cases(15)
def test_windows(explore):
    explore(documents(), check_windows)
