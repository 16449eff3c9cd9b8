"""python -m bench run and plot: what they measure, write, draw and refuse."""

import csv
import itertools
import re
import sys
import time
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch

sys.path.append(str(Path(__file__).parents[1]))  # bench is not installed
from bench import __main__ as bench
from bench import figures, measure, providers, records, run, suites
from bench.linear_providers import Shape

RESULTS = Path(bench.__file__).parent / "results/cpu"  # of the README's figure
TINY = "--tokens 16 --hidden 8 --vocab 70 300 --repeats 2".split()
OURS = ("eager", "chunked_ce", "chunked_ce inplace_backward")


@pytest.fixture(autouse=True)
def small_full_size(monkeypatch):
    monkeypatch.setattr(run, "FULL_SIZE", (Shape(512, 32, 1000),))


def rows_of(folder):
    with (folder / "results.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_suite_writes_one_folder(tmp_path, capsys):
    command = ["run", "--suite", "quick", *TINY, "--provider", *OURS, *providers.GPU_ONLY]
    assert bench.main([*command, "--out", str(tmp_path)]) == 0
    rows, printed = rows_of(tmp_path), capsys.readouterr().out
    assert tuple(rows[0]) == records.COLUMNS
    assert {r["dtype"] for r in rows} == {"float32", "bfloat16"}
    of_run = [r for r in rows if not r["device"].startswith("predicted")]
    assert {r["V"] for r in of_run} == {"70", "300"} and {r["N"] for r in of_run} == {"16"}
    times = [r for r in rows if r["metric"] == "seconds"]
    assert all(0 < float(r["q20"]) <= float(r["value"]) <= float(r["q80"]) for r in times)
    ours = {(r["mode"], r["D"]) for r in times if r["provider"] == "chunked_ce"}
    both = ("forward", "forward+backward")
    assert ours == {*((mode, d) for mode in both for d in ("", "8")), ("full", "8")}
    assert {*OURS} <= {r["provider"] for r in times}
    eager = [
        r for r in rows if r["provider"] == "eager" and "predicted" in r["metric"] and not r["D"]
    ]
    of_logit = {
        (r["mode"], r["dtype"]): float(r["value"]) / (16 * 300) for r in eager if r["V"] == "300"
    }
    # log-softmax, the gradient of that, the gradient of the logits
    assert of_logit["forward+backward", "float32"] == pytest.approx(12, rel=0.02)
    assert of_logit["forward+backward", "bfloat16"] == pytest.approx(6, rel=0.02)
    assert of_logit["forward", "float32"] == pytest.approx(4, rel=0.02)
    reasons = (tmp_path / "not_run.txt").read_text()
    assert all(f"{p}, logits" in reasons for p in providers.GPU_ONLY)
    assert "liger, linear: not run: its kernels need a GPU" in printed


@pytest.mark.skipif(not measure.memory_is_measurable(), reason="needs /proc")
def test_memory_is_measured_beside_the_prediction(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(measure, "in_fresh_process", lambda function, *args: function(*args))
    command = ["run", "--suite", "cpu", *TINY, "--provider", *OURS, "--dtype", "float32"]
    assert bench.main([*command, "--out", str(tmp_path)]) == 0
    rows = rows_of(tmp_path)
    measured = {(r["provider"], r["mode"]) for r in rows if r["metric"] == "peak_extra_bytes"}
    assert measured == {
        ("eager", "forward+backward"),
        ("chunked_ce", "forward+backward"),
        ("chunked_ce", "full"),
        ("chunked_ce inplace_backward", "full"),
    }
    header, *_ = capsys.readouterr().out.split("beyond its batch, MiB\n\n")[1].splitlines()
    assert header.split()[-3:] == ["predicted", "measured", "ratio"]


def test_the_gpu_suite_runs_the_same_code_and_ends_in_time(tmp_path, monkeypatch, capsys):
    suite = suites.SUITES["gpu"]
    assert suite.budget + 4 * suite.seconds_per_case <= 8 * 60
    command = ["run", "--suite", "gpu", "--device", "cpu", *TINY, "--provider", *OURS]
    assert bench.main([*command, "--out", str(tmp_path / "all")]) == 0
    assert {r["dtype"] for r in rows_of(tmp_path / "all")} == {"bfloat16"}
    monkeypatch.setitem(suites.SUITES, "gpu", suite._replace(budget=0.0))
    assert bench.main([*command, "--out", str(tmp_path / "late")]) == 0
    late = rows_of(tmp_path / "late")
    assert late and all(r["metric"] == "predicted_peak_extra_bytes" for r in late)
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
    step = measure.Step(lambda: calls.append(1))
    times = measure.interleaved({"a": step}, 3, clock=measure.clock_of("cuda"))
    assert times["a"].median == pytest.approx(0.007) and len(calls) == 4 == len(waited)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 100)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 350)
    assert measure.extra_peak_cuda_memory(lambda: "result") == (250, "result")


@pytest.mark.parametrize("form", ["logits", "linear", "full"])
def test_what_is_wrong_is_not_timed(form, tmp_path, monkeypatch, capsys):
    """The rest goes on, also where it is ours; then the exit code is 1."""
    loss_of = run.loss_of

    def wrong(of_form, provider, device):
        loss = loss_of(of_form, provider, device)
        return (lambda *b: loss(*b) * 1.1) if (of_form, provider) == (form, spoiled) else loss

    monkeypatch.setattr(run, "loss_of", wrong)
    monkeypatch.setattr(providers, "why_not", lambda *args: "")
    monkeypatch.setitem(suites.OF_FORM, form, ("eager", "torch.compile", "chunked_ce"))
    monkeypatch.setattr(torch, "compile", lambda f: f)
    providers.loss_of.cache_clear()
    command = ["run", "--suite", "quick", *TINY, "--dtype", "float32", "--out", str(tmp_path)]
    command += ["--provider", "eager", "torch.compile", "chunked_ce"]
    spoiled = "torch.compile"
    assert bench.main(command) == 0
    assert (
        f"torch.compile, {form}: not run: AssertionError: torch.compile: its loss"
        in capsys.readouterr().out
    )
    times = {
        (r["provider"], r["mode"], bool(r["D"]))
        for r in rows_of(tmp_path)
        if r["metric"] == "seconds"
    }
    mode = "full" if form == "full" else "forward"
    assert ("torch.compile", mode, form != "logits") not in times
    assert ("chunked_ce", mode, form != "logits") in times
    spoiled = "chunked_ce"
    assert bench.main(command) == 1
    assert "WRONG  AssertionError: chunked_ce: its loss is not eager's" in capsys.readouterr().out
    times = {
        (r["provider"], r["mode"], bool(r["D"]))
        for r in rows_of(tmp_path)
        if r["metric"] == "seconds"
    }
    assert ("chunked_ce", mode, form != "logits") not in times
    assert ("torch.compile", mode, form != "logits") in times
    providers.loss_of.cache_clear()


def out_of_memory(*arguments):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 97.66 GiB.")


@pytest.mark.parametrize("victim", ["eager", "chunked_ce"])
@pytest.mark.parametrize("calls", [0, 7], ids=["at once", "in the timed loop"])
def test_out_of_memory_ends_a_provider_and_not_the_suite(
    victim, calls, tmp_path, monkeypatch, capsys
):
    loss_of = run.loss_of
    called = []

    def hungry(form, provider, device):
        loss = loss_of(form, provider, device)
        if (form, provider) != ("logits", victim):
            return loss

        def of_batch(logits, target):
            if logits.shape[-1] == 70 and logits.device.type == "cpu":
                called.append(1)
                if len(called) > calls:
                    out_of_memory()
            return loss(logits, target)

        return of_batch

    monkeypatch.setattr(run, "loss_of", hungry)
    monkeypatch.setattr(run.Run, "_predict", lambda *arguments: None)
    command = ["run", "--suite", "quick", *TINY, "--dtype", "float32", "--out", str(tmp_path)]
    assert bench.main([*command, "--provider", "eager", "chunked_ce"]) == 0
    assert (
        f"{victim}, logits: not run: out of memory (loss alone, N = 16, V = 70"
        in capsys.readouterr().out
    )
    assert f"{victim}, logits" in (tmp_path / "not_run.txt").read_text()
    times = {
        (r["provider"], r["mode"], r["D"], r["V"])
        for r in rows_of(tmp_path)
        if r["metric"] == "seconds"
    }
    other = "eager" if victim == "chunked_ce" else "chunked_ce"
    assert (victim, "forward+backward", "", "70") not in times
    assert (other, "forward+backward", "", "70") in times
    assert (victim, "forward+backward", "", "300") in times
    assert (victim, "forward+backward", "8", "70") in times


def test_a_batch_or_a_reference_that_does_not_fit(tmp_path, monkeypatch, capsys):
    command = ["run", "--suite", "quick", *TINY, "--dtype", "float32", "--out", str(tmp_path)]
    command += ["--provider", "eager", "chunked_ce"]
    monkeypatch.setattr(run, "reference", lambda form: out_of_memory)
    assert bench.main(command) == 0
    assert "not compared with eager in float32: out of memory" in capsys.readouterr().out
    assert {"eager", "chunked_ce"} == {
        r["provider"] for r in rows_of(tmp_path) if r["metric"] == "seconds"
    }
    monkeypatch.setattr(run, "batch_of", out_of_memory)
    assert bench.main(command) == 0
    assert "eager, linear: not run: out of memory" in capsys.readouterr().out
    assert not any(r["metric"] == "seconds" for r in rows_of(tmp_path))


def test_memory_that_cannot_be_measured_is_said(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(measure, "memory_is_measurable", lambda: True)
    command = ["run", "--suite", "cpu", *TINY, "--dtype", "float32", "--out", str(tmp_path)]
    command += ["--provider", "eager"]
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


def table(path, *, device="a device", providers=("eager", "chunked_ce"), columns=records.COLUMNS):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        writer.writeheader()
        for provider in providers:
            for v in (1000, 50257):
                for metric in ("seconds", "peak_extra_bytes", "predicted_peak_extra_bytes"):
                    for mode, d in (
                        ("forward+backward", 64),
                        ("forward+backward", ""),
                        ("full", 64),
                    ):
                        values = dict.fromkeys(columns, "") | {
                            "provider": provider, "mode": mode, "metric": metric, "N": 16, "D": d,
                            "V": v, "dtype": "float32", "value": v, "device": device,
                        }  # fmt: skip
                        writer.writerow(values)
    return path


def test_every_figure_is_redrawn_from_the_csv(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "runs/bench/cpu"
    folder.mkdir(parents=True)
    table(folder / "results.csv")
    assert bench.main(["plot"]) == 0
    names = {"vocabulary_float32_N16", "logits_float32_N16", "memory_predicted_and_measured"}
    assert {p.stem for p in folder.glob("*.png")} == names
    assert all(p.read_bytes().startswith(b"\x89PNG") for p in folder.glob("*.png"))
    assert len(capsys.readouterr().out.splitlines()) == len(names)


def test_figures_say_what_their_axes_are(tmp_path, monkeypatch):
    """And no text lies on another, at the figure's size."""
    pytest.importorskip("matplotlib")
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    drawn = []
    save = figures._save

    def keep(figure, axes, path):
        saved = save(figure, axes, path)
        drawn.append((figure, axes))
        return saved

    monkeypatch.setattr(figures, "_save", keep)
    rows = records.read_csv(table(tmp_path / "r.csv", providers=figures.COLORS))
    list(figures.draw_all(rows, tmp_path))
    assert len(drawn) == 3
    for figure, axes in drawn:
        for ax in axes:
            assert "vocabulary V" in ax.get_xlabel() or "GiB" in ax.get_xlabel()
            assert any(unit in ax.get_ylabel() for unit in ("ms", "GiB", "MiB"))
        renderer = FigureCanvasAgg(figure).get_renderer()
        labels = [t for ax in axes for t in (ax.xaxis.label, ax.yaxis.label)]
        boxes = [t.get_window_extent(renderer) for t in (*labels, figure._suptitle)]
        boxes += [legend.get_window_extent(renderer) for legend in figure.legends]
        for i, box in enumerate(boxes):
            assert not any(box.overlaps(other) for other in boxes[:i])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["run", "--suite", "tpu"], "invalid choice: 'tpu'"),
        (["run", "--suite", "cpu", "--provider", "jax"], "invalid choice: 'jax'"),
        (["run", "--suite", "cpu", "--dtype", "int8"], "invalid choice: 'int8'"),
        (["run", "--suite", "cpu", "--vocab", "0"], "got '0'"),
        (["run", "--suite", "quick", "--out", "a_file"], "a_file is a file, expected a folder"),
        (["run", "--suite", "gpu"], "there is no GPU here: give --suite cpu"),
        (["plot"], "python -m bench run --suite cpu first"),
        (["plot", "none.csv"], "none.csv cannot be read: No such file"),
        (["plot", "old.csv"], "old.csv has the columns provider, mode, expected provider, mode, metric"),
        (["plot", "words.csv"], "words.csv has V 'many', expected a positive whole number, in row 2"),
        (["plot", "a_file"], "a_file has the columns (none)"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_and_exit_code_2(arguments, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    Path("a_file").write_text("")
    table(Path("old.csv"), columns=("provider", "mode"))
    table(Path("words.csv"))
    Path("words.csv").write_text(Path("words.csv").read_text().replace("1000", "many"))
    try:
        code = bench.main(arguments)
    except SystemExit as exit:
        code = exit.code
    assert code == 2
    *usage, error = capsys.readouterr().err.strip().splitlines()
    assert error.startswith("python -m bench") and said in error


def test_without_matplotlib_plot_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "matplotlib.figure", raising=False)
    assert bench.main(["plot", str(table(tmp_path / "r.csv"))]) == 2
    error = capsys.readouterr().err
    assert "plot needs matplotlib: pip install -e '.[bench]'" in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("column", "value", "said"),
    [
        ("dtype", "a/b", "dtype 'a/b', expected a name such as bfloat16, in row 2"),
        ("dtype", "", "dtype '', expected a name"),
        ("N", "0", "N '0', expected a positive whole number"),
        ("N", "9" * 5000, "expected a positive whole number"),
        ("D", "wide", "D 'wide', expected a positive whole number"),
        ("V", "1.5", "V '1.5', expected a positive whole number"),
        ("value", "nan", "value 'nan', expected a number from 0 to 1e30"),
        ("value", "-1", "value '-1', expected a number"),
        ("q20", "few", "q20 'few', expected a number"),
        ("q80", "inf", "q80 'inf', expected a number"),
        ("device", "one,two", "another number of cells than of columns in row 2"),
    ],
)  # fmt: skip
def test_a_row_that_no_figure_can_show_is_refused(column, value, said, tmp_path, capsys):
    row = dict.fromkeys(records.COLUMNS, "x") | {
        "N": "1",
        "D": "",
        "V": "9",
        "value": "1",
        "q20": "",
        "q80": "",
    }
    lines = (",".join(records.COLUMNS), ",".join((row | {column: value}).values()))
    (tmp_path / "r.csv").write_text("\n".join(lines) + "\n")
    assert bench.main(["plot", str(tmp_path / "r.csv")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("python -m bench: ") and error.count("\n") == 1 and said in error
    assert not list(tmp_path.glob("*.png"))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["header.csv"], "header.csv has a header and no rows"),
        (["r.csv", "--out", "r.csv"], "--out r.csv is a file, expected a folder"),
        (["r.csv", "--out", "r.csv/below"], "r.csv/below cannot be written: Not a directory"),
        (["r.csv", "r.csv", "--out", "figures"], "--out takes the figures of one CSV, got 2"),
        (["folder"], "folder cannot be read: Is a directory"),
        (["binary.csv"], "binary.csv is no CSV file"),
    ],
)
def test_a_file_that_plot_cannot_use(arguments, said, tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    table(Path("r.csv"))
    Path("header.csv").write_text(",".join(records.COLUMNS) + "\n")
    Path("binary.csv").write_bytes(b"\xff\xfe\x00" * 9)
    Path("folder").mkdir()
    assert bench.main(["plot", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("python -m bench: ") and error.count("\n") == 1 and said in error


def rows_at(**columns):
    row = dict.fromkeys(records.COLUMNS, "") | {
        "provider": "eager", "mode": "forward+backward", "metric": "seconds", "dtype": "float32",
        "device": "a", "N": "16", "D": "64", "V": "1000", "value": "1",
    }  # fmt: skip
    sizes = itertools.product(*columns.values())
    return [
        row | dict(zip(columns, values, strict=True), value=str(i + 1))
        for i, values in enumerate(sizes)
    ]


@pytest.mark.parametrize("column", ["N", "D", "dtype", "device"])
def test_a_line_joins_nothing_but_vocabularies(column):
    other = {
        "N": ("16", "32"),
        "D": ("64", "128"),
        "dtype": ("float32", "float64"),
        "device": ("a", "b"),
    }
    rows = rows_at(**{column: other[column], "V": ("1000", "2000")})
    lines = list(figures._lines(rows, "seconds", "V", 1.0))
    assert [[(x, y) for x, y, *_ in line.points] for line in lines] == [
        [(1000, 1), (2000, 2)],
        [(1000, 3), (2000, 4)],
    ]
    assert [line.label for line in lines] == [
        f"eager, {column} = {value}" for value in other[column]
    ]
    assert lines[0].style != lines[1].style


def test_the_cpu_suite_says_how_long_and_has_the_figures_rows(tmp_path, monkeypatch, capsys):
    suite = suites.SUITES["cpu"]
    assert suite.budget + 2 * 60 <= 12 * 60 and 60 * suite.minutes <= suite.budget
    cases = list(run.Run(suite, "cpu", records.Report(records.environment("x")), tmp_path).cases())
    figure = {
        (r["N"], r["V"], r["dtype"])
        for r in rows_of(RESULTS)
        if not r["device"].startswith("predicted")
    }
    assert figure <= {(str(c.shape.N), str(c.shape.V), records.dtype_name(c.dtype)) for c in cases}
    float32 = {c.shape.V for c in cases if c.dtype == torch.float32}
    assert float32 == {50257} and cases[-1].dtype == torch.float32  # last, where time runs out
    monkeypatch.setattr(run.Run, "all", lambda self: None)
    for arguments, said in (
        ([], f"some {suite.minutes} min on 2 idle cores, nothing begun after 10"),
        (["--dtype", "float32"], "nothing begun after 10 min"),
    ):
        assert bench.main(["run", "--suite", "cpu", *arguments, "--out", str(tmp_path)]) == 0
        assert said in capsys.readouterr().out.splitlines()


@pytest.mark.parametrize(("seconds", "measured"), [(0.9, False), (0.0, True)])
def test_what_takes_many_times_eagers_time_is_left_out(
    seconds, measured, tmp_path, monkeypatch, capsys
):
    loss_of, slow = run.loss_of, providers.TORCH

    def sleeping(form, provider, device):
        eager = loss_of(form, "eager", device)
        return eager if provider != slow else lambda *batch: (time.sleep(seconds), eager(*batch))[1]

    monkeypatch.setattr(run, "loss_of", sleeping)
    monkeypatch.setattr(providers, "why_not", lambda *arguments: "")
    command = [
        "run",
        "--suite",
        "quick",
        *TINY,
        "--vocab",
        "70",
        "--dtype",
        "float32",
        "--out",
        str(tmp_path),
    ]
    assert bench.main([*command, "--provider", "eager", slow]) == 0
    assert (
        (slow, "forward") in {(r["provider"], r["mode"]) for r in rows_of(tmp_path)}
    ) is measured
    reason = rf"{slow}, linear: not run: some (9|1\d) times eager's time"
    assert bool(re.search(reason, capsys.readouterr().out)) is not measured


def test_what_was_measured_more_than_once_is_one_point():
    rows = rows_at(V=("1000",) * 3)
    (line,) = figures._lines(rows, "seconds", "V", 1.0)
    assert line == figures.Line("eager", figures.COLORS["eager"], "-", [(1000.0, 2.0, 1.0, 3.0)])


def test_every_size_of_hidden_states_and_every_device_has_its_figure(tmp_path):
    pytest.importorskip("matplotlib")
    rows = rows_at(D=("64", "128"), V=("1000", "2000"), device=("a $1 device", "b"))
    names = [path.name for path in figures.draw_all(rows, tmp_path)]
    expected = {f"vocabulary_float32_N16_D{d}{end}.png" for d in (64, 128) for end in ("", "_2")}
    assert set(names) == expected and len(names) == 4
