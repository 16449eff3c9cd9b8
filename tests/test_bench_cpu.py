"""bench.cpu on tiny sizes: it runs, writes what it says, and measures memory right."""

import csv
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[1]))  # bench is not installed
from bench import cpu, cpu_sections, floors, measure, records

TINY = "--tokens 16 --vocab 300 --repeats 2 --threads 1 --no-compile".split()
PROVIDERS = {"eager", "chunked_ce"}

needs_proc = pytest.mark.skipif(not measure.memory_is_measurable(), reason="needs /proc")


@pytest.fixture(autouse=True)
def same_threads_afterwards() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def run(tmp_path: Path, *arguments: str) -> tuple[list[dict[str, str]], dict]:
    table, tree = tmp_path / "cpu.csv", tmp_path / "cpu.json"
    assert cpu.main([*TINY, *arguments, "--csv", str(table), "--json", str(tree)]) == 0
    with table.open(newline="") as file:
        return list(csv.DictReader(file)), json.loads(tree.read_text())


def test_csv_and_json_hold_the_figures_and_the_bounds(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cpu_sections, "VOCABULARIES", (64, 300))
    rows, tree = run(tmp_path, "--only", "time", "small", "vocabulary", "masked")

    assert list(rows[0]) == list(records.COLUMNS)
    assert ",".join(records.COLUMNS).startswith("provider,mode,metric,N,D,V,dtype,value,q20,q80")
    assert {r["provider"] for r in rows} == PROVIDERS | {floors.CALLS}
    assert {r["dtype"] for r in rows} == {"float32", "bfloat16"}
    assert {int(r["N"]) for r in rows} >= {16, 64, 8, 1}  # time, small, small, the fixed cost
    assert all(0 < float(r["q20"]) <= float(r["value"]) <= float(r["q80"]) for r in rows)
    assert len({r["mode"] for r in rows}) == 2 + 2 * 7  # forward and both; masks: six and none

    assert len(tree["measurements"]) == len(rows)
    assert tree["environment"]["torch"] == torch.__version__
    bounded = [c for c in tree["comparisons"] if c["bound"] is not None]
    assert bounded and {c["verdict"] for c in bounded} <= {"ok", "MISSED"}
    printed = capsys.readouterr().out
    assert all(c["what"] in printed for c in tree["comparisons"])


@needs_proc
def test_memory_section(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(measure, "in_fresh_process", lambda function, *args: function(*args))
    rows, _ = run(tmp_path, "--only", "memory")
    assert {r["provider"] for r in rows} == PROVIDERS | {"chunked_ce inplace_backward"}
    assert len(rows) == 2 * 5
    assert rows[0]["q20"] == rows[0]["D"] == ""


def test_without_proc_memory_is_not_measured(monkeypatch, capsys):
    monkeypatch.setattr(measure, "memory_is_measurable", lambda: False)
    assert cpu.main([*TINY, "--only", "memory"]) == 0
    assert "not measured: needs /proc" in capsys.readouterr().out


def peak_of_two_tensors() -> int:
    def run() -> torch.Tensor:
        freed = torch.ones(1 << 24, dtype=torch.uint8)
        return torch.ones(1 << 25, dtype=torch.uint8) + freed[0]

    run()  # the first call also starts torch's threads
    extra, result = measure.extra_peak_memory(run)
    assert result.numel() == 1 << 25
    return extra


@needs_proc
def test_peak_memory_is_that_of_the_step():
    """16 + 32 + 32 MiB are alive at once. As much was alive before, which does not count."""
    assert measure.in_fresh_process(peak_of_two_tensors) == pytest.approx(80 << 20, rel=0.1)


def test_a_wrong_result_is_not_reported(monkeypatch):
    loss_of = cpu_sections.loss_of

    def wrong(provider):
        return (
            (lambda x, t: loss_of("eager")(x, t) * 1.001)
            if provider == "chunked_ce"
            else loss_of(provider)
        )

    monkeypatch.setattr(cpu_sections, "loss_of", wrong)
    with pytest.raises(AssertionError, match="chunked_ce: its loss is not eager's"):
        cpu.main([*TINY, "--only", "time"])


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
    assert error.startswith("python -m bench.cpu: error: ") and option in error


def test_spinning_processes_end_with_the_measurement():
    import subprocess
    from unittest import mock

    started = []
    popen = subprocess.Popen
    with mock.patch.object(
        subprocess, "Popen", lambda *a: started.append(popen(*a)) or started[-1]
    ):
        with cpu.spinning(2):
            assert [p.poll() for p in started] == [None, None]
    assert len(started) == 2 and all(p.returncode is not None for p in started)
