"""python -m bench figures: what it draws and refuses; the commands that there are."""

import csv
import itertools
import sys
from pathlib import Path

import pytest

from bench import __main__ as bench
from bench import figures, records


def test_without_a_command_all_are_listed(capsys):
    assert bench.main([]) == 0
    printed = capsys.readouterr().out
    assert all(f"\n    {command} " in printed for command in bench.COMMANDS)


def test_a_provider_that_was_not_run_is_no_point(tmp_path):
    path = table(tmp_path / "r.csv", providers=("eager",))
    measured = records.read_measurements(path)
    with path.open("a", newline="") as file:
        row = dict.fromkeys(records.COLUMNS, "") | dict(
            provider="liger", metric="not run", N="16", V="1000", dtype="float32", note="no GPU"
        )
        csv.DictWriter(file, records.COLUMNS).writerow(row)
    assert records.read_measurements(path) == measured


def table(path, *, device="a device", providers=("eager", "chunked_ce"), columns=records.COLUMNS):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        writer.writeheader()
        for provider in providers:
            for v in (1000, 50257):
                for metric in ("seconds", "peak_extra_bytes", "predicted_peak_extra_bytes"):
                    for d in (64, ""):
                        values = dict.fromkeys(columns, "") | {
                            "provider": provider, "mode": "forward+backward", "metric": metric, "N": 16, "D": d,
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
    assert bench.main(["figures"]) == 0
    names = {"vocabulary_float32_N16", "logits_float32_N16"}
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
    rows = records.read_measurements(table(tmp_path / "r.csv", providers=figures.COLORS))
    list(figures.draw_all(rows, tmp_path))
    assert len(drawn) == 2
    for figure, axes in drawn:
        for ax in axes:
            assert "vocabulary V" in ax.get_xlabel()
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
        (["fly"], "no command 'fly', expected one of quick, full, cpu"),
        (["quick", "--provider", "jax"], "invalid choice: 'jax'"),
        (["full", "--dtype", "int8"], "invalid choice: 'int8'"),
        (["full", "--vocab", "0"], "got '0'"),
        (["quick", "--out", "a_file"], "a_file is a file, expected a folder"),
        (["figures"], "python -m bench full first"),
        (["figures", "none.csv"], "none.csv cannot be read: No such file"),
        (["figures", "old.csv"], "old.csv has the columns provider, mode, expected provider, mode"),
        (["figures", "words.csv"], "words.csv has V 'many', expected a positive whole number, in row 2"),
        (["figures", "a_file"], "a_file has the columns (none)"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_and_exit_code_2(arguments, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
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


def test_without_matplotlib_figures_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "matplotlib.figure", raising=False)
    assert bench.main(["figures", str(table(tmp_path / "r.csv"))]) == 2
    error = capsys.readouterr().err
    assert "figures needs matplotlib: pip install -e '.[bench]'" in error and error.count("\n") == 1


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
    assert bench.main(["figures", str(tmp_path / "r.csv")]) == 2
    error = capsys.readouterr().err
    assert (
        error.startswith("python -m bench figures: ") and error.count("\n") == 1 and said in error
    )
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
def test_a_file_that_cannot_be_drawn(arguments, said, tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    table(Path("r.csv"))
    Path("header.csv").write_text(",".join(records.COLUMNS) + "\n")
    Path("binary.csv").write_bytes(b"\xff\xfe\x00" * 9)
    Path("folder").mkdir()
    assert bench.main(["figures", *arguments]) == 2
    error = capsys.readouterr().err
    assert (
        error.startswith("python -m bench figures: ") and error.count("\n") == 1 and said in error
    )


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


def test_the_same_sizes_at_several_numbers_of_tokens_have_a_figure(tmp_path):
    pytest.importorskip("matplotlib")
    rows = rows_at(N=("16", "32", "64"), metric=("seconds", "peak_extra_bytes"))
    names = [path.name for path in figures.draw_all(rows, tmp_path)]
    assert "tokens_D64_V1000.png" in names
