"""What `python -m bench audit` finds in the compiled kernels, held so that no change can lose it."""

import json
import os
import subprocess
import sys

import pytest
from helpers import ROOT

pytest.importorskip("triton")


def audit(tmp_path, *arguments):
    """In a process of its own, for an interpreted Triton cannot compile."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    out = tmp_path / "audit.json"
    program = [sys.executable, "-m", "bench", "audit", *arguments, "--json", str(out)]
    done = subprocess.run(program, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "Lower bounds" in done.stdout and "not measurements" in done.stdout
    return json.loads(out.read_text())


def of(found, kernel, part, **also):
    return [
        f
        for f in found
        if f["kernel"] == kernel and f["part"] == part and also.items() <= f.items()
    ]


@pytest.mark.long
def test_sm_90_bfloat16(tmp_path):
    vocabularies = (32000, 50257, 128256, 151936, 262144)
    found = audit(tmp_path, "--vocab", *map(str, vocabularies))
    assert not [f for f in found if f["spills"]]
    for vocab in vocabularies:
        (sums,) = of(found, "statistics", "sums", vocab=vocab)
        assert sums["instructions"] <= 7.5 and sums["exponentials"] <= 1.15
        assert sums["accesses"] == "LDG.E.128" and sums["registers"] <= 64
        folded, general = of(found, "gradient", "gradient", vocab=vocab)
        assert min(folded["instructions"], general["instructions"]) <= 5.5
        assert folded["accesses"] == "LDG.E.128 STG.E.128" and folded["registers"] <= 64
        (sums,) = of(found, "one pass", "sums", vocab=vocab)
        writing = of(found, "one pass", "gradient", vocab=vocab)
        assert sums["instructions"] + max(f["instructions"] for f in writing) <= 22
        assert sums["registers"] <= 64 and sums["ctas_per_sm"] >= 2
        assert {f["accesses"] for f in writing} == {"LDG.E.128 STG.E.128"}
    (cluster,) = of(found, "one pass, clusters", "whole row", vocab=128256)
    assert cluster["instructions"] <= 22 and cluster["ctas_per_sm"] >= 2


@pytest.mark.long
def test_pairs_of_rows(tmp_path):
    """Distillation: 16-byte accesses at an odd vocabulary, few instructions where no log is taken."""
    found = audit(tmp_path, "--vocab", "50257", "--pairs")
    assert not [f for f in found if f["spills"]] and len(found) == 9
    most = dict(forward=(17, 40, 40), reverse=(17, 40, 22), jsd=(17, 175, 135))
    for kind, limits in most.items():
        kernels = (f"pair statistics, {kind}", f"pair gradient, {kind}")
        (sums,), (terms,) = (of(found, kernels[0], part) for part in ("sums", "divergence"))
        (writing,) = of(found, kernels[1], "gradient")
        for loop, limit in zip((sums, terms, writing), limits, strict=True):
            assert loop["instructions"] <= limit and loop["registers"] <= 96
        assert sums["accesses"] == terms["accesses"] == "LDG.E.128"
        assert writing["accesses"] == "LDG.E.128 STG.E.128"


def test_against_liger(tmp_path):
    pytest.importorskip("liger_kernel")
    found = audit(tmp_path, "--vocab", "50257", "--against", "liger")
    theirs = sum(f["instructions"] for f in found if f["provider"] == "liger")
    assert theirs > 30  # 2-byte accesses: this is what an aligned window saves


@pytest.mark.long
def test_growth(tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    out = tmp_path / "growth.csv"
    program = [sys.executable, "-m", "bench", "audit", "--growth", "--csv", str(out)]
    subprocess.run(program, check=True, capture_output=True, env=environment, cwd=ROOT)
    header, *rows = (line.split(",") for line in out.read_text().splitlines())
    table = {(int(r[0]), int(r[1])): dict(zip(header, r, strict=True)) for r in rows}
    # Few rows are divided among programs, many are not; the buffers stay a sliver of the logits.
    assert table[1, 128256]["statistics_programs"] == "1x8 + 1"
    assert table[4096, 128256]["statistics_programs"].startswith("4096x1 ")
    for (n, v), row in table.items():
        logits = 2 * n * v
        assert int(row["partial_buffer_bytes"]) <= 8 * n + logits / 1000


@pytest.mark.long
def test_errors():
    program = [sys.executable, "-m", "bench", "audit", "--vocab", "none"]
    done = subprocess.run(program, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2 and "expected a number of classes, got 'none'" in done.stderr
