"""Tests of cross_entropy: every option against the fp64 oracle, with upstream gradients other than 1."""

import itertools

import oracle
import pytest
import torch
import torch.nn.functional as F
from helpers import assert_gradient, batch, gradient
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from chunked_ce import cross_entropy, token_stats
from chunked_ce.checks import loss as loss_checks
from chunked_ce.ops import logits as ops

UPSTREAM = {
    "1": lambda loss: loss.sum(),
    "3.7": lambda loss: (3.7 * loss).sum(),
    "square": lambda loss: loss.square().sum(),
    "random": lambda loss: (
        loss * torch.randn(loss.shape, generator=torch.Generator().manual_seed(1)).to(loss)
    ).sum(),
    "strided": lambda loss: loss[::2].sum() if loss.dim() else loss,
    "expanded": lambda loss: (loss * torch.tensor(2.0).to(loss).expand(loss.shape)).sum(),
}
OPTIONS = [
    dict(label_smoothing=s, z_loss_weight=z, **head)
    for s, z, head in itertools.product(
        (0.0, 0.1, 1.0), (0.0, 1e-2), ({}, {"softcap": 6.0, "logit_scale": 0.8})
    )
]


def check(x, target, backend, upstream="1", **options):
    loss = cross_entropy(x, target, dim=-1, backend=backend, **options)
    truth = oracle.cross_entropy(x, target, **options)
    assert loss.dtype == (torch.float64 if x.dtype == torch.float64 else torch.float32)
    rtol = 1e-11 if x.dtype == torch.float64 else 2e-6
    torch.testing.assert_close(loss.double(), truth, rtol=rtol, atol=rtol, equal_nan=True)
    apply = UPSTREAM[upstream]
    ours = gradient(
        lambda x: cross_entropy(x, target, dim=-1, backend=backend, **options), x, upstream=apply
    )
    exact = gradient(
        lambda x: oracle.cross_entropy(x, target, **options), x.double(), upstream=apply
    )
    capped = options.get("softcap") is not None
    assert_gradient(ours, exact, x.dtype, exact.abs().max() * 5 if capped else None)
    assert (ours[target == options.get("ignore_index", -100)] == 0).all()


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_options(backend, device, options, reduction):
    if backend == "triton" and reduction != "mean":
        pytest.skip("the interpreter is slow; the reduction is not in the kernels")
    x, target = batch(6, 100, device=device)
    check(x, target, backend, "3.7", reduction=reduction, **options)


@pytest.mark.parametrize("upstream", UPSTREAM)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_upstream_gradients(backend, device, upstream, reduction):
    """Use upstream gradients other than 1, and ignore row 0."""
    x, target = batch(7, 100, device=device)
    assert target[0] == -100
    check(x, target, backend, upstream, reduction=reduction)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("options", OPTIONS[::5], ids=str)
def test_dtypes(backend, device, dtype, options):
    x, target = batch((2, 3), 70, dtype, device)
    check(x, target, backend, "3.7", **options)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_token_weight(backend, device, reduction):
    x, target = batch(8, 60, device=device)
    weight = torch.rand(8, device=device)
    weight[3] = 0
    weight[0] = float("nan")  # an ignored token's weight counts for nothing
    truth_weight = weight.nan_to_num(0.0)
    options = dict(reduction=reduction, label_smoothing=0.1, z_loss_weight=1e-2)
    ours = cross_entropy(x, target, token_weight=weight, backend=backend, **options)
    truth = oracle.cross_entropy(x, target, token_weight=truth_weight, **options)
    torch.testing.assert_close(ours.double(), truth, rtol=2e-6, atol=1e-7)
    leaf, exact = truth_weight.clone().requires_grad_(), truth_weight.double().requires_grad_()
    cross_entropy(x, target, token_weight=leaf, backend=backend, **options).sum().backward()
    oracle.cross_entropy(x, target, token_weight=exact, **options).sum().backward()
    torch.testing.assert_close(leaf.grad.double(), exact.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("as_tensor", [False, True])
def test_gradient_accumulation(backend, device, as_tensor):
    """Check that unequal micro-batches with a shared num_items give the gradients of one batch."""
    x, target = batch(12, 60, device=device)
    total = int((target != -100).sum())
    num_items = torch.tensor(total, device=device) if as_tensor else total
    whole = gradient(lambda x: cross_entropy(x, target, backend=backend), x)
    leaf = x.clone().requires_grad_()
    for part in (slice(0, 2), slice(2, 7), slice(7, 12)):
        cross_entropy(leaf[part], target[part], num_items=num_items, backend=backend).backward()
    torch.testing.assert_close(leaf.grad, whole, rtol=2e-6, atol=1e-9)


def test_masked_classes_match_deleted(backend, device):
    """Check for every option that masked classes act like deleted ones."""
    x, target = batch(9, 60, device=device, ignored=0.4)
    keep = target != -100
    weight = torch.rand(9, device=device)
    for options in OPTIONS:
        for reduction in ("mean",) if backend == "triton" else ("mean", "sum"):
            both = [
                gradient(
                    lambda x, t=t, w=w, o=options, r=reduction: cross_entropy(
                        x, t, reduction=r, token_weight=w, backend=backend, **o
                    ),
                    x_,
                )
                for x_, t, w in ((x, target, weight), (x[keep], target[keep], weight[keep]))
            ]
            torch.testing.assert_close(both[0][keep], both[1], rtol=1e-6, atol=1e-9)
            assert (both[0][~keep] == 0).all()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("rows", [0, 4])
def test_nothing_to_score(backend, device, reduction, rows):
    """Check that without scored rows the mean is NaN as in torch, and the gradients are 0."""
    x = torch.randn(rows, 30, device=device, requires_grad=True)
    target = torch.full((rows,), -100, device=device)
    loss = cross_entropy(x, target, reduction=reduction, label_smoothing=0.1, backend=backend)
    expected = F.cross_entropy(x, target, reduction=reduction, label_smoothing=0.1)
    torch.testing.assert_close(loss, expected, equal_nan=True)
    loss.sum().backward()
    assert x.grad.shape == x.shape and (x.grad == 0).all()


def test_ignored_loss_plus_zero(backend, device):
    x, target = batch(4, 30, device=device, ignored=1.0)
    target[:] = -100
    assert not cross_entropy(x, target, reduction="none", backend=backend).signbit().any()


def test_agreement_with_torch(backend, device):
    """Compare label smoothing with -inf logits to torch."""
    x, target = batch(5, 40, device=device)
    x[1, 3] = float("-inf")
    for smoothing in (0.0, 0.2):
        torch.testing.assert_close(
            cross_entropy(x, target, label_smoothing=smoothing, backend=backend),
            F.cross_entropy(x, target, label_smoothing=smoothing),
        )


@pytest.mark.parametrize("shape", [(), (5,), (2, 3), (2, 2, 2)], ids=str)
def test_shapes(backend, device, shape):
    x = torch.randn(*shape, 40, device=device)
    target = torch.randint(0, 40, shape, device=device)
    check(x, target, backend, reduction="none")
    if x.dim() <= 2:  # torch's own default dimension
        torch.testing.assert_close(
            cross_entropy(x, target, backend=backend), F.cross_entropy(x, target)
        )


# --- autograd -------------------------------------------------------------------------------------


def test_logits_unchanged_by_default(backend, device):
    """Apply softmax and two losses to the same logits, which must keep their bits."""
    x, target = batch(5, 60, device=device)
    leaf = x.clone().requires_grad_()
    logits = leaf * 1.0
    loss = cross_entropy(logits, target, backend=backend)
    loss = loss + cross_entropy(logits, target, label_smoothing=0.1, backend=backend)
    loss = loss + logits.softmax(-1).square().sum()
    loss.backward()
    assert torch.equal(logits, x * 1.0)
    exact = x.double().requires_grad_()
    truth = oracle.cross_entropy(exact, target) + oracle.cross_entropy(
        exact, target, label_smoothing=0.1
    )
    (truth + exact.softmax(-1).square().sum()).backward()
    assert_gradient(leaf.grad, exact.grad, torch.float32)


def test_second_backward_and_double_backward(backend, device):
    x, target = batch(4, 60, device=device)
    leaf = x.clone().requires_grad_()
    loss = cross_entropy(leaf, target, backend=backend)
    (first,) = torch.autograd.grad(loss, leaf, retain_graph=True)
    (second,) = torch.autograd.grad(loss, leaf, torch.tensor(2.0, device=device))
    torch.testing.assert_close(second, 2 * first, rtol=1e-6, atol=0)
    loss = cross_entropy(leaf, target, backend=backend)
    (grad,) = torch.autograd.grad(loss, leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="first derivatives only"):
        grad.square().sum().backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("view", ["whole", "last token dropped", "padded"])
def test_inplace_backward(backend, device, dtype, view):
    x, target = batch((2, 5), 60, dtype, device)
    if view == "last token dropped":
        cut, target = (lambda z: z[:, :-1]), target[:, 1:]
    elif view == "padded":
        target = target.clamp(max=49)
        cut = lambda z: z[..., :50]  # noqa: E731
    else:
        cut = lambda z: z  # noqa: E731

    def run(inplace):
        leaf = x.clone().requires_grad_()
        logits = leaf * 1
        loss = cross_entropy(cut(logits), target, dim=-1, inplace_backward=inplace, backend=backend)
        (3.7 * loss).backward()
        return leaf.grad, logits

    (safe, kept), (grad, overwritten) = run(False), run(True)
    assert torch.equal(kept, x) and torch.equal(safe, grad)
    assert torch.equal(cut(overwritten), cut(grad)), "the gradient lies over the logits"


def test_inplace_backward_aliasing(backend, device):
    x, target = batch(4, 60, device=device)
    leaf = x.clone().requires_grad_()
    with pytest.raises(ValueError, match="inplace_backward=True would overwrite a leaf"):
        cross_entropy(leaf, target, inplace_backward=True, backend=backend)
    logits = leaf * 1
    loss = cross_entropy(logits, target, inplace_backward=True, backend=backend)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    logits = leaf * 1
    first = cross_entropy(logits, target, inplace_backward=True, backend=backend)
    second = logits.softmax(-1)[:, 0].log().sum() + logits.square().sum()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        first.backward()
        second.backward()
    logits = leaf * 1
    loss = cross_entropy(logits, target, inplace_backward=True, backend=backend)
    logits.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    with torch.no_grad():  # nothing will be written: nothing to refuse
        cross_entropy(leaf, target, inplace_backward=True, backend=backend)


class Largest(TorchDispatchMode):
    """Records the most elements of any tensor that an operator made."""

    def __init__(self):
        super().__init__()
        self.elements = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(t, torch.Tensor) and t.data_ptr() not in [
                a.data_ptr() for a in args if isinstance(a, torch.Tensor)
            ]:
                self.elements.append(t.numel())
        return out


def big_tensors(function, at_least):
    with Largest() as outside:
        function()
    return sum(n >= at_least for n in outside.elements)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_copy_of_the_logits(backend, dtype, device, monkeypatch):
    """Check that only the gradient has N x V elements.

    The operators' own allocations count too, because they are called as Python functions.
    """

    rows, vocab = ((8, 10), 900) if backend == "torch" else ((2, 10), 90)
    x, target = batch(rows, vocab, dtype, device)
    big = x[:, :-1].numel() // 2
    options = dict(dim=-1, backend=backend, label_smoothing=0.1, z_loss_weight=0.1, softcap=9.0)
    for call in (
        lambda: ops._token_stats(
            x[:, :-1],
            target[:, 1:],
            *ops.Classes(),
            -100,
            vocab,
            9.0,
            1.0,
            backend,
            True,
            True,
            True,
            True,
            False,
        ),
        lambda: cross_entropy(x[:, :-1], target[:, 1:], **options),
    ):
        assert big_tensors(call, big) == 0
    stats = ops._token_stats(
        x, target, *ops.Classes(), -100, vocab, None, 1.0, backend, True, False, False, False, False
    )
    g = torch.ones_like(stats[0])
    arguments = (
        x,
        target,
        *ops.Classes(),
        *stats[:3],
        g,
        None,
        g,
        None,
        None,
        -100,
        vocab,
        None,
        1.0,
        backend,
    )
    assert big_tensors(lambda: ops._token_grad(*arguments), big) == 1
    inplace = (x.clone(), *arguments[1:])
    assert big_tensors(lambda: ops._token_grad_(*inplace), big) == 0


@pytest.mark.framework
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16], ids=str)
def test_autocast(device, dtype, autocast):
    """Check that the gradient has the logits' dtype and the loss is fp32, with and without autocast."""
    x, target = batch(4, 60, dtype, device)
    leaf = x.clone().requires_grad_()
    with torch.autocast(device, dtype=autocast or torch.bfloat16, enabled=autocast is not None):
        loss = cross_entropy(leaf, target)
    loss.backward()
    assert loss.dtype == torch.float32 and leaf.grad.dtype == dtype
    torch.testing.assert_close(loss.double(), oracle.cross_entropy(x, target), rtol=2e-6, atol=0)


@pytest.mark.framework
def test_modes(backend, device):
    x, target = batch(4, 60, device=device)
    expected = cross_entropy(x, target, backend=backend)
    with torch.inference_mode():
        assert torch.equal(cross_entropy(x, target, backend=backend), expected)
    assert torch.equal(cross_entropy(x, target, backend=backend), expected)  # after inference mode
    leaf = x.clone().requires_grad_()
    with torch.no_grad():
        assert not cross_entropy(leaf, target, backend=backend).requires_grad
    checkpointed = checkpoint(
        lambda z: cross_entropy(z, target, backend=backend), leaf, use_reentrant=False
    )
    checkpointed.backward()
    torch.testing.assert_close(
        leaf.grad, gradient(lambda x: cross_entropy(x, target, backend=backend), x)
    )


# --- operators and the compiler -------------------------------------------------------------------


@pytest.mark.framework
@pytest.mark.parametrize(
    "options", [{}, dict(entropy=True, mean_logprob=True, rank=True, argmax=True)], ids=str
)
def test_opcheck(backend, options, device):
    x, target = batch(4, 30, device=device)
    target = target.clamp(max=24)
    wanted = [options.get(k, False) for k in ("entropy", "mean_logprob", "rank", "argmax")]
    weight, at = (None, None)
    if options:
        weight = torch.rand(25, device=device)
        at = torch.randint(0, 25, (4, 3), device=device)
    classes = ops.Classes(weight, None, 1.0, 0.0, at)
    arguments = (x.requires_grad_(), target, *classes, -100, 25, 5.0, 0.5, backend, *wanted, False)
    torch.library.opcheck(torch.ops.chunked_ce.token_stats.default, arguments)
    x = x.detach()
    stats = torch.ops.chunked_ce.token_stats(*arguments)
    g = torch.randn(4, device=device)
    arguments = (
        x,
        target,
        *classes,
        *(s.detach() for s in stats[:3]),
        *[g] * 4,
        None if at is None else torch.randn(4, 3, device=device),
        -100,
        25,
        5.0,
        0.5,
        backend,
    )
    torch.library.opcheck(torch.ops.chunked_ce.token_grad.default, arguments)
    torch.library.opcheck(torch.ops.chunked_ce.token_grad_.default, (x.clone(), *arguments[1:]))


@pytest.mark.framework
@pytest.mark.parametrize(("compiler", "inplace"), [("aot_eager", True), ("inductor", False)])
def test_compile_fullgraph(backend, compiler, inplace, device):
    torch._dynamo.reset()
    head = torch.nn.Linear(8, 50, device=device)
    hidden = torch.randn(3, 4, 8, device=device)
    target = batch((3, 4), 50, device=device)[1]

    def step(hidden, target):
        logits = head(hidden)
        return cross_entropy(
            logits[:, :-1],
            target[:, 1:],
            dim=-1,
            label_smoothing=0.1,
            z_loss_weight=1e-3,
            inplace_backward=inplace,
            backend=backend,
        )

    expected = step(hidden, target)
    wanted = torch.autograd.grad(expected, head.parameters())
    compiled = torch.compile(step, fullgraph=True, backend=compiler)
    loss = compiled(hidden, target)
    torch.testing.assert_close(loss, expected)
    for ours, theirs in zip(torch.autograd.grad(loss, head.parameters()), wanted, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.framework
def test_compile_changes_of_size(backend, device):
    """Expect one more compilation for a second N (then dynamic), and none for the third."""
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(
        lambda x, t: cross_entropy(x, t, backend=backend), fullgraph=True, backend=counter
    )
    for rows in (5, 7, 9, 12):
        x, target = batch(rows, 40, device=device)
        torch.testing.assert_close(compiled(x, target), cross_entropy(x, target, backend=backend))
    assert counter.frame_count <= 2


@pytest.mark.framework
def test_no_host_synchronization(backend, device, monkeypatch):
    """Check that code for a GPU reads no tensor value. Only the torch backend on a CPU may."""
    reads = []
    real = torch.Tensor.item
    monkeypatch.setattr(torch.Tensor, "item", lambda self: reads.append(1) or real(self))
    for name in ("__bool__", "__float__", "__int__", "tolist", "nonzero"):
        original = getattr(torch.Tensor, name)
        monkeypatch.setattr(
            torch.Tensor,
            name,
            lambda self, *a, f=original, **k: reads.append(1) or f(self, *a, **k),
        )
    from chunked_ce.backends import torch as backend_torch

    monkeypatch.setattr(backend_torch, "_on_host", lambda x: False)
    monkeypatch.setattr(loss_checks, "may_be_read", lambda x: False)
    x, target = batch(5, 60, device=device)
    leaf = x.clone().requires_grad_()
    reads.clear()
    num_items = torch.tensor(4, device=device)
    token_stats(leaf, target, backend=backend, entropy=True, rank=True, argmax=True)
    cross_entropy(
        leaf, target, num_items=num_items, label_smoothing=0.1, backend=backend
    ).backward()
    if backend == "torch":
        assert not reads  # the interpreter, which stands in for a GPU's kernels, reads by design


# --- what a review broke --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("compiler", "other"),
    [("aot_eager", name) for name in ("exp", "logsumexp", "square", "second loss")]
    + [("inductor", "exp")],
)
def test_inplace_backward_compiled(other, compiler):
    torch._dynamo.reset()
    x, target = batch(4, 20)

    def step(x, inplace):
        y = x.exp()
        loss = cross_entropy(y, target, inplace_backward=inplace)
        if other == "second loss":
            return loss + cross_entropy(y, target, label_smoothing=0.1, inplace_backward=inplace)
        return (
            loss
            if other == "exp"
            else loss + getattr(y, other)(*[-1] * (other == "logsumexp")).sum()
        )

    compiled = torch.compile(step, fullgraph=True, backend=compiler)
    safe = gradient(lambda x: step(x, False), x)
    torch.testing.assert_close(gradient(lambda x: compiled(x, True), x), safe)


def test_inplace_backward_errors(backend, device):
    x, target = batch(4, 10, device=device)
    leaf = x.clone().requires_grad_()
    for view in (leaf.view(4, 10), leaf[:, :9]):
        with pytest.raises(ValueError, match="overwrite a leaf"):
            cross_entropy(view, target.clamp(max=8), inplace_backward=True, backend=backend)
    window = (torch.randn(13, device=device, requires_grad=True) * 1).unfold(0, 10, 1)
    with pytest.raises(ValueError, match="expanded or overlaps"):
        cross_entropy(window, target, inplace_backward=True, backend=backend)
    logits = leaf * 1
    loss = cross_entropy(logits, target, inplace_backward=True, backend=backend)
    with pytest.raises(RuntimeError, match="first derivatives only"):
        torch.autograd.grad(loss, logits, create_graph=True)


@pytest.mark.framework
def test_forward_mode_error(device):
    x, target = batch(4, 10, device=device)
    with pytest.raises(NotImplementedError, match="reverse-mode derivatives only"):
        torch.func.jvp(lambda x: cross_entropy(x, target), (x,), (x,))


@pytest.mark.framework
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_default_dtype(dtype):
    import threading

    x, target = batch(4, 1000)
    expected = cross_entropy(x, target)
    losses = []

    def fresh_thread():
        losses.extend(cross_entropy(x.to(d), target) for d in (torch.float32, torch.bfloat16))

    torch.set_default_dtype(dtype)
    try:
        thread = threading.Thread(target=fresh_thread)
        thread.start()
        thread.join()
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(losses[0], expected) and losses[1].dtype == torch.float32


def test_small_integer_targets(backend, device):
    """Check ignore_index -100 with uint8 targets, where it would wrap to 156."""
    x = torch.randn(3, 200, device=device)
    target = torch.tensor([156, 156, 7], device=device)
    weight = torch.rand(3, device=device)
    for options in ({}, dict(token_weight=weight), dict(reduction="none")):
        torch.testing.assert_close(
            cross_entropy(x, target.to(torch.uint8), backend=backend, **options),
            cross_entropy(x, target, backend=backend, **options),
            rtol=0,
            atol=0,
        )


@pytest.mark.parametrize("dtype", [torch.int32, torch.float16, torch.float64], ids=str)
def test_num_items_dtype(backend, device, dtype):
    x, target = batch(4, 20, device=device)
    num_items = torch.tensor(3, dtype=dtype, device=device)
    loss = cross_entropy(x, target, num_items=num_items, backend=backend)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, cross_entropy(x, target, num_items=3, backend=backend))


@pytest.mark.framework
def test_compile_dynamic():
    torch._dynamo.reset()
    x, target = batch(5, 40)

    def step(x, target, smoothing, scale):
        return cross_entropy(x, target, label_smoothing=smoothing, logit_scale=scale)

    for dynamic in (True, None):
        compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend="aot_eager")
        for smoothing, scale in ((0.1, 1.0), (0.2, 0.7), (0.3, 0.4)):
            torch.testing.assert_close(
                compiled(x, target, smoothing, scale), step(x, target, smoothing, scale)
            )


@pytest.mark.parametrize("offset", [39.5, -39.5, 60.0])
@pytest.mark.parametrize("scale", [0.01, 1.0, 30.0])
@pytest.mark.parametrize("vocab", [2, 3])
def test_few_classes_near_switches(backend, device, vocab, scale, offset):
    """Use few classes near the limits of code paths, and losses far below fp64's step at 1."""
    x = torch.randn(64 if backend == "torch" else 6, vocab, device=device) * scale + offset
    target = torch.randint(0, vocab, x.shape[:1], device=device)
    z, t = x.double(), target[:, None]
    others = (z - z.gather(1, t)).scatter(1, t, float("-inf")).logsumexp(1)
    truth = torch.where(others > 0, others, 0.0) + (-others.abs()).exp().log1p()
    ours = cross_entropy(x, target, reduction="none", backend=backend)
    torch.testing.assert_close(ours.double(), truth, rtol=1e-6, atol=1e-37)
    options = dict(label_smoothing=1.0, reduction="none")
    ours = cross_entropy(x, target, backend=backend, **options)
    truth = oracle.cross_entropy(x, target, **options)
    torch.testing.assert_close(ours.double(), truth, rtol=1e-6, atol=0)


def test_few_classes_ignored_rows(backend, device):
    """Use one class, with loss 0, and two classes, each of which may be the ignored index."""
    target = torch.tensor([0, -100, 0, -100], device=device)
    for vocab in (1, 2):
        x = torch.randn(4, vocab, device=device)
        ours = gradient(lambda x: cross_entropy(x, target, backend=backend), x)
        exact = gradient(lambda x: oracle.cross_entropy(x, target), x.double())
        assert_gradient(ours, exact, torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_gradient_softcap_is_felt(backend, device, dtype):
    """Check the digits of 1 - tanh^2 five caps out, where eager's form cancels."""
    x = torch.tensor([[24.0, 25.0, 30.0, -28.0, 3.0]], device=device).to(dtype)
    target = torch.tensor([1], device=device)
    ours = gradient(lambda x: cross_entropy(x, target, softcap=5.0, backend=backend), x)
    exact = gradient(lambda x: oracle.cross_entropy(x, target, softcap=5.0), x.double())
    rtol = 2.0**-7 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(ours.double(), exact, rtol=rtol, atol=0)
