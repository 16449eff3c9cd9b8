"""python -m bench plan: README's picture says what the planner says."""

from pathlib import Path

import pytest
import torch

from bench import __main__ as bench
from bench import plan_figure
from chunked_ce.planner import HeadShape, plan

LLAMA = HeadShape(128256, 4096, torch.bfloat16)


@pytest.mark.parametrize("tokens", [8192, 32768])
def test_bars_are_the_planners(tokens):
    peaks = {e.name: e.peak_bytes / 2**30 for e in plan(LLAMA, tokens)}
    found = [bar.gib for bar in plan_figure.bars(LLAMA, tokens)]
    ours = [gib for name, gib in peaks.items() if "cross_entropy" in name]
    assert found == [
        peaks["eager, float32 loss (transformers)"], peaks["eager"], peaks["torch.compile"],
        peaks["linear_cross_entropy"], min(ours),
    ]  # fmt: skip


def test_what_readme_says_of_the_picture():
    """torch.compile: as much at 8192 tokens, almost three times as much at 32768."""
    _, _, compiled, default, smallest = plan_figure.bars(LLAMA, 8192)
    assert 0.9 < compiled.gib / default.gib < 1.1
    assert "sums in bfloat16)" in smallest.label
    _, _, compiled, default, _ = plan_figure.bars(LLAMA, 32768)
    assert 2.5 < compiled.gib / default.gib < 3


def test_a_picture_is_drawn(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    out = tmp_path / "plan.png"
    assert bench.main(["plan", "--vocab", "1000", "--hidden", "64", "--out", str(out)]) == 0
    assert out.read_bytes().startswith(b"\x89PNG")
    assert len(capsys.readouterr().out.splitlines()) == 2 * 5 + 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--out", "none/plan.png"], "no file can be written at 'none/plan.png'"),
        (["--out", "plan.docx"], "plan.docx cannot be written: Format 'docx' is not supported"),
        (["--tokens", "0"], "expected a positive whole number, got '0'"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    arguments, said, tmp_path: Path, monkeypatch, capsys
):
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    try:
        code = bench.main(["plan", *arguments])
    except SystemExit as exit:
        code = exit.code
    assert code == 2
    *_, error = capsys.readouterr().err.strip().splitlines()
    assert error.startswith("python -m bench plan: ") and said in error
