"""Deferred logits under DDP and FSDP2, in processes of their own."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed
from helpers import ROOT

HERE = Path(__file__).parent


def ranks(count: int) -> str:
    program = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    program += ["--nproc-per-node", str(count), str(HERE / "huggingface_ranks.py")]
    environment = {
        **os.environ,
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(program, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


@pytest.mark.long
@pytest.mark.framework
@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo")
def test_ranks():
    one, two = ranks(1), ranks(2)
    assert one.count("agrees") == 1 and two.count("agrees") == 2
    losses = [float(re.findall(r"eval_loss ([\d.]+)", out)[0]) for out in (one, two)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)
