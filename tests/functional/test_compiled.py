"""Compile every kernel on this machine. No kernel spills.

This file builds float16 for one GPU with the installed Triton. `make compile` builds all dtypes for all GPUs with
every version.
"""

import json
import os
import subprocess
import sys

import pytest
from helpers import ROOT

pytest.importorskip("triton")


def compile_kernels(*arguments, **variables):
    """Run in its own process, because an interpreted Triton cannot compile."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | variables
    program = [sys.executable, "-m", "bench", "compile", *arguments]
    return subprocess.run(program, capture_output=True, text=True, env=environment, cwd=ROOT)


def test_float16_spills(tmp_path):
    done = compile_kernels(
        "--dtype", "float16", "--target", "gfx942", "--json", str(tmp_path / "built.json")
    )
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    built = json.loads((tmp_path / "built.json").read_text())
    assert {b["kernel"] for b in built} == {
        "token_stats_kernel", "merge_parts_kernel", "token_grad_kernel", "loss_and_grad_kernel",
        "binary_kernel", "pair_stats_kernel", "pair_grad_kernel",
    }  # fmt: skip
    assert {b["target"] for b in built} == {"gfx942"}
    assert all(b["size"] > 0 and b["spills"] == 0 for b in built)
    assert "FP_FUSION" not in done.stderr  # Triton 3.9 warns where fusion is not stated


def test_interpreted_triton_error():
    done = compile_kernels(TRITON_INTERPRET="1")
    assert done.returncode == 2 and "TRITON_INTERPRET=1" in done.stderr


def test_fault_names(monkeypatch):
    """Check the lines about compile errors, spills and too many instructions."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    from bench import compile as program

    fine = program.Variant("sm_90", "stats", "token_stats_kernel", 40, 0, 9)
    bad = [fine._replace(spills=8), fine._replace(error="CompilationError: None")]
    counts = {"statistics": 7.6, "gradient": 5.4, "one pass": 13.2}
    lines = program.faults([fine, *bad], [counts])
    assert [line.split(": ", 1)[1] for line in lines] == [
        "CompilationError: None", "8 bytes spilled", "7.60 instructions per logit, at most 7.5 expected"
    ]  # fmt: skip
    assert program.faults([fine], [counts | {"statistics": 7.4}]) == []
