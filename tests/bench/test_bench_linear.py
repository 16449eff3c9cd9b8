"""python -m bench linear on tiny sizes: it runs, writes what it says, and refuses wrong results."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from bench import linear, measure, providers, records, runner
from bench.cases import LINEAR
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


def run(tmp_path: Path, *arguments: str) -> list[dict[str, str]]:
    table = tmp_path / "linear.csv"
    assert linear.main([*TINY, *WITHOUT, *arguments, "--csv", str(table)]) == 0
    return records.read_measurements(table)


def measured_here() -> set[str]:
    """torch has its own only from some version on."""
    (torchs,) = providers.find(LINEAR, [TORCH])
    return {"eager", "chunked_ce"} | (set() if providers.why_not(torchs, "cpu") else {TORCH})


def test_csv_holds_the_times_and_the_screen_the_ratios(tmp_path, capsys):
    rows = run(tmp_path, "--only", "time", "masked")
    printed = capsys.readouterr().out
    assert {r["provider"] for r in rows} == measured_here()
    assert {(r["N"], r["D"], r["V"]) for r in rows} == {("16", "16", "320")}
    assert {r["dtype"] for r in rows} == {"float32", "bfloat16"}
    assert len({r["mode"] for r in rows}) == 2 + 2  # half of the targets ignored
    assert all(0 < float(r["q20"]) <= float(r["value"]) <= float(r["q80"]) for r in rows)
    for what, bound in (
        ("float32 forward+backward: chunked_ce / eager", "0.85"),
        ("bfloat16 forward+backward: chunked_ce / eager", "0.65"),
        ("float32 forward: chunked_ce, half ignored / none", "0.6"),
    ):
        (line,) = (s for s in printed.splitlines() if s.startswith(what))
        assert f"<= {bound} " in line and line.split()[-1] in ("ok", "MISSED")
    assert f"{LIGER}, linear: not run: its kernels need a GPU" in printed


@pytest.mark.long
@needs_proc
def test_memory_section(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(measure, "in_fresh_process", lambda function, *args: function(*args))
    rows = run(tmp_path, "--only", "memory")
    assert {r["provider"] for r in rows} == measured_here()
    assert len(rows) == 2 * 2 * len(measured_here()) + 2  # and eager and ours at 8 N
    assert {r["N"] for r in rows} == {"16", "128"}
    assert rows[0]["metric"] == "peak_extra_bytes" and rows[0]["q20"] == ""
    printed = capsys.readouterr().out
    assert "chunked_ce / eager" in printed and "/ eager, measured" in printed


@pytest.mark.long
@needs_proc
def test_what_does_not_fit_is_not_run_and_eagers_memory_is_computed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(measure, "in_fresh_process", lambda function, *args: function(*args))
    monkeypatch.setattr(measure, "free_bytes", lambda device: 1.1 * 2**30)
    needed = runner.bytes_needed

    def more_for_eager(case, provider):
        return needed(case, provider) * (1 if provider.name != "eager" else 2**20)

    monkeypatch.setattr(runner, "bytes_needed", more_for_eager)
    rows = run(tmp_path, "--only", "memory")
    assert "eager" not in {r["provider"] for r in rows}
    printed = capsys.readouterr().out
    assert "eager, linear: not run: needs" in printed and "/ eager, computed" in printed


def test_grid_is_along_each_axis():
    config = linear.Config(2048, 768, 50257, True)
    assert {n for n, _ in config.sizes} == {1024, 2048, 4096, 8192, 16384}
    assert {v for _, v in config.sizes} == {32000, 50257, 128256, 256000}
    assert len(config.sizes) == 5 + 3
    assert len(config._replace(grid=False).sizes) == 1


@pytest.mark.parametrize("wrong", [0, 1, 2], ids=["loss", "input's grad", "weight's grad"])
def test_a_wrong_result_is_not_timed(wrong, tmp_path, monkeypatch, capsys):
    run_loss = runner.run_loss

    def spoiled(loss, batch, *arguments):
        right = list(run_loss(loss, batch, *arguments))
        right[wrong] = right[wrong] * 1.1
        return tuple(right)

    monkeypatch.setattr(runner, "run_loss", spoiled)
    names = ["loss", "input's grad", "weight's grad"]
    assert linear.main([*TINY, *WITHOUT, "--only", "masked"]) == 1
    said = f"WRONG  ValueError: chunked_ce: its {names[wrong]} is not eager's"
    assert said in capsys.readouterr().out


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--only", "speed"),
        ("--hidden", "0"),
        ("--without", "eager"),  # the ratios need it
        ("--csv", "no/such/folder/file.csv"),
        ("--nonsense", "1"),
    ],
)
def test_a_bad_option_is_refused_in_one_line(option, value, capsys):
    with pytest.raises(SystemExit) as exit:
        linear.main([option, value])
    assert exit.value.code == 2
    *usage, error = capsys.readouterr().err.strip().splitlines()
    assert error.startswith("python -m bench linear: error: ") and option in error
