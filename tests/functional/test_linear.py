"""The lm_head and the loss in one: as F.linear and the loss on its logits."""

import copy
import itertools
import subprocess
import sys

import oracle
import pytest
import torch
import torch.nn.functional as F
from helpers import ROOT
from torch.utils._python_dispatch import TorchDispatchMode

from chunked_ce import LinearCrossEntropyLoss, linear_cross_entropy, linear_token_stats
from chunked_ce.ops import chunks
from chunked_ce.ops import linear as linear_ops
from chunked_ce.ops.library import Classes

N, D, V = 9, 16, 101
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
# relative to the largest: logits and gradients of logits are rounded to the dtype, as eager's are
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3, torch.float64: 1e-12}
OPTIONS = {
    "plain": {},
    "sum": dict(reduction="sum"),
    "none": dict(reduction="none"),
    "smoothing": dict(label_smoothing=0.1),
    "z_loss": dict(z_loss_weight=1e-2),
    "softcap": dict(softcap=5.0, logit_scale=0.5),
    "padded": dict(vocab_size=90),
    "num_items": dict(num_items=20),
}


def head(dtype=torch.float32, device="cpu", n=N, ignored=True):
    """Hidden states, weight, bias, target; those ignored in the midst of the others."""
    x, w, b = torch.randn(n, D), torch.randn(V, D) / D**0.5, torch.randn(V)
    target = torch.randint(0, 90, (n,))
    if ignored:
        target[::3] = -100
    return *(t.to(device, dtype) for t in (x, w, b)), target.to(device)


def leaves(*tensors):
    return [t.detach().clone().requires_grad_() for t in tensors]


def truth(x, w, b, target, upstream, **options):
    """Loss and gradients in fp64 with all logits."""
    x, w, b = leaves(*(t.double().cpu() for t in (x, w, b)))
    loss = oracle.cross_entropy(F.linear(x, w, b), target.cpu(), **options)
    (loss * upstream).sum().backward()
    return loss.detach(), x.grad, w.grad, b.grad


def assert_near(ours, expected, dtype):
    for a, e in zip(ours, expected, strict=True):
        assert (a.double().cpu() - e).abs().max() <= TOLERANCE[dtype] * e.abs().max()


@pytest.mark.parametrize("chunk", [None, 4])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_loss_and_gradients(backend, device, dtype, options, chunk):
    x, w, b, target = head(dtype, device)
    options = OPTIONS[options]
    upstream = torch.randn(N).double() if options.get("reduction") == "none" else 3.7
    expected = truth(x, w, b, target, upstream, **options)
    x, w, b = leaves(x, w, b)
    loss = linear_cross_entropy(
        x, w, target, linear_bias=b, token_chunk_size=chunk, backend=backend, **options
    )
    assert loss.dtype == dtype
    factor = upstream.to(loss) if isinstance(upstream, torch.Tensor) else upstream
    (loss * factor).sum().backward()
    assert_near((loss.detach(), x.grad, w.grad, b.grad), expected, dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("chunk", [None, 3])
def test_half_precision(backend, device, dtype, chunk):
    x, w, b, target = head(dtype, device)
    expected = truth(x, w, b, target, 3.7)
    x, w, b = leaves(x, w, b)
    loss = linear_cross_entropy(
        x, w, target, linear_bias=b, token_chunk_size=chunk, backend=backend
    )
    assert loss.dtype == torch.float32
    (3.7 * loss).backward()
    assert x.grad.dtype == w.grad.dtype == b.grad.dtype == dtype
    assert_near((loss.detach(), x.grad, w.grad, b.grad), expected, dtype)


def test_weight_gradient_bfloat16_error():
    torch.manual_seed(1)
    x, w = torch.randn(512, 64), torch.randn(1000, 64) / 8
    target = torch.randint(0, 1000, (512,))
    x, w = x.bfloat16(), w.bfloat16()
    *_, exact, _ = truth(x, w, torch.zeros(1000), target, 1.0)
    errors = []
    for chunk in (None, 64, 0):
        xs, ws = leaves(x, w)
        if chunk == 0:
            F.cross_entropy(F.linear(xs, ws), target).backward()
        else:
            linear_cross_entropy(xs, ws, target, token_chunk_size=chunk).backward()
        errors.append((ws.grad.double() - exact).norm() / exact.norm())
    whole, chunked, eager = errors
    assert whole <= 1.01 * eager and chunked <= 1.01 * eager


@pytest.mark.parametrize("needs", list(itertools.product([False, True], repeat=3))[1:])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_frozen_tensors(needs, reduction):
    """LoRA freezes the weight; nothing is computed for what needs no gradient."""
    x, w, b, target = head()
    expected = truth(x, w, b, target, 1.0, reduction=reduction)[1:]
    tensors = [t.requires_grad_(n) for t, n in zip((x, w, b), needs, strict=True)]
    linear_cross_entropy(x, w, target, linear_bias=b, reduction=reduction).sum().backward()
    for t, n, e in zip(tensors, needs, expected, strict=True):
        assert t.grad is None if not n else torch.allclose(t.grad.double(), e, atol=1e-6)


@pytest.mark.real_sizes
@pytest.mark.parametrize(("d", "v"), [(33, 1001), (201, 101)])
def test_chunk_padding(d, v):
    """In deterministic mode torch fills new memory with NaN; some bf16 products read it."""
    x, w = leaves(torch.randn(64, d).bfloat16(), torch.randn(v, d).bfloat16())
    torch.use_deterministic_algorithms(True)
    try:
        linear_cross_entropy(x, w, torch.randint(0, v, (64,))).backward()
    finally:
        torch.use_deterministic_algorithms(False)
    assert x.grad.isfinite().all() and w.grad.isfinite().all()


def test_tied_embeddings():
    w = (torch.randn(V, D) / 4).requires_grad_()
    tokens, target = torch.randint(0, V, (N,)), torch.randint(0, V, (N,))
    linear_cross_entropy(F.embedding(tokens, w), w, target).backward()
    ours, w.grad = w.grad, None
    F.cross_entropy(F.linear(F.embedding(tokens, w), w), target).backward()
    torch.testing.assert_close(ours, w.grad)


@pytest.mark.parametrize("shape", [(), (4,), (2, 3), (2, 1, 3)])
def test_shapes(shape):
    x, target = torch.randn(*shape, D), torch.randint(0, V, shape)
    w = torch.randn(V, D)
    expected = F.cross_entropy(F.linear(x, w).view(-1, V), target.view(-1), reduction="none").view(
        shape
    )
    torch.testing.assert_close(linear_cross_entropy(x, w, target, reduction="none"), expected)
    torch.testing.assert_close(linear_cross_entropy(x, w, target), expected.mean())


torch_has_it = pytest.mark.skipif(
    not hasattr(F, "linear_cross_entropy"), reason="torch has F.linear_cross_entropy from 2.13 on"
)


@torch_has_it
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("bias", [False, True])
def test_several_heads(reduction, bias):
    double = dict(dtype=torch.float64)
    x, w = leaves(torch.randn(N, D, **double), torch.randn(V, 2, 3, D, **double))
    b = torch.randn(V, 2, 3, **double, requires_grad=True) if bias else None
    target = torch.randint(0, V, (N, 2, 3))
    target[0, 1] = -100
    results = []
    for function in (linear_cross_entropy, F.linear_cross_entropy):
        loss = function(x, w, target, linear_bias=b, reduction=reduction, label_smoothing=0.1)
        results.append((loss, *torch.autograd.grad((2 * loss).sum(), [x, w] + [b] * bias)))
    for ours, torchs in zip(*results, strict=True):
        torch.testing.assert_close(ours, torchs)


@pytest.mark.parametrize("options", [dict(), dict(softcap=5.0), dict(vocab_size=90)])
def test_token_stats(backend, device, options):
    x, w, b, target = head(torch.float64, device)
    x, w, b = leaves(x, w, b)
    stats = linear_token_stats(
        x, w, target, linear_bias=b, entropy=True, mean_logprob=True, rank=True, argmax=True,
        token_chunk_size=4, backend=backend, **options,
    )  # fmt: skip
    others = leaves(*(t.cpu() for t in (x, w, b)))
    expected = oracle.token_stats(F.linear(*others), target.cpu(), **options)
    for name, value in expected.items():
        torch.testing.assert_close(getattr(stats, name).detach().cpu(), value.detach())
    names = ("lse", "logprob", "entropy", "mean_logprob")
    factors = torch.randn(4, N, dtype=torch.float64)
    loss = sum(
        (f.to(device) * getattr(stats, n)).sum() for f, n in zip(factors, names, strict=True)
    )
    loss.backward()
    sum((f * expected[n]).sum() for f, n in zip(factors, names, strict=True)).backward()
    for ours, theirs in zip((x, w, b), others, strict=True):
        torch.testing.assert_close(ours.grad.cpu(), theirs.grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_chunk_size_rounding(dtype):
    x, w, b, target = head(dtype, n=40)
    results = []
    for chunk in (1, 7, 13, None):
        tensors = leaves(x, w, b)
        loss = linear_cross_entropy(
            *tensors[:2], target, linear_bias=tensors[2], token_chunk_size=chunk
        )
        loss.backward()
        results.append((loss.detach(), *(t.grad for t in tensors)))
    for other in results[1:]:
        assert_near(other, [t.double() for t in results[0]], dtype)


@pytest.mark.parametrize("drop", [True, False])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_ignored_tokens(backend, device, drop, reduction):
    """Dropped before the product, or masked at static shapes: the same, NaN and all."""
    x, w, _, target = head(device=device)
    x[0] = float("nan")
    x, w = leaves(x, w)
    loss = linear_cross_entropy(
        x, w, target, reduction=reduction, drop_ignored=drop, token_chunk_size=4, backend=backend
    )
    loss.sum().backward()
    assert not x.grad[::3].any()
    kept = target != -100
    xs, ws = leaves(x[kept], w)
    F.cross_entropy(F.linear(xs, ws), target[kept], reduction=reduction).sum().backward()
    torch.testing.assert_close(x.grad[kept], xs.grad, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(w.grad, ws.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("n", [0, 3])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_all_tokens_ignored(n, reduction):
    x, w, b, _ = head(n=n)
    x, w, b = leaves(x, w, b)
    target = torch.full((n,), -100)
    loss = linear_cross_entropy(x, w, target, linear_bias=b, reduction=reduction)
    assert loss.isnan() if reduction == "mean" else not loss.any()
    loss.sum().backward()
    assert not any(t.grad.any() for t in (x, w, b))


def test_token_weight_with_and_without_a_gradient():
    x, w, b, target = head(torch.float64)
    for needs in (False, True):
        weight = torch.rand(N, dtype=torch.float64, requires_grad=needs)
        tensors = leaves(x, w)
        linear_cross_entropy(*tensors, target, token_weight=weight).backward()
        other = weight.detach().clone().requires_grad_()
        others = leaves(x, w)
        oracle.cross_entropy(F.linear(*others), target, token_weight=other).backward()
        for ours, theirs in zip(tensors, others, strict=True):
            torch.testing.assert_close(ours.grad, theirs.grad)
        if needs:
            torch.testing.assert_close(weight.grad, other.grad)


def test_second_backward_and_double_backward():
    x, w, b, target = head(torch.float64)
    x, w = leaves(x, w)
    loss = linear_cross_entropy(x, w, target)
    first = torch.autograd.grad(2 * loss, (x, w), retain_graph=True)
    second = torch.autograd.grad(3 * loss, (x, w), retain_graph=True)
    for a, c in zip(first, second, strict=True):
        torch.testing.assert_close(1.5 * a, c)
    with pytest.raises(RuntimeError, match="first derivatives only"):
        torch.autograd.grad(loss, x, create_graph=True)


def test_loss_scale_small_float16_gradients():
    """They would round to 0 before backward, which alone knows the scale."""
    x, w = torch.randn(4, 8), torch.randn(3000, 8) / 10
    target = torch.randint(0, 3000, (4,))
    *_, exact, _ = truth(x.half(), w.half(), torch.zeros(3000), target, 65536.0, num_items=8192)
    x, w = leaves(x.half(), w.half())
    (65536.0 * linear_cross_entropy(x, w, target, num_items=8192)).backward()
    assert (w.grad.double() - exact).norm() <= 5e-3 * exact.norm()


def test_num_items_requires_grad():
    x, w, _, target = head(torch.float64)
    items = torch.tensor(7.0, dtype=torch.float64, requires_grad=True)
    linear_cross_entropy(x.requires_grad_(), w, target, num_items=items).backward()
    total = linear_cross_entropy(x.detach(), w, target, reduction="sum")
    torch.testing.assert_close(items.grad, -total / 49)


def test_module_unknown_options():
    with pytest.raises(TypeError, match="has no argument softcapp: did you mean softcap"):
        LinearCrossEntropyLoss(4, 7, softcapp=3.0)


def test_gradients_accumulate():
    x, w, b, target = head()
    x, w = leaves(x, w)
    for _ in range(3):
        linear_cross_entropy(x, w, target).backward()
    xs, ws = leaves(x, w)
    linear_cross_entropy(xs, ws, target).backward()
    torch.testing.assert_close(w.grad, 3 * ws.grad)


def test_autocast():
    x, w, b, target = head()
    results = []
    for ours in (True, False):
        tensors = leaves(x, w, b)
        with torch.autocast("cpu", torch.bfloat16):
            if ours:
                loss = linear_cross_entropy(*tensors[:2], target, linear_bias=tensors[2])
            else:
                loss = F.cross_entropy(F.linear(*tensors).float(), target)
        loss.backward()
        results.append((loss.detach(), *(t.grad for t in tensors)))
    for a, e in zip(*results, strict=True):
        assert a.dtype == e.dtype == torch.float32
        assert (a - e).abs().max() <= 2e-2 * e.abs().max()


def test_shapes_without_autocast():
    tensors = leaves(*(t.to("meta") for t in head()[:2]))
    linear_cross_entropy(*tensors, torch.zeros(N, dtype=torch.int64, device="meta")).backward()
    assert tensors[1].grad.shape == (V, D)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradcheck(backend, device, reduction):
    if backend == "triton":
        pytest.skip("the interpreter is slow; gradcheck of token_stats runs the same kernels")
    x, w, b, target = head(torch.float64, device, n=4)

    def loss(x, w, b):
        return linear_cross_entropy(
            x, w, target, linear_bias=b, reduction=reduction, token_chunk_size=3, backend=backend
        )

    small = (x[:, :3], w[:7, :3], b[:7])
    target.clamp_(max=6)
    assert torch.autograd.gradcheck(loss, [t.requires_grad_() for t in leaves(*small)])


class Watch(TorchDispatchMode):
    """The most bytes of one tensor that is made, and the FLOPs of products, inside our operators."""

    def __init__(self):
        super().__init__()
        self.bytes, self.flops = 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        inside = getattr(linear_ops, "_" + function.overloadpacket.__name__, None)
        if function.namespace == "chunked_ce" and inside is not None:
            with self:
                return inside(*args)
        result = function(*args, **(kwargs or {}))
        for t in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(t, torch.Tensor):
                self.bytes = max(self.bytes, t.untyped_storage().nbytes())
        if function.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm_):
            a, b = [t for t in args if isinstance(t, torch.Tensor)][-2:]
            self.flops += 2 * a.shape[0] * a.shape[1] * b.shape[1]
        return result


@pytest.mark.real_sizes
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_memory_largest_tensor(reduction):
    n, v, d = 512, 4000, 32
    x, w = leaves(torch.randn(n, d), torch.randn(v, d))
    target = torch.randint(0, v, (n,))
    chunk = 64 * 4000 * 4
    with Watch() as seen:
        loss = linear_cross_entropy(x, w, target, reduction=reduction, chunk_bytes=chunk)
        loss.sum().backward()
    assert seen.bytes <= max(chunk, v * d * 4) < n * v * 4 / 2
    assert seen.flops == (6 if reduction == "mean" else 8) * n * d * v


@pytest.mark.real_sizes
def test_no_gradient_no_extra_work():
    n, v, d = 256, 4000, 32
    x, w, target = torch.randn(n, d), torch.randn(v, d), torch.randint(0, v, (n,))
    with Watch() as seen, torch.no_grad():
        linear_cross_entropy(x.requires_grad_(), w, target, chunk_bytes=1 << 20)
    assert seen.flops == 2 * n * d * v and seen.bytes <= 3 << 20
    w.requires_grad_(False)
    with Watch() as seen:
        linear_cross_entropy(x, w, target, chunk_bytes=1 << 20).backward()
    assert seen.flops == 4 * n * d * v


@pytest.mark.framework
@pytest.mark.parametrize(
    ("tracer", "reduction"),
    [
        ("aot_eager", "mean"),
        ("aot_eager", "none"),
        pytest.param("inductor", "mean", marks=pytest.mark.long),
    ],
)
def test_compile_fullgraph(tracer, reduction):
    x, w, b, target = head()

    def loss(x, w, b):
        each = linear_cross_entropy(
            x * 1.0, w, target, linear_bias=b, reduction=reduction, token_chunk_size=4
        )
        return 2 * each.sum()

    results = []
    for function in (loss, torch.compile(loss, backend=tracer, fullgraph=True)):
        tensors = leaves(x, w, b)
        value = function(*tensors)
        value.backward()
        results.append((value.detach(), *(t.grad for t in tensors)))
    for a, e in zip(*results, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("reduction", "frozen", "products"),
    [("mean", False, 3), ("none", False, 4), ("mean", True, 2), ("none", True, 3)],
)
def test_flop_counter(reduction, frozen, products):
    from torch.utils.flop_counter import FlopCounterMode

    x, w, _, target = head()
    x, w = x.requires_grad_(), w.requires_grad_(not frozen)
    with FlopCounterMode(display=False) as counter:
        linear_cross_entropy(x, w, target, reduction=reduction).sum().backward()
    assert counter.get_total_flops() == products * 2 * x.numel() * w.shape[0]


@pytest.mark.long
def test_flop_counter_that_was_there_before_the_first_call():
    """Formulas are registered late, because importing torch's counter takes long."""
    code = """
import torch, chunked_ce, sys
assert "torch.utils.flop_counter" not in sys.modules
from torch.utils.flop_counter import FlopCounterMode
x, w = torch.randn(4, 8), torch.randn(10, 8)
with FlopCounterMode(display=False) as counter:
    chunked_ce.linear_cross_entropy(x, w, torch.arange(4))
assert counter.get_total_flops() == 2 * 4 * 8 * 10
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


@pytest.mark.framework
def test_export_for_any_number_of_tokens(monkeypatch):
    """The default chunk depends on their number: the operator chooses it."""

    class Loss(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.randn(V, 8))

        def forward(self, x, target):
            return linear_cross_entropy(x, self.weight, target)

    model, tokens = Loss(), torch.export.Dim("tokens", min=1)
    arguments = torch.randn(12, 8), torch.randint(0, V, (12,))
    shapes = {0: tokens}, {0: tokens}
    exported = torch.export.export(model, arguments, dynamic_shapes=shapes).module()
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 20 * chunks.padded_row_bytes(V, 4))
    monkeypatch.setattr(chunks, "_CPU_CHUNK_BYTES", 20 * chunks.padded_row_bytes(V, 4))
    for n in (1, 12, 20, 21, 90):  # of 20 tokens in a chunk
        x, target = torch.randn(n, 8), torch.randint(0, V, (n,))
        torch.testing.assert_close(exported(x, target), model(x, target))


@pytest.mark.framework
def test_operators_are_well_formed():
    x, w, b, target = head()
    ops, chunk = torch.ops.chunked_ce, (4, True, torch.float32, torch.float32)
    shared = (-100, V, None, 1.0, "torch", *chunk)
    for needs in (False, True):
        tensors = [t.requires_grad_(needs) for t in leaves(x, w, b)]
        torch.library.opcheck(
            ops.linear_loss,
            (*tensors, target, None, None, 0.1, 0.0, *shared, [False] * 3, False, []),
        )
        torch.library.opcheck(
            ops.linear_loss,
            (
                *tensors,
                target,
                None,
                None,
                0.1,
                0.0,
                *shared,
                [False] * 3,
                False,
                [True, False, True],
            ),
        )
        torch.library.opcheck(
            ops.linear_stats, (*tensors, target, *Classes(), *shared, *[True] * 4)
        )


@pytest.mark.framework
def test_activation_checkpointing():
    from torch.utils.checkpoint import checkpoint

    x, w, b, target = head()
    results = []
    for wrap in (lambda f, *a: f(*a), lambda f, *a: checkpoint(f, *a, use_reentrant=False)):
        tensors = leaves(x, w)
        wrap(lambda x, w: linear_cross_entropy(x, w, target), *tensors).backward()
        results.append([t.grad for t in tensors])
    for a, e in zip(*results, strict=True):
        torch.testing.assert_close(a, e)


@torch_has_it
def test_module_parameters():
    torch.manual_seed(0)
    ours = LinearCrossEntropyLoss(D, V, out_features=(2,), bias=True, label_smoothing=0.1)
    torchs = torch.nn.LinearCrossEntropyLoss(
        D, V, out_features=(2,), bias=True, label_smoothing=0.1
    )
    torchs.load_state_dict(ours.state_dict())
    x, target = torch.randn(N, D), torch.randint(0, V, (N, 2))
    torch.testing.assert_close(ours(x, target), torchs(x, target))
    again = copy.deepcopy(ours)
    assert torch.equal(again(x, target), ours(x, target))
    assert "num_classes=101" in repr(ours) and "label_smoothing=0.1" in repr(ours)


X, W, T = torch.randn(3, D), torch.randn(V, D), torch.tensor([0, 5, -100])


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        (([1.0], W, T), {}, TypeError, "input must be a Tensor of hidden states, got list"),
        ((X.long(), W, T), {}, TypeError, "input has dtype torch.int64"),
        ((torch.tensor(1.0), W, T), {}, ValueError, "0-dimensional"),
        ((X, W.int(), T), {}, TypeError, "linear_weight has dtype torch.int32"),
        ((X, W[0], T), {}, ValueError, r"linear_weight has shape \[16\], expected \[V, D\]"),
        (
            (X, W[:, :5], T),
            {},
            ValueError,
            r"input has shape \[3, 16\]: pass the weight as \[V, D\]",
        ),
        ((X, W.t(), T), {}, ValueError, "takes hidden states of 101 numbers"),
        ((X, W.double(), T), {}, TypeError, "linear_weight has dtype torch.float64, but input has"),
        ((X, W, T), dict(linear_bias=torch.zeros(5)), ValueError, "linear_bias has shape .5."),
        ((X, W, T), dict(linear_bias=1.0), TypeError, "linear_bias must be a Tensor or None"),
        ((X, W, T[:2]), {}, ValueError, r"target has shape \[2\].*for each of \[3\]"),
        ((X, W, T.float()), {}, TypeError, "target has dtype torch.float32"),
        ((X, W, torch.tensor([0, 101, 1])), {}, IndexError, "target 101 in row 1"),
        ((X, W, T), dict(chunk_bytes=100), ValueError, "logits of one token take 512 bytes"),
        ((X, W, T), dict(chunk_bytes=1.5), TypeError, "chunk_bytes must be an int or None"),
        ((X, W, T), dict(token_chunk_size=0), ValueError, "token_chunk_size is 0"),
        ((X, W, T), dict(token_chunk_size=1, chunk_bytes=512), ValueError, "give one of them"),
        ((X, W, T), dict(acc_dtype=torch.int8), TypeError, "acc_dtype must be a floating dtype"),
        ((X, W, T), dict(acc_dtype="float32"), TypeError, "acc_dtype must be a floating dtype"),
        ((X, W, T), dict(drop_ignored=1), TypeError, "drop_ignored must be True or False"),
        ((X, W, T), dict(vocab_size=102), ValueError, "linear_weight of shape .* has 101 classes"),
        ((X, W, T), dict(weight=torch.ones(V - 1)), ValueError, "one weight per class"),
        ((X, W.to("meta"), T), {}, ValueError, "linear_weight is on meta"),
        ((X, W, T.to("meta")), {}, ValueError, "target is on meta"),
        ((X[None], W.view(V, 1, D), T[None]), {}, ValueError, "more than two dimensions"),
        ((X[:, :0], W[:, :0], T), {}, ValueError, "hidden states of 0 numbers"),
        ((X, torch.zeros(V, 0, D), torch.zeros(3, 0).long()), {}, ValueError, "no heads"),
    ],
)
def test_bad_input(arguments, options, error, message):
    with pytest.raises(error, match=message):
        linear_cross_entropy(*arguments, **options)


def test_sharded_weight_error():
    class DTensor(torch.Tensor):
        pass

    with pytest.raises(TypeError, match="gather it first"):
        linear_cross_entropy(X, W.as_subclass(DTensor), T)


def test_upstream_gradient_shape_error():
    x, w = leaves(X, W)
    with pytest.raises(RuntimeError):
        linear_cross_entropy(x, w, T).backward(torch.ones(3))


@pytest.mark.parametrize("adds", [True, False])
def test_products_in_float32_of_an_accelerator(monkeypatch, adds):
    """What a GPU does, where a product of bf16 tensors can stay in fp32: here emulated."""
    torch_mm, torch_addmm, sums = torch.mm, torch.addmm, []

    def mm(a, b, *, out_dtype=None, out=None):
        if out_dtype is None:
            return torch_mm(a, b, out=out)
        if out is None:  # apart from its sum only where products cannot add
            assert not adds and a.shape[0] * b.shape[1] * 4 <= chunks.PRODUCT_BYTES
        return torch_mm(a.to(out_dtype), b.to(out_dtype), out=out)

    def addmm(sum, a, b, *, out_dtype=None, out=None):
        if out_dtype is None:
            return torch_addmm(sum, a, b, out=out)
        assert adds and sum is out
        sums.append(sum.shape)
        return torch_addmm(sum, a.to(out_dtype), b.to(out_dtype), out=out)

    monkeypatch.setattr(chunks, "PRODUCT_BYTES", 30 * 16 * 4)
    monkeypatch.setattr(chunks, "has_wide_products", lambda x, dtype: dtype == torch.float32)
    monkeypatch.setattr(chunks, "adds_in_products", lambda x: adds)
    monkeypatch.setattr(chunks.torch, "mm", mm)
    monkeypatch.setattr(chunks.torch, "addmm", addmm)
    x = torch.randn(50, 16, dtype=torch.bfloat16, requires_grad=True)
    w = torch.randn(101, 16, dtype=torch.bfloat16, requires_grad=True)
    target = torch.randint(97, (50,))
    loss = linear_cross_entropy(x, w, target, token_chunk_size=9, vocab_size=97)
    (grad,) = torch.autograd.grad(3 * loss, w)
    wide = w.detach().double().requires_grad_()
    logits = (x.detach().double() @ wide.T)[:, :97]
    (truth,) = torch.autograd.grad(3 * F.cross_entropy(logits, target), wide)
    assert grad.dtype == torch.bfloat16 and (grad[97:] == 0).all()
    error = torch.linalg.vector_norm(grad.double() - truth) / torch.linalg.vector_norm(truth)
    assert error < 2**-7
    assert len(sums) == (5 if adds else 0)  # the first of six chunks writes


def test_a_device_without_sums_in_products_says_no():
    x = torch.zeros(2, 2, dtype=torch.bfloat16)
    assert not chunks.has_wide_products(x, torch.float32) and not chunks.adds_in_products(x)


@pytest.mark.parametrize(
    ("tokens", "row_bytes", "device", "rows"),
    [
        (8192, 256512, "cuda", 4096),
        (4185, 256512, "cuda", 4185),  # whose logits fit 1 GiB, and one more does not
        (4186, 256512, "cuda", 4096),
        (100, 4 << 30, "cuda", 4096),
        (8192, 256512, "cpu", (128 << 20) // 256512),
        (1000, 256512, "cpu", (256 << 20) // 256512),
        (1, 1 << 30, "cpu", 1),
    ],
)
def test_default_rows(tokens, row_bytes, device, rows):
    assert chunks.default_rows(tokens, row_bytes, device) == rows
