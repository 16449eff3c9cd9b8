"""Several processes over gloo, started by torchrun; what they run is in distributed_cases.py."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from helpers import ROOT

from chunked_ce.distributed import checks
from chunked_ce.distributed.losses import vocab_parallel_cross_entropy

HERE = Path(__file__).parent
pytestmark = [
    pytest.mark.framework,
    pytest.mark.skipif(not dist.is_available(), reason="a torch without torch.distributed"),
]


@pytest.mark.parametrize("world", [2, 4])
def test_every_case_on_ranks_started_by_torchrun(world: int, tmp_path: Path) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    script = [str(HERE / "distributed_cases.py"), str(tmp_path)]
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "TRITON_INTERPRET": "1",
        "PYTHONPATH": os.pathsep.join((str(ROOT / "tests"), str(ROOT))),
    }
    done = subprocess.run(
        [*launcher, f"--nproc-per-node={world}", *script],
        capture_output=True, text=True, env=environment, timeout=300,
    )  # fmt: skip
    results = {path.stem: json.loads(path.read_text()) for path in tmp_path.iterdir()}
    for rank, cases in results.items():
        for name, result in cases.items():
            assert result == "passed", f"rank {rank} of {world}, {name}:\n{result}"
    assert done.returncode == 0, done.stderr[-4000:]
    assert len(results) == world
    assert all(len(cases) > 20 for cases in results.values())


def test_a_torch_without_distributed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match="this build of torch has no torch.distributed"):
        checks.process_group(None)


def test_without_a_process_group() -> None:
    with pytest.raises(RuntimeError, match=r"call torch.distributed.init_process_group\(\) first"):
        vocab_parallel_cross_entropy(torch.randn(2, 5), torch.tensor([0, 1]))
