"""`return_stats`: the statistics of the loss's own pass, and a loss that keeps its bits."""

import ast
import inspect
from pathlib import Path

import pytest
import torch
from helpers import batch
from torch import nn

from chunked_ce import (
    CrossEntropyLoss,
    LinearCrossEntropyLoss,
    TokenStats,
    cross_entropy,
    linear_cross_entropy,
    linear_token_stats,
    token_stats,
)
from chunked_ce.huggingface import causal_lm_loss

N, D, V = 11, 8, 100
EVERYTHING = ("entropy", "rank", "argmax")
WANTED = {"lse and logprob": True, "one": ["rank"], "everything": EVERYTHING}
SCHEDULES = {
    "two passes": {},
    "none": dict(reduction="none"),
    "sum": dict(reduction="sum", z_loss_weight=1e-2),
    "one pass": dict(grad_in_forward=True),
    "one pass, every term": dict(grad_in_forward=True, label_smoothing=0.1, z_loss_weight=1e-2),
    "one pass, head": dict(grad_in_forward=True, softcap=5.0, logit_scale=0.7, vocab_size=90),
}
HEAD = ("softcap", "logit_scale", "vocab_size", "token_chunk_size", "drop_ignored", "backend")


def asked(wanted):
    """Return token_stats' arguments for the same statistics."""
    return {} if wanted is True else dict.fromkeys(wanted, True)


def assert_same_stats(found, expected, *, exactly=True):
    for name, a, e in zip(TokenStats._fields, found, expected, strict=True):
        assert (a is None) == (e is None), name
        if a is None:
            continue
        assert not a.requires_grad
        assert (a.shape, a.dtype) == (e.shape, e.dtype)
        if exactly or not a.is_floating_point():
            assert torch.equal(a, e), name
        else:
            torch.testing.assert_close(a, e, rtol=1e-6, atol=1e-6)


def backward(loss, *leaves):
    """Return the gradients for an upstream gradient that is not 1."""
    return torch.autograd.grad((2.5 * loss).sum(), leaves)


def both(function, leaves, *arguments, wanted, **options):
    """Return the statistics, after a check that loss and gradients keep their bits."""
    plain = function(*leaves, *arguments, **options)
    loss, stats = function(*leaves, *arguments, return_stats=wanted, **options)
    assert torch.equal(plain, loss)
    for a, e in zip(backward(loss, *leaves), backward(plain, *leaves), strict=True):
        assert torch.equal(a, e)
    return stats


@pytest.mark.parametrize("wanted", WANTED.values(), ids=WANTED)
@pytest.mark.parametrize("options", SCHEDULES.values(), ids=SCHEDULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_stats_of_logits(backend, device, dtype, options, wanted):
    one_pass = "grad_in_forward" in options
    usual = EVERYTHING if dtype == torch.float32 else True
    if backend == "triton" and (wanted != usual or not (one_pass or wanted is EVERYTHING)):
        pytest.skip("the interpreter is slow; other cases run the same kernels")
    x, target = batch(N, 90, dtype, device)
    x = nn.functional.pad(x, (0, 10)).requires_grad_()
    stats = both(cross_entropy, [x], target, wanted=wanted, backend=backend, **options)
    head = {k: v for k, v in options.items() if k in HEAD}
    expected = token_stats(x.detach(), target, backend=backend, **asked(wanted), **head)
    # Triton sums rows in other tiles for further statistics, and for the gradient in one pass.
    plain = token_stats(x.detach(), target, backend=backend, **head)
    expected = expected._replace(lse=plain.lse, logprob=plain.logprob)
    same_tiles = backend != "triton" or not options.get("grad_in_forward")
    assert_same_stats(stats, expected, exactly=same_tiles)
    assert stats.lse[target == -100].eq(0).all() and (target == -100).any()


@pytest.mark.parametrize("wanted", [True, EVERYTHING], ids=str)
def test_stats_before_logits_are_overwritten(backend, device, wanted):
    x, target = batch(N, V, device=device)
    leaf = x.clone().requires_grad_()
    _, stats = cross_entropy(
        leaf * 1.0, target, grad_in_forward=True, inplace_backward=True, return_stats=wanted,
        backend=backend,
    )  # fmt: skip
    expected = token_stats(x, target, backend=backend, **asked(wanted))
    assert_same_stats(stats, expected, exactly=backend != "triton")


LINEAR = {
    "fused": {},
    "chunks": dict(token_chunk_size=4, drop_ignored=False),
    "dropped": dict(token_chunk_size=4, drop_ignored=True),
    "none": dict(reduction="none", token_chunk_size=4, drop_ignored=True),
    "every term": dict(label_smoothing=0.1, z_loss_weight=1e-2, reduction="sum"),
    "head": dict(softcap=5.0, logit_scale=0.7, vocab_size=90, token_chunk_size=4),
}


def hidden_states(device="cpu", dtype=torch.float32):
    """Return hidden states and weight that want gradients, and targets."""
    x, w = (torch.randn(n, D, device=device).to(dtype).requires_grad_() for n in (N, V))
    target = torch.randint(0, 90, (N,), device=device)
    target[::4] = -100
    return x, w, target


@pytest.mark.parametrize("wanted", WANTED.values(), ids=WANTED)
@pytest.mark.parametrize("options", LINEAR.values(), ids=LINEAR)
def test_stats_of_hidden_states(backend, device, options, wanted):
    if backend == "triton" and (wanted == ["rank"] or "token_chunk_size" in options):
        pytest.skip("the interpreter is slow; chunks are not in the kernels")
    x, w, target = hidden_states(device)
    stats = both(linear_cross_entropy, [x, w], target, wanted=wanted, backend=backend, **options)
    head = {k: v for k, v in options.items() if k in HEAD}
    with torch.no_grad():
        expected = linear_token_stats(x, w, target, backend=backend, **asked(wanted), **head)
        plain = linear_token_stats(x, w, target, backend=backend, **head)
    expected = expected._replace(lse=plain.lse, logprob=plain.logprob)
    exactly = backend != "triton" or options.get("reduction") == "none"
    assert_same_stats(stats, expected, exactly=exactly)
    with torch.no_grad():  # without gradients the pass is that of the statistics
        plain = linear_cross_entropy(x, w, target, backend=backend, **options)
        loss, stats = linear_cross_entropy(
            x, w, target, return_stats=wanted, backend=backend, **options
        )
    assert torch.equal(loss, plain)
    other_tiles = backend == "triton" and "label_smoothing" in options  # of a row with more sums
    assert_same_stats(stats, expected, exactly=not other_tiles)


@pytest.mark.parametrize("wanted", WANTED.values(), ids=WANTED)
@pytest.mark.parametrize("options", LINEAR.values(), ids=LINEAR)
def test_stats_of_called_head(options, wanted):
    x, _, target = hidden_states()
    head = nn.Sequential(nn.Linear(D, V), nn.Tanh())
    leaves = [x, *head.parameters()]

    def loss(x, weight, bias, target, **options):
        return linear_cross_entropy(x, head, target, **options)

    stats = both(loss, leaves, target, wanted=wanted, **options)
    of_head = {k: v for k, v in options.items() if k in HEAD}
    with torch.no_grad():
        expected = linear_token_stats(x, head, target, **asked(wanted), **of_head)
    assert_same_stats(stats, expected)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_stats_of_several_heads(reduction):
    x, w = torch.randn(N, D, requires_grad=True), torch.randn(V, 2, 3, D, requires_grad=True)
    target = torch.randint(0, V, (N, 2, 3))
    target[0, 1] = -100
    stats = both(
        linear_cross_entropy, [x, w], target, wanted=EVERYTHING, reduction=reduction,
        token_chunk_size=4, drop_ignored=True,
    )  # fmt: skip
    for i in range(2):
        for j in range(3):
            expected = linear_token_stats(
                x.detach(), w.detach()[:, i, j], target[:, i, j], token_chunk_size=4,
                drop_ignored=True, **asked(EVERYTHING),
            )  # fmt: skip
            one = TokenStats(*(None if s is None else s[:, i, j] for s in stats))
            assert_same_stats(one, expected)


def likeliest(target):
    if isinstance(target, tuple):
        indices, prob = target
        return indices.gather(-1, prob.argmax(-1, keepdim=True))[..., 0]
    return target.argmax(-1)


@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize("kind", ["probabilities", "top-k"])
def test_stats_of_distributions(kind, linear):
    """They are those of the likeliest class; a row of padding is ignored."""
    target = torch.randn(N, V).softmax(-1)
    if kind == "top-k":
        prob, indices = target.topk(3)
        indices[2] = -100
        target = (indices, prob)
    options = dict(label_smoothing=0.1)
    if linear:
        x, w, _ = hidden_states()
        stats = both(linear_cross_entropy, [x, w], target, wanted=EVERYTHING, **options)
        with torch.no_grad():
            expected = linear_token_stats(x, w, likeliest(target), **asked(EVERYTHING))
    else:
        x = torch.randn(N, V, requires_grad=True)
        stats = both(cross_entropy, [x], target, wanted=EVERYTHING, **options)
        expected = token_stats(x.detach(), likeliest(target), **asked(EVERYTHING))
    assert_same_stats(stats, expected)


def test_class_weights_do_not_change_stats():
    x, target = batch(N, V)
    for options in ({}, dict(label_smoothing=0.2)):
        _, stats = cross_entropy(x, target, torch.rand(V), return_stats=True, **options)
        assert_same_stats(stats, token_stats(x, target))


@pytest.mark.parametrize("linear", [False, True])
def test_shift_ignores_last_position(linear):
    tokens = torch.randint(0, V, (2, 6))
    x = torch.randn(2, 6, D if linear else V)
    if linear:
        w = torch.randn(V, D)
        _, stats = linear_cross_entropy(x, w, tokens, shift=True, return_stats=EVERYTHING)
        expected = linear_token_stats(x, w, tokens, shift=True, **asked(EVERYTHING))
    else:
        _, stats = cross_entropy(x, tokens, dim=-1, shift=True, return_stats=EVERYTHING)
        expected = token_stats(x, tokens, shift=True, **asked(EVERYTHING))
    assert_same_stats(stats, expected)
    assert stats.rank[:, -1].eq(-1).all() and stats.rank[:, :-1].ge(0).all()


def test_class_dimension_and_single_row():
    x, target = torch.randn(2, V, 3), torch.randint(0, V, (2, 3))
    _, stats = cross_entropy(x, target, return_stats=True)  # dim=1, as torch
    assert_same_stats(stats, token_stats(x.movedim(1, -1), target))
    _, stats = cross_entropy(x[0, :, 0], target[0, 0], return_stats=EVERYTHING)
    assert all(s is None or s.shape == () for s in stats)


@pytest.mark.parametrize("grad_in_forward", [False, True])
def test_no_rows(grad_in_forward):
    x, target = torch.randn(0, V, requires_grad=True), torch.empty(0, dtype=torch.long)
    options = dict(reduction="sum", return_stats=EVERYTHING)
    _, stats = cross_entropy(x, target, grad_in_forward=grad_in_forward, **options)
    assert_same_stats(stats, token_stats(x.detach(), target, **asked(EVERYTHING)))
    h, w = torch.randn(0, D, requires_grad=True), torch.randn(V, D)
    _, stats = linear_cross_entropy(h, w, target, **options)
    assert all(s is None or s.shape == (0,) for s in stats)


def test_all_rows_ignored():
    x, w, target = hidden_states()
    target.fill_(-100)
    _, stats = linear_cross_entropy(x, w, target, return_stats=EVERYTHING)
    assert not stats.lse.any() and stats.rank.eq(-1).all() and stats.argmax.eq(-1).all()


def test_dtypes():
    x, w, target = hidden_states()
    for dtype, logits_dtype in ((torch.float16, None), (torch.float16, torch.float32)):
        _, stats = linear_cross_entropy(
            x.detach().to(dtype), w.detach().to(dtype), target, logits_dtype=logits_dtype,
            return_stats=["entropy"],
        )  # fmt: skip
        assert stats.lse.dtype == stats.entropy.dtype == torch.float32
    _, stats = linear_cross_entropy(x.double(), w.double(), target, return_stats=["entropy"])
    assert stats.lse.dtype == stats.entropy.dtype == torch.float64


def test_autocast():
    x, w, target = hidden_states()
    with torch.autocast("cpu", torch.bfloat16):
        stats = both(linear_cross_entropy, [x, w], target, wanted=EVERYTHING)
        expected = linear_token_stats(x, w, target, **asked(EVERYTHING))
    assert_same_stats(stats, [None if s is None else s.detach() for s in expected])


@pytest.mark.framework
@pytest.mark.parametrize(
    ("tracer", "wanted"),
    [
        ("aot_eager", True),
        ("aot_eager", EVERYTHING),
        pytest.param("inductor", EVERYTHING, marks=pytest.mark.long),
    ],
)
def test_compile_fullgraph(tracer, wanted):
    x, w, target = hidden_states()

    def fused(x, w):
        return linear_cross_entropy(x * 1.0, w, target, return_stats=wanted)

    def of_logits(x, w):
        return cross_entropy((x * 1.0) @ w.t(), target, return_stats=wanted)

    for loss in (fused, of_logits):
        results = []
        for function in (loss, torch.compile(loss, backend=tracer, fullgraph=True)):
            value, stats = function(x, w)
            assert not any(s is not None and s.requires_grad for s in stats)
            results.append((value, stats, torch.autograd.grad(3 * value, (x, w))))
        (value, stats, grads), (traced, traced_stats, traced_grads) = results
        torch.testing.assert_close(traced, value)
        torch.testing.assert_close(traced_grads, grads, rtol=1e-5, atol=1e-6)
        for a, e in zip(traced_stats, stats, strict=True):
            assert a is None if e is None else torch.allclose(a, e, atol=1e-6)


@pytest.mark.framework
def test_function_transforms():
    x, w, target = hidden_states()
    x, w = x.detach(), w.detach()

    def loss(w):
        return linear_cross_entropy(x, w, target, return_stats=["entropy"])

    def with_entropy(w):  # torch.func takes no None, as of the statistics that are not asked for
        value, stats = loss(w)
        return value, stats.entropy

    grad, entropy = torch.func.grad(with_entropy, has_aux=True)(w)
    expected, expected_stats = loss(w.requires_grad_())
    assert torch.equal(grad, torch.autograd.grad(expected, w)[0])
    assert torch.equal(entropy, expected_stats.entropy) and not entropy.requires_grad
    logits = torch.randn(3, N, V)
    logprob = torch.func.vmap(lambda x: cross_entropy(x, target, return_stats=True)[1].logprob)
    assert torch.equal(logprob(logits), token_stats(logits, target.expand(3, N)).logprob)
    # Statistics carry no gradient inside a transform either.
    by_stats = torch.func.grad(lambda w: loss(w)[1].entropy.sum())(w.detach())
    assert not by_stats.any()


@pytest.mark.framework
def test_activation_checkpointing():
    from torch.utils.checkpoint import checkpoint

    x, w, target = hidden_states()
    loss, stats = checkpoint(
        lambda x, w: linear_cross_entropy(x, w, target, return_stats=True), x, w,
        use_reentrant=False,
    )  # fmt: skip
    expected, expected_stats = linear_cross_entropy(x, w, target, return_stats=True)
    assert_same_stats(stats, expected_stats)
    for a, e in zip(backward(loss, x, w), backward(expected, x, w), strict=True):
        assert torch.equal(a, e)


def test_second_backward():
    x, w, target = hidden_states()
    for head in (w, nn.Sequential(nn.Linear(D, V))):
        loss, _ = linear_cross_entropy(x, head, target, return_stats=EVERYTHING)
        first, second = (torch.autograd.grad(loss, x, retain_graph=True)[0] for _ in range(2))
        assert torch.equal(first, second)


def test_modules():
    x, w, target = hidden_states()
    logits = (x @ w.t()).detach()
    loss, stats = CrossEntropyLoss(return_stats=True)(logits, target)
    assert torch.equal(loss, cross_entropy(logits, target))
    assert_same_stats(stats, token_stats(logits, target))
    module = LinearCrossEntropyLoss(D, V, return_stats=EVERYTHING)
    loss, stats = module(x.detach(), target)
    loss.backward()
    expected = linear_token_stats(x, module.linear.weight, target, **asked(EVERYTHING))
    assert_same_stats(stats, [None if s is None else s.detach() for s in expected])


@pytest.mark.parametrize(
    ("value", "error", "text"),
    [
        (1, TypeError, "return_stats must be True, False, or a tuple of names"),
        (None, TypeError, "got NoneType"),
        ("entropy", TypeError, "pass ('entropy',)"),
        (("entropy", "top5"), ValueError, "names 'top5', expected of entropy, rank, argmax"),
        (["mean_logprob"], ValueError, "mean_logprob by token_stats"),
        ((True,), ValueError, "names True"),
    ],
)
def test_bad_input(value, error, text):
    x, w, target = hidden_states()
    for call in (
        lambda: linear_cross_entropy(x, w, target, return_stats=value),
        lambda: cross_entropy(x @ w.t(), target, return_stats=value),
        lambda: CrossEntropyLoss(return_stats=value),
        lambda: LinearCrossEntropyLoss(D, V, return_stats=value),
    ):
        with pytest.raises(error) as caught:
            call()
        assert text in str(caught.value)


def test_accuracy_entropy_and_z_loss_beside_the_fused_loss():
    """What a training loop logs, from one call, equals what `token_stats` gives for the logits."""
    x, w, target = hidden_states()
    loss, stats = linear_cross_entropy(
        x, w, target, z_loss_weight=1e-4, return_stats=("entropy", "argmax")
    )
    loss.backward()
    scored = target != -100
    expected = token_stats((x @ w.t()).detach(), target, entropy=True, argmax=True)
    accuracy = (stats.argmax == target)[scored].float().mean()
    assert accuracy == (expected.argmax == target)[scored].float().mean()
    entropy, z_loss = stats.entropy[scored].mean(), 1e-4 * stats.lse[scored].square().mean()
    torch.testing.assert_close(entropy, expected.entropy[scored].mean())
    torch.testing.assert_close(z_loss, 1e-4 * expected.lse[scored].square().mean())
    # The three terms make the loss.
    torch.testing.assert_close(loss.detach(), z_loss - stats.logprob[scored].mean())


@pytest.mark.parametrize(
    "function", [cross_entropy, linear_cross_entropy, causal_lm_loss], ids=lambda f: f.__name__
)
def test_overloads_have_the_arguments_of_the_function(function):
    """Type checkers see these in place of the function. Only the type of return_stats differs."""
    tree = ast.parse(Path(inspect.getsourcefile(function)).read_text())
    found = [n for n in tree.body if getattr(n, "name", "") == function.__name__]
    assert len(found) == 3
    arguments = []
    for one in found:
        given = one.args.posonlyargs + one.args.args + one.args.kwonlyargs
        texts = {a.arg: ast.unparse(a.annotation) for a in given if a.arg != "return_stats"}
        arguments.append(texts)
    assert arguments[0] == arguments[1] == arguments[2]
