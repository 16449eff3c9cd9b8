"""The examples on scikit-learn's digits: their curves are torch's, and what they print is measured."""

from __future__ import annotations

import importlib
import math
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from helpers import ROOT

pytest.importorskip("sklearn")

FOLDER = ROOT / "examples"
NAMES = ["classify_digits", "segmentation", "multilabel"]
HELPERS = ["digits", "side_by_side"]


@pytest.fixture(autouse=True)
def examples(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """They import one another, and set the number of threads."""
    monkeypatch.syspath_prepend(str(FOLDER))
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    for name in NAMES + HELPERS:
        sys.modules.pop(name, None)


@pytest.fixture
def double() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("name", NAMES)
def test_curves_are_torchs(name: str, double: None) -> None:
    runs = importlib.import_module(name).main(["--steps", "5"])
    theirs, *ours = (run.curve for run in runs.values())
    assert len(theirs) == 5 and ours and all(map(math.isfinite, theirs))
    assert len(set(theirs)) == 5  # it moves
    for curve in ours:  # float64's rounding, that four steps of AdamW multiply
        assert curve == pytest.approx(theirs, rel=1e-10)


@pytest.mark.long
@pytest.mark.parametrize("name", NAMES)
def test_as_a_command(name: str, tmp_path: Path) -> None:
    command = [sys.executable, str(FOLDER / f"{name}.py"), "--steps", "2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert done.returncode == 0 and not done.stderr, done.stderr
    found = re.search(r"^largest difference .*, 2 steps: (\S+)$", done.stdout, re.MULTILINE)
    assert found and float(found[1]) < 1e-5, done.stdout


def test_a_difference_is_seen(capsys: pytest.CaptureFixture[str]) -> None:
    side_by_side, module = map(importlib.import_module, ("side_by_side", "classify_digits"))
    batches = module.batches_of(importlib.import_module("digits").load()[0], 3, 0)
    loss = torch.nn.functional.cross_entropy
    losses = {"one": loss, "other": lambda z, y: loss(z, y, label_smoothing=0.1)}
    runs = side_by_side.train_with_each(losses, module.make_model, batches, 1e-2, 0)
    assert side_by_side.difference(runs) > 1e-2
    assert f"3 steps: {side_by_side.difference(runs):.1e}" in capsys.readouterr().out


def test_borders_and_labels_are_those_of_the_canvas() -> None:
    digits, segmentation, multilabel = map(
        importlib.import_module, ("digits", "segmentation", "multilabel")
    )
    data, held_out = digits.load()
    assert len(data.labels) + len(held_out.labels) == 1797
    canvases = digits.paste(data, 40, torch.Generator().manual_seed(0), empty=0.3)
    classes, hot = segmentation.classes_of(canvases), multilabel.multi_hot(canvases.labels)
    ink = canvases.images[:, 0]
    assert ((ink == 0) == (classes == 0)).all()
    assert (((ink > 0) & (ink < 0.5)) == (classes == 255)).all()
    for i in range(40):
        drawn = set(classes[i][ink[i] >= 0.5].sub(1).tolist())
        assert drawn == set(hot[i].nonzero().flatten().tolist())
        assert drawn == set(canvases.labels[i].tolist()) - {-100}


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        ("--steps 0", "--steps: expected an integer from 1 to 2147483647, got '0'"),
        ("--seed -1", "--seed: expected an integer from 0"),
        ("--unknown", "unrecognized arguments: --unknown"),
    ],
)
def test_bad_input_is_one_line(bad: str, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        importlib.import_module("multilabel").main(bad.split())
    assert stopped.value.code == 2
    out, err = capsys.readouterr()
    assert not out and err.startswith("multilabel: ") and err.count("\n") == 1 and says in err


@pytest.mark.long
def test_they_learn(capsys: pytest.CaptureFixture[str]) -> None:
    for name in NAMES:
        importlib.import_module(name).main([])
    printed = capsys.readouterr().out
    rare = [float(n) for n in re.findall(r"([\d.]+)% of the rare", printed)]
    assert rare[1] > 75 and rare[1] > rare[2]  # ours with the weights, and without
    assert all(float(n) > 0.9 for n in re.findall(r"^(?:mean IoU|F1), .*: (.*)$", printed, re.M))
    assert len(re.findall("^mean IoU", printed, re.M)) == 2
    assert len(re.findall("^F1", printed, re.M)) == 3
