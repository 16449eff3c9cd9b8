"""`chunked-ce perplexity` on a model saved here."""

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from language_models import TEXTS, brute_force, byte_tokenizer, causal_lm

from chunked_ce.cli import files, main, perplexity
from chunked_ce.cli.perplexity_plot import binned
from chunked_ce.evaluation.report import PerplexityReport
from chunked_ce.evaluation.scoring import Scoring

for needed in ("matplotlib", "tokenizers", "transformers"):
    pytest.importorskip(needed)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    causal_lm().save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    for i, text in enumerate(TEXTS):
        (folder / f"{i}.txt").write_bytes(text.encode())
    return folder


def texts(folder):
    return [str(folder / f"{i}.txt") for i in range(len(TEXTS))]


def test_report_json_and_picture(folder, tmp_path, capsys):
    out, picture = tmp_path / "out.json", tmp_path / "out.png"
    argv = ["perplexity", str(folder), "--text", *texts(folder), "--context", "16", "--stride", "5"]
    argv += ["--bos", "yes", "--device", "cpu", "--json", str(out), "--plot", str(picture)]
    assert main(argv) == 0
    report = json.loads(out.read_text(), parse_constant=pytest.fail)
    tokenizer, model = byte_tokenizer(), causal_lm()
    ids = [torch.tensor([tokenizer.bos_token_id, *tokenizer(t)["input_ids"]]) for t in TEXTS]
    nll = [brute_force(model, d, 16, 5) for d in ids]
    assert report["nll_sum"] == pytest.approx(sum(nll), rel=1e-6)
    assert [d["nll_sum"] for d in report["per_document"]] == pytest.approx(nll, rel=1e-6)
    assert report["tokens"] == sum(map(len, ids)) - 3
    assert report["bytes"] == sum(len(text.encode()) for text in TEXTS)
    assert report["words"] == sum(len(text.split()) for text in TEXTS)
    assert len(report["per_position"]) == 16 and report["partial"] is False
    printed = capsys.readouterr().out
    for measure in ("perplexity", "bits_per_token", "bits_per_byte", "accuracy"):
        assert f"{report[measure]:.4f}" in printed
    assert f"BOS {tokenizer.bos_token_id}, EOS not added" in printed and "stride 5" in printed
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_dtype_and_full_last_window(folder, capsys):
    argv = ["perplexity", str(folder), "--text", texts(folder)[0], "--no-rank", "--device", "cpu"]
    assert main([*argv, "--dtype", "float64"]) == 0
    exact = capsys.readouterr().out
    assert main([*argv, "--dtype", "bfloat16", "--full-last-window", "--eos", "yes"]) == 0
    other = capsys.readouterr().out
    assert exact != other and "accuracy" not in exact and "EOS 0" in other


def test_ctrl_c_reports_what_there_is(folder, tmp_path, monkeypatch, capsys):
    score, calls = Scoring._batch, []

    def interrupted(self, chosen):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return score(self, chosen)

    monkeypatch.setattr(Scoring, "_batch", interrupted)
    out, picture = tmp_path / "out.json", tmp_path / "out.png"
    argv = ["perplexity", str(folder), "--text", *texts(folder), "--batch-size", "1"]
    argv += ["--json", str(out), "--plot", str(picture), "--device", "cpu"]
    assert main(argv) == 130
    report = json.loads(out.read_text())
    assert report["partial"] is True and report["tokens"] > 0 and report["bytes"] is None
    begun = sum(document["tokens"] > 0 for document in report["per_document"])
    assert 0 < begun == report["documents"] and report["documents_given"] == len(TEXTS)
    assert report["windows_scored"] == 2 < report["windows"]
    printed = capsys.readouterr().out
    assert "PARTIAL" in printed and picture.exists()
    some = f"{begun} of {len(TEXTS)} documents" if begun < len(TEXTS) else f"{begun} documents"
    assert f"{some}, 2 of {report['windows']} windows" in printed
    mean = f"mean of the perplexities of {some}, partly scored"
    assert (mean in printed) == (begun > 1)


def test_an_interruption_before_anything_was_scored(folder, monkeypatch, capsys):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(Scoring, "_batch", interrupted)
    argv = ["perplexity", str(folder), "--text", *texts(folder), "--device", "cpu"]
    assert main(argv) == 130
    assert capsys.readouterr().err.endswith("chunked-ce: interrupted before anything was scored\n")


@pytest.mark.long
def test_a_real_ctrl_c(folder, tmp_path):
    (tmp_path / "long.txt").write_text(TEXTS[0] * 4000)
    command = [sys.executable, "-m", "chunked_ce.cli", "perplexity", str(folder), "--device", "cpu"]
    command += ["--text", str(tmp_path / "long.txt"), "--batch-size", "1", "--stride", "1"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ
    )
    time.sleep(20)  # loading takes seconds, the text minutes
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "PARTIAL" in out and "Traceback" not in err


@pytest.mark.parametrize(("tokens", "first"), [(40, [1, 2, 3, 4]), (2, [15**0.5])])
def test_positions_are_binned_without_losing_any(tokens, first):
    positions = [PerplexityReport(float(i), tokens, nll_square_sum=1.0) for i in range(1, 129)]
    bins = binned(positions)
    assert sum(r.tokens for _, r in bins) == 128 * tokens
    assert sum(r.nll_sum for _, r in bins) == sum(range(1, 129))
    assert [x for x, _ in bins][: len(first)] == pytest.approx(first)
    assert all(r.tokens >= 30 for _, r in bins) and 100 < bins[-1][0] < 128
    assert binned(positions[:1]) == [(1.0, positions[0])] and binned([]) == []


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        ("{m} --text {t}/empty", "empty: empty; expected a file of text"),
        ("{m} --text {t}/one", "--text: {t}/one has 1 token"),
        ("{m} --text {t}/one", "leave it out, or pass --bos yes"),
        ("{m} --text - -", "--text: - is given twice"),
        ("{m} --text {t}/latin", "latin: not UTF-8 at byte 2"),
        ("{m} --text {t}/none", "none: No such file or directory"),
        ("{m} --text {t}", "Is a directory"),
        ("{m} --text {t}/good --context 1", "context_length is 1, expected at least 2"),
        ("{m} --text {t}/good --context 33", "the model has positions for 32 tokens"),
        ("{m} --text {t}/good --stride 0", "stride is 0, expected 1 to context_length, 32"),
        ("{m} --text {t}/good --stride 33", "stride is 33"),
        ("{m} --text {t}/good --batch-size 0", "batch_size is 0"),
        ("{m} --text {t}/good --bos 300", "token id 300, but the model's are 0 to 299"),
        ("{m} --text {t}/good --device nonsense", "--device: 'nonsense' cannot be used here"),
        ("{m} --text {t}/good --plot {t}/x.gif", "--plot: expected a name that ends in .png, .pdf or .svg"),
        ("{m} --text {t}/good --plot {t}/no/x.png", "--plot: the folder '{t}/no' does not exist"),
        ("{m} --text {t}/good --json {t}/no/x", "--json: the folder '{t}/no' does not exist"),
        ("{m} --text {t}/good --json /proc/foo.json", "--json: no file can be written"),
        ("{m} --text {t}/good --plot /proc/foo.png", "--plot: no file can be written"),
        ("{t} --text {t}/good", "is no model folder: it has no config.json"),
        ("{t}/good --text {t}/good", "is a file, expected the folder of a model"),
        ("{t}/hollow --text {t}/good", "has no tokenizer files, such as tokenizer.json"),
        ("{t}/run --text {t}/good", "has no config.json; did you mean '{t}/run/model'?"),
        ("{t}/pickled --text {t}/good", "cannot be loaded as a causal LM"),
        ("{t}/adapter --text {t}/good", "has an adapter without adapter_model.safetensors"),
        ("{t}/kernel --text {t}/good", "config.json has attn_implementation 'someone/kernel'"),
        ("{t}/nested --text {t}/good", "'someone/kernel'}}, code from elsewhere, and none is run"),
        ("no-one/no-model --text {t}/good", "nothing is downloaded"),
        ("{m} --text /dev/zero", "/dev/zero: a device; expected a file of text"),
        ("{m} --text {t}/good --json {t}/good", "good' is a file of --text, which it would overwrite"),
        ("{m} --text {t}/good --json {t}/link", "link' is a file of --text, which it would overwrite"),
        ("{m} --text {t}/good --json {m}/config.json", "is a file of a model, which it would overwrite"),
        ("{m} --text {t}/good --json {t}/a.png --plot {t}/x/../a.png", "is that of --json"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_and_exit_code_2(folder, tmp_path, capfd, bad, says):
    (tmp_path / "good").write_text("some words and more of them")
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "one").write_text("a")
    (tmp_path / "latin").write_bytes("naïve".encode("latin-1"))
    (tmp_path / "hollow").mkdir()
    (tmp_path / "hollow" / "config.json").write_text("{}")
    (tmp_path / "pickled").mkdir()
    (tmp_path / "run" / "model").mkdir(parents=True)
    (tmp_path / "run" / "model" / "config.json").write_text("{}")
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "pickled" / name).write_bytes((folder / name).read_bytes())
    torch.save({}, tmp_path / "pickled" / "pytorch_model.bin")
    (tmp_path / "link").symlink_to(tmp_path / "good")
    (tmp_path / "x").mkdir()
    config = json.loads((folder / "config.json").read_text())
    code = dict(attn_implementation="someone/kernel")
    nested = dict(text_config=dict(_attn_implementation={"": "someone/kernel"}))
    for name, extra in dict(kernel=code, nested=nested, adapter={}).items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config | extra))
        (tmp_path / name / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert main(["perplexity", *bad.format(m=folder, t=tmp_path).split()]) == 2
    out, err = capfd.readouterr()
    says = says.format(t=tmp_path)
    assert err.startswith("chunked-ce: ") and err.count("\n") == 1 and says in err and not out
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


def test_an_output_is_whole_or_what_it_was(folder, tmp_path, monkeypatch, capsys):
    out, link = tmp_path / "out.json", tmp_path / "link.json"
    out.write_text("before")
    link.symlink_to(out)
    argv = ["perplexity", str(folder), "--text", texts(folder)[0], "--device", "cpu", "--json"]

    def stopped(self, text):
        with self.open("w") as file:
            file.write(text[:10])
        raise error

    for error in (KeyboardInterrupt(), OSError(28, "No space left on device")):
        with monkeypatch.context() as patch:
            patch.setattr(Path, "write_text", stopped)
            if isinstance(error, OSError):
                assert main([*argv, str(out)]) == 2
                assert "out.json: No space left on device" in capsys.readouterr().err
            else:
                assert main([*argv, str(out)]) == 130
                assert capsys.readouterr().err == "chunked-ce: interrupted\n"
        assert out.read_text() == "before" and sorted(tmp_path.iterdir()) == [link, out]
    assert main([*argv, str(link)]) == 0
    assert link.is_symlink() and json.loads(out.read_text())["tokens"] > 0
    assert main([*argv, "/dev/null"]) == 0


@pytest.mark.parametrize("bad", ["--context x", "--bos perhaps", "--unknown", "--dtype int8"])
def test_what_argparse_rejects(folder, bad, capfd):
    with pytest.raises(SystemExit) as exit:
        main(["perplexity", str(folder), "--text", "x", *bad.split()])
    err = capfd.readouterr().err
    assert exit.value.code == 2 and err.startswith("chunked-ce: ") and err.count("\n") == 1


def test_text_from_the_standard_input_and_json_to_the_output(folder, monkeypatch, capsys):
    text = io.TextIOWrapper(io.BytesIO(TEXTS[0].encode()))
    monkeypatch.setattr(files.sys, "stdin", text)
    argv = ["perplexity", str(folder), "--text", "-", texts(folder)[1], "--device", "cpu"]
    assert main([*argv, "--json", "-", "--bos", "yes"]) == 0
    out, err = capsys.readouterr()
    report = json.loads(out, parse_constant=pytest.fail)
    assert report["bytes"] == sum(len(t.encode()) for t in TEXTS[:2]) and "perplexity" in err
    assert [document["file"] for document in report["per_document"]] == ["-", texts(folder)[1]]
    assert not Path("-").exists()


def test_json_says_what_was_used(folder, tmp_path, capsys):
    out = tmp_path / "out.json"
    argv = ["perplexity", str(folder), "--text", texts(folder)[1], "--json", str(out)]
    assert main([*argv, "--device", "cpu", "--dtype", "bf16"]) == 0
    report = json.loads(out.read_text())
    assert (report["dtype"], report["device"]) == ("bfloat16", "cpu")
    assert [p["context_tokens"] for p in report["per_position"][:3]] == [1, 2, 3]
    scored = [p for p in report["per_position"] if not p["tokens"]]
    assert scored == [] or all(p["perplexity"] is None for p in scored)
    assert main([*argv, "--device", "cpu"]) == 0
    assert json.loads(out.read_text())["dtype"] == "float32"


def test_a_table_by_file(folder, capsys):
    argv = ["perplexity", str(folder), "--text", *texts(folder), "--device", "cpu", "--bos", "yes"]
    assert main(argv) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-4].split() == ["file", "tokens", "perplexity", "bits", "per", "byte"]
    total = 0
    for line, file in zip(lines[-3:], texts(folder), strict=True):
        name, tokens, perplexity, bits = line.split()
        assert name == file and float(perplexity) > 1 and float(bits) > 0
        total += int(tokens)
    assert f"per token, {total} tokens" in lines[1]


@pytest.mark.parametrize("suffix, start", [(".pdf", b"%PDF"), (".svg", b"<?xml")])
def test_other_kinds_of_pictures(folder, tmp_path, suffix, start, capsys):
    picture = tmp_path / f"out{suffix}"
    argv = ["perplexity", str(folder), "--text", texts(folder)[1], "--device", "cpu"]
    assert main([*argv, "--plot", str(picture)]) == 0
    assert picture.read_bytes().startswith(start)


def test_much_text_is_announced_step_by_step(folder, monkeypatch, capfd):
    monkeypatch.setattr(perplexity, "MUCH_TEXT", 10)
    assert main(["perplexity", str(folder), "--text", *texts(folder), "--device", "cpu"]) == 0
    err = capfd.readouterr().err
    size = sum(len(t.encode()) for t in TEXTS) / 1e6
    steps = [f"read {size:.1f} MB; loading", "tokenizing 3 documents, 0.0 M characters", "scoring "]
    places = [err.index(step) for step in steps]
    assert places == sorted(places) and "windows" in err


def headless(folder, family="Llama", **config):
    causal_lm(family, **config).model.save_pretrained(folder)


def changed(folder, **config):
    causal_lm("Llama").save_pretrained(folder)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))


def cut(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:5000])


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (headless, "has no weights for lm_head.weight, which would be random"),
        (lambda d: changed(d, num_hidden_layers=3), "has no weights for .* and 6 more, which would"),
        (lambda d: changed(d, vocab_size=310), "other sizes than config.json says"),
        (cut, "cannot be loaded as a causal LM: SafetensorError: "),
        (lambda d: (d / "config.json").write_text("[]"), "cannot be loaded as a"),
        (lambda d: (d / "tokenizer.json").write_text("{}"), "as a tokenizer: KeyError: 'added_tokens'"),
    ],
    ids=["no head", "too few layers", "other sizes", "cut off", "config.json of []", "empty tokenizer"],
)  # fmt: skip
def test_a_spoilt_folder_is_one_line_and_exit_code_2(folder, tmp_path, capfd, spoil, says):
    spoilt = tmp_path / "model"
    shutil.copytree(folder, spoilt)
    spoil(spoilt)
    capfd.readouterr()  # bars of saving
    assert main(["perplexity", str(spoilt), "--text", texts(folder)[1], "--device", "cpu"]) == 2
    out, err = capfd.readouterr()
    assert err.startswith("chunked-ce: ") and err.count("\n") == 1 and not out
    assert re.search(says, err), err


def test_a_tied_head_is_not_missing(folder, tmp_path, capsys):
    tied = tmp_path / "model"
    shutil.copytree(folder, tied)
    headless(tied, tie_word_embeddings=True)
    assert main(["perplexity", str(tied), "--text", texts(folder)[0], "--device", "cpu"]) == 0
    assert "perplexity" in capsys.readouterr().out
