"""python -m bench quick and full, and the runner under them: what is measured, and what is not."""

import csv
import re
import time
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch

from bench import __main__ as bench
from bench import measure, providers, records, runner, suites
from bench.cases import LINEAR, LOGITS, Case, dtype_name

RESULTS = Path(bench.__file__).parent / "results/cpu"  # of the figure in docs/benchmarks.md
TINY = "--tokens 16 --hidden 8 --vocab 70 300 --repeats 2".split()
QUICK = ["quick", *TINY, "--dtype", "float32"]
OURS = ("eager", "chunked_ce", "chunked_ce inplace_backward")
GPU_ONLY = ("liger", "quack", "flash-attn")
BOTH = "forward+backward"


@pytest.fixture(autouse=True)
def small_full_size(monkeypatch):
    monkeypatch.setattr(suites, "FULL_SIZE", (Case(LINEAR, 512, 32, 1000, torch.bfloat16),))


def rows_of(folder):
    return records.read_table(folder / "results.csv")


def times_of(folder):
    """(provider, mode, D) of all that was timed."""
    rows = rows_of(folder)
    return {(r["provider"], r["mode"], r["D"]) for r in rows if r["metric"] == "seconds"}


def replace(monkeypatch, form, name, change):
    """Put `change(loss)` in the table for a provider's loss."""

    def changed(p):
        if (p.form, p.name) != (form, name):
            return p
        return p._replace(load=lambda device: change(p.load(device)))

    monkeypatch.setattr(providers, "TABLE", tuple(map(changed, providers.TABLE)))


@pytest.mark.long
def test_a_suite_writes_one_folder(tmp_path, capsys):
    command = ["quick", *TINY, "--provider", *OURS, *GPU_ONLY]
    assert bench.main([*command, "--out", str(tmp_path)]) == 0
    rows, printed = rows_of(tmp_path), capsys.readouterr().out
    assert tuple(rows[0]) == records.COLUMNS
    assert {r["dtype"] for r in rows} == {"float32", "bfloat16"}
    of_run = [r for r in rows if not r["device"].startswith("predicted")]
    assert {r["V"] for r in of_run} == {"70", "300"} and {r["N"] for r in of_run} == {"16"}
    times = [r for r in rows if r["metric"] == "seconds"]
    assert all(0 < float(r["q20"]) <= float(r["value"]) <= float(r["q80"]) for r in times)
    logits_times = {(p, mode, "") for p in ("eager", "chunked_ce") for mode in ("forward", BOTH)}
    head_times = {(p, mode, "8") for p, mode, _ in logits_times}
    headed = {(f"head + {p}", BOTH, "8") for p in OURS[1:]}
    assert times_of(tmp_path) == logits_times | head_times | headed
    predicted = {
        (r["mode"], r["dtype"]): float(r["value"]) / (16 * 300)
        for r in rows
        if (r["provider"], r["metric"]) == ("eager", "predicted_peak_extra_bytes")
        and (r["V"], r["D"]) == ("300", "")
    }
    # log-softmax, the gradient of that, the gradient of the logits
    assert predicted[BOTH, "float32"] == pytest.approx(12, rel=0.02)
    assert predicted[BOTH, "bfloat16"] == pytest.approx(6, rel=0.02)
    assert predicted["forward", "float32"] == pytest.approx(4, rel=0.02)
    reasons = {(r["provider"], r["D"]): r["note"] for r in rows if r["metric"] == "not run"}
    assert all(reasons[p, ""] == "its kernels need a GPU" for p in GPU_ONLY)
    assert "liger, linear: not run: its kernels need a GPU" in printed


@pytest.mark.long
@pytest.mark.skipif(not measure.memory_is_measurable(), reason="needs /proc")
def test_memory_is_measured_beside_the_prediction(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(measure, "in_fresh_process", lambda function, *args: function(*args))
    command = ["full", *TINY, "--provider", *OURS, "--dtype", "float32"]
    assert bench.main([*command, "--out", str(tmp_path)]) == 0
    rows = rows_of(tmp_path)
    measured = {(r["provider"], r["mode"]) for r in rows if r["metric"] == "peak_extra_bytes"}
    names = ("eager", "chunked_ce", "head + chunked_ce", "head + chunked_ce inplace_backward")
    assert measured == {(name, BOTH) for name in names}
    header, *_ = capsys.readouterr().out.split("beyond its batch, MiB\n\n")[1].splitlines()
    assert header.split()[-3:] == ["predicted", "measured", "ratio"]


@pytest.mark.long
def test_nothing_is_begun_after_the_deadline(tmp_path, monkeypatch, capsys):
    late = suites.SUITES["full"]._replace(budget=0.0)
    monkeypatch.setitem(suites.SUITES, "full", late)
    command = ["full", *TINY, "--provider", *OURS, "--dtype", "float32", "--out", str(tmp_path)]
    assert bench.main(command) == 0
    assert {r["metric"] for r in rows_of(tmp_path)} == {"predicted_peak_extra_bytes", "not run"}
    assert "chunked_ce, linear: not run: out of time" in capsys.readouterr().out


class FakeEvent:
    """A GPU's clock that says 7 ms."""

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        pass

    def elapsed_time(self, end):
        return 7.0


def test_cuda_is_timed_by_events_and_weighed_by_its_allocator(monkeypatch):
    waited, calls = [], []
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: waited.append(1))
    times = measure.interleaved({"a": lambda: calls.append(1)}, 3, clock=measure.clock_of("cuda"))
    assert times["a"].median == pytest.approx(0.007) and len(calls) == 4 == len(waited)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 100)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 350)
    assert measure.extra_peak_cuda_memory(lambda: "result") == (250, "result")


@pytest.mark.parametrize(("form", "name"), [
    (LOGITS, "chunked_ce"), (LINEAR, "chunked_ce"), (LINEAR, "head + chunked_ce"),
    (LINEAR, "F.linear_cross_entropy"),
])  # fmt: skip
def test_what_is_wrong_is_not_timed(form, name, tmp_path, monkeypatch, capsys):
    """The rest goes on, also where it is ours; then the exit code is 1."""
    replace(monkeypatch, form, name, lambda loss: lambda *batch: loss(*batch) * 1.1)
    command = [*QUICK, "--out", str(tmp_path)]
    command += ["--provider", "eager", "chunked_ce", "F.linear_cross_entropy"]
    ours = "chunked_ce" in name
    reason = f"ValueError: {name}: its loss is not eager's, so it is not timed: off by 0.1"
    if not ours and not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        pytest.skip("this torch has none")
    assert bench.main(command) == (1 if ours else 0)
    printed = capsys.readouterr().out
    assert f"{name}, {form}: not run: {reason}" in printed
    assert (f"WRONG  {reason}" in printed) is ours
    hidden = "8" if form == LINEAR else ""
    times = times_of(tmp_path)
    assert (name, BOTH, hidden) not in times and ("eager", BOTH, hidden) in times
    others = {("chunked_ce", BOTH, ""), ("chunked_ce", BOTH, "8")}
    assert others - {(name, BOTH, hidden)} <= times


def test_a_wrong_gradient_is_found(tmp_path, monkeypatch, capsys):
    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            grad = grad.clone()
            grad[3] *= 1.01  # of one row alone
            return grad

    replace(monkeypatch, LOGITS, "chunked_ce", lambda loss: lambda x, t: loss(Wrong.apply(x), t))
    command = [*QUICK, "--provider", "eager", "chunked_ce", "--out", str(tmp_path)]
    assert bench.main(command) == 1
    said = "chunked_ce: its gradient is not eager's, so it is not timed: off by 0.0099"
    assert said in capsys.readouterr().out.replace("off by 0.01 ", "off by 0.0099 ")


def out_of_memory(*arguments):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 97.66 GiB.")


@pytest.mark.parametrize("victim", ["eager", "chunked_ce"])
@pytest.mark.parametrize("calls", [0, 7], ids=["at once", "in the timed loop"])
def test_out_of_memory_ends_a_provider_and_not_the_suite(
    victim, calls, tmp_path, monkeypatch, capsys
):
    called = []

    def hungry(loss):
        def of_batch(logits, target):
            if logits.shape[-1] == 70 and logits.device.type == "cpu":
                called.append(1)
                if len(called) > calls:
                    out_of_memory()
            return loss(logits, target)

        return of_batch

    replace(monkeypatch, LOGITS, victim, hungry)
    monkeypatch.setattr(suites, "predict", lambda *arguments: None)
    command = [*QUICK, "--out", str(tmp_path), "--provider", "eager", "chunked_ce"]
    assert bench.main(command) == 0
    said = f"{victim}, logits: not run: out of memory (loss alone, N = 16, V = 70"
    assert said in capsys.readouterr().out
    rows = [r for r in rows_of(tmp_path) if r["metric"] == "seconds"]
    times = {(r["provider"], r["mode"], r["D"], r["V"]) for r in rows}
    other = "eager" if victim == "chunked_ce" else "chunked_ce"
    assert (victim, BOTH, "", "70") not in times
    assert (other, BOTH, "", "70") in times
    assert (victim, BOTH, "", "300") in times
    assert (victim, BOTH, "8", "70") in times


@pytest.mark.parametrize("what", ["batch_of", "reference"])
def test_a_batch_or_a_reference_that_does_not_fit(what, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(runner, what, out_of_memory)
    command = [*QUICK, "--out", str(tmp_path), "--provider", "eager", "chunked_ce"]
    assert bench.main(command) == 0
    assert "eager, linear: not run: out of memory" in capsys.readouterr().out
    assert not times_of(tmp_path)


def test_memory_that_cannot_be_measured_is_said(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(measure, "memory_is_measurable", lambda: True)
    command = ["full", *TINY, "--dtype", "float32", "--out", str(tmp_path), "--provider", "eager"]
    for error, said in (
        (BrokenProcessPool("terminated abruptly"), "its process was killed"),
        (RuntimeError("can't allocate memory: 9 bytes"), "out of memory"),
    ):
        monkeypatch.setattr(measure, "in_fresh_process", Mock(side_effect=error))
        assert bench.main(command) == 0
        assert f"eager, logits: not run: {said}" in capsys.readouterr().out
    monkeypatch.setattr(measure, "in_fresh_process", Mock(side_effect=RuntimeError("another")))
    assert bench.main(command) == 1
    assert "WRONG  RuntimeError: another" in capsys.readouterr().out


def test_the_full_suite_has_the_figures_rows_and_says_how_long(tmp_path, monkeypatch, capsys):
    suite = suites.SUITES["full"]
    assert suite.budget + 2 * 60 <= 12 * 60
    cases = list(suites.cases_of(suite, extra=True))
    figure = {
        (r["N"], r["V"], r["dtype"])
        for r in rows_of(RESULTS)
        if not r["device"].startswith("predicted")
    }
    assert figure <= {(str(c.N), str(c.V), dtype_name(c.dtype)) for c in cases}
    float32 = {c.V for c in cases if c.dtype == torch.float32}
    assert float32 == {50257} and cases[-1].dtype == torch.float32  # last, where time runs out
    monkeypatch.setattr(suites, "run", lambda *arguments: None)
    assert bench.main(["full", "--out", str(tmp_path)]) == 0
    assert "nothing is begun after 10 min" in capsys.readouterr().out.splitlines()


@pytest.mark.parametrize(("seconds", "measured"), [(0.9, False), (0.0, True)])
def test_what_takes_many_times_eagers_time_is_left_out(
    seconds, measured, tmp_path, monkeypatch, capsys
):
    slow = providers.TORCH
    eager = providers.find(LINEAR, ["eager"])[0].load("cpu")

    def sleeping(*batch):
        time.sleep(seconds)
        return eager(*batch)

    table = [p._replace(load=lambda device: sleeping) if p.name == slow else p
             for p in providers.TABLE]  # fmt: skip
    monkeypatch.setattr(providers, "TABLE", tuple(table))
    command = [*QUICK, "--vocab", "70", "--out", str(tmp_path), "--provider", "eager", slow]
    assert bench.main(command) == 0
    assert ((slow, "forward", "8") in times_of(tmp_path)) is measured
    reason = rf"{slow}, linear: not run: some (9|1\d) times eager's time"
    assert bool(re.search(reason, capsys.readouterr().out)) is not measured


def test_rows_are_in_the_file_as_they_come(tmp_path):
    table = records.Table(tmp_path / "t.csv", ("a", "b"))
    table.add(a=1, b=1 / 3)
    assert records.read_table(tmp_path / "t.csv") == [dict(a="1", b="0.333333")]
    table.add(a="x")
    with (tmp_path / "t.csv").open(newline="") as file:
        assert list(csv.DictReader(file))[1] == dict(a="x", b="")
    table.close()


def test_every_provider_says_what_it_computes_and_why_it_cannot_run():
    for provider in providers.TABLE:
        assert provider.computes
        why = providers.why_not(provider, "cpu")
        assert why or callable(provider.load("cpu"))
    assert len({(p.form, p.name) for p in providers.TABLE}) == len(providers.TABLE)
