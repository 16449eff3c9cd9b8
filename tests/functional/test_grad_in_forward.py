"""Tests of grad_in_forward: the same loss and gradient from one read of the logits."""

import oracle
import pytest
import torch
from helpers import assert_gradient, batch, gradient

from chunked_ce import cross_entropy
from chunked_ce.ops.library import new_stats

OPTIONS = {
    "plain": {},
    "smoothing": dict(label_smoothing=0.1),
    "z_loss": dict(z_loss_weight=1e-2),
    "softcap": dict(softcap=5.0, logit_scale=0.5),
    "padded": dict(vocab_size=93),
    "everything": dict(label_smoothing=0.2, z_loss_weight=1e-3, softcap=20.0, vocab_size=77),
}


@pytest.fixture(params=["torch", "on_chip", "streamed", "cluster"])
def backend(request, monkeypatch):
    """Return the torch backend, or one of the three forms of the one-pass kernel."""
    if request.param == "torch":
        return "torch"
    pytest.importorskip("triton")
    from chunked_ce.backends import clusters
    from chunked_ce.kernels import launch

    if request.param != "on_chip":
        monkeypatch.setattr(launch, "ON_CHIP_GROUPS", 8)
        monkeypatch.setattr(launch, "STREAMED", launch.Row(groups=8, num_warps=1))
    monkeypatch.setattr(clusters, "is_verified", lambda device: request.param == "cluster")
    return "triton"


def one_pass(backend, **options):
    return lambda x, t: cross_entropy(
        x, t, dim=-1, grad_in_forward=True, backend=backend, **options
    )


def check(x, target, backend, dtype, upstream=None, **options):
    truth_x = x.double().cpu().requires_grad_()
    truth = oracle.cross_entropy(truth_x, target.cpu(), **{
        k: v.cpu() if isinstance(v, torch.Tensor) else v for k, v in options.items()
    })  # fmt: skip
    loss = one_pass(backend, **options)(x.detach().clone().requires_grad_(), target)
    torch.testing.assert_close(loss.double().cpu(), truth.detach(), rtol=1e-6, atol=1e-9)
    ours = gradient(one_pass(backend, **options), x, target, upstream=upstream)
    if callable(upstream):
        upstream(truth).backward()
    else:
        truth.backward(upstream)
    assert_gradient(ours.cpu(), truth_x.grad, dtype, largest=float(truth_x.grad.abs().max()))


@pytest.mark.parametrize(
    ("options", "dtype"),
    [(name, torch.float32) for name in OPTIONS]
    + [("plain", dtype) for dtype in (torch.bfloat16, torch.float16, torch.float64)]
    + [("everything", dtype) for dtype in (torch.bfloat16, torch.float64)],
)
def test_value_and_gradient(backend, device, options, dtype):
    x, target = batch(5, 100, dtype, device)
    target[target >= 77] = 3
    check(x, target, backend, dtype, **OPTIONS[options])


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("options", ["plain", "everything"])
def test_upstream(backend, device, reduction, options):
    if backend == "triton" and reduction == "sum":
        pytest.skip("the interpreter is slow; the other reduction runs the same kernel")
    x, target = batch(5, 100, device=device)
    target[target >= 77] = 3
    check(
        x, target, backend, torch.float32, lambda loss: 3.7 * loss,
        reduction=reduction, **OPTIONS[options],
    )  # fmt: skip


@pytest.mark.parametrize("shape", [(6,), (2, 3)])
def test_upstream_of_every_token(backend, device, shape):
    x, target = batch(shape, 100, device=device)
    upstream = torch.randn(shape, dtype=torch.float64)
    check(x, target, backend, torch.float32, upstream, reduction="none")


def test_token_weight_and_num_items_on_device(backend, device):
    x, target = batch(6, 100, device=device)
    weight = torch.rand(6, device=device)
    check(x, target, backend, torch.float32, token_weight=weight)
    check(x, target, backend, torch.float32, token_weight=-weight, reduction="sum")
    check(x, target, backend, torch.float32, num_items=torch.tensor(9, device=device))
    check(x, target, backend, torch.float32, num_items=9, label_smoothing=0.1)


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x[:, :-1, :98],  # rows that start anywhere
        lambda x: x.transpose(0, 1)[:2, :3],
        lambda x: x[:, :3, ::2],
        lambda x: x[:1, :2].expand(2, 2, -1),
    ],
)  # fmt: skip
def test_strided(backend, device, view):
    x = view(torch.randn(2, 4, 101, device=device))
    target = torch.randint(0, x.shape[-1], x.shape[:-1], device=device)
    check(x, target, backend, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_over_the_logits(backend, device, dtype):
    leaf, target = batch(6, 101, dtype, device)
    expected = gradient(one_pass(backend), leaf, target)
    leaf.requires_grad_()
    x = leaf * 1.0
    version = x._version
    loss = one_pass(backend, inplace_backward=True)(x, target)
    assert x._version > version
    torch.testing.assert_close(x.detach(), expected, rtol=0, atol=0)
    loss.backward()
    torch.testing.assert_close(leaf.grad, expected, rtol=0, atol=0)


def test_overwritten_logits_version(backend, device):
    leaf, target = batch(6, 100, device=device)
    x = leaf.requires_grad_() * 1.0
    other = x.square().sum()
    cross_entropy(x, target, grad_in_forward=True, inplace_backward=True, backend=backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        other.backward()


def test_logits_unchanged_by_default(backend, device):
    x, target = batch(6, 100, device=device)
    kept = x.clone()
    x.requires_grad_()
    (2 * one_pass(backend)(x, target)).backward()
    assert torch.equal(x.detach(), kept)


def test_second_backward_error(backend, device):
    x, target = batch(4, 100, device=device)
    loss = one_pass(backend)(x.requires_grad_(), target)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="pass grad_in_forward=False"):
        loss.backward()


def test_double_backward_error(backend, device):
    x, target = batch(4, 100, device=device)
    loss = one_pass(backend)(x.requires_grad_(), target)
    with pytest.raises(RuntimeError, match="first derivatives only"):
        torch.autograd.grad(loss, x, create_graph=True)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_all_ignored(backend, device, reduction):
    x = torch.full((3, 100), float("nan"), device=device)
    target = torch.full((3,), -100, device=device)
    loss = one_pass(backend, reduction=reduction, label_smoothing=0.1)(x.requires_grad_(), target)
    assert loss.isnan() if reduction == "mean" else not loss.any()
    loss.sum().backward()
    assert x.grad.count_nonzero() == 0


def test_no_rows(backend, device):
    x = torch.zeros(0, 100, device=device, requires_grad=True)
    loss = one_pass(backend, reduction="sum")(x, torch.zeros(0, dtype=torch.long, device=device))
    loss.backward()
    assert loss == 0 and x.grad.shape == (0, 100)


@pytest.mark.parametrize("vocab", [1, 2, 3, 17, 65, 127, 300])
def test_small_and_odd_vocabularies(backend, device, vocab):
    x, target = batch(4, vocab, device=device)
    check(x, target, backend, torch.float32, label_smoothing=0.1)


def test_extremes(backend, device):
    x, target = batch(6, 100, device=device, ignored=0.0)
    x[0] += 1e4
    x[1, ::2] = float("-inf")
    target[1] = 1
    x[2] = -1e4
    x[3, 5], target[3] = 20.0, 5
    x[3, 6:] = -40.0
    check(x, target, backend, torch.float32, reduction="sum")
    x[4, 7], x[5, 8] = float("nan"), float("inf")
    grad = gradient(one_pass(backend, reduction="sum"), x, target)
    assert grad[4:].isnan().any(1).all() and grad[:4].isfinite().all()


def test_target_out_of_range(backend, device):
    x, target = batch(3, 100, device=device, ignored=0.0)
    target[1] = 100
    x.requires_grad_()
    if backend == "torch":
        with pytest.raises(IndexError, match="row 1"):
            one_pass(backend)(x, target)
        return
    loss = one_pass(backend, reduction="none")(x, target)
    assert loss.isnan().tolist() == [False, True, False]
    loss.sum().backward()
    assert x.grad[1].isnan().all() and x.grad[::2].isfinite().all()


def test_bit_identical_twice_and_alone(backend, device):
    x, target = batch(8, 100, torch.float32, device, ignored=0.0)
    both = [gradient(one_pass(backend, reduction="sum"), x, target) for _ in range(2)]
    alone = gradient(one_pass(backend, reduction="sum"), x[3:4], target[3:4])
    assert torch.equal(*both) and torch.equal(both[0][3:4], alone)


def test_token_weight_requires_grad_error(backend, device):
    x, target = batch(3, 100, device=device)
    weight = torch.ones(3, device=device, requires_grad=True)
    with pytest.raises(ValueError, match="token_weight.detach()"):
        one_pass(backend, token_weight=weight)(x.requires_grad_(), target)


def test_loss_scale_small_float16_gradients(backend, device):
    """Check that gradients wait for the loss scale of backward instead of rounding to 0."""
    x, target = batch(3, 100, torch.float16, device)
    check(x, target, backend, torch.float16, lambda loss: 65536 * loss, num_items=65536)


def test_no_grad_evaluation(backend, device, monkeypatch):
    x, target = batch(3, 100, device=device)
    expected = cross_entropy(x, target, backend=backend)
    assert torch.equal(one_pass(backend)(x, target), expected)
    with torch.no_grad():
        assert torch.equal(one_pass(backend)(x.requires_grad_(), target), expected)


@pytest.mark.framework
@pytest.mark.parametrize("inplace", [False, True])
def test_operators_are_well_formed(backend, device, inplace):
    if backend == "triton":
        pytest.skip("the interpreter is slow; the operators' code is the same for every backend")
    x, target = batch(3, 50, device=device)
    name = "loss_and_grad_" if inplace else "loss_and_grad"
    arguments = (x, target, None, None, 0.1, 0.0, -100, 50, None, 1.0, backend)
    for flags in ([], [False] * 3, [True] * 3):
        stats = new_stats(x, 3, flags)
        memory = [None] * 5 if stats is None else [*stats[:3], *stats[4:]]
        wanted = memory if inplace else [flags]
        torch.library.opcheck(getattr(torch.ops.chunked_ce, name), (*arguments, *wanted))
    torch.library.opcheck(torch.ops.chunked_ce.scale_, (x, torch.tensor(2.0), backend))


@pytest.mark.framework
@pytest.mark.parametrize("inplace", [False, True])
def test_compile_falls_back(backend, device, inplace):
    leaf, target = batch(4, 100, device=device)
    expected = gradient(one_pass(backend), leaf, target)
    step = torch.compile(
        lambda x: one_pass(backend, inplace_backward=inplace)(x * 1.0, target),
        backend="aot_eager", fullgraph=True,
    )  # fmt: skip
    torch.testing.assert_close(gradient(step, leaf), expected)
