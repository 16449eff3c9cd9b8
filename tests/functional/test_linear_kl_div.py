"""linear_kl_div against the two heads and eager torch in fp64."""

import oracle
import pytest
import torch
from helpers import ULP
from torch import nn

from chunked_ce import kl_div, linear_kl_div

KINDS = ("forward", "reverse", "jsd")
N, D, TEACHER_D, V = 11, 16, 24, 151  # several chunks of tokens; several ragged tiles


def models(dtype=torch.float32, device="cpu"):
    """Hidden states, head and bias of a student; hidden states and head of a teacher."""
    shapes = ((N, D), (V, D), (V,), (N, TEACHER_D), (V, TEACHER_D))
    tensors = [torch.randn(s, dtype=torch.float64).to(device, dtype) for s in shapes]
    tensors[4] *= 0.3
    return tensors


def losses(tensors, target, dtype, reduction, cross_entropy_weight, **options):
    x, w, b, tx, tw = (t.detach().to(dtype) for t in tensors)
    leaves = [t.requires_grad_() for t in (x, w, b)]
    if dtype == torch.float64 and options.pop("truth", False):
        options = {k: v for k, v in options.items() if k not in ("token_chunk_size", "backend")}
        z, y = x @ w.T + b, tx @ tw.T
        loss = oracle.kl_div(z, y, target=target, reduction=reduction, **options)
        if cross_entropy_weight:
            weights = {k: options.get(k) for k in ("token_weight", "num_items")}
            hard = oracle.cross_entropy(z, target, reduction=reduction, **weights)
            loss = loss + cross_entropy_weight * hard
        return loss, leaves
    loss = linear_kl_div(
        x, w, tx, tw, linear_bias=b, target=target, reduction=reduction,
        cross_entropy_weight=cross_entropy_weight, **options,
    )  # fmt: skip
    return loss, leaves


@pytest.mark.parametrize("cross_entropy_weight", [0.0, 0.7])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("kind", KINDS)
def test_values_and_gradients(backend, device, kind, reduction, cross_entropy_weight):
    if backend == "triton" and (
        reduction != ("none" if kind == "jsd" else "mean")
        or (kind == "jsd") == bool(cross_entropy_weight)
    ):
        pytest.skip("the interpreter is slow; the other reductions reach the same code")
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        if backend == "triton" and dtype != torch.float32:
            continue
        tensors = models(dtype, device)
        target = torch.randint(V, (N,), device=device)
        target[::5] = -100
        options = dict(kind=kind, beta=0.3, temperature=2.0, token_chunk_size=4, backend=backend)
        given = (reduction, cross_entropy_weight)
        ours, grads = losses(tensors, target, dtype, *given, **options)
        truth, of_truth = losses(tensors, target, torch.float64, *given, truth=True, **options)
        upstream = torch.randn(N, device=device) if reduction == "none" else torch.tensor(-2.0)
        ours.backward(upstream.to(ours))
        truth.backward(upstream.to(truth))
        # Logits are rounded to the dtype once, as those of eager are.
        torch.testing.assert_close(ours.double(), truth, rtol=2 * ULP[dtype], atol=2 * ULP[dtype])
        for a, b in zip(grads, of_truth, strict=True):
            assert a.grad.dtype == dtype
            worst = (a.grad.double() - b.grad).abs().max() / b.grad.abs().max()
            assert worst < 3 * ULP[dtype]


def test_weights_num_items_and_no_target(backend, device):
    if backend == "triton":
        pytest.skip("the interpreter is slow; the kernels are given each token's weight")
    tensors = models(device=device)
    weight = torch.rand(N, device=device)
    target = torch.randint(V, (N,), device=device)
    for labels, reduction, options in (
        (None, "mean", dict(token_weight=weight)),
        (None, "none", dict(token_weight=weight)),
        (target, "mean", dict(num_items=torch.tensor(50))),
        (target, "mean", dict(num_items=50, token_weight=weight)),
    ):
        options |= dict(kind="reverse", token_chunk_size=6, backend=backend)
        ours, grads = losses(tensors, labels, torch.float32, reduction, 0.0, **options)
        truth, of_truth = losses(
            tensors, labels, torch.float64, reduction, 0.0, truth=True, **options
        )
        ours.sum().backward()
        truth.sum().backward()
        torch.testing.assert_close(ours.double(), truth, rtol=1e-5, atol=1e-7)
        for a, b in zip(grads, of_truth, strict=True):
            worst = (a.grad.double() - b.grad).abs().max() / b.grad.abs().max()
            assert worst < 3 * ULP[torch.float32]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_softcap_and_scale_of_each_model(backend, device, kind, reduction):
    """Gemma 2's cap, Granite's factor: the two models' own, in one pass and in two."""
    if backend == "triton":
        pytest.skip("the interpreter is slow; the transforms are not in the kernels")
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        x, w, b, tx, tw = models(dtype, device)
        target = torch.randint(V, (N,), device=device)
        target[::5] = -100
        for cap, scale, teacher_cap, teacher_scale in ((3.0, 1.5, None, 0.25), (None, 0.3, 2.0, 1)):
            given = dict(kind=kind, temperature=1.5, token_chunk_size=7, backend=backend)
            leaves = [t.clone().requires_grad_() for t in (x, w, b)]
            ours = linear_kl_div(
                *leaves[:2], tx, tw, linear_bias=leaves[2], target=target, reduction=reduction,
                cross_entropy_weight=0.7, softcap=cap, logit_scale=scale,
                teacher_softcap=teacher_cap, teacher_logit_scale=teacher_scale, **given,
            )  # fmt: skip
            truth = [t.double().clone().requires_grad_() for t in (x, w, b)]
            z = oracle.logits(truth[0] @ truth[1].T + truth[2], cap, scale)
            y = oracle.logits(tx.double() @ tw.double().T, teacher_cap, teacher_scale)
            tokens = dict(target=target, reduction=reduction)
            expected = oracle.kl_div(z, y, kind=kind, temperature=1.5, **tokens)
            expected = expected + 0.7 * oracle.cross_entropy(z, **tokens)
            step = 4 * ULP[dtype]  # the logits are rounded by the product and by the transforms
            torch.testing.assert_close(ours.double(), expected, rtol=step, atol=step)
            ours.sum().backward()
            expected.sum().backward()
            for a, b_ in zip(leaves, truth, strict=True):
                worst = (a.grad.double() - b_.grad).abs().max() / b_.grad.abs().max()
                assert worst < step


@pytest.mark.framework
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(backend, device, kind, reduction):
    if backend == "triton":
        pytest.skip("minutes in the interpreter; kl_div's gradcheck runs the same kernels")
    shapes = ((5, 4), (11, 4), (11,), (5, 3), (11, 3))
    x, w, b, tx, tw = (torch.randn(s, dtype=torch.float64, device=device) for s in shapes)
    target = torch.tensor([1, -100, 3, 10, 0], device=device)

    def loss(x, w, b):
        return linear_kl_div(
            x, w, tx, tw, linear_bias=b, kind=kind, beta=0.2, temperature=1.3, target=target,
            reduction=reduction, cross_entropy_weight=0.5, softcap=4.0, teacher_softcap=2.0,
            token_chunk_size=2, backend=backend,
        )  # fmt: skip

    assert torch.autograd.gradcheck(loss, [t.requires_grad_() for t in (x, w, b)])


def test_padded_heads_and_batches():
    student, teacher = nn.Linear(8, 104, bias=False), nn.Linear(12, 120, bias=False)
    x, y = torch.randn(2, 3, 8), torch.randn(2, 3, 12)
    target = torch.tensor([[1, 2, -100], [4, 5, 6]])
    given = dict(kind="jsd", target=target, vocab_size=100)
    loss = linear_kl_div(x, student.weight, y, teacher.weight.detach(), **given)
    truth = kl_div(student(x), teacher(y).detach(), **given)
    torch.testing.assert_close(loss, truth)
    (grad,) = torch.autograd.grad(loss, student.weight)
    torch.testing.assert_close(grad, torch.autograd.grad(truth, student.weight)[0])
    assert (grad[100:] == 0).all()


@pytest.mark.framework
def test_frozen_parts_second_backward_and_compile():
    x, w, b, tx, tw = models()
    frozen = linear_kl_div(x.requires_grad_(), w, tx, tw, token_chunk_size=5)
    first = torch.autograd.grad(frozen, x, retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(frozen, x), first)
    loss = lambda x, w: linear_kl_div(x, w, tx, tw, linear_bias=b, kind="jsd")  # noqa: E731
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    w.requires_grad_()
    truth = torch.autograd.grad(loss(x, w), (x, w))
    torch.testing.assert_close(torch.autograd.grad(compiled(x, w), (x, w)), truth)
    torch.testing.assert_close(torch.func.grad(loss)(x.detach(), w.detach()), truth[0])
    with pytest.raises(RuntimeError, match="first derivatives only"):
        torch.autograd.grad(loss(x, w), x, create_graph=True)


@pytest.mark.framework
def test_autocast():
    x, w, b, tx, tw = models()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = linear_kl_div(x, w.requires_grad_(), tx, tw, linear_bias=b)
    half = [t.bfloat16() for t in (x, w, tx, tw, b)]
    same = linear_kl_div(*half[:4], linear_bias=half[4])
    torch.testing.assert_close(loss, same)
    loss.backward()
    assert w.grad.dtype == torch.float32


X, W, TX, TW = torch.zeros(3, 4), torch.zeros(7, 4), torch.zeros(3, 5), torch.zeros(7, 5)


@pytest.mark.parametrize(
    "arguments, options, error",
    [
        ((X, W, TX, W), {}, r"teacher_weight of shape \[7, 4\] takes hidden states of 4 numbers"),
        ((X, W, TX[:2], TW), {}, r"teacher_input has shape \[2, 5\], but input has shape \[3, 4\]"),
        ((X, W, TX, torch.zeros(9, 5)), {}, "input has 7 columns, but teacher has 9"),
        ((X, W, TX, nn.Parameter(TW)), {}, r"teacher gets none: pass teacher_weight.detach\(\)"),
        (
            (X, W, TX.requires_grad_(False), TW),
            dict(cross_entropy_weight=1.0),
            "there is no target",
        ),
        ((X, W, TX, TW), dict(beta=-1), "beta is -1.0"),
        ((X, W, TX, TW), dict(softcap=0), "softcap is 0.0, expected a number above 0"),
        ((X, W, TX, TW), dict(teacher_softcap=-1), "teacher_softcap is -1.0"),
        ((X, W, TX, TW), dict(teacher_logit_scale="2"), "teacher_logit_scale must be a number"),
        ((X, W, TX, TW), dict(teacher_head=TW), "did you mean teacher_weight"),
        ((X, W, TX, TW), dict(target=torch.zeros(2, dtype=torch.long)), "target has shape"),
        ((X, W, TX.bfloat16(), TW), {}, "dtype"),
        ((X, W.T, TX, TW), {}, r"linear_weight of shape \[4, 7\] takes hidden states of 7"),
    ],
)
def test_bad_input(arguments, options, error):
    with pytest.raises((TypeError, ValueError), match=error):
        linear_kl_div(*arguments, **options)


def test_a_target_out_of_range_is_found_before_any_work():
    with pytest.raises(IndexError, match="target"):
        linear_kl_div(X, W, TX, TW, target=torch.tensor([0, 9, 1]), cross_entropy_weight=1.0)
