"""Cases of the divergences of several ranks, which run_cases.py runs on each.

Each rank builds the same whole tensors from a seed, and compares with the oracle on all of them.
"""

import importlib.util
import math

import oracle
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
import triton_interpreter
from distributed_cases import SIZES, D, N, V, assert_loss, assert_near, batch, shards
from helpers import assert_gradient
from torch.distributed.device_mesh import init_device_mesh

from chunked_ce.distributed import vocab_parallel_kl_div, vocab_parallel_linear_kl_div

CASES = {}
KINDS = ("forward", "reverse", "jsd")
E = 6  # numbers in the teacher's hidden states


def case(function):
    CASES["pair " + function.__name__] = function
    return function


def pair(dtype=torch.float32, n=N, distance=2.0):
    x, target = batch(dtype, n)
    y = x.double() + distance * torch.randn(n, V, dtype=torch.float64)
    return x, y.to(dtype), target


def check(x, y, target=None, sizes=(37, 11), upstream=3.7, backend="auto", **options):
    """Compare with one process; return the loss and the gradient of this rank's logits."""
    start, stop = shards(sizes)
    leaf = x[:, start:stop].detach().clone().requires_grad_()
    loss = vocab_parallel_kl_div(
        leaf, y[:, start:stop], vocab_start=start, vocab_size=V, target=target, backend=backend,
        **options,
    )  # fmt: skip
    (loss * upstream).sum().backward()
    exact = x.to(torch.float64, copy=True).requires_grad_()
    expected = oracle.kl_div(exact, y, target=target, **options)
    (expected * upstream).sum().backward()
    assert_loss(loss.detach(), expected.detach(), x.dtype)
    largest = exact.grad.abs().amax() * 4
    assert_gradient(leaf.grad, exact.grad[:, start:stop], x.dtype, largest)
    return loss.detach(), leaf.grad


@case
def test_values_and_gradients():
    weight = torch.rand(N)
    for kind in KINDS:
        for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
            x, y, target = pair(dtype)
            check(x, y, kind=kind, temperature=1.7, beta=0.3)
            check(x, y, target, kind=kind, reduction="none", upstream=torch.randn(N).double())
        for options in (dict(reduction="sum"), dict(num_items=20), dict(token_weight=weight)):
            check(x, y, target, kind=kind, **options)
        for sizes in SIZES.values():
            check(x.float(), y.float(), target, sizes, kind=kind)


@case
def test_backend_triton():
    if dist.get_world_size() > 2 or importlib.util.find_spec("triton") is None:
        return  # the interpreter is slow, and two ranks show it
    triton_interpreter.prepare()
    for backend in ("triton", "torch"):
        for kind in KINDS:
            x, y, target = pair(n=4)
            check(x, y, target, kind=kind, backend=backend, temperature=0.8, reduction="none")


@case
def test_equal_rows_give_exactly_zero():
    for kind in KINDS:
        for offset in (0.0, 1e3):
            x = pair()[0][:, slice(*shards((37, 11)))] + offset
            leaf = x.clone().requires_grad_()
            here = dict(vocab_start=shards((37, 11))[0], vocab_size=V)
            loss = vocab_parallel_kl_div(leaf, x, kind=kind, reduction="none", **here)
            loss.sum().backward()
            assert (loss == 0).all() and (leaf.grad == 0).all()


@case
def test_nearly_equal_rows_keep_their_digits():
    start, stop = shards((37, 11))
    for kind in KINDS:
        for distance in (1e-1, 1e-2, 1e-3):
            x, y, _ = pair(distance=distance)
            loss = vocab_parallel_kl_div(
                x[:, start:stop], y[:, start:stop], vocab_start=start, vocab_size=V, kind=kind,
                reduction="none",
            )  # fmt: skip
            truth = oracle.kl_div(x, y, kind=kind, reduction="none")
            rounding = 0 if kind == "jsd" else 1e-6 * truth.sqrt()  # of the shards' shares
            assert ((loss.double() - truth).abs() <= 1e-5 * truth + rounding).all()


@case
def test_masked_classes_and_ignored_rows():
    target = torch.randint(0, V, (N,))
    target[0] = -100
    for kind in KINDS:
        x, y, _ = pair()
        x[0] = math.nan
        x[:, :37] = y[:, :37] = -math.inf  # a shard of nothing else
        x[1, 37:50] = -math.inf
        y[2, 60:] = -math.inf
        start, stop = shards((37, 11))
        leaf = x[:, start:stop].clone().requires_grad_()
        loss = vocab_parallel_kl_div(
            leaf, y[:, start:stop], vocab_start=start, vocab_size=V, kind=kind, target=target,
            reduction="none",
        )  # fmt: skip
        truth = oracle.kl_div(x, y, kind=kind, target=target, reduction="none")
        assert_loss(loss[1:].detach(), truth[1:], torch.float32)
        assert loss[0] == 0
        assert bool(loss[1].isinf()) == (kind == "forward")
        assert bool(loss[2].isinf()) == (kind == "reverse")
        loss[[0, 3, 4]].sum().backward()
        assert leaf.grad[3:].isfinite().all() and (leaf.grad[0] == 0).all()


@case
def test_no_tokens():
    x, y, target = pair()
    for kind in KINDS:
        start, stop = shards((37, 11))
        leaf = x[:0, start:stop].clone().requires_grad_()
        given = (leaf, y[:0, start:stop])
        loss = vocab_parallel_kl_div(*given, vocab_start=start, vocab_size=V, kind=kind)
        loss.backward()
        assert loss.isnan() and leaf.grad.shape == leaf.shape
        loss, grad = check(x, y, torch.full((N,), -100), kind=kind, reduction="sum")
        assert loss == 0 and (grad == 0).all()


def of_heads(dtype, sizes=(37, 11), target=None, upstream=3.7, **options):
    """Loss, exact loss; gradients of hidden states and of this rank's rows, the exact ones."""
    h, w, b = torch.randn(N, D), torch.randn(V, D) / 2, torch.randn(V)
    teacher = torch.randn(N, E), torch.randn(V, E) / 2, torch.randn(V)
    h, w, b, *teacher = (t.to(dtype) for t in (h, w, b, *teacher))
    start, stop = shards(sizes)
    mine = [t.clone().requires_grad_() for t in (h, w[start:stop], b[start:stop])]
    loss = vocab_parallel_linear_kl_div(
        mine[0], mine[1], teacher[0], teacher[1][start:stop], linear_bias=mine[2],
        teacher_bias=teacher[2][start:stop], vocab_start=start, vocab_size=V, target=target,
        **options,
    )  # fmt: skip
    (loss * upstream).sum().backward()
    exact = [t.double().requires_grad_() for t in (h, w, b)]
    cap, scale = options.pop("softcap", None), options.pop("logit_scale", 1.0)
    teacher_cap, teacher_scale = (
        options.pop("teacher_softcap", None),
        options.pop("teacher_logit_scale", 1.0),
    )
    options.pop("token_chunk_size", None)
    z = oracle.logits(F.linear(*exact), cap, scale)
    y = oracle.logits(F.linear(*(t.double() for t in teacher)), teacher_cap, teacher_scale)
    expected = oracle.kl_div(z, y, target=target, **options)
    (expected * upstream).sum().backward()
    grads = [exact[0].grad, exact[1].grad[start:stop], exact[2].grad[start:stop]]
    return loss.detach(), expected.detach(), [t.grad for t in mine], grads


@case
def test_heads():
    _, target = batch()
    for dtype, tolerance in ((torch.float32, 3e-6), (torch.float64, 1e-12)):
        for kind in KINDS:
            for options in (
                dict(token_chunk_size=2, target=target),
                dict(token_chunk_size=4, temperature=2.0, reduction="none"),
                dict(softcap=3.0, teacher_softcap=4.0, logit_scale=0.5, teacher_logit_scale=2.0),
                dict(sizes=SIZES["no class"], token_chunk_size=4),
            ):
                loss, expected, grads, exact = of_heads(dtype, kind=kind, **options)
                assert_near(loss, expected, tolerance)
                for a, e in zip(grads, exact, strict=True):
                    assert a.dtype == dtype
                    assert_near(a, e, tolerance)


@case
def test_dtensor_mesh():
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    x, y, target = pair()
    logits, teacher = (distribute_tensor(t, mesh, [Shard(1)]) for t in (x, y))
    logits.requires_grad_()
    vocab_parallel_kl_div(logits, teacher, target=target, kind="jsd").backward()
    exact = x.to(torch.float64, copy=True).requires_grad_()
    oracle.kl_div(exact, y, target=target, kind="jsd").backward()
    assert_gradient(logits.grad.full_tensor(), exact.grad, torch.float32, exact.grad.abs().amax())
    h, w, g, v = torch.randn(N, D), torch.randn(V, D), torch.randn(N, E), torch.randn(V, E)
    weight, of_teacher = (distribute_tensor(t, mesh, [Shard(0)]) for t in (w, v))
    weight.requires_grad_()
    hidden = distribute_tensor(h, mesh, [Replicate()]).requires_grad_()
    vocab_parallel_linear_kl_div(hidden, weight, g, of_teacher).backward()
    h, w = h.double().requires_grad_(), w.double().requires_grad_()
    oracle.kl_div(F.linear(h, w), F.linear(g.double(), v.double())).backward()
    assert_near(hidden.grad.full_tensor(), h.grad, 3e-6)
    assert_near(weight.grad.full_tensor(), w.grad, 3e-6)


@case
def test_bad_input():
    x, y, target = pair()
    start, stop = shards((37, 11))
    rank = dist.get_rank()
    mine, of_teacher = x[:, start:stop], y[:, start:stop]
    here = dict(vocab_start=start, vocab_size=V)
    for arguments, options, error, message in (
        ((x, [1.0]), {}, TypeError, "teacher must be a Tensor of logits, got list"),
        ((mine, y[:, : stop - start - 1]), here, ValueError, "but .* of the teacher: give every"),
        ((mine, of_teacher), here | dict(kind="both"), ValueError, "kind is 'both'"),
        ((mine, of_teacher), here | dict(beta=2), ValueError, "beta is 2"),
        ((mine, of_teacher), here | dict(temperature=0), ValueError, "temperature is 0"),
        ((mine, of_teacher[1:]), here, ValueError, r"teacher has shape \[8, "),
        ((mine, of_teacher), here | dict(target=target[1:]), ValueError, "target has shape"),
        ((mine, of_teacher.clone().requires_grad_()), here, ValueError, "a teacher gets none"),
        ((x, y), {}, ValueError, "bring the same values"),
        ((mine, of_teacher), here | dict(beta=0.1 * (rank + 1), kind="jsd"), ValueError, "options"),
        ((mine, of_teacher), here | dict(group="world"), TypeError, "ProcessGroup or None, got"),
    ):
        with pytest.raises(error, match=message):
            vocab_parallel_kl_div(*arguments, **options)
    h, w, g, v = torch.randn(N, D), torch.randn(V, D), torch.randn(N, E), torch.randn(V, E)
    for arguments, options, error, message in (
        ((h, w, g, v[1:]), {}, ValueError, "101 classes of the student, but 100 of the teacher"),
        ((h, w, g, v[:, 1:]), {}, ValueError, r"teacher_weight has shape \[101, 5\]"),
        ((h, w, g[1:], v), {}, ValueError, "teacher_input has shape"),
        ((h, torch.nn.Linear(D, V), g, v), {}, TypeError, "linear_weight is a module"),
        ((h, w, g, v), dict(chunk_bytes=3), ValueError, "chunk_bytes is 3"),
        ((h, w, g, v), dict(cross_entropy_weight=1.0), TypeError, "cross_entropy_weight"),
    ):
        with pytest.raises(error, match=message):
            vocab_parallel_linear_kl_div(*arguments, **options)
    leaf = mine.clone().requires_grad_()
    with pytest.raises(RuntimeError, match="first derivatives only"):
        loss = vocab_parallel_kl_div(leaf, of_teacher, **here)
        torch.autograd.grad(loss, leaf, create_graph=True)
