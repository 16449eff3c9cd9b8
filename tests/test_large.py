"""Offsets beyond 2^31 (PITFALLS, loss 4): rows that lie 2^31 logits apart. Memory never touched costs nothing."""

import subprocess
import sys

import pytest

PROGRAM = """
import os, sys
backend, inplace = sys.argv[1], sys.argv[2] == "True"
if backend == "triton": os.environ["TRITON_INTERPRET"] = "1"
import torch, chunked_ce
rows, vocab, apart = 3, 100, 2**31 + 8
storage = torch.empty(2 * apart + vocab, dtype=torch.bfloat16)
logits = storage.as_strided((rows, vocab), (apart, 1))
logits.copy_(torch.randn(rows, vocab))
# Rows that start alike in 16 bytes: a sum's order follows that, and so its last bit.
small = torch.empty(rows, 104, dtype=torch.bfloat16)[:, :vocab].copy_(logits)
target = torch.tensor([0, 50, 99])
expected = chunked_ce.token_stats(small, target, backend=backend)
small = small.detach().requires_grad_()
chunked_ce.cross_entropy(small, target, backend=backend).backward()
class Own(torch.autograd.Function):  # logits with a history, and no copy of them
    forward = staticmethod(lambda ctx, like: logits.data)
    backward = staticmethod(lambda ctx, grad: (results.append(grad), torch.zeros(1))[1])
results = []
far = Own.apply(torch.zeros(1, requires_grad=True))
stats = chunked_ce.token_stats(far, target, backend=backend)
assert torch.equal(stats.lse, expected.lse) and torch.equal(stats.logprob, expected.logprob)
chunked_ce.cross_entropy(far, target, inplace_backward=inplace, backend=backend).backward()
assert torch.equal(results[0], small.grad)
assert torch.equal(logits, small.grad) == inplace
logits.copy_(small.detach())
results.clear()
far = Own.apply(torch.zeros(1, requires_grad=True))
chunked_ce.cross_entropy(
    far, target, grad_in_forward=True, inplace_backward=inplace, backend=backend
).backward()
torch.testing.assert_close(results[0], small.grad)
assert (results[0].data_ptr() == logits.data_ptr()) == inplace
print("equal")
"""


@pytest.mark.parametrize("inplace", [False, True])
def test_rows_two_to_the_31_logits_apart(backend, inplace):
    command = [sys.executable, "-c", PROGRAM, backend, str(inplace)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout.strip() == "equal", done.stderr[-3000:]
