"""python -m bench cpu on tiny sizes: it runs, writes what it says, and measures memory right."""

import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
import torch

from bench import cpu, measure, providers, records

TINY = "--tokens 16 --vocab 300 --repeats 2 --threads 1 --no-compile".split()
PROVIDERS = {"eager", "chunked_ce", "chunked_ce inplace_backward"}

needs_proc = pytest.mark.skipif(not measure.memory_is_measurable(), reason="needs /proc")


@pytest.fixture(autouse=True)
def same_threads_afterwards() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def run(tmp_path: Path, *arguments: str) -> list[dict[str, str]]:
    assert cpu.main([*TINY, *arguments, "--csv", str(tmp_path / "cpu.csv")]) == 0
    return records.read_measurements(tmp_path / "cpu.csv")


def test_csv_holds_the_figures_and_the_screen_the_bounds(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cpu, "VOCABULARIES", (64, 300))
    rows = run(tmp_path, "--only", "time", "small", "vocabulary", "masked", "stats")
    assert {r["provider"] for r in rows} == PROVIDERS | {providers.STATS, providers.ALL_STATS}
    assert {r["dtype"] for r in rows} == {"float32", "bfloat16"}
    assert {int(r["N"]) for r in rows} >= {16, 64, 8, 128, 1}  # time, small, a call's cost
    assert all(0 < float(r["q20"]) <= float(r["value"]) <= float(r["q80"]) for r in rows)
    assert len({r["mode"] for r in rows}) == 2 + 2 * 7  # forward and both; masks: six and none
    printed = capsys.readouterr().out
    for what, bound in (
        ("float32 forward: chunked_ce / eager", "0.2"),
        ("bfloat16 forward+backward: chunked_ce / eager", "0.45"),
        ("float32 forward+backward: chunked_ce inplace_backward / eager", "0.15"),
        ("loss alone, N = 8, V = 300, bfloat16 forward: chunked_ce / eager", "1.3"),
        ("loss alone, N = 128, V = 10, float32 forward+backward: chunked_ce / eager", "2.5"),
        ("forward: most / least time per logit", "1.5"),
        ("forward, upper half at -inf: chunked_ce / unmasked", "1.3"),
        ("float32 forward+backward: chunked_ce return_stats / chunked_ce", "1.03"),
    ):
        (line,) = (s for s in printed.splitlines() if s.startswith(what))
        assert f"<= {bound} " in line and line.split()[-1] in ("ok", "MISSED")
    assert "bounds held" in printed


def test_busy_measures_again_with_its_own_bounds(tmp_path, capsys):
    rows = run(tmp_path, "--only", "time", "--busy", "1")
    devices = {r["device"].rsplit(", ", 1)[1] for r in rows}
    assert devices == {"beside 0 spinning processes", "beside 1 spinning processes"}
    printed = capsys.readouterr().out
    idle, busy = printed.split("# time, beside 1 spinning processes")
    what = "float32 forward: chunked_ce / eager"
    for part, bound in ((idle, "<= 0.2 "), (busy.split("bounds held")[0], "<= 0.35 ")):
        (line,) = (s for s in part.splitlines() if s.startswith(what))
        assert bound in line
        assert "other processes, compilers included, took" in part or "needs /proc" in part


@pytest.mark.long
@needs_proc
def test_memory_section(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(measure, "in_fresh_process", lambda function, *args: function(*args))
    rows = run(tmp_path, "--only", "memory")
    assert {r["provider"] for r in rows} == PROVIDERS
    assert len(rows) == 2 * 5 and {r["metric"] for r in rows} == {"peak_extra_bytes"}
    assert rows[0]["q20"] == rows[0]["D"] == ""
    assert "float32 forward+backward: chunked_ce / logits" in capsys.readouterr().out


def test_without_proc_memory_is_not_measured(monkeypatch, capsys):
    monkeypatch.setattr(measure, "memory_is_measurable", lambda: False)
    assert cpu.main([*TINY, "--only", "memory"]) == 0
    assert "not measured: it needs /proc" in capsys.readouterr().out


def peak_of_two_tensors() -> int:
    def run() -> torch.Tensor:
        freed = torch.ones(1 << 24, dtype=torch.uint8)
        return torch.ones(1 << 25, dtype=torch.uint8) + freed[0]

    run()  # the first call also starts torch's threads
    extra, result = measure.extra_peak_memory(run)
    assert result.numel() == 1 << 25
    return extra


@pytest.mark.long
@needs_proc
def test_peak_memory_is_that_of_the_step():
    """16 + 32 + 32 MiB are alive at once. As much was alive before, which does not count."""
    assert measure.in_fresh_process(peak_of_two_tensors) == pytest.approx(80 << 20, rel=0.1)


def test_a_wrong_result_is_not_timed(tmp_path, monkeypatch, capsys):
    def spoiled(provider):
        if provider.name != "chunked_ce":
            return provider
        loss = provider.load("cpu")
        return provider._replace(load=lambda device: lambda *batch: loss(*batch) * 1.001)

    monkeypatch.setattr(providers, "TABLE", tuple(map(spoiled, providers.TABLE)))
    assert cpu.main([*TINY, "--only", "time", "--csv", str(tmp_path / "cpu.csv")]) == 1
    assert "WRONG  ValueError: chunked_ce: its loss is not eager's" in capsys.readouterr().out
    rows = records.read_measurements(tmp_path / "cpu.csv")
    assert "chunked_ce" not in {r["provider"] for r in rows}


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--only", "speed"),
        ("--tokens", "0"),
        ("--vocab", "many"),
        ("--threads", "-1"),
        ("--csv", "no/such/folder/file.csv"),
        ("--nonsense", "1"),
    ],
)
def test_a_bad_option_is_refused_in_one_line(option, value, capsys):
    with pytest.raises(SystemExit) as exit:
        cpu.main([option, value])
    assert exit.value.code == 2
    *usage, error = capsys.readouterr().err.strip().splitlines()
    assert error.startswith("python -m bench cpu: error: ") and option in error


def test_spinning_processes_end_with_the_measurement():
    started = []
    popen = subprocess.Popen
    with mock.patch.object(
        subprocess, "Popen", lambda *a: started.append(popen(*a)) or started[-1]
    ):
        with measure.spinning(2):
            assert [p.poll() for p in started] == [None, None]
    assert len(started) == 2 and all(p.returncode is not None for p in started)


@pytest.mark.parametrize("module", ["bench.cpu", "bench.linear", "bench.perplexity"])
def test_a_program_runs_by_its_own_name(module, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [module, "--help"])
    monkeypatch.delitem(sys.modules, module, raising=False)
    with pytest.raises(SystemExit) as end:
        runpy.run_module(module, run_name="__main__")
    assert end.value.code == 0
    assert f"usage: python -m {module.replace('.', ' ')}" in capsys.readouterr().out
