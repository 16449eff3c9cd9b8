"""`chunked-ce compare` on models saved here."""

import json
import math
import shutil

import pytest
import torch
from language_models import TEXTS, byte_tokenizer, causal_lm

from chunked_ce import compare_models
from chunked_ce.cli import compare, main
from chunked_ce.cli.comparison_plot import draw
from chunked_ce.cli.comparison_table import table
from chunked_ce.evaluation.pair_scoring import PairScoring

for needed in ("matplotlib", "tokenizers", "transformers"):
    pytest.importorskip(needed)


def base_model():
    model = causal_lm()
    torch.manual_seed(4)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter) * parameter.std(correction=0))
    return model


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for name, model in (("model", causal_lm()), ("base", base_model())):
        model.save_pretrained(folder / name)
        byte_tokenizer().save_pretrained(folder / name)
    for place, i in (("prose", 0), ("prose", 1), ("code", 2)):
        (folder / place).mkdir(exist_ok=True)
        (folder / place / f"{i}.txt").write_bytes(TEXTS[i].encode())
    return folder


def arguments(models, *more, files=("prose/0.txt", "prose/1.txt", "code/2.txt")):
    texts = [str(models / file) for file in files]
    folders = [str(models / "model"), str(models / "base")]
    return ["compare", *folders, "--device", "cpu", *more, "--text", *texts]


def test_report_json_and_picture(models, tmp_path, capsys):
    out, picture = tmp_path / "out.json", tmp_path / "out.png"
    more = ["--context", "16", "--stride", "5", "--bos", "yes", "--seed", "2"]
    argv = arguments(models, *more, "--json", str(out), "--plot", str(picture))
    assert main(argv) == 0
    report = json.loads(out.read_text(), parse_constant=pytest.fail)
    expected = compare_models(
        causal_lm(), base_model(), text=TEXTS, tokenizer=byte_tokenizer(), bos=True, seed=2,
        context_length=16, stride=5, per_document=True, groups=["prose", "prose", "code"],
    ).to_dict()  # fmt: skip
    for name in ("mean_kl", "perplexity", "log_perplexity_ratio", "correlation", "rms_delta_p"):
        for part, value in expected[name].items():
            assert report[name][part] == (
                value if value is None else pytest.approx(value, rel=1e-5)
            )
    assert list(report["per_group"]) == [str(models / "prose"), str(models / "code")]
    assert [d["file"] for d in report["per_document"]] == argv[-3:]
    assert [d["tokens"] for d in report["per_document"]] == [
        d["tokens"] for d in expected["per_document"]
    ]
    assert (report["dtype"], report["base_dtype"], report["device"]) == (*["float32"] * 2, "cpu")
    assert picture.read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    lines = {line[:36].strip(): line[36:].split() for line in printed.splitlines()}
    for row, name, factor in (
        ("mean KL(base‖model)", "mean_kl", 1), ("perplexity", "perplexity", 1),
        ("perplexity of the base", "base_perplexity", 1), ("same top token", "same_top", 100),
        ("log of their ratio", "log_perplexity_ratio", 1), ("RMS Δp", "rms_delta_p", 100),
    ):  # fmt: skip
        shown = [float(number) for number in lines[row][:3]]
        measures = [factor * number for number in expected[name].values()]
        assert shown == pytest.approx(measures, rel=6e-3, abs=6e-5)
    assert [line.split()[0] for line in printed.splitlines()[-7:] if line] == [
        *argv[-3:], "folder", str(models / "prose"), str(models / "code")
    ]  # fmt: skip


def test_a_model_against_itself_and_in_bf16(models, tmp_path, capsys):
    folder, out = str(models / "model"), tmp_path / "out.json"
    argv = ["compare", folder, folder, "--text", str(models / "prose" / "0.txt"), "--device", "cpu"]
    picture = tmp_path / "out.svg"
    assert main([*argv, "--json", str(out), "--plot", str(picture)]) == 0
    report = json.loads(out.read_text())
    assert report["mean_kl"] == {"value": 0.0, "stderr": 0.0, "document_stderr": None}
    assert report["same_top"]["value"] == 1.0 and report["per_group"] is None
    assert picture.read_bytes().startswith(b"<?xml")
    assert f"{folder} (float32) against {folder} (float32): " in capsys.readouterr().out
    assert main([*argv, "--json", str(out), "--dtype", "bf16"]) == 0
    report = json.loads(out.read_text())
    assert (report["dtype"], report["base_dtype"]) == ("bfloat16", "float32")
    assert 0 < report["mean_kl"]["value"] < 0.1
    assert f"{folder} (bfloat16) against {folder} (float32)" in capsys.readouterr().out


def test_turns_change_nothing(models, tmp_path, capsys):
    reports = []
    for more in ([], ["--take-turns"]):
        out = tmp_path / "out.json"
        assert main(arguments(models, *more, "--json", str(out))) == 0
        reports.append(json.loads(out.read_text()))
    assert [report.pop("took_turns") for report in reports] == [False, True]
    assert reports[0] == reports[1]


def test_json_to_the_standard_output(models, capsys):
    assert main(arguments(models, "--json", "-")) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["tokens"] > 0 and "mean KL(base‖model)" in err


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("never", [5, 9], ids=["one token", "a token that comes late"])
def test_infinite_divergences(never, tmp_path):
    """A model that rules out what the base expects: every number says so, the picture too."""

    def base(ids):
        return torch.zeros(*ids.shape, 16)

    def model(ids):
        z = torch.zeros(*ids.shape, 16)
        z[ids == never, 9] = -torch.inf
        return z

    ids = [1, 2, 3, 4, 5, 6, 7, 8] * 30 + [9, 9, 1]
    report = compare_models(model, base, [ids], context_length=300)
    assert report.kl_quantiles[0.5] == 0 and report.kl_quantiles[1.0] == math.inf
    assert report.mean_kl == (math.inf, None, None)
    rows = {line[:28].strip(): line[28:].split() for line in table(report, "a", "b").splitlines()}
    assert rows["mean KL(base‖model)"] == ["inf", "nats", "per", "token"]
    assert json.loads(report.to_json())["mean_kl"]["value"] == "inf"
    for place in (tmp_path / "a.png", tmp_path / "b.svg"):
        draw(report, "a", "b", place)
        assert place.stat().st_size > 10_000
    words = place.read_text()  # matplotlib writes each text of an SVG in a comment
    infinite = int(report.per_token.kl.isinf().sum())
    assert f"without {infinite} infinite token" in words and "infinite in " in words


def interrupt_at(monkeypatch, call):
    score, calls = PairScoring._compare, []

    def interrupted(self, *arguments):
        calls.append(1)
        if len(calls) == call:
            raise KeyboardInterrupt
        return score(self, *arguments)

    monkeypatch.setattr(PairScoring, "_compare", interrupted)


def test_ctrl_c_reports_what_there_is(models, tmp_path, monkeypatch, capsys):
    interrupt_at(monkeypatch, 3)
    out, picture = tmp_path / "out.json", tmp_path / "out.png"
    more = ["--batch-size", "1", "--json", str(out), "--plot", str(picture)]
    assert main(arguments(models, *more)) == 130
    report = json.loads(out.read_text(), parse_constant=pytest.fail)
    assert report["partial"] is True and report["windows_scored"] == 2 < report["windows"]
    printed = capsys.readouterr().out
    assert printed.startswith("PARTIAL") and f"2 of {report['windows']} windows" in printed
    assert "not scored" in printed and picture.exists()


def test_an_interruption_before_anything_was_scored(models, monkeypatch, capsys):
    interrupt_at(monkeypatch, 1)
    assert main(arguments(models)) == 130
    assert capsys.readouterr().err.endswith("chunked-ce: interrupted before anything was scored\n")


def test_much_text_is_announced_step_by_step(models, monkeypatch, capfd):
    monkeypatch.setattr(compare, "MUCH_TEXT", 10)
    assert main(arguments(models)) == 0
    err = capfd.readouterr().err
    steps = ["MB; loading", "tokenizing 3 documents", "scoring ", "KL="]
    places = [err.index(step) for step in steps]
    assert places == sorted(places)


@pytest.fixture(scope="module")
def misfits(models, tmp_path_factory):
    """Folders of bases that read other tokens, fewer, or a shorter context."""
    folder = tmp_path_factory.mktemp("misfits")
    causal_lm(vocab_size=290).save_pretrained(folder / "narrow")
    causal_lm(vocab_size=280).save_pretrained(folder / "unknown")
    causal_lm(max_position_embeddings=16).save_pretrained(folder / "short")
    causal_lm(vocab_size=320).save_pretrained(folder / "padded")
    for name in ("narrow", "unknown", "short", "padded"):
        byte_tokenizer().save_pretrained(folder / name)
    shutil.copytree(models / "base", folder / "moved")
    path = folder / "moved" / "tokenizer.json"
    contents = json.loads(path.read_text())
    vocab = contents["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    path.write_text(json.dumps(contents))
    shutil.copytree(models / "base", folder / "unmerged")
    path = folder / "unmerged" / "tokenizer.json"
    contents = json.loads(path.read_text())
    contents["model"]["merges"] = contents["model"]["merges"][:5]
    path.write_text(json.dumps(contents))
    return folder


@pytest.mark.parametrize(
    ("base", "more", "says"),
    [
        ("narrow", "", "vocabularies differ: the model has 300 classes and the base 290, and the "
         "tokenizer has 300 tokens; pass --vocab-size 290"),
        ("unknown", "", "unknown: --text: {t} has token id"),
        ("moved", "", "tokenizers differ: 'a' is 65 in the model's and 66 in the base's (2 such"),
        ("unmerged", "", "--text: {t} has other token ids in the base's tokenizer: "),
        ("short", "--context 32", "short: context_length is 32, but the model has positions for 16"),
        ("short", "--stride 17", "stride is 17, expected 1 to context_length, 16"),
        ("padded", "--vocab-size 301", "vocab_size is 301, expected more than the highest token id"),
        ("padded", "--seed -1", "seed is -1, expected at least 0"),
        ("nothing", "", "nothing is downloaded"),
        ("{m}/base", "--json {m}/base/config.json", "is a file of a model, which it would overwrite"),
        ("{m}/base", "--plot x.gif", "--plot: expected a name that ends in .png, .pdf or .svg"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_and_exit_code_2(models, misfits, capfd, base, more, says):
    text = models / "prose" / "0.txt"
    base = base.format(m=models) if base.startswith("{m}") else str(misfits / base)
    argv = ["compare", str(models / "model"), base, "--text", str(text), "--device", "cpu"]
    capfd.readouterr()
    assert main([*argv, *more.format(m=models).split()]) == 2
    out, err = capfd.readouterr()
    assert err.startswith("chunked-ce: ") and err.count("\n") == 1 and not out
    assert says.format(t=text) in err, err


def test_an_empty_text(models, tmp_path, capfd):
    (tmp_path / "empty").write_bytes(b"")
    argv = ["compare", str(models / "model"), str(models / "base"), "--text"]
    assert main([*argv, str(tmp_path / "empty")]) == 2
    assert "empty: empty; expected a file of text" in capfd.readouterr().err


def test_padding_of_the_base_and_a_shorter_context(models, misfits, capsys):
    text = str(models / "prose" / "0.txt")
    for base, says in (("padded", "300 classes"), ("short", "of up to 16 tokens")):
        argv = ["compare", str(models / "model"), str(misfits / base), "--device", "cpu"]
        assert main([*argv, "--text", text]) == 0
        assert says in capsys.readouterr().out
