"""`logits_dtype`: float32 logits of half-precision hidden states and weight."""

import oracle
import pytest
import torch
import torch.nn.functional as F

from chunked_ce import LinearCrossEntropyLoss, linear_cross_entropy, linear_token_stats
from chunked_ce.ops import chunks

N, D, V = 23, 16, 101
HALF = [torch.bfloat16, torch.float16]
OPTIONS = {
    "plain": {},
    "none": dict(reduction="none"),
    "all": dict(label_smoothing=0.1, z_loss_weight=1e-2, softcap=20.0, vocab_size=90),
}


def head(dtype):
    torch.manual_seed(2)
    x, w, b = 4 * torch.randn(N, D), torch.randn(V, D), torch.randn(V)
    target = torch.randint(0, 90, (N,))
    target[::5] = -100
    return *(t.to(dtype).requires_grad_() for t in (x, w, b)), target


def truth(x, w, b, target, upstream, **options):
    leaves = [t.detach().double().requires_grad_() for t in (x, w, b)]
    loss = oracle.cross_entropy(F.linear(*leaves), target, **options)
    (loss * upstream).sum().backward()
    return loss.detach(), [t.grad for t in leaves]


@pytest.mark.parametrize("wide_slice", [64, 16 << 20])  # bytes: a class or two at a time, all
@pytest.mark.parametrize("drop", [True, False])
@pytest.mark.parametrize("chunk", [None, 7])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtype", HALF)
def test_loss_and_gradients(monkeypatch, dtype, options, chunk, drop, wide_slice):
    """The loss as exact as in float32; each gradient rounded once."""
    monkeypatch.setattr(chunks, "WIDE_BYTES", wide_slice)
    x, w, b, target = head(dtype)
    options = OPTIONS[options]
    upstream = torch.linspace(-1, 2, N).double() if "reduction" in options else 3.7
    loss, grads = truth(x, w, b, target, upstream, **options)
    ours = linear_cross_entropy(
        x, w, target, linear_bias=b, logits_dtype=torch.float32, token_chunk_size=chunk,
        drop_ignored=drop, **options,
    )  # fmt: skip
    torch.testing.assert_close(ours.detach().double(), loss, rtol=2e-6, atol=2e-6)
    (ours * (upstream.float() if "reduction" in options else upstream)).sum().backward()
    for t, exact in zip((x, w, b), grads, strict=True):
        assert t.grad.dtype == dtype
        # Twice: when it is made, and when the upstream gradient multiplies it.
        step = 2 * torch.finfo(dtype).eps
        torch.testing.assert_close(
            t.grad.double(), exact, rtol=step, atol=float(exact.abs().max()) * 2e-5
        )


def test_the_dtype_of_the_operands_is_less_exact():
    x, w, b, target = head(torch.bfloat16)
    exact, _ = truth(x, w, b, target, 1.0)
    half, wide = (
        (linear_cross_entropy(x, w, target, linear_bias=b, logits_dtype=d) - exact).abs().item()
        for d in (None, torch.float32)
    )
    assert wide < half / 50


@pytest.mark.parametrize("dtype", HALF)
def test_token_stats(dtype):
    x, w, b, target = head(dtype)
    wanted = dict(entropy=True, mean_logprob=True, rank=True, argmax=True)
    stats = linear_token_stats(
        x, w, target, linear_bias=b, logits_dtype=torch.float32, token_chunk_size=6, **wanted
    )
    leaves = [t.detach().double().requires_grad_() for t in (x, w, b)]
    expected = oracle.token_stats(F.linear(*leaves), target)
    for name, value in expected.items():
        ours = getattr(stats, name).detach()
        torch.testing.assert_close(ours.to(value.dtype), value.detach(), rtol=2e-6, atol=5e-6)
    loss = (stats.logprob * 3 + stats.entropy * stats.lse).sum()
    exact = (expected["logprob"] * 3 + expected["entropy"] * expected["lse"]).sum()
    ours = torch.autograd.grad(loss, (x, w, b))
    for a, e in zip(ours, torch.autograd.grad(exact, leaves), strict=True):
        torch.testing.assert_close(
            a.double(), e, rtol=torch.finfo(dtype).eps, atol=float(e.abs().max()) * 2e-5
        )


def test_products_of_an_accelerator(monkeypatch):
    """There the gradient of logits is rounded for products that sum in float32: here emulated."""
    torch_mm = torch.mm

    def mm(a, b, *, out_dtype=None, out=None):
        if out_dtype is not None:
            assert a.dtype == b.dtype == torch.bfloat16
            a, b = a.to(out_dtype), b.to(out_dtype)
        return torch_mm(a, b, out=out)

    monkeypatch.setattr(chunks.torch, "mm", mm)
    monkeypatch.setattr(chunks, "has_wide_products", lambda x, dtype: dtype == torch.float32)
    x, w, b, target = head(torch.bfloat16)
    loss, grads = truth(x, w, b, target, 3.7)
    ours = linear_cross_entropy(
        x, w, target, linear_bias=b, logits_dtype=torch.float32, token_chunk_size=9
    )
    torch.testing.assert_close(ours.detach().double(), loss, rtol=2e-6, atol=0)
    (3.7 * ours).backward()
    for t, exact in zip((x, w, b), grads, strict=True):
        assert (t.grad.double() - exact).norm() < 6e-3 * exact.norm()


def test_module_and_autocast():
    module = LinearCrossEntropyLoss(D, V, logits_dtype=torch.float32)
    x, _, _, target = head(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss = module(x, target)
    x, w = x.detach().bfloat16(), module.linear.weight.detach().bfloat16()
    exact, _ = truth(x, w, torch.zeros(V), target, 1.0)
    torch.testing.assert_close(loss.detach().double(), exact, rtol=2e-6, atol=0)
    assert "logits_dtype=torch.float32" in repr(module)


def test_operands_that_are_as_wide_change_nothing():
    x, w, b, target = head(torch.float32)
    loss = linear_cross_entropy(x, w, target, linear_bias=b, logits_dtype=torch.float32)
    assert torch.equal(loss, linear_cross_entropy(x, w, target, linear_bias=b))


@pytest.mark.framework
def test_compiled():
    x, w, b, target = head(torch.bfloat16)

    def loss(x, w):
        return 2 * linear_cross_entropy(x * 1.0, w, target, logits_dtype=torch.float32)

    results = []
    for function in (loss, torch.compile(loss, backend="aot_eager", fullgraph=True)):
        value = function(x, w)
        results.append((value.detach(), *torch.autograd.grad(value, (x, w))))
    for a, e in zip(*results, strict=True):
        torch.testing.assert_close(a, e)


@pytest.mark.parametrize("function", [linear_cross_entropy, linear_token_stats])
@pytest.mark.parametrize(
    ("dtype", "value", "error", "said"),
    [
        (torch.float32, torch.bfloat16, ValueError, "narrower than the operands' torch.float32"),
        (torch.float64, torch.float32, ValueError, "narrower than the operands' torch.float64"),
        (torch.bfloat16, torch.float16, ValueError, "give torch.float32"),
        (torch.bfloat16, torch.int64, ValueError, "give torch.float32"),
        (torch.bfloat16, "float32", TypeError, "must be a floating dtype or None, got 'float32'"),
    ],
)
def test_bad_dtypes(function, dtype, value, error, said):
    x, w, _, target = head(dtype)
    with pytest.raises(error, match=said):
        function(x, w, target, logits_dtype=value)
