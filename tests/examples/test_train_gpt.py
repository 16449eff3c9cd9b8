"""examples/train_gpt.py on a model and texts so small that a run takes a second."""

from __future__ import annotations

import csv
import importlib.util
import json
import math
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from helpers import ROOT

for needed in ("matplotlib", "tokenizers", "tqdm", "transformers"):
    pytest.importorskip(needed)

SCRIPT = ROOT / "examples" / "train_gpt.py"
SMALL = "--context 32 --vocab-size 300 --layers 1 --width 32 --heads 2 --batch-size 4 --device cpu"


@pytest.fixture(scope="module")
def train_gpt() -> ModuleType:
    spec = importlib.util.spec_from_file_location("train_gpt", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["train_gpt"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
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


def test_a_run_leaves_its_files_and_a_model_that_loads(texts: list[str], tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), *arguments(texts, tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "bits per byte" in done.stdout and "chunked_ce.cross_entropy" in done.stdout
    assert "warn" not in done.stderr.lower() and "recommend" not in done.stderr
    folder = tmp_path / "small"
    report = json.loads((folder / "report.json").read_text())
    assert finite(report)
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


def test_fused_trains_to_the_same_losses(
    train_gpt: ModuleType, texts: list[Path], tmp_path: Path
) -> None:
    for name, options in (("logits", []), ("fused", ["--fused"])):
        assert train_gpt.main([*arguments(texts, tmp_path, name), *options]) == 0
    logits, fused = (losses(tmp_path / name) for name in ("logits", "fused"))
    assert max(abs(a - b) for a, b in zip(logits, fused, strict=True)) < 1e-3


@pytest.mark.long
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("loss", [[], ["--fused"]], ids=str)
def test_compiled_trains_to_the_same_losses(
    train_gpt: ModuleType, texts: list[Path], tmp_path: Path, loss: list[str]
) -> None:
    for name, options in (("eager", []), ("compiled", ["--compile"])):
        assert train_gpt.main([*arguments(texts, tmp_path, name), *loss, *options]) == 0
    eager, compiled = (losses(tmp_path / name) for name in ("eager", "compiled"))
    assert max(abs(a - b) for a, b in zip(eager, compiled, strict=True)) < 1e-3


def test_the_same_seed_gives_the_same_losses(
    train_gpt: ModuleType, texts: list[str], tmp_path: Path
) -> None:
    for name in ("first", "second"):
        assert train_gpt.main(arguments(texts, tmp_path, name)) == 0
    assert losses(tmp_path / "first") == losses(tmp_path / "second")


def test_every_token_of_a_document_is_scored_once_and_no_padding(train_gpt: ModuleType) -> None:
    documents = ["abcdefgh" * 30, "é", "<|endoftext|>\n"]
    tokenizer = train_gpt.train_tokenizer(documents, 300)
    inputs, targets = train_gpt.cut_into_windows(documents, tokenizer, 8).tensors
    end, scored = tokenizer.token_to_id("<|endoftext|>"), targets != -100
    with_both_ends = sum(len(tokenizer.encode(text).ids) + 2 for text in documents)
    assert scored.sum() == with_both_ends - len(documents)
    assert (inputs[:, 1:][scored[:, 1:]] == targets[:, :-1][scored[:, 1:]]).all()
    assert tokenizer.decode(targets[scored].tolist()) == "".join(documents)
    assert (targets == end).sum() == len(documents)


def test_validation_scores_the_bytes_of_the_held_out_text(
    train_gpt: ModuleType, texts: list[str], tmp_path: Path
) -> None:
    assert train_gpt.main(arguments(texts, tmp_path)) == 0
    report = json.loads((tmp_path / "small" / "report.json").read_text())
    validation = report["validation"]
    assert validation["documents"] == 1 and not validation["partial"]
    assert validation["tokens"] == report["held_out_tokens"]
    assert validation["bytes"] == Path(texts[2]).stat().st_size
    bits = validation["nll_sum"] / math.log(2)
    assert validation["bits_per_byte"] == pytest.approx(bits / validation["bytes"], rel=1e-12)
    assert validation["perplexity"] == pytest.approx(
        math.exp(validation["nll_sum"] / validation["tokens"]), rel=1e-12
    )


def test_validation_agrees_with_torch(train_gpt: ModuleType) -> None:
    documents = ["two words, and more <|endoftext|> of them " * 9, "short"]
    tokenizer = train_gpt.train_tokenizer(documents, 300)
    args = train_gpt.parse_arguments(SMALL.split() + ["--context", "16"])
    model = train_gpt.build_model(args, tokenizer)
    saved = train_gpt.for_transformers(tokenizer, 16)
    result = train_gpt.validate(model, documents, saved, args)
    inputs, targets = train_gpt.cut_into_windows(documents, tokenizer, 16).tensors
    logits = model(inputs, use_cache=False).logits.double().flatten(0, 1)
    expected = torch.nn.functional.cross_entropy(logits, targets.flatten(), reduction="sum")
    assert result["nll_sum"] == pytest.approx(expected.item(), rel=1e-6)
    assert result["bytes"] == len("".join(documents))


def test_the_command_scores_the_held_out_text_alike(
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


def test_of_much_held_out_text_some_documents_are_scored(
    train_gpt: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train_gpt, "VALIDATION_TOKENS", 100)
    documents = list("abcdefgh")
    assert train_gpt.some_of(documents, 100) == documents
    assert train_gpt.some_of(documents, 250) == ["a", "d", "g"]


def test_of_one_document_the_end_is_held_out(train_gpt: ModuleType) -> None:
    assert train_gpt.split(["x" * 95 + "y" * 5]) == (["x" * 95], ["y" * 5])
    assert train_gpt.split(["a", "b", "c"]) == (["a", "b"], ["c"])
    training, held_out = train_gpt.split([str(i) for i in range(100)])
    assert held_out == ["19", "39", "59", "79", "99"] and len(training) == 95


def test_an_interruption_saves_what_there_is(
    train_gpt: ModuleType, texts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loss, calls = train_gpt.chunked_ce_loss, []

    def interrupted(*tensors: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return loss(*tensors)

    monkeypatch.setattr(train_gpt, "chunked_ce_loss", interrupted)
    assert train_gpt.main(arguments(texts, tmp_path, steps=9)) == 130
    folder = tmp_path / "small"
    report = json.loads((folder / "report.json").read_text())
    assert report["interrupted"] is True and report["steps_done"] == len(losses(folder)) == 2
    assert report["validation"] is None and report["comparison"] is None
    assert (folder / "loss.png").exists() and (folder / "model" / "model.safetensors").exists()


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
def test_bad_input_is_one_line_and_exit_code_2(
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
def test_a_missing_gpu_is_named(train_gpt: ModuleType, capfd: pytest.CaptureFixture[str]) -> None:
    assert train_gpt.main(["--device", "cuda"]) == 2
    assert capfd.readouterr().err.count("\n") == 1


def test_the_closing_table_says_when_cores_were_busy(train_gpt):
    seconds = train_gpt.Seconds(0.2, 0.1, 0.4)
    comparison = {
        "step_seconds": {"F.cross_entropy": seconds},
        "loss_seconds": {"F.cross_entropy": seconds},
        "loss_extra_bytes": {"F.cross_entropy": 5 << 20},
        "gradient_difference": 1e-9,
        "largest_gradient": 1.0,
        "loss_difference": 0.0,
    }
    busy = train_gpt.table(comparison | {"cores_used_by_others": 1.25})
    assert "200 ms (100 - 400)" in busy and "other programs used 1.2 of" in busy
    assert "other programs" not in train_gpt.table(comparison | {"cores_used_by_others": 0.02})
