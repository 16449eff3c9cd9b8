"""python -m bench log_probabilities at a size that takes seconds."""

import csv

import pytest
import torch

from bench import log_probabilities, measure


@pytest.mark.long
@pytest.mark.skipif(not measure.memory_is_measurable(), reason="needs /proc")
def test_ours_takes_less_memory(tmp_path, capsys):
    pytest.importorskip("transformers")
    out = tmp_path / "out.csv"
    argv = "--context 128 --batch-size 8 --vocab 40000 --hidden 32 --threads 1 --csv".split()
    assert log_probabilities.main([*argv, str(out)]) == 0
    rows = {row["provider"]: float(row["value"]) for row in csv.DictReader(out.open())}
    assert rows["stock"] > 2 * 8 * 128 * 40000 * 4 and rows["enable"] < 0.6 * rows["stock"]
    assert "memory: enable / stock" in capsys.readouterr().out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_steps_of_trl(dtype):
    """The programs' own form of the two is TRL's."""
    utils = pytest.importorskip("trl.trainer.utils")
    logits, ids = torch.randn(2, 70, 11).to(dtype), torch.randint(11, (2, 70))
    ours = log_probabilities.log_probabilities_and_entropies(logits, ids)
    for a, e in zip(ours, utils.selective_log_softmax_and_entropy(logits, ids), strict=True):
        assert torch.equal(a, e)
