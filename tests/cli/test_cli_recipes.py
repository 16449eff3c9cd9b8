"""`chunked-ce perplexity --recipe`: what is printed, what is written, and what is refused."""

import json

import pytest

pytest.importorskip("transformers")


from language_models import TEXTS, causal_lm, tokenizer_with_bos

from chunked_ce import evaluate_perplexity
from chunked_ce.cli import main


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    causal_lm(max_position_embeddings=600, bos_token_id=0, eos_token_id=0).save_pretrained(folder)
    tokenizer_with_bos().save_pretrained(folder)
    for name, text in dict(a=TEXTS[0] * 4, b=TEXTS[2] * 4).items():
        (folder / f"{name}.txt").write_text(text, newline="")
    return folder


@pytest.fixture
def argv(folder):
    files = [str(folder / "a.txt"), str(folder / "b.txt")]
    return ["perplexity", str(folder), "--device", "cpu", "--text", *files]


def test_the_report_names_the_recipe(argv, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    out, picture = tmp_path / "out.json", tmp_path / "out.png"
    extra = ["--recipe", "llama.cpp-512", "--json", str(out), "--plot", str(picture)]
    assert main([*argv, *extra]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == (
        "recipe llama.cpp-512: windows of 512, second half scored, BOS 0 at the start of each"
    )
    assert not any("a.txt" in line for line in lines)  # joined: no line for each file
    report = json.loads(out.read_text())
    texts = [TEXTS[0] * 4, TEXTS[2] * 4]
    model = causal_lm(max_position_embeddings=600, bos_token_id=0, eos_token_id=0)
    expected = evaluate_perplexity(
        model, text=texts, tokenizer=tokenizer_with_bos(), recipe="llama.cpp-512"
    )
    assert report["recipe"] == "llama.cpp-512"
    assert report["perplexity"] == pytest.approx(expected.perplexity, rel=1e-6)
    assert f"standard error {report['perplexity_stderr']:.4f}" in lines[2]
    assert report["per_document"][0]["file"] == " + ".join(argv[-2:])
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_documents_that_stay_apart_have_a_line_each(argv, capsys):
    assert main([*argv, "--recipe", "lm-eval-rolling"]) == 0
    out = capsys.readouterr().out
    assert "recipe lm-eval-rolling: each document in windows of the model's context" in out
    assert "token 0 before each document" in out and "b.txt" in out


@pytest.mark.parametrize(
    ("extra", "says"),
    [
        ("--recipe gptq-2048", "recipe gptq-2048 needs a context of 2048 tokens, but the model has positions for 600"),
        ("--recipe llama.cpp-512 --stride 100", "--stride is 100, but recipe llama.cpp-512 has stride 512"),
        ("--recipe llama.cpp-512 --context 256", "--context is 256, but recipe llama.cpp-512 has context 512"),
        ("--recipe hf-stride --eos yes", "--eos is True, but recipe hf-stride has eos False"),
        ("--recipe hf-stride --full-last-window", "--full-last-window is True, but recipe hf-stride"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line(argv, capfd, extra, says):
    assert main([*argv, *extra.split()]) == 2
    out, err = capfd.readouterr()
    assert err.startswith("chunked-ce: ") and err.count("\n") == 1 and says in err and not out


def test_an_unknown_recipe_lists_those_there_are(argv, capfd):
    with pytest.raises(SystemExit) as exit:
        main([*argv, "--recipe", "gptq"])
    err = capfd.readouterr().err
    assert exit.value.code == 2 and err.count("\n") == 1
    assert all(
        name in err for name in ("gptq-2048", "llama.cpp-512", "hf-stride", "lm-eval-rolling")
    )
