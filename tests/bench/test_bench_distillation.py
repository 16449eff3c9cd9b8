"""`python -m bench distillation` at a size that takes a second."""

import csv

import pytest
import torch

from bench import distillation
from bench.cases import LINEAR, Case

SMALL = "--tokens 40 --hidden 16 --teacher-hidden 24 --vocab 500 --repeats 2 --threads 1".split()


@pytest.mark.long
def test_table_and_csv(tmp_path, capsys):
    path = tmp_path / "distillation.csv"
    options = ["--kind", "jsd", "--dtype", "float32", "bfloat16", "--csv", str(path)]
    assert distillation.main([*SMALL, *options]) == 0
    rows = list(csv.DictReader(path.open()))
    assert {r["mode"] for r in rows} == {"forward+backward, jsd"}
    assert {(r["provider"], r["dtype"]) for r in rows} == {
        (p, d) for p in ("eager", "chunked_ce") for d in ("float32", "bfloat16")
    }
    assert all(r["note"] == "teacher D = 24" and r["device"] for r in rows)
    assert all(float(r["value"]) > 0 for r in rows if r["metric"] == "seconds")
    printed = capsys.readouterr().out
    assert printed.count("gradient error") == 2 and "other processes" in printed


def test_every_kind_agrees_with_eager():
    case = Case(LINEAR, 40, 16, 500, torch.float32)
    for kind in distillation.KINDS:
        assert "loss error" in distillation.differences(case, kind, distillation.batch_of(case, 24))


def test_a_wrong_result_is_not_timed(monkeypatch, capsys):
    monkeypatch.setitem(
        distillation.LOSSES, distillation.OURS, lambda *given: 1.01 * distillation.ours(*given)
    )
    assert distillation.main(SMALL) == 1
    assert "WRONG  chunked_ce is wrong: loss by 1.0e-02" in capsys.readouterr().out


def test_eager_is_the_definition():
    case = Case(LINEAR, 6, 8, 30, torch.float64)
    x, w, tx, tw = distillation.batch_of(case, 12)
    p, q = (x @ w.T).softmax(-1), (tx @ tw.T).softmax(-1)
    m = (p + q) / 2
    kl = lambda a, b: (a * (a / b).log()).sum(-1).mean()  # noqa: E731
    truths = dict(forward=kl(q, p), reverse=kl(p, q), jsd=(kl(q, m) + kl(p, m)) / 2)
    for kind, truth in truths.items():
        torch.testing.assert_close(distillation.eager(kind, x, w, tx, tw), truth)
