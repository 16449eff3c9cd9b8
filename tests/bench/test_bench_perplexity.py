"""python -m bench perplexity at a size that takes seconds."""

import csv

import pytest

from bench import measure, perplexity


@pytest.mark.long
@pytest.mark.skipif(not measure.memory_is_measurable(), reason="needs /proc")
def test_ours_takes_less_memory(tmp_path, capsys):
    pytest.importorskip("transformers")
    out = tmp_path / "out.csv"
    argv = "--context 128 --batch-size 8 --vocab 40000 --hidden 32 --threads 1 --csv".split()
    assert perplexity.main([*argv, str(out)]) == 0
    rows = {row["provider"]: float(row["value"]) for row in csv.DictReader(out.open())}
    logits = 8 * 128 * 40000 * 4
    assert rows["stock"] > logits
    printed = capsys.readouterr().out
    assert "mean NLL" in printed and "memory: evaluate_perplexity / stock" in printed
