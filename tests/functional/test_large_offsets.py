"""Tests of logits with a large common offset, whose gradients must be as accurate as in fp64.

A scale folded into an exponent near 1e6 would be rounded away (found: 3 % off, and nonsense at 1e8).
"""

import pytest
import torch
import torch.nn.functional as F

import chunked_ce

V = 70
OFFSETS = [sign * 10.0**k for k in range(2, 10) for sign in (1, -1)]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
T = torch.tensor([1, V - 1, -100])


def logits(offset: float, dtype: torch.dtype, device: str) -> torch.Tensor:
    """Return logits [3, V]: all equal, or a few representable units around the offset."""
    x = torch.full((3, V), offset, dtype=dtype)
    near = max(1.0, torch.finfo(dtype).eps * abs(offset))
    if near <= 4.0:
        x[1] += near * torch.randint(-2, 3, (V,)).to(dtype)
    return x.to(device)


def gradient(loss, x):
    """Return the gradient under upstream gradients other than 1, with a sign for each token."""
    y = loss(x)
    upstream = torch.tensor([3.0, -0.7, 2.0], device=x.device, dtype=y.dtype)
    (y * (upstream if y.dim() else 3.0)).sum().backward()
    return x.grad


ENTRY_POINTS = {
    "sum": (lambda f, x, t: f(x, t, reduction="sum"), {}),
    "mean": (lambda f, x, t: f(x, t), {}),
    "none": (lambda f, x, t: f(x, t, reduction="none"), {}),
    "in place": (lambda f, x, t: f(x * 1, t, reduction="none"), dict(inplace_backward=True)),
    "one pass": (lambda f, x, t: f(x, t, reduction="sum"), dict(grad_in_forward=True)),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("entry", ENTRY_POINTS)
def test_cross_entropy(backend, device, entry, dtype):
    call, options = ENTRY_POINTS[entry]
    interpreted = backend == "triton"  # slow: every power of ten, with one sign or the other
    for offset in OFFSETS[1::4] + OFFSETS[2::4] if interpreted else OFFSETS:
        if abs(offset) > torch.finfo(dtype).max:
            continue
        x = logits(offset, dtype, device).requires_grad_()
        grad = gradient(
            lambda z: call(
                lambda *a, **k: chunked_ce.cross_entropy(*a, **k, **options, backend=backend),
                z,
                T.to(device),
            ),
            x,
        )
        z = x.detach().double().requires_grad_()
        truth = gradient(lambda z: call(F.cross_entropy, z, T.to(device)), z)
        compare(grad, truth, dtype, offset)


def compare(grad, truth, dtype, offset):
    """Compare within one unit of a half dtype; in float32 allow the error of exp at an ulp of lse."""
    relative = (
        4e-6 + 2**-22 * abs(offset) * 2**-23 if dtype == torch.float32 else torch.finfo(dtype).eps
    )
    allowed = relative * truth.abs() + 1e-7 * (truth.abs() < 6e-5)
    error = (grad.double() - truth).abs()
    assert (error <= allowed).all(), (
        f"{dtype} {offset:g}: {(error / truth.abs()).nan_to_num().max():.3g}"
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_top_k_targets(backend, device, dtype):
    classes = torch.tensor([[1, 5], [0, V - 1], [3, 4]], device=device)
    prob = torch.tensor([[0.75, 0.25], [0.5, 0.5], [1.0, 0.0]], device=device)
    dense = torch.zeros(3, V, dtype=torch.float64, device=device).scatter_(
        1, classes, prob.double()
    )
    for offset in OFFSETS:
        if abs(offset) > torch.finfo(dtype).max:
            continue
        x = logits(offset, dtype, device).requires_grad_()
        grad = gradient(
            lambda z: chunked_ce.cross_entropy(
                z, (classes, prob), reduction="none", backend=backend
            ),
            x,
        )
        z = x.detach().double().requires_grad_()
        compare(
            grad, gradient(lambda z: F.cross_entropy(z, dense, reduction="none"), z), dtype, offset
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_token_stats(backend, device, dtype):
    for offset in OFFSETS:
        if abs(offset) > torch.finfo(dtype).max:
            continue
        x = logits(offset, dtype, device).requires_grad_()
        grad = gradient(
            lambda z: chunked_ce.token_stats(z, T.to(device), backend=backend).logprob, x
        )
        z = x.detach().double().requires_grad_()
        compare(
            grad,
            gradient(lambda z: -F.cross_entropy(z, T.to(device), reduction="none"), z),
            dtype,
            offset,
        )
        x.grad = z.grad = None
        grad = gradient(lambda z: chunked_ce.token_stats(z, T.to(device), backend=backend).lse, x)
        truth = gradient(lambda z: torch.where(T.to(device) == -100, 0.0, z.logsumexp(-1)), z)
        compare(grad, truth, dtype, offset)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_linear_cross_entropy(backend, device, dtype):
    """Give all classes the offset as logit, for any summation order of the product."""
    for offset in OFFSETS:
        hidden = torch.zeros(3, 8, dtype=dtype, device=device)
        hidden[:, 0] = 1.0
        weight = torch.zeros(V, 8, dtype=dtype, device=device)
        weight[:, 0] = offset
        w, exact = weight.clone().requires_grad_(), weight.double().requires_grad_()
        target = T.to(device)
        grad = gradient(
            lambda w, h=hidden, t=target: chunked_ce.linear_cross_entropy(
                h, w, t, reduction="none", backend=backend
            ),
            w,
        )
        truth = gradient(
            lambda w, h=hidden, t=target: F.cross_entropy(h.double() @ w.T, t, reduction="none"),
            exact,
        )
        assert (grad[:, 0].double() - truth[:, 0]).abs().max() <= 2 * torch.finfo(
            dtype
        ).eps * truth.abs().max(), offset
