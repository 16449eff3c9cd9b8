"""The programs of docs/distributed.md, on two ranks started by torchrun; each rank checks what it got."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist
from helpers import ROOT, block_of, blocks_of

PAGE = "docs/distributed.md"
END = "dist.destroy_process_group()\n"
# While Python ends, torch at times aborts in a thread of gloo, with torch's own loss too.
EXIT = "import os, sys; sys.stdout.flush(); os._exit(0)\n"
pytestmark = [
    pytest.mark.framework,
    pytest.mark.skipif(not dist.is_available(), reason="a torch without torch.distributed"),
]

OF_TENSOR_PARALLEL = """
import chunked_ce
whole_hidden, whole_weight = hidden.detach().requires_grad_(), weight.clone().requires_grad_()
expected = torch.nn.functional.cross_entropy(whole_hidden @ whole_weight.T, labels)
expected.backward()
for found in (loss, from_logits):
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
torch.testing.assert_close(hidden.grad, whole_hidden.grad, rtol=1e-4, atol=1e-6)
torch.testing.assert_close(local_weight.grad, whole_weight.grad.chunk(world)[rank], rtol=1e-4, atol=1e-6)
assert torch.equal(stats.argmax, (hidden @ weight.T).argmax(1))
"""

OF_FSDP = """
torch.manual_seed(0)
alone = Model()
tokens = torch.randint(0, 1000, (world, 2, 32))
labels = tokens.roll(-1, 2)
for r in range(world):
    labels[r, :, 31 - r :] = -100
expected = alone(tokens.flatten(0, 1), labels.flatten(0, 1)) / (labels != -100).sum()
expected.backward()
for name, p in alone.named_parameters():
    ours = dict(model.named_parameters())[name].grad.full_tensor()
    torch.testing.assert_close(ours, p.grad, rtol=1e-5, atol=1e-7)
mean = loss.detach() / world
dist.all_reduce(mean)
torch.testing.assert_close(mean, expected.detach(), rtol=1e-5, atol=0)
"""

OF_CONTEXT = """
whole = [t.detach().clone().requires_grad_() for t in (body.weight, weight)]
expected = torch.nn.functional.cross_entropy(
    (whole[0][tokens] @ whole[1].T).flatten(0, 1), labels.flatten()
)
expected.backward()
total = loss.detach().clone()
dist.all_reduce(total)
torch.testing.assert_close(total, expected.detach(), rtol=1e-5, atol=0)
for ours, alone in zip((body.weight, weight), whole, strict=True):
    torch.testing.assert_close(ours.grad, alone.grad, rtol=1e-4, atol=1e-6)
"""

OF_HEAD = """
torch.manual_seed(0)
alone = Model()
logits = alone.head(alone.body(tokens[:, :-1]))
torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
for name, p in alone.named_parameters():
    ours = dict(model.named_parameters())[name].grad.full_tensor()
    torch.testing.assert_close(ours, p.grad, rtol=1e-5, atol=1e-7)
"""

CHECKS = {
    "vocab_parallel_cross_entropy": OF_TENSOR_PARALLEL,
    "LinearCrossEntropyLoss": OF_FSDP,
    "self.head, labels, shift=True": OF_HEAD,
    "group=dist.group.WORLD": OF_CONTEXT,
}


def test_each_program_has_its_check() -> None:
    assert len(blocks_of(PAGE)) == len(CHECKS)


@pytest.mark.long
@pytest.mark.parametrize("containing", CHECKS)
def test_a_program_on_two_ranks(containing: str, tmp_path: Path) -> None:
    block = block_of(PAGE, containing)
    assert block.endswith(END)
    program = tmp_path / "program.py"
    program.write_text(
        block.removesuffix(END) + CHECKS[containing] + "print('right')\n" + END + EXIT,
        encoding="utf-8",
    )
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [*launcher, str(program)], capture_output=True, text=True, env=environment, timeout=300
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.count("right") == 2
