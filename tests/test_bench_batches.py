"""Batches, free memory and peers of `python -m bench run`."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

sys.path.append(str(Path(__file__).parents[1]))  # bench is not installed
from bench import __main__ as bench
from bench import cases, linear_providers, providers, run
from bench.linear_providers import Shape

TINY = "--tokens 16 --hidden 8 --vocab 70 300 --repeats 2 --dtype float32".split()


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


def test_a_provider_that_overwrites_its_logits_spoils_no_other(tmp_path, monkeypatch, capsys):
    loss_of, why_not = run.loss_of, providers.why_not

    def with_liger(form, provider, device):
        if provider != providers.LIGER:
            return loss_of(form, provider, device)
        return providers.behind_its_head(overwriting) if form == "full" else overwriting

    monkeypatch.setattr(run, "loss_of", with_liger)
    monkeypatch.setattr(
        providers, "why_not",
        lambda form, p, *a: "" if (form, p) == ("logits", "liger") else why_not(form, p, *a),
    )  # fmt: skip
    monkeypatch.setattr(run, "FULL_SIZE", ())
    command = ["run", "--suite", "quick", *TINY, "--out", str(tmp_path)]
    assert bench.main([*command, "--provider", "eager", "liger", "chunked_ce"]) == 0
    printed = capsys.readouterr().out
    assert "chunked_ce, logits: not run" not in printed
    alone = printed.split("## loss alone, N = 16, V = 70")[1].split("##")[0]
    assert all(f"{p} " in alone for p in ("eager", "liger", "chunked_ce"))


def test_only_such_a_provider_gets_a_copy():
    case = cases.Case("logits", Shape(4, 8, 30), torch.float32)
    batch = cases.batch_of(case, "cpu")
    assert cases.batch_for(case, providers.OURS, batch) is batch
    copy = cases.batch_for(case, providers.LIGER, batch)
    assert all(torch.equal(a, b) for a, b in zip(copy, batch, strict=True))
    assert copy[0].data_ptr() != batch[0].data_ptr()
    behind_head = case._replace(form="linear")
    assert cases.batch_for(behind_head, providers.LIGER, batch) is batch


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_random_numbers(dtype, monkeypatch):
    monkeypatch.setattr(linear_providers, "BLOCK", 1000)  # several blocks, the last one short
    x = linear_providers.normal(505, 30, dtype, torch.Generator().manual_seed(0))
    assert x.shape == (505, 30) and x.dtype == dtype
    assert float(x.float().mean()) == pytest.approx(0, abs=0.03)
    assert float(x.float().std()) == pytest.approx(1, abs=0.02)
    again = linear_providers.normal(505, 30, dtype, torch.Generator().manual_seed(0))
    assert torch.equal(x, again) and not torch.equal(x[:33], x[33:66])


def test_random_bf16_is_made_from_float32(monkeypatch):
    """In bfloat16 itself it takes three times as long. Without a clock: no such call is made."""
    asked = []
    randn = torch.randn
    monkeypatch.setattr(
        torch, "randn", lambda *a, **k: (asked.append(k.get("dtype")), randn(*a, **k))[1]
    )
    for form in ("logits", "linear"):
        case = cases.Case(form, Shape(4, 8, 30), torch.bfloat16)
        assert cases.batch_of(case, "cpu")[0].dtype == torch.bfloat16
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
    for form in ("logits", "linear"):
        case = cases.Case(form, Shape(8192, 4096, 128256), torch.bfloat16)
        assert {t.device.type for t in cases.batch_of(case, "meta")} == {"meta"}
    assert set(places) == {"meta"}


def test_cached_memory_is_free(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (1000, 9000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 600)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 250)
    assert linear_providers._bytes_available("cuda") == 1350


def test_cut_cross_entropy_with_its_filter_and_without(monkeypatch):
    calls = []
    module = SimpleNamespace(linear_cross_entropy=lambda *a, **options: calls.append(options))
    monkeypatch.setattr(providers, "_module", lambda name: module)
    providers.loss_of.cache_clear()
    for provider in (providers.CUT, providers.CUT_FILTER):
        providers.loss_of("linear", provider, "cuda")(1, 2, 3)
    providers.loss_of.cache_clear()
    assert calls == [dict(impl="cce", filter_eps=None), dict(impl="cce")]
    assert providers.why_not("linear", providers.CUT_FILTER, "cpu") == "its filter needs a GPU"


def test_results_are_written_after_each_case(tmp_path, monkeypatch):
    """An end in the middle, even a kill, loses no more than a case."""
    seen = []
    time_of = run.Run._time

    def watch(self, case):
        file = tmp_path / "results.csv"
        seen.append(len(file.read_text().splitlines()) if file.exists() else 0)
        if len(seen) == 3:
            raise KeyboardInterrupt
        time_of(self, case)

    monkeypatch.setattr(run.Run, "_time", watch)
    command = ["run", "--suite", "quick", *TINY, "--provider", "eager", "--out", str(tmp_path)]
    with pytest.raises(KeyboardInterrupt):
        bench.main(command)
    assert seen[0] == 0 < seen[1] <= seen[2]
