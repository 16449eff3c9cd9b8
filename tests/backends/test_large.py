"""Tests of large sizes: offsets beyond 2^31, many tokens, large vocabularies, many calls.

Rows that lie 2^31 logits apart need no memory between them, because it is never touched.
"""

import gc
import re
import subprocess
import sys
from pathlib import Path

import oracle
import pytest
import torch
import torch.nn.functional as F

from chunked_ce import (
    Perplexity,
    binary_cross_entropy_with_logits,
    cross_entropy,
    kl_div,
    linear_cross_entropy,
    linear_kl_div,
    token_stats,
)

PROGRAM = """
import os, sys
backend, device = sys.argv[1:]
if backend == "triton" and device == "cpu": os.environ["TRITON_INTERPRET"] = "1"
import torch, chunked_ce
torch.set_default_device(device)
rows, vocab, row_stride = 3, 100, 2**31 + 8
storage = torch.empty(2 * row_stride + vocab, dtype=torch.bfloat16)
logits = storage.as_strided((rows, vocab), (row_stride, 1))
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
stats = chunked_ce.token_stats(logits, target, backend=backend)
assert torch.equal(stats.lse, expected.lse) and torch.equal(stats.logprob, expected.logprob)
for inplace in (False, True):
    for grad_in_forward in (False, True):
        logits.copy_(small.detach())
        results = []
        far = Own.apply(torch.zeros(1, requires_grad=True))
        options = dict(inplace_backward=inplace, grad_in_forward=grad_in_forward, backend=backend)
        chunked_ce.cross_entropy(far, target, **options).backward()
        if grad_in_forward:
            torch.testing.assert_close(results[0], small.grad)
            assert (results[0].data_ptr() == logits.data_ptr()) == inplace
        else:
            assert torch.equal(results[0], small.grad)
            assert torch.equal(logits, small.grad) == inplace
logits.copy_(small.detach())
other = torch.empty_like(small).copy_(torch.randn(rows, vocab))  # of a pair of rows, either is far
for near, far in (((small, other), (logits, other)), ((other, small), (other, logits))):
    grads = []
    for x, y in (near, far):
        x = x.detach().requires_grad_()
        chunked_ce.kl_div(x, y.detach(), kind="jsd", backend=backend).backward()
        grads.append(x.grad)
    assert torch.equal(*grads)
print("equal")
"""


def test_large_row_stride(backend, device):
    command = [sys.executable, "-c", PROGRAM, backend, device]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout.strip() == "equal", done.stderr[-3000:]


def memory_mib() -> float:
    """Return the resident memory of this process."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmRSS:\s+(\d+)", status)[1]) / 1024


@pytest.mark.long
@pytest.mark.real_sizes
def test_large_logits():
    """Use 43 000 x 50 000 logits in bfloat16 (4 GiB), with the gradient written over them."""
    rows, vocab = 43_000, 50_000
    assert rows * vocab > 2**31
    needed = 4.5 * 2**30
    available = re.search(r"MemAvailable:\s+(\d+)", Path("/proc/meminfo").read_text())
    if int(available[1]) * 1024 < 1.3 * needed:
        pytest.skip("needs 6 GB of memory")
    row = torch.randn(vocab).bfloat16()
    logits = torch.empty(rows, vocab, dtype=torch.bfloat16)
    logits.copy_(row.expand_as(logits))
    target = torch.arange(rows) % vocab
    target[-2] = -100
    few = [0, 1, rows // 2, rows - 2, rows - 1]  # 42 949 x 50 000 is 2^31
    small = logits[few].clone().requires_grad_()
    expected = token_stats(small.detach(), target[few])
    cross_entropy(small, target[few], reduction="sum").backward()
    stats = token_stats(logits, target)
    assert torch.equal(stats.lse[few], expected.lse)
    assert torch.equal(stats.logprob[few], expected.logprob)
    teacher = torch.randn(vocab).bfloat16().expand_as(logits)
    options = dict(kind="reverse", target=target, reduction="none")
    of_pairs = kl_div(logits, teacher, **options)[few]
    options |= dict(target=target[few])
    assert torch.equal(of_pairs, kl_div(small.detach(), teacher[few], **options))
    logits.requires_grad_()
    grads = []
    leaf = WithoutCopy.apply(logits.detach(), torch.zeros(1, requires_grad=True), grads)
    cross_entropy(leaf, target, reduction="sum", inplace_backward=True).backward()
    assert grads[0].data_ptr() == logits.data_ptr()
    assert torch.equal(grads[0][few], small.grad)
    assert not grads[0][-2].any() and grads[0][-1].any()


class WithoutCopy(torch.autograd.Function):
    """Gives logits a history without a copy."""

    @staticmethod
    def forward(ctx, logits, like, grads):
        ctx.grads = grads
        return logits.view_as(logits)

    @staticmethod
    def backward(ctx, grad):
        ctx.grads.append(grad)
        return None, torch.zeros(1), None


@pytest.mark.long
@pytest.mark.real_sizes
def test_large_token_count():
    """Use a million tokens: logits, and a linear head with more than 2^31 logits in all."""
    n, d, v, times = 1_000_000, 4, 2200, 50  # 50 times the same 20 000
    few = torch.arange(n // times) % v
    few[::5] = -100
    x, w = torch.randn(n // times, d), torch.randn(v, d)
    exact = [t.double().requires_grad_() for t in (x, w)]
    truth = F.cross_entropy(exact[0] @ exact[1].t(), few, reduction="sum")
    truth.backward()
    target = few.repeat(times)
    leaves = [x.repeat(times, 1).requires_grad_(), w.clone().requires_grad_()]
    before = memory_mib()
    loss = linear_cross_entropy(*leaves, target, reduction="sum")
    loss.backward()
    assert memory_mib() - before < 1000, "n x v takes 8 GiB"
    assert float(loss) == pytest.approx(times * float(truth), rel=1e-5)
    of_hidden = leaves[0].grad.view(times, -1, d)
    torch.testing.assert_close(of_hidden[0].double(), exact[0].grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(of_hidden, of_hidden[:1].expand_as(of_hidden), rtol=1e-4, atol=1e-5)
    eager = w.clone().requires_grad_()
    F.cross_entropy(x @ eager.t(), few, reduction="sum").backward()
    error = relative_error(leaves[1].grad / times, exact[1].grad)
    # A sum of `times` as many terms, each rounded in the same way.
    assert error < times * relative_error(eager.grad, exact[1].grad)
    logits = torch.randn(n, 33).requires_grad_()
    wide = logits.detach().double().requires_grad_()
    labels = target.where(target < 33, -100)
    for arguments, function in ((logits, cross_entropy), (wide, F.cross_entropy)):
        function(arguments, labels).backward()
    torch.testing.assert_close(logits.grad.double(), wide.grad, rtol=2e-6, atol=1e-12)


@pytest.mark.long
@pytest.mark.real_sizes
def test_large_vocabulary():
    n, d, v = 6, 8, 1_200_001
    hidden, weight = torch.randn(n, d), torch.randn(v, d)
    # All scored: chunks of two. A product with 1.2 M has an error of 1e-3 in some BLAS, in eager's hands too.
    target = torch.tensor([0, v - 1, 2**20, 17, 2**20 - 1, 65_536])
    leaves = [t.clone().requires_grad_() for t in (hidden, weight)]
    exact = [t.double().requires_grad_() for t in (hidden, weight)]
    linear_cross_entropy(*leaves, target, token_chunk_size=2).backward()
    eager = [t.clone().requires_grad_() for t in (hidden, weight)]
    for h, w in (exact, eager):
        F.cross_entropy(h @ w.t(), target).backward()
    for ours, truth, theirs in zip(leaves, exact, eager, strict=True):
        error = relative_error(ours.grad, truth.grad)
        assert error < 1e-5 + 1.5 * relative_error(theirs.grad, truth.grad)
    logits = (hidden @ weight.t()).requires_grad_()
    truth = logits.detach().double().requires_grad_()
    cross_entropy(logits, target, label_smoothing=0.1).backward()
    F.cross_entropy(truth, target, label_smoothing=0.1).backward()
    noise = 2e-7 * float(truth.grad.abs().max())
    torch.testing.assert_close(logits.grad.double(), truth.grad, rtol=2e-6, atol=noise)


@pytest.mark.long
@pytest.mark.real_sizes
@pytest.mark.parametrize("kind", ["forward", "jsd"])
def test_large_pairs(kind):
    """Use a million pairs of rows, and a pair of 1.2 million classes; one row has no memory of its own."""
    options = dict(kind=kind, reduction="none")
    x, y = torch.randn(2, 20_000, 33)
    many = x.repeat(50, 1).requires_grad_()
    few = x.clone().requires_grad_()
    losses = [kl_div(many, y.repeat(50, 1), **options), kl_div(few, y, **options)]
    for loss in losses:
        loss.sum().backward()
    assert torch.equal(losses[0], losses[1].repeat(50))
    assert torch.equal(many.grad, few.grad.repeat(50, 1))
    x, y = torch.randn(3, 1_200_001), torch.randn(1, 1_200_001).expand(3, -1)
    truth, leaf = x.double().requires_grad_(), x.clone().requires_grad_()
    expected, loss = oracle.kl_div(truth, y, **options), kl_div(leaf, y, **options)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)
    for each in (expected, loss):
        each.sum().backward()
    noise = 2e-7 * float(truth.grad.abs().max())
    torch.testing.assert_close(leaf.grad.double(), truth.grad, rtol=1e-5, atol=noise)


def relative_error(ours, truth):
    return float((ours.double() - truth).abs().max() / truth.abs().max())


def every_function(x, hidden, weight, target, meter):
    """Call ten functions."""
    leaf = x.clone().requires_grad_()
    cross_entropy(leaf, target, label_smoothing=0.1).backward()
    cross_entropy(leaf * 1, target, grad_in_forward=True, inplace_backward=True).backward()
    stats = token_stats(leaf, target, entropy=True, rank=True)
    (stats.logprob.sum() + stats.entropy.sum()).backward()
    leaves = [t.clone().requires_grad_() for t in (hidden, weight)]
    linear_cross_entropy(*leaves, target, token_chunk_size=4).backward()
    linear_cross_entropy(*leaves, target, reduction="none").sum().backward()
    binary_cross_entropy_with_logits(leaf, target[:, None]).backward()
    kl_div(leaf, x.flip(0), kind="jsd", target=target).backward()
    linear_kl_div(*leaves, hidden[:, :3], weight[:, :3], token_chunk_size=4).backward()
    meter.update(x, target)
    with pytest.raises(IndexError):
        cross_entropy(x, target + 1000)


@pytest.mark.real_sizes
@pytest.mark.parametrize("calls", [800, pytest.param(10_000, marks=pytest.mark.long)])
def test_memory_after_many_calls(calls):
    """Check that no memory is left, even with the cycle collector off."""
    if not Path("/proc/self/status").exists():
        pytest.skip("reads /proc")
    arguments = torch.randn(10, 500), torch.randn(10, 8), torch.randn(500, 8), torch.arange(10)
    meter = Perplexity()
    gc.collect()
    gc.disable()
    try:
        for _ in range(25):
            every_function(*arguments, meter)
        tensors = sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())
        before = memory_mib()
        for _ in range(calls // 10):
            every_function(*arguments, meter)
        growth = memory_mib() - before
        assert (
            sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects()) <= tensors + 1
        )
    finally:
        gc.enable()
    # 20 kB of logits kept by each call would be 15 MiB after 800 and 190 after 10 000.
    assert growth < 8, f"{growth:.1f} MiB"
