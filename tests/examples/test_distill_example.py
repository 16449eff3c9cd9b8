"""examples/distill.py with a teacher and texts so small that a run takes seconds."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from helpers import ROOT

for needed in ("matplotlib", "tokenizers", "tqdm", "transformers"):
    pytest.importorskip(needed)

SCRIPT = ROOT / "examples" / "distill.py"
SMALL = "--steps 60 --batch-size 4 --width 16 --heads 2 --lr 0.01 --device cpu".split()


@pytest.fixture(scope="module")
def example() -> ModuleType:
    sys.path.insert(0, str(SCRIPT.parent))  # as it is for a script
    spec = importlib.util.spec_from_file_location("distill_example", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(SCRIPT.parent))
    return module


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A teacher that train_gpt.py saved, and the texts that it was trained on."""
    folder = tmp_path_factory.mktemp("trained")
    texts = []
    for i, length in enumerate((60, 75, 40)):
        path = folder / f"{i}.txt"
        path.write_text("".join(f"{i + j} is one more than {i + j - 1}\n" for j in range(length)))
        texts.append(str(path))
    sizes = "--context 32 --vocab-size 300 --layers 1 --width 32 --heads 2 --batch-size 8"
    command = [sys.executable, str(ROOT / "examples/train_gpt.py"), *sizes.split(), "--lr", "0.01"]
    command += ["--device", "cpu", "--steps", "60", "--out", str(folder), "--text", *texts]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return folder / "train_gpt" / "model", texts


def arguments(trained: tuple[Path, list[str]], *options: str) -> list[str]:
    teacher, texts = trained
    out = str(teacher.parents[1])
    return ["--teacher", str(teacher), *SMALL, "--out", out, *options, "--text", *texts]


def test_the_student_learns_from_the_teacher(example, trained, capsys):
    found = example.run(example.parse_arguments(arguments(trained)))
    assert found["losses"][-1] < 0.5 * found["losses"][0] and min(found["losses"]) > 0
    assert found["teacher"] < found["after"] < 0.5 * found["before"]
    assert found["loss_difference"] < 1e-5 and found["gradient_difference"] < 1e-4
    printed = capsys.readouterr().out
    assert "step 60 of 60: loss" in printed and "peak extra memory" in printed
    assert "distilled from GPT2LMHeadModel: kind forward" in printed
    saved = trained[0].parents[1] / "distill" / "model"
    again, tokenizer = example.load_teacher(saved, torch.device("cpu"))
    assert again.config.n_embd == 16 and len(tokenizer) == again.config.vocab_size


def test_labels_are_the_next_tokens_once_the_model_has_shifted_them(example):
    inputs = torch.tensor([[9, 4, 5, 6]])
    targets = torch.tensor([[4, 5, 6, 9]])
    labels = example.labels_of(inputs, targets)
    assert labels[:, 1:].tolist() == targets[:, :-1].tolist() and labels[0, 0] == -100


def test_options_reach_the_loss(example, trained, capsys):
    options = "--kind jsd --beta 0.3 --temperature 2 --cross-entropy-weight 0.5 --steps 1".split()
    assert example.main(arguments(trained, *options)) == 0
    said = "kind jsd, beta 0.3, temperature 2, cross-entropy weight 0.5"
    assert said in capsys.readouterr().out


@pytest.mark.parametrize(
    "options, said",
    [
        (["--teacher", "nowhere"], "there is no model in nowhere; run `make train` first"),
        (["--temperature", "0"], "temperature is 0.0, expected a number above 0"),
        (["--kind", "jsd", "--beta", "2"], "beta is 2.0, expected a number from 0 to 1"),
        (["--kind", "js"], "argument --kind: invalid choice: 'js'"),
        (["--steps", "0"], "expected an integer of at least 1, got '0'"),
        (["--width", "15"], "argument --width: expected a multiple of 2, got 15"),
        (["--lr", "-1"], "argument --lr: expected a positive number"),
    ],
)
def test_bad_input_is_one_line(example, trained, capsys, options, said):
    assert example.main(arguments(trained, *options)) == 2
    errors = capsys.readouterr().err
    assert said in errors and errors.startswith("distill: ") and errors.count("\n") == 1


def test_a_folder_that_is_no_model(example, tmp_path, capsys):
    (tmp_path / "config.json").write_text("{}")
    assert example.main(["--teacher", str(tmp_path), "--device", "cpu"]) == 2
    assert "cannot be loaded" in capsys.readouterr().err
