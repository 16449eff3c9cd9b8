"""Test examples/train_gpt.py on a model and texts so small that a run takes a second."""

from __future__ import annotations

import csv
import importlib.util
import json
import math
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from helpers import ROOT

from bench.records import cpu_name

for needed in ("matplotlib", "tokenizers", "tqdm", "transformers"):
    pytest.importorskip(needed)

SCRIPT = ROOT / "examples" / "train_gpt.py"
SMALL = "--context 32 --vocab-size 300 --layers 1 --width 32 --heads 2 --batch-size 4 --device cpu"


@pytest.fixture(scope="module")
def train_gpt() -> ModuleType:
    sys.path.insert(0, str(SCRIPT.parent))  # as it is for a script
    spec = importlib.util.spec_from_file_location("train_gpt", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(SCRIPT.parent))
    return module


@pytest.fixture
def texts(tmp_path: Path) -> list[str]:
    """Three documents of unequal length, with bytes outside of ASCII; the last is held out."""
    paths = []
    for i, length in enumerate((40, 55, 25)):
        path = tmp_path / f"{i}.txt"
        path.write_bytes(
            "".join(f"{i + j} naïve <|endoftext|> → π\r\n" for j in range(length)).encode()
        )
        paths.append(str(path))
    return paths


def arguments(texts: list[str], out: Path, name: str = "small", steps: int = 3) -> list[str]:
    run = ["--steps", str(steps), "--out", str(out), "--name", name]
    return [*SMALL.split(), *run, "--text", *texts]


def losses(folder: Path) -> list[float]:
    with (folder / "metrics.csv").open() as file:
        return [float(row["loss"]) for row in csv.DictReader(file)]


def finite(value: Any) -> bool:
    if isinstance(value, dict):
        return all(map(finite, value.values()))
    return not isinstance(value, float) or math.isfinite(value)


def test_files_of_a_run(texts: list[str], tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), *arguments(texts, tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "bits per byte" in done.stdout and "chunked_ce.cross_entropy" in done.stdout
    assert "warn" not in done.stderr.lower() and "recommend" not in done.stderr
    assert "scoring 1 of 1 held-out documents" in done.stdout
    assert "\r" not in done.stderr and re.match(r"step 3 of 3: loss \d", done.stderr)
    folder = tmp_path / "small"
    assert not (folder / "checkpoint.pt").exists()
    report = json.loads((folder / "report.json").read_text())
    assert finite(report) and report["device_name"] == cpu_name()
    assert report["steps_done"] == len(losses(folder)) == 3 and not report["interrupted"]
    assert report["comparison"]["gradient_difference"] < 1e-6
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")

    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    text = Path(texts[2]).read_bytes().decode()[:40]
    tokens = tokenizer(text, return_tensors="pt")
    assert tokenizer.decode(tokens["input_ids"][0]) == text
    assert tokenizer.eos_token_id == tokenizer.pad_token_id == model.config.eos_token_id
    assert model(**tokens).logits.shape[-1] == report["vocabulary"] == len(tokenizer)


def test_losses_of_fused(train_gpt: ModuleType, texts: list[Path], tmp_path: Path) -> None:
    for name, options in (("logits", []), ("fused", ["--fused"])):
        assert train_gpt.main([*arguments(texts, tmp_path, name), *options]) == 0
    logits, fused = (losses(tmp_path / name) for name in ("logits", "fused"))
    assert max(abs(a - b) for a, b in zip(logits, fused, strict=True)) < 1e-3


@pytest.mark.long
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("loss", [[], ["--fused"]], ids=str)
def test_losses_of_compiled(
    train_gpt: ModuleType, texts: list[Path], tmp_path: Path, loss: list[str]
) -> None:
    for name, options in (("eager", []), ("compiled", ["--compile"])):
        assert train_gpt.main([*arguments(texts, tmp_path, name), *loss, *options]) == 0
    eager, compiled = (losses(tmp_path / name) for name in ("eager", "compiled"))
    assert max(abs(a - b) for a, b in zip(eager, compiled, strict=True)) < 1e-3


def test_losses_of_the_same_seed(train_gpt: ModuleType, texts: list[str], tmp_path: Path) -> None:
    for name in ("first", "second"):
        assert train_gpt.main(arguments(texts, tmp_path, name)) == 0
    assert losses(tmp_path / "first") == losses(tmp_path / "second")


def test_windows_of_documents(train_gpt: ModuleType) -> None:
    documents = [" ".join(f"{i * i:x}" for i in range(60)), "é", "<|endoftext|>\n"]
    tokenizer = train_gpt.text_data.train_tokenizer(documents, 300)
    inputs, targets = train_gpt.text_data.cut_into_windows(documents, tokenizer, 8)
    end, scored = tokenizer.token_to_id("<|endoftext|>"), targets != -100
    with_both_ends = sum(len(tokenizer.encode(text).ids) + 2 for text in documents)
    assert scored.sum() == with_both_ends - len(documents)
    assert (inputs[:, 1:][scored[:, 1:]] == targets[:, :-1][scored[:, 1:]]).all()
    assert tokenizer.decode(targets[scored].tolist()) == "".join(documents)
    assert (targets == end).sum() == len(documents)


def test_validation_of_the_held_out_text(
    train_gpt: ModuleType, texts: list[str], tmp_path: Path
) -> None:
    assert train_gpt.main(arguments(texts, tmp_path)) == 0
    report = json.loads((tmp_path / "small" / "report.json").read_text())
    validation = report["validation"]
    assert validation["documents"] == report["scored_documents"] == 1 and not validation["partial"]
    assert validation["bytes"] == Path(texts[2]).stat().st_size
    bits = validation["nll_sum"] / math.log(2)
    assert validation["bits_per_byte"] == pytest.approx(bits / validation["bytes"], rel=1e-12)
    assert validation["perplexity"] == pytest.approx(
        math.exp(validation["nll_sum"] / validation["tokens"]), rel=1e-12
    )


def test_validation_against_torch(train_gpt: ModuleType) -> None:
    documents = ["two words, and more <|endoftext|> of them " * 9, "short"]
    text_data = train_gpt.text_data
    tokenizer = text_data.train_tokenizer(documents, 300)
    args = train_gpt.parse_arguments(SMALL.split() + ["--context", "16"])
    model = train_gpt.build_model(args, tokenizer)
    saved = text_data.for_transformers(tokenizer, 16)
    result = train_gpt.validate(model, documents, saved, args)
    inputs, targets = text_data.cut_into_windows(documents, tokenizer, 16)
    logits = model(inputs, use_cache=False).logits.double().flatten(0, 1)
    expected = torch.nn.functional.cross_entropy(logits, targets.flatten(), reduction="sum")
    assert result["nll_sum"] == pytest.approx(expected.item(), rel=1e-6)
    assert result["bytes"] == len("".join(documents))


def test_validation_against_the_command(
    train_gpt: ModuleType, texts: list[str], tmp_path: Path
) -> None:
    from chunked_ce.cli import main

    assert train_gpt.main(arguments(texts, tmp_path)) == 0
    folder, out = tmp_path / "small", tmp_path / "again.json"
    held_out = sorted(map(str, (folder / "held_out").iterdir()))
    argv = ["perplexity", str(folder / "model"), "--bos", "yes", "--eos", "yes", "--device", "cpu"]
    assert main([*argv, "--json", str(out), "--text", *held_out]) == 0
    again = json.loads(out.read_text())
    validation = json.loads((folder / "report.json").read_text())["validation"]
    for measure in ("tokens", "bytes", "words", "top1"):
        assert again[measure] == validation[measure]
    assert again["bits_per_byte"] == pytest.approx(validation["bits_per_byte"], rel=1e-6)


def test_choose_documents_until_the_budget_is_full(train_gpt: ModuleType) -> None:
    choose = train_gpt.text_data.choose
    documents = [f"{i:02}π" for i in range(50)]  # 4 bytes each
    assert choose(documents, 200) == choose(documents, 10**6) == documents
    chosen = choose(documents, 39)
    assert len(chosen) == 10 and chosen == sorted(chosen) and chosen != documents[:10]
    assert chosen == choose(documents, 40) and len(choose(documents, 41)) == 11
    assert len(choose(documents, 1)) == 1


def test_split(train_gpt: ModuleType) -> None:
    split = train_gpt.text_data.split
    assert split(["x" * 95 + "y" * 5]) == (["x" * 95], ["y" * 5])
    assert split(["a", "b", "c"]) == (["a", "b"], ["c"])
    training, held_out = split([str(i) for i in range(100)])
    assert held_out == ["19", "39", "59", "79", "99"] and len(training) == 95


@pytest.mark.parametrize("steps", [1, 2, 19, 20, 100, 600])
def test_learning_rate(train_gpt: ModuleType, steps: int) -> None:
    rates = [train_gpt.learning_rate(step, steps, 0.5) for step in range(1, steps + 1)]
    assert min(rates) > 0 and max(rates) == 0.5
    top = rates.index(0.5)
    assert rates[: top + 1] == sorted(rates[: top + 1])
    assert rates[top:] == sorted(rates[top:], reverse=True)


class Crash(Exception):
    """The process ends without a word."""


def stop_in_call(monkeypatch: pytest.MonkeyPatch, module: ModuleType, call: int, how: type) -> None:
    """Raise in one of the calls of the loss that trains."""
    loss, calls = module.chunked_ce_loss, []

    def stopped(*tensors: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        if len(calls) == call:
            raise how
        result: torch.Tensor = loss(*tensors)
        return result

    monkeypatch.setattr(module, "chunked_ce_loss", stopped)


def test_interruption_saves_the_run(
    train_gpt: ModuleType, texts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_in_call(monkeypatch, train_gpt, 3, KeyboardInterrupt)
    assert train_gpt.main(arguments(texts, tmp_path, steps=9)) == 130
    folder = tmp_path / "small"
    report = json.loads((folder / "report.json").read_text())
    assert report["interrupted"] is True and report["steps_done"] == len(losses(folder)) == 2
    assert report["validation"] is None and report["comparison"] is None
    assert (folder / "loss.png").exists() and (folder / "model" / "model.safetensors").exists()


def weights(folder: Path) -> bytes:
    return (folder / "model" / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("how", "call"), [(KeyboardInterrupt, 4), (KeyboardInterrupt, 1), (Crash, 6)], ids=str
)
def test_resume_gives_the_same_bits(
    train_gpt: ModuleType,
    texts: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    how: type,
    call: int,
) -> None:
    options = ["--checkpoint-every", "2"]
    assert train_gpt.main([*arguments(texts, tmp_path, "whole", 8), *options]) == 0
    argv = [*arguments(texts, tmp_path, "stopped", 8), *options]
    with monkeypatch.context() as patch:
        stop_in_call(patch, train_gpt, call, how)
        if how is Crash:
            with pytest.raises(Crash):
                train_gpt.main(argv)
        else:
            assert train_gpt.main(argv) == 130
    torch.manual_seed(99)
    assert train_gpt.main([*argv, "--resume"]) == 0
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert losses(stopped) == losses(whole) and weights(stopped) == weights(whole)
    validations = [
        json.loads((folder / "report.json").read_text())["validation"]
        for folder in (whole, stopped)
    ]
    assert validations[0] == validations[1]


def test_interruption_during_an_update_waits_for_its_end(
    train_gpt: ModuleType, texts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert train_gpt.main(arguments(texts, tmp_path, "whole", 4)) == 0
    update = train_gpt.Training.update

    def interrupted(self: Any, step: int) -> float:
        if step == 2:
            os.kill(os.getpid(), signal.SIGINT)
        rate: float = update(self, step)
        return rate

    argv = arguments(texts, tmp_path, "stopped", 4)
    handler = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        patch.setattr(train_gpt.Training, "update", interrupted)
        assert train_gpt.main(argv) == 130
    assert signal.getsignal(signal.SIGINT) is handler
    assert len(losses(tmp_path / "stopped")) == 2
    assert train_gpt.main([*argv, "--resume"]) == 0
    assert weights(tmp_path / "stopped") == weights(tmp_path / "whole")


def test_checkpoint_survives_a_write_that_fails(
    train_gpt: ModuleType, texts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save, calls = torch.save, []

    def full_disk(state: Any, path: Path) -> None:
        calls.append(1)
        if len(calls) == 2:
            Path(path).write_bytes(b"half")
            raise OSError("no space left")
        save(state, path)

    argv = [*arguments(texts, tmp_path, steps=6), "--checkpoint-every", "2"]
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full_disk)
        assert train_gpt.main(argv) == 2
    state = torch.load(tmp_path / "small" / "checkpoint.pt", weights_only=True)
    assert len(state["steps"]) == 2
    assert train_gpt.main([*argv, "--resume"]) == 0
    assert len(losses(tmp_path / "small")) == 6


def test_resume_of_another_run_is_refused(
    train_gpt: ModuleType,
    texts: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    argv = [*arguments(texts, tmp_path), "--resume"]
    assert train_gpt.main(argv) == 2
    assert "argument --resume: there is no " in capfd.readouterr().err
    with monkeypatch.context() as patch:
        stop_in_call(patch, train_gpt, 2, KeyboardInterrupt)
        assert train_gpt.main(argv[:-1]) == 130
    assert train_gpt.main([*argv, "--lr", "0.5"]) == 2
    assert "argument --lr: the checkpoint has 0.0007, got 0.5" in capfd.readouterr().err
    first = Path(texts[0])
    first.write_bytes(first.read_bytes().replace(b"7", b"8"))
    assert train_gpt.main(argv) == 2
    assert "argument --text: not what" in capfd.readouterr().err


def test_interruption_during_imports_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "tokenizers.py").write_text("raise KeyboardInterrupt")
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    done = subprocess.run(
        [sys.executable, str(SCRIPT)], capture_output=True, text=True, timeout=120,
        env=os.environ | {"PYTHONPATH": path},
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (130, "")
    assert done.stderr == "train_gpt: interrupted\n"


def test_help_gives_every_default(
    train_gpt: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        train_gpt.main(["--help"])
    options = capsys.readouterr().out.partition("options:")[2].split("\n  --")[1:]
    assert len(options) == 18
    for option in options:
        assert re.search(r"\w.*\(default: [^)]+\)$", " ".join(option.split())), option


def write(path: Path, data: bytes) -> str:
    path.write_bytes(data)
    return str(path)


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        ("--steps 0", "--steps: expected an integer of at least 1, got '0'"),
        ("--batch-size x", "--batch-size: expected an integer of at least 1, got 'x'"),
        ("--context 1", "--context: expected an integer of at least 2, got '1'"),
        ("--context 100000", "--context: 100000 is longer than the longest training document"),
        ("--vocab-size 257", "--vocab-size: expected an integer of at least 258, got '257'"),
        ("--width 33", "--width: expected a multiple of 2, got 33"),
        ("--lr 0", "--lr: expected a positive number, got 0.0"),
        ("--lr nan", "--lr: expected a positive number, got nan"),
        ("--dtype int8", "--dtype: invalid choice"),
        ("--device nonsense", "--device: 'nonsense' cannot be used here"),
        ("--device meta", "--device: 'meta' cannot be used here"),
        ("--text {tmp}/missing.txt", "missing.txt: No such file or directory"),
        ("--text {tmp}/good.txt {tmp}/empty.txt", "empty.txt: empty"),
        ("--text {tmp}/nul.txt", "nul.txt: binary"),
        ("--text {tmp}/latin.txt", "latin.txt: not UTF-8"),
        ("--text {tmp}", "expected a file of UTF-8 text"),
        ("--unknown", "unrecognized arguments: --unknown"),
        ("--out {tmp}/good.txt", "good.txt"),
    ],
)
def test_bad_input(
    train_gpt: ModuleType,
    bad: str,
    says: str,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    good = write(tmp_path / "good.txt", b"some words and more of them\n" * 20)
    write(tmp_path / "empty.txt", b"")
    write(tmp_path / "nul.txt", b"some\0words")
    write(tmp_path / "latin.txt", "naïve".encode("latin-1"))
    argv = arguments([good], tmp_path / "out") + bad.format(tmp=tmp_path).split()
    assert train_gpt.main(argv) == 2
    out, err = capfd.readouterr()
    assert err.startswith("train_gpt: ") and err.count("\n") == 1 and err.endswith("\n")
    assert says in err and "Traceback" not in err
    assert not (tmp_path / "out" / "small").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_missing_gpu(train_gpt: ModuleType, capfd: pytest.CaptureFixture[str]) -> None:
    assert train_gpt.main(["--device", "cuda"]) == 2
    assert capfd.readouterr().err.count("\n") == 1


def test_table_of_busy_cores(train_gpt: ModuleType) -> None:
    machine = train_gpt.machine
    seconds = machine.Seconds(0.2, 0.1, 0.4)
    measured = {
        "step_seconds": {"F.cross_entropy": seconds},
        "loss_seconds": {"F.cross_entropy": seconds},
        "loss_extra_bytes": {"F.cross_entropy": 5 << 20},
    }
    busy = machine.table(measured | {"cores_used_by_others": 1.25})
    assert "200 ms (100 - 400)" in busy and "other programs used 1.2 of" in busy
    assert "other programs" not in machine.table(measured | {"cores_used_by_others": 0.02})
