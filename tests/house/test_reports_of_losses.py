"""More reports from public trackers, of distillation and of what chunks and devices do; see REPORTS.md."""

import math

import oracle
import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from chunked_ce import (
    binary_cross_entropy_with_logits,
    cross_entropy,
    kl_div,
    linear_cross_entropy,
    linear_kl_div,
    token_stats,
)
from chunked_ce.core import head

KINDS = ("forward", "reverse", "jsd")
N, D, V = 9, 6, 40


def of_distillation(x, w, target, **options):
    """A teacher of another hidden size, mixed with the cross-entropy of `target`."""
    g = torch.Generator().manual_seed(1)
    y, teacher = (torch.randn(*s, generator=g).to(x) for s in ((len(x), 4), (len(w), 4)))
    options |= dict(kind="jsd", cross_entropy_weight=0.5)
    return linear_kl_div(x, w, y, teacher, target=target, **options)


LINEAR = {
    "weight": linear_cross_entropy,
    "called head": lambda x, w, t, **options: linear_cross_entropy(x, lambda h: h @ w.T, t, **options),
    "distillation": of_distillation,
}  # fmt: skip


@pytest.fixture
def case():
    x, w = torch.randn(N, D, requires_grad=True), torch.randn(V, D, requires_grad=True)
    return x, w, torch.randint(V, (N,))


@pytest.mark.parametrize("loss", LINEAR)
def test_nemo_automodel_3803_and_torchtune_1865_chunks_of_ignored_tokens(loss, case):
    """Means of chunks were added up; a chunk of padding alone counted as a chunk."""
    x, w, target = case
    target[3:6] = -100
    expected = torch.autograd.grad(LINEAR[loss](x, w, target), (x, w))
    for size in (1, 3, 4):
        value = LINEAR[loss](x, w, target, token_chunk_size=size)
        torch.testing.assert_close(value, LINEAR[loss](x, w, target))
        torch.testing.assert_close(torch.autograd.grad(value, (x, w)), expected)


@pytest.mark.parametrize("loss", LINEAR)
def test_quack_209_gradients_that_were_handed_out_stay(loss, case):
    """A second backward failed, or scaled the first one's gradients."""
    x, w, target = case
    value = LINEAR[loss](x, w, target, token_chunk_size=4)
    first = torch.autograd.grad(3.0 * value, (x, w), retain_graph=True)
    kept = [g.clone() for g in first]
    second = torch.autograd.grad(-0.5 * value, (x, w), retain_graph=True)
    third = torch.autograd.grad(value, (x, w))
    assert all(map(torch.equal, first, kept))
    for one, two, three in zip(first, second, third, strict=True):
        torch.testing.assert_close(one, 3.0 * three)
        torch.testing.assert_close(two, -0.5 * three)


def test_pytorch_195829_a_large_bias_of_all_classes(backend, case):
    """The loss of a linear head lost its digits at a common offset of the logits."""
    x, w, target = (t.detach() for t in case)
    bias = torch.full((V,), 1e6)
    logits = x @ w.T + bias  # rounded to 1/16, by any head
    expected = F.cross_entropy(logits.double(), target, reduction="none")
    loss = linear_cross_entropy(x, w, target, linear_bias=bias, reduction="none", backend=backend)
    torch.testing.assert_close(loss.double(), expected, rtol=2e-6, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_mlx_4188_an_offset_of_one_of_two_rows(backend, device, kind):
    """A common offset costs the digits that the logits have lost, and no others; of one row too."""
    x, y = torch.randint(-40, 41, (2, 2, 130)).to(device) / 8
    for offset in (1e4, 1e5):  # multiples of 1/8 stay what they are
        leaf = x.clone().requires_grad_()
        loss = kl_div(leaf, y + offset, kind=kind, backend=backend)
        exact = x.double().requires_grad_()
        truth = oracle.kl_div(exact, y, kind=kind)
        for value in (loss, truth):
            value.backward()
        torch.testing.assert_close(loss.double(), truth, rtol=1e-6, atol=0)
        largest = float(exact.grad.abs().max())
        torch.testing.assert_close(leaf.grad.double(), exact.grad, rtol=1e-5, atol=2e-6 * largest)


def test_pytorch_89558_classes_that_the_teacher_rules_out(backend, device):
    """The gradient was NaN where the teacher's probability is 0."""
    x = torch.tensor([[0.0, -700.0, 1.0, 0.5]], device=device, requires_grad=True)
    y = torch.tensor([[0.0, -math.inf, 2.0, -math.inf]], device=device)
    kl_div(x, y, backend=backend).backward()
    expected = x.detach().double().softmax(-1) - y.double().softmax(-1)
    torch.testing.assert_close(x.grad.double(), expected, rtol=1e-5, atol=1e-8)
    x.grad = None
    kl_div(x, y, kind="jsd", backend=backend).backward()
    assert x.grad.isfinite().all() and x.grad[0, 3] > 0


@pytest.mark.parametrize("kind", KINDS)
def test_liger_769_classes_that_both_rule_out(backend, device, kind):
    """log of a mixture of two zeros: the loss was NaN."""
    x = torch.tensor([[0.0, 1.0, -1e4, -300.0]], device=device, requires_grad=True)
    y = torch.tensor([[1.0, 0.0, -2e4, -400.0]], device=device)
    loss = kl_div(x, y, kind=kind, backend=backend)
    loss.backward()
    truth = oracle.kl_div(x[:, :2].detach(), y[:, :2], kind=kind)
    torch.testing.assert_close(loss.double(), truth, rtol=1e-6, atol=0)
    assert x.grad.isfinite().all() and (x.grad[0, 2:] == 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_trl_5731_a_model_is_its_own_teacher(kind, case):
    """A default mixed the cross-entropy in, at another temperature: 6.0 where the loss is 0."""
    x, w, target = case
    loss = linear_kl_div(x, w, x.detach(), w.detach(), kind=kind, target=target, token_chunk_size=4)
    grads = torch.autograd.grad(loss, (x, w))
    assert loss == 0 and all((g == 0).all() for g in grads)


def test_trl_7221_entropy_of_masked_classes(backend, device):
    """0 log 0 was NaN, and so was its gradient; in float16 at finite logits too."""
    for logits, dtype, entropy in (
        ([0.0, 0.0, -math.inf], torch.float32, math.log(2)),
        ([65504.0, -65504.0], torch.float16, 0.0),
    ):
        x = torch.tensor([logits], dtype=dtype, device=device, requires_grad=True)
        target = torch.tensor([0], device=device)
        stats = token_stats(x, target, entropy=True, backend=backend)
        stats.entropy.sum().backward()
        assert stats.entropy.item() == pytest.approx(entropy)
        assert x.grad.abs().max() < 1e-7


class WithoutFloat64(TorchDispatchMode):
    """A device that has no float64."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        made = out if isinstance(out, list | tuple) else (out,)
        assert not any(getattr(t, "dtype", None) == torch.float64 for t in made), func
        return out


def test_pytorch_122602_devices_without_float64(monkeypatch, case):
    """Apple's GPUs: sums were float64 there, which ended in a TypeError."""
    monkeypatch.setattr(head, "WITHOUT_FLOAT64", {"cpu"})
    x, w, target = case
    logits, teacher = torch.randn(N, V, requires_grad=True), torch.randn(N, V)
    shared = dict(backend="torch")
    with WithoutFloat64():
        for loss in (
            cross_entropy(logits, target, label_smoothing=0.1, **shared),
            cross_entropy(logits, target, grad_in_forward=True, **shared),
            token_stats(logits, target, entropy=True, rank=True, **shared).entropy.sum(),
            binary_cross_entropy_with_logits(logits, target[:, None], **shared),
            *(kl_div(logits, teacher, kind=kind, **shared) for kind in KINDS),
            *(loss(x, w, target, **shared) for loss in LINEAR.values()),
        ):
            loss.backward()
            assert loss.isfinite()
