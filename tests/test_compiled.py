"""Every kernel built for the GPUs it is meant for, on this machine, which needs none: it compiles and spills nothing."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
HERE = Path(__file__).parent


TARGETS = ["sm_80", "sm_90", "sm_100", "gfx942"]


def build_all(target: str, *dtypes: str) -> list[dict]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(HERE.parent)
    program = [sys.executable, str(HERE / "compile_all.py"), target, *dtypes]
    done = subprocess.run(program, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    built = json.loads(done.stdout.splitlines()[-1])
    assert all(b["size"] > 0 for b in built)
    return built


def spilled(built: list[dict]) -> list[dict]:
    return [b for b in built if b["spills"]]


@pytest.mark.parametrize("target", TARGETS)
def test_fp16_compiles_and_spills_nothing(target):
    built = build_all(target, "float16")
    assert {b["kernel"] for b in built} == {
        "token_stats_kernel", "finish_kernel", "token_grad_kernel", "loss_and_grad_kernel",
        "binary_kernel",
    }  # fmt: skip
    assert not spilled(built)


@pytest.mark.long
@pytest.mark.parametrize("target", TARGETS)
def test_every_variant_compiles_and_spills_nothing(target):
    built = build_all(target, "bfloat16", "float32", "float64")
    assert len(built) > 60 and not spilled(built)
