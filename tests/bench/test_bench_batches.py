"""Batches, references, free memory and the peers of the benchmarks."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from bench import cases, measure, providers, runner
from bench.cases import LINEAR, LOGITS, Case
from bench.records import Report

SMALL = (Case(LOGITS, 5, 0, 30, torch.float32), Case(LINEAR, 5, 8, 30, torch.float32))


def overwriting(logits, target):
    """As Liger's: the gradient lies over the logits after forward."""

    class Loss(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            with torch.enable_grad():
                leaf = x.detach().clone().requires_grad_()
                loss = F.cross_entropy(leaf, target)
                (grad,) = torch.autograd.grad(loss, leaf)
            x.data.copy_(grad)
            ctx.save_for_backward(x)
            return loss.detach()

        @staticmethod
        def backward(ctx, upstream):
            return ctx.saved_tensors[0].data * upstream

    return Loss.apply(logits)


def test_a_provider_that_overwrites_its_logits_spoils_no_other(monkeypatch, capsys):
    table = [p._replace(load=lambda device: overwriting) if p.name == "liger" else p
             for p in providers.TABLE if p.form == LOGITS]  # fmt: skip
    monkeypatch.setattr(providers, "TABLE", tuple(table))
    report = Report("a device")
    names = ("eager", "liger", "chunked_ce", "chunked_ce inplace_backward")
    timed = runner.Runner(report, rounds=2).time(SMALL[0], names)
    assert {t.entry.provider.name for t in timed} == {*names}
    assert all(max(t.entry.errors) < 1e-6 for t in timed)
    batches = {t.entry.provider.name: t.entry.batch[0] for t in timed}
    expected = cases.batch_of(SMALL[0])[0]
    assert torch.equal(batches["eager"], expected) and torch.equal(batches["chunked_ce"], expected)
    assert batches["eager"] is batches["chunked_ce"]  # only who overwrites gets a copy
    assert not torch.equal(batches["liger"], expected)


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.form)
def test_the_reference_by_blocks_is_the_whole(case, monkeypatch):
    monkeypatch.setattr(cases, "ROWS_OF_REFERENCE", 2)
    *leaves, target = cases.batch_of(case)
    target[1] = -100
    wide = [leaf.double().requires_grad_() for leaf in leaves]
    logits = wide[0] if case.form == LOGITS else F.linear(*wide)
    loss = F.cross_entropy(logits, target)
    truth = (loss, *torch.autograd.grad(loss, wide))
    found = cases.reference((*leaves, target))
    assert len(found) == len(truth)
    for got, expected in zip(found, truth, strict=True):
        torch.testing.assert_close(got.double(), expected.detach(), rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("row", [0, 4])
def test_one_wrong_row_or_number_is_found(row, monkeypatch):
    monkeypatch.setattr(cases, "ROWS_OF_REFERENCE", 2)
    right = cases.reference(cases.batch_of(SMALL[1]))
    assert cases.check("x", right, right, exact=True) == (0.0, 0.0)
    for factor in (1.001, float("nan")):
        grad = right[1].clone()
        grad[row] *= factor
        with pytest.raises(ValueError, match="x: its input's grad is not eager's"):
            cases.check("x", (right[0], grad, right[2]), right, exact=True)
    grad = right[1].clone()
    grad[row] = 0.0  # a row of zeros is right only where both have one
    with pytest.raises(ValueError, match="off by 1 "):
        cases.check("x", (right[0], grad, right[2]), right, exact=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_random_numbers(dtype, monkeypatch):
    monkeypatch.setattr(cases, "NORMAL_BLOCK", 1000)  # several blocks, the last one short
    x = cases.normal(505, 30, dtype, torch.Generator().manual_seed(0))
    assert x.shape == (505, 30) and x.dtype == dtype
    assert float(x.float().mean()) == pytest.approx(0, abs=0.03)
    assert float(x.float().std()) == pytest.approx(1, abs=0.02)
    again = cases.normal(505, 30, dtype, torch.Generator().manual_seed(0))
    assert torch.equal(x, again) and not torch.equal(x[:33], x[33:66])


def test_random_bf16_is_made_from_float32(monkeypatch):
    """In bfloat16 itself it takes three times as long. Without a clock: no such call is made."""
    asked = []
    randn = torch.randn
    monkeypatch.setattr(
        torch, "randn", lambda *a, **k: (asked.append(k.get("dtype")), randn(*a, **k))[1]
    )
    for case in SMALL:
        case = case._replace(dtype=torch.bfloat16)
        assert cases.batch_of(case)[0].dtype == torch.bfloat16
    assert len(asked) == 3 and set(asked) <= {None, torch.float32}


def test_batches_are_made_where_they_are_used(monkeypatch):
    """Nothing is copied from the CPU: on "meta" there is no copy to make."""
    made = SimpleNamespace(device=torch.device("meta"))
    monkeypatch.setattr(
        torch, "Generator", lambda device: SimpleNamespace(manual_seed=lambda s: made)
    )
    randn, randint = torch.randn, torch.randint
    places = []

    def placed(function):
        def call(*arguments, generator, device, **options):
            places.append(str(device))
            return function(*arguments, device=device, **options)

        return call

    monkeypatch.setattr(torch, "randn", placed(randn))
    monkeypatch.setattr(torch, "randint", placed(randint))
    for form, hidden in ((LOGITS, 0), (LINEAR, 4096)):
        case = Case(form, 8192, hidden, 128256, torch.bfloat16)
        assert {t.device.type for t in cases.batch_of(case, "meta")} == {"meta"}
    assert set(places) == {"meta"}


def test_cached_memory_is_free(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (1000, 9000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 600)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 250)
    assert measure.free_bytes("cuda") == 1350


def test_cut_cross_entropy_with_its_filter_and_without(monkeypatch):
    calls = []
    module = SimpleNamespace(linear_cross_entropy=lambda *a, **options: calls.append(options))
    monkeypatch.setattr(providers, "_module", lambda name: module)
    cut, with_filter = providers.find(LINEAR, (providers.CUT, providers.CUT_FILTER))
    for provider in (cut, with_filter):
        provider.load("cuda")(1, 2, 3)
    assert calls == [dict(impl="cce", filter_eps=None), dict(impl="cce")]
    assert providers.why_not(with_filter, "cpu") == "its filter needs a GPU"
