"""Tests of binary cross-entropy and gradient scaling in C: threads, block edges, dtypes."""

import pytest
import torch
import torch.nn.functional as F

from chunked_ce import backends, binary_cross_entropy_with_logits, cross_entropy
from chunked_ce.backends import cpu_library

pytestmark = pytest.mark.skipif(not cpu_library.IS_AVAILABLE, reason="no C compiler built them")
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def results(x, target, weight):
    leaf = x.clone().requires_grad_()
    found = []
    for reduction in ("sum", "none"):
        loss = binary_cross_entropy_with_logits(
            leaf, target, weight, reduction=reduction, backend="cpu"
        )
        found += [loss.detach(), torch.autograd.grad(loss.sum(), leaf)[0]]
    return found


@pytest.mark.parametrize("rows, vocab", [(1, 100_003), (5, 60_000), (3000, 70)])
@pytest.mark.parametrize("labels", ["dense", "indices"])
def test_bit_identity_threads(threads, rows, vocab, labels):
    x, weight = torch.randn(rows, vocab) * 5, torch.rand(vocab)
    target = torch.rand(rows, vocab) if labels == "dense" else torch.randint(vocab, (rows, 9))
    threads(1)
    first = results(x, target, weight)
    for count in (2, 3, 7):
        threads(count)
        assert all(map(torch.equal, first, results(x, target, weight)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [1, 15, 2048, 2049, 16384, 16385, 40_000])
def test_values_block_edges(dtype, vocab):
    x = (torch.randn(3, vocab) * 4).to(dtype)
    y = torch.zeros(3, vocab)
    index = torch.tensor([0, vocab - 1, min(2047, vocab - 1), min(2048, vocab - 1), vocab // 2])
    y[:, index] = 1
    sign = 1 - 2 * y.double()  # of these labels no term cancels
    exact, slope = -F.logsigmoid(-sign * x.double()), sign * (sign * x.double()).sigmoid()
    rtol = 1e-13 if dtype == torch.float64 else 1e-6
    half = torch.finfo(dtype).eps * (0.51 if dtype.itemsize == 2 else 8)
    smallest = 3e-8 if dtype == torch.float16 else 0  # half the least subnormal
    for target in (y.to(dtype), torch.cat([index, index]).expand(3, -1)):
        total, grad, losses, _ = results(x, target, None)
        torch.testing.assert_close(total.double(), exact.sum(), rtol=rtol, atol=0)
        torch.testing.assert_close(losses.double(), exact, rtol=rtol, atol=0)
        torch.testing.assert_close(grad.double(), slope, rtol=half, atol=smallest)


@pytest.mark.parametrize("label_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_labels_and_weights_dtypes(dtype, label_dtype):
    x, y = (torch.randn(4, 300) * 3).to(dtype), torch.rand(4, 300).to(label_dtype)
    weight, pos_weight = torch.rand(4, 1).to(label_dtype), torch.rand(300).to(label_dtype)
    ours = binary_cross_entropy_with_logits(
        x, y, weight, reduction="none", pos_weight=pos_weight, backend="cpu"
    )
    exact = F.binary_cross_entropy_with_logits(
        x.double(), y.double(), weight.double(), reduction="none", pos_weight=pos_weight.double()
    )
    rtol = 1e-13 if dtype == torch.float64 else 1e-6
    torch.testing.assert_close(ours.double(), exact, rtol=rtol, atol=0)


def test_all_labels_left_out():
    x = torch.randn(2, 5000)
    x[0, 4999] = torch.inf
    target = torch.arange(-1, 5000).clamp(min=0).expand(2, -1)  # 0 twice: it counts once
    ours = binary_cross_entropy_with_logits(x, target, reduction="sum", backend="cpu")
    exact = F.softplus(-x.double()).sum()
    torch.testing.assert_close(ours.double(), exact, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["contiguous", "strided", "transposed"])
def test_scale(dtype, layout):
    grad = torch.randn(4, 3, 5001).to(dtype)
    if layout == "strided":
        grad = torch.randn(4, 3, 10_002).to(dtype)[..., ::2]
    elif layout == "transposed":
        grad = grad.permute(2, 1, 0).contiguous().permute(2, 1, 0)
    grad[1, 2] = 0
    upstream = torch.randn(4, 3, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    upstream[1, 2] = torch.nan  # of an ignored row
    for factor in (upstream, upstream[0, 0]):
        wide = factor[..., None] if factor.dim() else factor
        expected = (grad.to(factor.dtype) * wide).to(dtype)
        expected[1, 2] = 0
        ours = grad.clone(memory_format=torch.preserve_format)
        backends.scale_(ours, factor, "cpu")
        assert torch.equal(ours, expected)


def test_scale_grad_in_forward():
    x, target = torch.randn(3, 40_000), torch.tensor([1, -100, 39_999])
    leaf = x.clone().requires_grad_()
    loss = cross_entropy(leaf, target, reduction="none", grad_in_forward=True, backend="cpu")
    loss.backward(torch.tensor([2.0, torch.nan, -3.0]))
    truth = x.double().requires_grad_()
    F.cross_entropy(truth, target, reduction="none").backward(torch.tensor([2.0, 0, -3]).double())
    torch.testing.assert_close(leaf.grad.double(), truth.grad, rtol=4e-6, atol=0)
    assert (leaf.grad[1] == 0).all()
