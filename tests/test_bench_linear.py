"""bench.linear on tiny sizes: it runs, writes what it says, and refuses wrong results."""

import csv
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[1]))  # bench is not installed
from bench import linear, linear_providers, linear_sections, measure, records
from bench.providers import CUT, LIGER, TORCH

COMPILED = "torch.compile"
TINY = "--tokens 16 --hidden 16 --vocab 320 --repeats 2 --threads 1".split()
WITHOUT = ["--without", COMPILED, CUT]  # compiling takes longer than all the rest

needs_proc = pytest.mark.skipif(not measure.memory_is_measurable(), reason="needs /proc")


@pytest.fixture(autouse=True)
def same_threads_afterwards() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def run(tmp_path: Path, *arguments: str) -> tuple[list[dict[str, str]], dict]:
    table, tree = tmp_path / "linear.csv", tmp_path / "linear.json"
    files = ["--csv", str(table), "--json", str(tree)]
    assert linear.main([*TINY, *WITHOUT, *arguments, *files]) == 0
    with table.open(newline="") as file:
        return list(csv.DictReader(file)), json.loads(tree.read_text())


def measured_here() -> set[str]:
    """torch has its own only from some version on."""
    shape = linear_providers.Shape(1, 1, 1)
    has_torchs = not linear_providers.why_not(TORCH, shape, torch.float32)
    return {"eager", "chunked_ce"} | ({TORCH} if has_torchs else set())


def test_csv_and_json_hold_the_times_and_the_ratios(tmp_path, capsys):
    rows, tree = run(tmp_path, "--only", "time", "masked")
    printed = capsys.readouterr().out

    assert list(rows[0]) == list(records.COLUMNS)
    assert {r["provider"] for r in rows} == measured_here()
    assert {(r["N"], r["D"], r["V"]) for r in rows} == {("16", "16", "320")}
    assert {r["dtype"] for r in rows} == {"float32", "bfloat16"}
    assert len({r["mode"] for r in rows}) == 2 + 2  # half of the targets ignored
    assert all(0 < float(r["q20"]) <= float(r["value"]) <= float(r["q80"]) for r in rows)

    bounds = {c["what"]: c["bound"] for c in tree["comparisons"]}
    assert [b for what, b in bounds.items() if "forward+backward: chunked_ce / eager" in what] == [
        1.0,
        0.9,
    ]
    assert all(b == 0.6 for what, b in bounds.items() if "ignored" in what)
    assert all(what in printed for what in bounds)
    assert "ok" in printed or "MISSED" in printed
    assert f"{LIGER}: not run: its kernels need a GPU" in printed


@needs_proc
def test_memory_section_and_figure(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(measure, "in_fresh_process", lambda function, *args: function(*args))
    picture = tmp_path / "linear.png"
    rows, tree = run(tmp_path, "--only", "memory", "--figure", str(picture))
    assert {r["provider"] for r in rows} == measured_here()
    assert len(rows) == 2 * 2 * len(measured_here()) + 2  # and eager and ours at 8 N
    assert {r["N"] for r in rows} == {"16", "128"}
    assert rows[0]["metric"] == "peak_extra_bytes" and rows[0]["q20"] == ""
    assert {0.5, 0.1, None} == {c["bound"] for c in tree["comparisons"]}
    assert picture.read_bytes().startswith(b"\x89PNG")


@needs_proc
def test_what_does_not_fit_is_not_run_and_eagers_memory_is_computed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(measure, "in_fresh_process", lambda function, *args: function(*args))
    monkeypatch.setattr(linear_providers, "_bytes_available", lambda device: 1.1 * 2**30)
    needed = linear_providers._bytes_needed

    def more_for_eager(provider, *args):
        return needed(provider, *args) * (1 if provider != "eager" else 2**20)

    monkeypatch.setattr(linear_providers, "_bytes_needed", more_for_eager)
    rows, tree = run(tmp_path, "--only", "memory")
    assert "eager" not in {r["provider"] for r in rows}
    assert "eager: not run: needs" in capsys.readouterr().out
    assert tree["comparisons"][-1]["what"].endswith("/ eager, computed")


def test_grid_is_along_each_axis():
    config = linear_sections.Config(2048, 768, 50257, 2, 5, 2, True, ())
    assert {s.N for s in config.shapes} == {1024, 2048, 4096, 8192, 16384}
    assert {s.V for s in config.shapes} == {32000, 50257, 128256, 256000}
    assert len(config.shapes) == 5 + 3
    assert len(config._replace(grid=False).shapes) == 1


@pytest.mark.parametrize("wrong", ["loss", "input_grad", "weight_grad"])
def test_a_wrong_result_is_not_measured(wrong, monkeypatch):
    answer = linear_sections.answer

    def spoiled(loss, batch):
        right = answer(loss, batch)
        return right._replace(**{wrong: getattr(right, wrong) * 1.01})

    monkeypatch.setattr(linear_sections, "answer", spoiled)
    with pytest.raises(AssertionError, match="chunked_ce: its .* is not eager's"):
        linear.main([*TINY, "--only", "time"])


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--only", "speed"),
        ("--hidden", "0"),
        ("--slow-repeats", "-1"),
        ("--without", "eager"),  # the ratios need it
        ("--csv", "no/such/folder/file.csv"),
        ("--figure", "linear.pdf"),
        ("--nonsense", "1"),
    ],
)
def test_a_bad_option_is_refused_in_one_line(option, value, capsys):
    with pytest.raises(SystemExit) as exit:
        linear.main([option, value])
    assert exit.value.code == 2
    *usage, error = capsys.readouterr().err.strip().splitlines()
    assert error.startswith("python -m bench.linear: error: ") and option in error
