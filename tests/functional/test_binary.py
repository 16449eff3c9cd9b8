"""Tests of binary_cross_entropy_with_logits: dense and index labels, values, gradients, memory."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from helpers import ULP, gradient

from bench import measure
from chunked_ce import BCEWithLogitsLoss, binary_cross_entropy_with_logits


def truth(x, y, weight=None, pos_weight=None, reduction="mean"):
    weight, pos_weight = (None if t is None else t.double() for t in (weight, pos_weight))
    return F.binary_cross_entropy_with_logits(
        x.double(), y.double(), weight, reduction=reduction, pos_weight=pos_weight
    )


def by_index(y, extra=2):
    """Return 0/1 labels as class indices, with padding and one repetition."""
    k = max(1, int(y.sum(-1).max())) + extra
    order = y.argsort(dim=-1, descending=True, stable=True)[..., :k]
    index = torch.where(y.gather(-1, order) > 0, order, -100)
    index[..., -1] = index[..., 0]
    return index


def compare(loss, exact, x):
    """Compare values and gradients, with an upstream gradient other than 1."""
    dtype = x.dtype
    value = loss(x)
    assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    rtol = 1e-11 if dtype == torch.float64 else 2e-6
    torch.testing.assert_close(value.double(), exact(x), rtol=rtol, atol=rtol)

    def up(out):
        return (out * torch.linspace(-1, 2, out.numel()).view(out.shape).to(out)).sum()

    ours, right = gradient(loss, x, upstream=up), gradient(exact, x.double(), upstream=up)
    assert ours.dtype == dtype
    noise = float(right.abs().max()) * (1e-14 if dtype == torch.float64 else 2e-7)
    torch.testing.assert_close(ours.double(), right, rtol=ULP[dtype], atol=noise)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(3, 101), (2, 2, 37), (9,), (4, 1)], ids=str)
@pytest.mark.parametrize("labels", ["soft", "hard", "indices"])
def test_labels(backend, device, dtype, shape, labels):
    one = shape == (3, 101) and labels == "soft"
    if backend == "triton" and dtype != torch.float32 and not one:
        pytest.skip("the interpreter is slow, and no kernel sees both the dtype and the shape")
    x = (torch.randn(shape, dtype=torch.float64, device=device) * 4).to(dtype)
    y = torch.rand(shape) if labels == "soft" else (torch.rand(shape) < 0.1).float()
    target = by_index(y) if labels == "indices" else y
    if labels == "indices" and target.shape == shape:
        target = torch.cat([target, target], -1)  # as many entries as logits would look multi-hot
    y, target = y.to(device), target.to(device)
    for reduction, weight, pos_weight in itertools.product(
        ("mean", "sum", "none"),
        (None, torch.rand(shape, device=device)),
        (None, torch.rand(shape[-1], device=device)),
    ):
        if backend == "triton" and (reduction, weight is None, pos_weight is None) not in (
            ("mean", True, True), ("none", False, False),
        ):  # fmt: skip
            continue  # the kernels see no difference

        def loss(x, r=reduction, w=weight, v=pos_weight):
            return binary_cross_entropy_with_logits(
                x, target, w, reduction=r, pos_weight=v, backend=backend
            )

        compare(loss, lambda x, r=reduction, w=weight, v=pos_weight: truth(x, y, w, v, r), x)


@pytest.mark.parametrize("view", ["offset", "strided", "transposed", "expanded weight"])
def test_views(backend, device, view):
    x = torch.randn(4, 3, 60, device=device)
    y = (torch.rand(4, 3, 60, device=device) < 0.2).float()
    weight = None
    if view == "offset":
        x, y = x[..., 3:50], y[..., 5:52]
    elif view == "strided":
        x, y = x[..., ::2], y[..., 1::2]
    elif view == "transposed":
        x = x.transpose(0, 1).contiguous().transpose(0, 1)
        y = y.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    else:
        weight = torch.rand(3, 1, device=device)
    for target in (y, by_index(y)):
        compare(
            lambda x, t=target: binary_cross_entropy_with_logits(x, t, weight, backend=backend),
            lambda x: truth(x, y, weight),
            x,
        )


def test_confident_answers_digits(backend, device):
    """Check that softplus(-20) = 2e-9 and its gradient are not 0, as they are in torch."""
    z = torch.tensor([[-20.0, 20.0, -20.0, 20.0]], device=device)
    y = torch.tensor([[0.0, 1.0, 1.0, 0.0]], device=device)
    for target in (y, torch.tensor([[1, 2]], device=device)):

        def loss(z, target=target):
            return binary_cross_entropy_with_logits(z, target, reduction="none", backend=backend)

        exact = F.softplus((1 - 2 * y.double()) * z.double())
        torch.testing.assert_close(loss(z).double(), exact, rtol=1e-6, atol=0)
        ours = gradient(loss, z, upstream=torch.ones(1, 4))
        sign = 1 - 2 * y.double()
        torch.testing.assert_close(ours.double(), sign * (sign * z).sigmoid(), rtol=1e-6, atol=0)


def test_infinite_logits(backend, device):
    """Check that a masked class without a label has loss 0, and an impossible label has loss inf."""
    inf = float("inf")
    z = torch.tensor([-inf, inf, -inf, inf, float("nan")], device=device)
    for y in (
        torch.tensor([0.0, 1.0, 1.0, 0.0, 0.0], device=device),
        torch.tensor([0.0, 1.0, 1.0, 0.0, 0.5], device=device),  # no longer all 0 or 1
    ):
        loss = binary_cross_entropy_with_logits(z, y, reduction="none", backend=backend)
        assert loss[:4].tolist() == [0, 0, inf, inf] and loss[4].isnan()
    x = torch.tensor([[inf, -inf, 1.0]], device=device)
    last = torch.tensor([0.0, 0.0, 1.0], device=device)
    exact = F.softplus(torch.tensor(-1.0))
    for target in (
        torch.tensor([[1.0, 1, 1]], device=device),
        torch.tensor([[0, 1, 2, -100]], device=device),
    ):
        for weights in (dict(weight=last), dict(pos_weight=last)):
            loss = binary_cross_entropy_with_logits(
                x, target, reduction="none", backend=backend, **weights
            )
            assert loss[0, :2].tolist() == [0, 0]
            torch.testing.assert_close(loss[0, 2].cpu(), exact)


def test_empty_labels_and_empty_rows(backend, device):
    x = torch.randn(3, 20, device=device)
    none = torch.full((3, 2), -100, device=device)
    compare(
        lambda x: binary_cross_entropy_with_logits(x, none, backend=backend),
        lambda x: truth(x, torch.zeros(3, 20, device=device)),
        x,
    )
    pad = torch.tensor([[4, 255], [255, 255], [0, 1]], dtype=torch.uint8, device=device)
    hot = torch.zeros(3, 20, device=device)
    hot[[0, 2, 2], [4, 0, 1]] = 1
    ours = binary_cross_entropy_with_logits(x, pad, ignore_index=255, backend=backend)
    torch.testing.assert_close(ours.double(), truth(x, hot))
    empty = torch.randn(0, 20, device=device, requires_grad=True)
    loss = binary_cross_entropy_with_logits(
        empty, torch.rand(0, 20, device=device), backend=backend
    )
    loss.backward()
    assert loss.isnan() and empty.grad.shape == (0, 20)


def test_rows_independent(backend, device):
    x, y = torch.randn(5, 80, device=device), (torch.rand(5, 80, device=device) < 0.1).float()
    whole = binary_cross_entropy_with_logits(x, by_index(y), reduction="none", backend=backend)
    for i in range(5):
        one = binary_cross_entropy_with_logits(
            x[i], by_index(y[i]), reduction="none", backend=backend
        )
        assert torch.equal(one, whole[i])


@pytest.mark.parametrize("target", ["dense", "indices"])
def test_second_backward_and_double_backward(backend, device, target):
    x = torch.randn(3, 30, device=device, requires_grad=True)
    y = (torch.rand(3, 30, device=device) < 0.2).float()
    loss = binary_cross_entropy_with_logits(x, y if target == "dense" else by_index(y), backend=backend)  # fmt: skip
    first, second = (torch.autograd.grad(loss, x, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
    (grad,) = torch.autograd.grad(loss, x, create_graph=True)
    with pytest.raises(RuntimeError, match="first derivatives only"):
        grad.sum().backward()


@pytest.mark.framework
def test_operators_are_well_formed():
    x, y = torch.randn(3, 30), torch.rand(3, 30)
    index, weight = torch.tensor([[3, -100], [4, 5], [29, 29]]), torch.rand(30)
    ops = torch.ops.chunked_ce
    for target, by_element in itertools.product((y, index), (False, True)):
        arguments = (x.clone().requires_grad_(), target, weight, weight, -100, by_element, "torch")
        torch.library.opcheck(ops.binary_loss.default, arguments)
        arguments = (x, target, weight, weight, torch.randn(3, 30), -100, "torch")
        torch.library.opcheck(ops.binary_grad.default, arguments)


@pytest.mark.framework
def test_compile_fullgraph():
    torch._dynamo.reset()
    x, module = torch.randn(3, 30), BCEWithLogitsLoss(pos_weight=torch.rand(30))
    for target in (torch.rand(3, 30), torch.tensor([[3, -100], [4, 5], [29, 29]])):
        ours = gradient(torch.compile(module, backend="aot_eager", fullgraph=True), x, target)
        torch.testing.assert_close(ours, gradient(module, x, target))


def memory_of_a_step(n, v, k, labels):
    """Return the memory of forward and backward, in units of the logits."""
    target = torch.randint(0, v, (n, k)) if labels == "indices" else torch.zeros(n, v)
    binary_cross_entropy_with_logits(torch.zeros(1, v, requires_grad=True), target[:1]).backward()
    x = torch.ones(n, v).requires_grad_()
    loss = (
        F.binary_cross_entropy_with_logits
        if labels == "torch"
        else binary_cross_entropy_with_logits
    )
    extra, _ = measure.extra_peak_memory(lambda: loss(x, target).backward())
    return extra / (x.numel() * x.element_size())


def extra_memory(n, v, k, labels):
    used = measure.in_fresh_process(memory_of_a_step, n, v, k, labels)
    print(f"\nextra memory of forward + backward, {n} x {v}, {labels}: {used:.3f} x the logits")
    return used


needs_proc = pytest.mark.skipif(not measure.memory_is_measurable(), reason="needs /proc")


@pytest.mark.long
@needs_proc
def test_extra_memory():
    assert (
        0.9 < extra_memory(256, 100_000, 20, "indices") <= 1.2
    )  # the blocks count for more than at full size
    assert extra_memory(256, 100_000, 20, "torch") > 1.9  # or it would not be seen


@pytest.mark.long
@needs_proc
@pytest.mark.parametrize("labels", ["dense", "indices"])
def test_extra_memory_many_labels(labels):
    assert 0.9 < extra_memory(256, 600_000, 100, labels) <= 1.05


@pytest.mark.parametrize("weighted", [False, True])
def test_labels_fp64_digits(weighted, backend, device):
    """Check that 1 - y is computed before an fp64 label near 1 is rounded."""
    y = torch.tensor([[1 - 1e-5 / 3, 1 - 1e-6 / 7, 0.9]], dtype=torch.float64, device=device)
    x = torch.tensor([[15.0, 17.0, 1.0]], device=device)
    arguments = dict(pos_weight=torch.full((3,), 0.6, device=device)) if weighted else {}
    wide = {k: v.double() for k, v in arguments.items()}
    loss = binary_cross_entropy_with_logits(x, y, reduction="none", backend=backend, **arguments)
    exact = F.binary_cross_entropy_with_logits(x.double(), y, reduction="none", **wide)
    torch.testing.assert_close(loss.double(), exact, rtol=1e-6, atol=0)

    def of(function, y, arguments):
        return lambda x: function(x, y, reduction="sum", **arguments)

    grad = gradient(of(binary_cross_entropy_with_logits, y, arguments | dict(backend=backend)), x)
    truth = gradient(of(F.binary_cross_entropy_with_logits, y, wide), x.double())
    torch.testing.assert_close(grad.double(), truth, rtol=1e-6, atol=1e-12)
