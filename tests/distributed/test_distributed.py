"""Several processes over gloo, started by torchrun; what they run is in run_cases.py."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers import ROOT

import chunked_ce
from chunked_ce.distributed import (
    checks,
    vocab_parallel_cross_entropy,
    vocab_parallel_linear_cross_entropy,
    vocab_parallel_token_stats,
)

HERE = Path(__file__).parent
pytestmark = [
    pytest.mark.framework,
    pytest.mark.skipif(not dist.is_available(), reason="a torch without torch.distributed"),
]


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.long)])
def test_ranks_of_torchrun(world: int, tmp_path: Path) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    script = [str(HERE / "run_cases.py"), str(tmp_path)]
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
    assert all(cases == results["0"] for cases in results.values())
    files = Counter(name.split()[0] for name in results["0"])
    assert {"pair": 9, "group:": 8, "head:": 22, "evaluation:": 2}.items() <= files.items()
    assert files.total() == 67


def test_torch_without_distributed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match="this build of torch has no torch.distributed"):
        checks.process_group(None)


def test_no_process_group() -> None:
    with pytest.raises(RuntimeError, match=r"call torch.distributed.init_process_group\(\) first"):
        vocab_parallel_cross_entropy(torch.randn(2, 5), torch.tensor([0, 1]))


@pytest.fixture
def dtensor(group: Any) -> Callable[[torch.Tensor], Any]:
    """Make DTensors in a group of this process alone."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, distribute_tensor

    mesh = init_device_mesh("cpu", (1,))
    return lambda tensor: distribute_tensor(tensor, mesh, [Replicate()])


LOGITS = chunked_ce.cross_entropy, vocab_parallel_cross_entropy
HEADS = chunked_ce.linear_cross_entropy, vocab_parallel_linear_cross_entropy
T = torch.tensor([1, 2, 3, 4])


def leaf(*shape: int) -> torch.Tensor:
    return torch.randn(shape).requires_grad_()


@pytest.mark.parametrize(
    "call",
    [
        lambda d: chunked_ce.cross_entropy(leaf(4, 10), d(T)),
        lambda d: chunked_ce.cross_entropy(leaf(4, 10), d(torch.rand(4, 10))),
        lambda d: chunked_ce.cross_entropy(leaf(4, 10), T, weight=d(torch.rand(10))),
        lambda d: chunked_ce.cross_entropy(leaf(4, 10), T, token_weight=d(torch.rand(4))),
        lambda d: chunked_ce.token_stats(leaf(4, 10), d(T)),
        lambda d: chunked_ce.linear_cross_entropy(leaf(4, 6), leaf(10, 6), d(T)),
        lambda d: chunked_ce.linear_token_stats(leaf(4, 6), leaf(10, 6), d(T)),
        lambda d: chunked_ce.binary_cross_entropy_with_logits(leaf(4, 9), d(torch.rand(4, 9))),
        lambda d: vocab_parallel_cross_entropy(leaf(4, 10), T, token_weight=d(torch.rand(4))),
    ],
)
def test_dtensor_beside_plain_input(call: Callable[..., Any], dtensor: Any) -> None:
    with pytest.raises(TypeError, match="is a DTensor, but input is a plain tensor: pass .*full"):
        call(dtensor)


@pytest.mark.parametrize("loss", LOGITS + HEADS)
def test_dtensor_target_of_vocab_parallel(loss: Callable[..., Any], dtensor: Any) -> None:
    tensors = (leaf(4, 10),) if loss in LOGITS else (leaf(4, 6), leaf(10, 6))
    if loss in (LOGITS[1], HEADS[1]):
        assert torch.equal(loss(*tensors, dtensor(T)), loss(*tensors, T))
    else:
        with pytest.raises(TypeError, match="target is a DTensor"):
            loss(*tensors, dtensor(T))


UPSTREAM = {
    "plain": lambda: chunked_ce.cross_entropy(leaf(4, 10), T),
    "one pass": lambda: chunked_ce.cross_entropy(leaf(4, 10), T, grad_in_forward=True),
    "none": lambda: chunked_ce.cross_entropy(leaf(4, 10), T, reduction="none"),
    "linear": lambda: chunked_ce.linear_cross_entropy(leaf(4, 6), leaf(10, 6), T),
    "linear none": lambda: chunked_ce.linear_cross_entropy(
        leaf(4, 6), leaf(10, 6), T, reduction="none"
    ),
    "statistics": lambda: chunked_ce.token_stats(leaf(4, 10), T, entropy=True).entropy,
    "linear statistics": lambda: chunked_ce.linear_token_stats(leaf(4, 6), leaf(10, 6), T).lse,
    "binary": lambda: chunked_ce.binary_cross_entropy_with_logits(leaf(4, 9), torch.rand(4, 9)),
    "shard": lambda: vocab_parallel_cross_entropy(leaf(4, 10), T),
    "shard statistics": lambda: vocab_parallel_token_stats(leaf(4, 10), T).logprob,
    "shard of a head": lambda: vocab_parallel_linear_cross_entropy(leaf(4, 6), leaf(10, 6), T),
}


@pytest.mark.parametrize("name", UPSTREAM)
def test_dtensor_upstream_gradient(name: str, dtensor: Any) -> None:
    result = UPSTREAM[name]()
    with pytest.raises(TypeError, match="the upstream gradient is a DTensor, but the loss is a"):
        result.backward(dtensor(torch.ones(result.shape)))
    UPSTREAM[name]().backward(torch.ones(result.shape))
