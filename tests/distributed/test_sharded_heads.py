"""Heads in pieces on two ranks, in processes of their own: see head_ranks.py."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed
from helpers import ROOT


@pytest.mark.framework
@pytest.mark.skipif(not torch.distributed.is_available(), reason="a torch without distributed")
def test_sharded_heads():
    program = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    program += ["--nproc-per-node", "2", str(Path(__file__).parent / "head_ranks.py")]
    environment = {
        **os.environ,
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(program, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.count("agrees") == 2
