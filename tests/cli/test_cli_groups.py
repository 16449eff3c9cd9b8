"""`chunked-ce perplexity --after` and `--group-by`."""

import json

import pytest

pytest.importorskip("transformers")

from language_models import TEXTS, byte_tokenizer, causal_lm

from chunked_ce import evaluate_perplexity
from chunked_ce.cli import main

CONTENTS = {"prose/a": TEXTS[0], "prose/b": TEXTS[1] + "\n", "code/c": TEXTS[2]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    causal_lm(bos_token_id=0, eos_token_id=0).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    for name, text in CONTENTS.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(text.encode())
    return folder


@pytest.fixture
def argv(folder):
    files = [str(folder / name) for name in CONTENTS]
    return ["perplexity", str(folder), "--device", "cpu", "--bos", "yes", "--text", *files]


def expected(**arguments):
    model = causal_lm(bos_token_id=0, eos_token_id=0)
    texts = list(CONTENTS.values())
    return evaluate_perplexity(model, text=texts, tokenizer=byte_tokenizer(), bos=True, **arguments)


def test_group_by_folder(argv, folder, tmp_path, capsys):
    out = tmp_path / "out.json"
    assert main([*argv, "--group-by", "folder", "--json", str(out)]) == 0
    report = expected(groups=["prose", "prose", "code"])
    written = json.loads(out.read_text())
    assert list(written["per_group"]) == [str(folder / "prose"), str(folder / "code")]
    bits = [group.bits_per_byte for group in report.per_group.values()]
    assert [g["bits_per_byte"] for g in written["per_group"].values()] == pytest.approx(bits)
    assert written["mean_group_bits_per_byte"] == pytest.approx(sum(bits) / 2)
    lines = capsys.readouterr().out.splitlines()
    last = [line.split() for line in lines[-5:]]
    assert last[0] == ["group", "tokens", "perplexity", "bits", "per", "byte"]
    assert last[1][0] == str(folder / "prose") and last[2][0] == str(folder / "code")
    assert last[1][-1] == f"{bits[0]:.4f}"
    assert last[3][:3] == ["mean", "of", "groups"] and last[3][-1] == f"{sum(bits) / 2:.4f}"
    assert last[4][:4] == ["all", "tokens,", "all", "bytes"]
    assert last[4][-1] == f"{report.bits_per_byte:.4f}"


def test_group_by_file_and_the_error_of_documents(argv, tmp_path, capsys):
    out = tmp_path / "out.json"
    assert main([*argv, "--group-by", "file", "--json", str(out)]) == 0
    report, written = expected(), json.loads(out.read_text())
    assert list(written["per_group"]) == argv[-3:]
    assert written["mean_group_perplexity"] == written["mean_document_perplexity"]
    error = written["mean_nll_document_stderr"]
    assert error == pytest.approx(report.mean_nll_document_stderr, rel=1e-5)
    of_tokens = written["mean_nll_stderr"]
    shown = f"standard error {of_tokens:.4f} over tokens, {error:.4f} over documents"
    assert shown in capsys.readouterr().out


def test_after_a_marker(argv, folder, tmp_path, capsys):
    """A space that is in each file."""
    out = tmp_path / "out.json"
    assert main([*argv, "--after", " ", "--json", str(out)]) == 0
    report, written = expected(after=" "), json.loads(out.read_text())
    assert written["nll_sum"] == pytest.approx(report.nll_sum, rel=1e-6)
    assert (written["tokens"], written["bytes"]) == (report.tokens, report.bytes)
    assert written["after"] == " " and "only what follows ' ' is scored" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("extra", "says"),
    [
        ("--after lengths", "--text: {folder}/prose/a does not contain the marker 'lengths'"),
        ("--after one --recipe lm-eval-rolling", "recipe lm-eval-rolling decides what is scored"),
    ],
)
def test_bad_input_is_one_line(argv, folder, capfd, extra, says):
    assert main([*argv, *extra.split()]) == 2
    out, err = capfd.readouterr()
    assert err.startswith("chunked-ce: ") and err.count("\n") == 1 and not out
    assert says.format(folder=folder) in err


def test_groups_of_what_a_recipe_joins(tmp_path, capfd):
    causal_lm(max_position_embeddings=600).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "text").write_text(TEXTS[0] * 9)
    argv = ["perplexity", str(tmp_path), "--text", str(tmp_path / "text"), "--device", "cpu"]
    capfd.readouterr()
    assert main([*argv, "--recipe", "llama.cpp-512", "--group-by", "file"]) == 2
    assert "recipe llama.cpp-512 joins the documents" in capfd.readouterr().err
