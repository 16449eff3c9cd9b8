"""Perplexity: PITFALLS, Perplexity 1, 2, 5, 7, 8, 9, 10, and the mistakes each argument allows."""

import json
import math

import oracle
import pytest
import torch
from helpers import batch

from chunked_ce import Perplexity, PerplexityReport, perplexity


def truth(x, target):
    losses = oracle.cross_entropy(x, target, reduction="none")
    return losses.sum() / (target != -100).sum()


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str
)
def test_one_batch(dtype):
    x, target = batch((3, 7), 50, dtype)
    result = perplexity(x, target)
    assert result.dtype == torch.float64 and result.shape == ()
    torch.testing.assert_close(result, truth(x, target).exp(), rtol=1e-6, atol=0)
    torch.testing.assert_close(
        perplexity(x[0], target[0], dim=1), truth(x[0], target[0]).exp(), rtol=1e-6, atol=0
    )


def test_default_ignore_index():
    x, target = batch(20, 50)
    assert (target == -100).any()
    assert perplexity(x, target, ignore_index=None) == perplexity(x, target)
    assert Perplexity(ignore_index=None)(x, target) == perplexity(x, target)
    with pytest.raises(TypeError, match="ignore_index must be an int"):
        perplexity(x, target, ignore_index="none")


@pytest.mark.parametrize("size", [1, 8, 16, 40])
@pytest.mark.parametrize("order", [1, -1])
def test_batch_size_and_order(size, order):
    """1: exp(sum / sum), never a mean of means, though batches hold unequal numbers of tokens."""
    x, target = batch(40, 50, ignored=0.5)
    meter = Perplexity()
    parts = list(zip(x.split(size), target.split(size), strict=True))[::order]
    for logits, labels in parts:
        meter.update(logits, labels)
    torch.testing.assert_close(meter.compute(), truth(x, target).exp(), rtol=1e-6, atol=0)
    assert meter.report().tokens == int((target != -100).sum())


def test_ignore_index():
    """2: token 0, and a padding id that is also the end of text, are scored like any other."""
    x = torch.randn(6, 20)
    target = torch.tensor([0, 3, -100, 0, 19, -100])
    meter = Perplexity()
    meter.update(x, target)
    assert meter.report().tokens == 4
    other = Perplexity(ignore_index=0)
    other.update(x, target.clamp(min=1))
    assert other.report().tokens == 6


def test_overflow():
    """5: float64, inf reported together with the mean NLL, no exception."""
    report = PerplexityReport(nll_sum=1e6, tokens=10)
    assert report.perplexity == math.inf and report.mean_nll == 1e5
    meter = Perplexity()
    meter.update_nll(1e6, 10)
    assert meter.compute() == math.inf


def test_measures_and_units():
    """7 and 8: bits per byte from the bytes of the scored text; per word and per token are told apart."""
    report = PerplexityReport(nll_sum=100 * math.log(2), tokens=25, bytes=80, words=20)
    assert report.bits_per_token == pytest.approx(4)
    assert report.perplexity == pytest.approx(16)
    assert report.bits_per_byte == pytest.approx(1.25)
    assert report.word_perplexity == pytest.approx(32)
    text = str(report)
    for part in (
        "16 per token over 25 tokens",
        "1.2500 bits per byte over 80 bytes",
        "32 per word over 20 words",
    ):
        assert part in text
    assert json.loads(json.dumps(report.to_dict()))["bits_per_byte"] == pytest.approx(1.25)
    bare = PerplexityReport(nll_sum=1.0, tokens=1)
    assert bare.bits_per_byte is None and bare.word_perplexity is None and "byte" not in str(bare)


def test_bytes_of_scored_text():
    meter = Perplexity()
    meter.update_nll(10.0, 5, n_bytes=20, words=4)
    assert meter.report().bits_per_byte == pytest.approx(0.5 / math.log(2))
    meter.update_nll(10.0, 5, n_bytes=20)
    assert meter.report().bytes == 40 and meter.report().words is None
    meter.update_nll(10.0, 5)
    assert meter.report().bits_per_byte is None and meter.report().perplexity == pytest.approx(
        math.exp(2)
    )


def test_float64_sums():
    """9: a million small terms onto a large one; fp32 would lose them."""
    meter = Perplexity()
    meter.update_nll(2.0**30, 2**31)
    for _ in range(1000):
        meter.update_nll(torch.tensor(1e-3), torch.tensor(1, dtype=torch.int32))
    assert meter.report().nll_sum == pytest.approx(2.0**30 + 1.0, abs=1e-4)
    assert meter.report().tokens == 2**31 + 1000


def test_adding_and_resetting():
    left, right = Perplexity(), Perplexity()
    left.update_nll(3.0, 2, n_bytes=8)
    right.update_nll(5.0, 6, n_bytes=8)
    both = left + right
    assert both.report() == PerplexityReport(8.0, 8, 16, None)
    assert left.report().tokens == 2
    left.reset()
    assert left.compute().isnan() and left.report().tokens == 0
    assert "nan" in repr(left) and "tokens" in repr(both)


def test_nothing_scored():
    """10: documented, no exception."""
    x, _ = batch(3, 20)
    nothing = torch.full((3,), -100)
    assert perplexity(x, nothing).isnan()
    meter = Perplexity()
    meter.update(x, nothing)
    assert meter.compute().isnan() and math.isnan(meter.report().mean_nll)


def test_update_without_synchronization(monkeypatch):
    meter, (x, target) = Perplexity(), batch(3, 20)
    from chunked_ce.backends import torch as backend_torch
    from chunked_ce.checks import loss as loss_checks

    monkeypatch.setattr(backend_torch, "_on_host", lambda x: False)
    monkeypatch.setattr(loss_checks, "may_be_read", lambda x: False)
    for name in ("item", "__bool__", "__float__", "__int__", "tolist"):
        monkeypatch.setattr(torch.Tensor, name, lambda self, n=name: pytest.fail(f"{n} was called"))
    meter.update(x, target, n_bytes=9)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m: m.update_nll("x", 1), TypeError, "nll_sum must be a number .* got str"),
        (lambda m: m.update_nll(1.0, 1.5), TypeError, "tokens must be an int .* got float"),
        (lambda m: m.update_nll(1.0, -1), ValueError, "tokens is -1, expected at least 0"),
        (
            lambda m: m.update_nll(1.0, torch.tensor(1.0)),
            TypeError,
            "tokens has dtype torch.float32",
        ),
        (
            lambda m: m.update_nll(torch.ones(2), 1),
            ValueError,
            r"nll_sum has shape \[2\].*sum it first",
        ),
        (
            lambda m: m.update_nll(torch.tensor(1j), 1),
            TypeError,
            "nll_sum has dtype torch.complex64",
        ),
        (lambda m: m.update_nll(1.0, 2**70), ValueError, "tokens is .* of 64 bits"),
        (lambda m: m.update_nll(1.0, 1, n_bytes=-3), ValueError, "n_bytes is -3"),
        (
            lambda m: m.update_nll(1.0, 1, words=2.0),
            TypeError,
            "words must be an int or None, got float",
        ),
        (
            lambda m: m.update(torch.randn(2, 3, 4), torch.zeros(2, 4).long()),
            ValueError,
            "target has shape",
        ),
        (
            lambda m: m.update(torch.randn(2, 4), torch.tensor([0, 4])),
            IndexError,
            "target 4 in row 1",
        ),
        (
            lambda m: Perplexity(ignore_index=1.0),
            TypeError,
            "ignore_index must be an int .*, got float",
        ),
        (lambda m: m + 1, TypeError, "unsupported operand"),
    ],
)
def test_mistakes(call, error, message):
    meter = Perplexity()
    with pytest.raises(error, match=message):
        call(meter)
    assert meter.report() == PerplexityReport(0.0, 0), "nothing was counted"
