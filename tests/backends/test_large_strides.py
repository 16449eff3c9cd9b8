"""Tests of strides of 2^28 elements, where a column times its stride exceeds 2^31.

The tensors take 5 GB of address space, and one page per element is touched. They run in their own process,
because a 32-bit offset would read memory that is not mapped.
"""

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")
PROGRAM = """
import os
os.environ["TRITON_INTERPRET"] = "1"
import torch, torch.nn.functional as F, chunked_ce
V, stride = 10, 2**28 + 16
def spread(values):
    x = torch.empty(V * stride, dtype=torch.float16).as_strided((1, V), (1, stride))
    return x.copy_(values)
def ours(*given, **options):
    loss = chunked_ce.binary_cross_entropy_with_logits(*given, backend="triton", **options)
    return loss.half() if name == "upstream" else loss  # whose gradient is then no copy
def run(f, logits, labels, weight, pos_weight, upstream):
    logits = logits.detach().requires_grad_()
    loss = f(logits, labels, weight=weight, pos_weight=pos_weight[0], reduction="none")
    grad, = torch.autograd.grad(loss, logits, upstream.to(loss.dtype))
    return loss.detach(), grad
x, y, w, p, up = (f(1, V).half() for f in (torch.randn, torch.rand, torch.rand, torch.rand, torch.randn))
tensors = dict(logits=x, labels=y, weight=w, pos_weight=p, upstream=up)
exact = {k: v.double() for k, v in tensors.items()}
for name in tensors:
    far = {k: spread(t) if k == name else t for k, t in tensors.items()}
    loss, grad = run(ours, **far)
    true_loss, true_grad = run(F.binary_cross_entropy_with_logits, **exact)
    assert torch.allclose(loss.double(), true_loss, rtol=1e-3), (name, loss, true_loss)
    assert torch.allclose(grad.double(), true_grad, rtol=2e-3, atol=1e-6), (name, grad, true_grad)
    print(name)
"""


def test_binary_cross_entropy():
    environment = os.environ | {"PYTHONPATH": os.getcwd()}
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.stdout.split() == ["logits", "labels", "weight", "pos_weight", "upstream"], (
        done.stderr[-2000:]
    )
