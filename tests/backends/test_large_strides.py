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
x = torch.randn(1, V).half()
y, w, p = torch.rand(1, V).half(), torch.rand(1, V).half(), torch.rand(1, V).half()
up = torch.randn(1, V).half()
tensors = dict(logits=x, labels=y, weight=w, pos_weight=p, upstream=up)
far = {name: spread(t) if name == NAME else t for name, t in tensors.items()}
def run(logits, labels, weight, pos_weight, upstream, f, **options):
    logits = logits.detach().requires_grad_()
    loss = f(logits, labels, weight=weight, pos_weight=pos_weight[0], reduction="none", **options)
    grad, = torch.autograd.grad(loss, logits, upstream.to(loss.dtype) if NAME != "upstream" else upstream)
    return loss.detach(), grad
loss, grad = run(**far, f=CALL)
true_loss, true_grad = run(**{k: v.double() for k, v in tensors.items()}, f=F.binary_cross_entropy_with_logits)
assert torch.allclose(loss.double(), true_loss, rtol=1e-3), (loss, true_loss)
assert torch.allclose(grad.double(), true_grad, rtol=2e-3, atol=1e-6), (grad, true_grad)
"""
BINARY = """
def CALL(logits, labels, **options):
    loss = chunked_ce.binary_cross_entropy_with_logits(logits, labels, backend="triton", **options)
    return loss
"""


@pytest.mark.parametrize("name", ["logits", "labels", "weight", "pos_weight", "upstream"])
def test_binary_cross_entropy(name):
    body = BINARY.replace(
        "return loss\n", "return loss.half()\n" if name == "upstream" else "return loss\n"
    )
    program = f"NAME = {name!r}\n" + PROGRAM.replace(
        "loss, grad = run", body + "\nloss, grad = run", 1
    )
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {
        "PYTHONPATH": os.getcwd()
    }
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr[-2000:]
