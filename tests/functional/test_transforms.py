"""Tests of torch.func's transforms of the public functions, against eager torch in float64."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import (
    functional_call,
    functionalize,
    grad,
    grad_and_value,
    hessian,
    jacrev,
    jvp,
    vjp,
    vmap,
)

import chunked_ce as c
from chunked_ce.distributed.losses import vocab_parallel_cross_entropy

pytestmark = pytest.mark.framework
torch.manual_seed(0)
N, V, D, B, K = 5, 37, 8, 3, 2  # a batch B of samples that differ in every dimension's size
X, H = torch.randn(N, V).double(), torch.randn(N, D).double()
HEAD, BIAS = torch.randn(V, D).double(), torch.randn(V).double()
TEACHER_H = torch.randn(N, 2).double()
Y, W = torch.randint(0, V, (N,)), torch.rand(V).double()
Y[1] = -100
P, HOT = torch.randn(N, V).double().softmax(-1), torch.rand(N, V).double()
TOP = torch.rand(N, V).topk(K).indices
TOP_P = torch.full((N, K), 0.5).double()
DENSE = torch.zeros(N, V).double().scatter_(1, TOP, TOP_P)


def _statistics(x):
    logprob = x.log_softmax(-1)
    scored = Y != -100
    entropy = -(logprob.exp() * logprob).sum(-1) * scored
    return x.logsumexp(-1).square() * scored, -F.cross_entropy(x, Y, reduction="none"), entropy


def _mixed(stats):
    return (stats.lse.square() + 2 * stats.logprob - stats.entropy).sum()


def _reference_mixed(x):
    squares, logprob, entropy = _statistics(x)
    return (squares + 2 * logprob - entropy).sum()


def _reverse_kl(x, y):
    log_p, log_q = x.log_softmax(-1), y.log_softmax(-1)
    return ((log_p.exp() * (log_p - log_q)).sum(-1) * (Y != -100)).sum() / (Y != -100).sum()


# (ours, eager's), of logits or of hidden states
LOSSES = {
    "mean": (lambda x: c.cross_entropy(x, Y), lambda x: F.cross_entropy(x, Y), X),
    "weights": (
        lambda x: c.cross_entropy(x, Y, W, label_smoothing=0.1),
        lambda x: F.cross_entropy(x, Y, W, label_smoothing=0.1),
        X,
    ),
    "probabilities": (lambda x: c.cross_entropy(x, P), lambda x: F.cross_entropy(x, P), X),
    "top k": (
        lambda x: c.cross_entropy(x, (TOP, TOP_P)),
        lambda x: F.cross_entropy(x, DENSE),
        X,
    ),
    "classes first": (
        lambda x: c.cross_entropy(x.T[None], Y[None]),
        lambda x: F.cross_entropy(x.T[None], Y[None]),
        X,
    ),
    "written over": (
        lambda x: c.cross_entropy(x, Y, inplace_backward=True, grad_in_forward=True),
        lambda x: F.cross_entropy(x, Y),
        X,
    ),
    "statistics": (lambda x: _mixed(c.token_stats(x, Y, entropy=True)), _reference_mixed, X),
    "head": (
        lambda h: c.linear_cross_entropy(h, HEAD, Y, linear_bias=BIAS, token_chunk_size=2),
        lambda h: F.cross_entropy(F.linear(h, HEAD, BIAS), Y),
        H,
    ),
    "head's statistics": (
        lambda h: _mixed(c.linear_token_stats(h, HEAD, Y, entropy=True)),
        lambda h: _reference_mixed(h @ HEAD.T),
        H,
    ),
    "distillation": (
        lambda x: c.kl_div(x, x.detach().flip(-1), kind="reverse", target=Y),
        lambda x: _reverse_kl(x, x.detach().flip(-1)),
        X,
    ),
    "two heads": (
        lambda h: c.linear_kl_div(h, HEAD, TEACHER_H, HEAD[:, :2], kind="reverse", target=Y),
        lambda h: _reverse_kl(h @ HEAD.T, TEACHER_H @ HEAD[:, :2].T),
        H,
    ),
    "binary": (
        lambda x: c.binary_cross_entropy_with_logits(x, HOT, pos_weight=W),
        lambda x: F.binary_cross_entropy_with_logits(x, HOT, pos_weight=W),
        X,
    ),
    "binary by index": (
        lambda x: c.binary_cross_entropy_with_logits(x, TOP),
        lambda x: F.binary_cross_entropy_with_logits(x, 2 * DENSE),
        X,
    ),
}


def _batch(a):
    return torch.stack([a, 2 * a, a - 1])


TRANSFORMS = {
    "grad": lambda f, a: grad(f)(a),
    "grad_and_value": lambda f, a: grad_and_value(f)(a),
    "vjp": lambda f, a: vjp(lambda a: f(a).square(), a)[1](torch.tensor(3.0).double()),
    "vjp with aux": lambda f, a: (
        lambda out, pull, aux: (out, *pull(torch.ones_like(out)), aux)
    )(*vjp(lambda a: (f(a), a.sum()), a, has_aux=True)),
    "jacrev": lambda f, a: jacrev(lambda a: torch.stack([f(a), f(2 * a)]))(a),
    "vmap": lambda f, a: vmap(f)(_batch(a)),
    "vmap in the middle": lambda f, a: vmap(
        lambda a: f(a) * a, in_dims=1, out_dims=2
    )(_batch(a).movedim(0, 1)),
    "vmap in chunks": lambda f, a: vmap(f, chunk_size=2)(_batch(a)),
    "vmap of vmap": lambda f, a: vmap(vmap(f))(torch.stack([_batch(a), _batch(-a)])),
    "vmap of grad": lambda f, a: vmap(grad(f))(_batch(a)),
    "grad of vmap": lambda f, a: grad(lambda b: vmap(f)(b).square().sum())(_batch(a)),
    "vmap of jacrev": lambda f, a: vmap(jacrev(f))(_batch(a)),
}  # fmt: skip


@pytest.mark.parametrize("kind", TRANSFORMS)
@pytest.mark.parametrize("name", LOSSES)
def test_transform_loss(name, kind):
    ours, reference, a = LOSSES[name]
    before = a.clone()
    torch.testing.assert_close(TRANSFORMS[kind](ours, a), TRANSFORMS[kind](reference, a))
    assert torch.equal(a, before)


@pytest.mark.parametrize("name", ["mean", "head"])
def test_functionalize_error(name):
    """torch has no rule for it; alone, and around another transform."""
    ours, _, a = LOSSES[name]
    for f in (ours, grad(ours)):
        with pytest.raises(
            NotImplementedError, match="functionalize cannot see into.*leave it out"
        ):
            functionalize(f)(a)


def test_vmap_all_arguments():
    x, y = _batch(X), torch.stack([Y, Y.flip(0), (Y + 1).clamp(min=0)])
    w, token_weight = torch.rand(V, B).double(), torch.rand(B, N).double()

    def ours(x, y, w):
        return c.cross_entropy(x, y, w)

    for in_dims in ((0, 0, 1), (None, 0, None), (None, None, 1), (0, None, 1)):
        arguments = [t if d is not None else t.select(d0, 0)
                 for t, d, d0 in zip((x, y, w), in_dims, (0, 0, 1), strict=True)]  # fmt: skip
        out = vmap(ours, in_dims=in_dims)(*arguments)
        torch.testing.assert_close(out, vmap(F.cross_entropy, in_dims=in_dims)(*arguments))
    out = vmap(lambda x, t: c.cross_entropy(x, Y, token_weight=t))(x, token_weight)
    losses = vmap(lambda x: F.cross_entropy(x, Y, reduction="none"))(x)
    weights = token_weight * (Y != -100)
    torch.testing.assert_close(out, (losses * weights).sum(1) / weights.sum(1))


def test_vmap_rows_one_call(monkeypatch):
    from chunked_ce import backends

    calls, row_statistics = [], backends.row_statistics
    monkeypatch.setattr(
        backends, "row_statistics", lambda *a, **k: calls.append(0) or row_statistics(*a, **k)
    )

    def statistics(x, y):  # vmap takes no None
        return tuple(s for s in c.token_stats(x, y, rank=True, argmax=True) if s is not None)

    out = vmap(statistics)(X, Y)
    assert len(calls) == 1
    torch.testing.assert_close(out, statistics(X, Y))
    of_rows = vmap(grad(lambda x, y: c.token_stats(x, y).logprob))(X, Y)
    expected = grad(lambda x: -F.cross_entropy(x, Y, reduction="sum"))(X)
    torch.testing.assert_close(of_rows, expected)
    assert len(calls) == 4  # that above, this one's two, and the plain call's


@pytest.mark.parametrize("fused", [False, True])
def test_per_sample_gradients(fused):
    model = nn.Sequential(nn.Linear(D, 6), nn.Tanh()).double()
    loss = c.LinearCrossEntropyLoss(6, V, bias=True, dtype=torch.float64)
    parameters = dict(model.named_parameters()) | {"h." + k: p for k, p in loss.named_parameters()}
    parameters = {k: p.detach() for k, p in parameters.items()}
    hidden, target = _batch(H), torch.stack([Y, Y.flip(0), Y])

    def of_sample(parameters, h, y, ours=True):
        body = {k: p for k, p in parameters.items() if not k.startswith("h.")}
        head = {k[2:]: p for k, p in parameters.items() if k.startswith("h.")}
        h = functional_call(model, body, (h,))
        if fused and ours:
            return functional_call(loss, head, (h, y))
        logits = F.linear(h, head["linear.weight"], head["linear.bias"])
        return (c.cross_entropy if ours else F.cross_entropy)(logits, y)

    ours = vmap(grad(of_sample), in_dims=(None, 0, 0))(parameters, hidden, target)
    expected = [grad(lambda p, h, y: of_sample(p, h, y, ours=False))(parameters, h, y)
                for h, y in zip(hidden, target, strict=True)]  # fmt: skip
    for name, of_each in ours.items():
        torch.testing.assert_close(of_each, torch.stack([e[name] for e in expected]))


def test_gradient_probabilities_and_num_items():
    f, g = (lambda p: c.cross_entropy(X, p), lambda p: F.cross_entropy(X, p))
    torch.testing.assert_close(grad(f)(P), grad(g)(P))
    n = torch.tensor(7.0).double()
    ours = grad(lambda n: c.cross_entropy(X, Y, num_items=n))(n)
    torch.testing.assert_close(ours, grad(lambda n: F.cross_entropy(X, Y, reduction="sum") / n)(n))


def test_backward_through_vmap():
    b = _batch(X).requires_grad_()
    (ours,) = torch.autograd.grad(vmap(lambda x: c.cross_entropy(x, Y))(b).square().sum(), b)
    (expected,) = torch.autograd.grad(vmap(lambda x: F.cross_entropy(x, Y))(b).square().sum(), b)
    torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("name", LOSSES)
def test_second_derivatives_and_forward_mode_error(name):
    f, _, a = LOSSES[name]
    with pytest.raises(RuntimeError, match="first derivatives only"):
        grad(lambda a: grad(f)(a).square().sum())(a)
    with pytest.raises(NotImplementedError, match="reverse-mode derivatives only"):
        jvp(f, (a,), (a,))
    with pytest.raises(NotImplementedError, match="reverse-mode derivatives only"):
        hessian(f)(a)


def test_bad_input_under_transforms():
    with pytest.raises(IndexError, match="target 37 in row 2 is out of range"):
        grad(lambda x: c.cross_entropy(x, torch.tensor([0, 1, V, 3, 4])))(X)
    with pytest.raises(ValueError, match="target has shape"):
        vmap(lambda x: c.cross_entropy(x, Y[:2]))(_batch(X))
    with pytest.raises(ValueError, match="weight requires a gradient"):
        grad(lambda w: c.cross_entropy(X, Y, w))(W)
    with pytest.raises(ValueError, match="requires? a gradient"):
        grad(lambda w: c.binary_cross_entropy_with_logits(X, HOT, pos_weight=w))(W)
    with pytest.raises(ValueError, match="size 0, expected at least 1"):
        vmap(lambda x: c.cross_entropy(x, Y))(X.new_zeros(0, N, V))
    with pytest.raises(NotImplementedError, match="cannot be transformed by torch.func"):
        grad(lambda x: vocab_parallel_cross_entropy(x, Y))(X)


def test_transforms_and_compile():
    def loss(x):
        return c.cross_entropy(x, Y)

    torch._dynamo.reset()
    compiled = torch.compile(loss, backend="aot_eager")
    torch.testing.assert_close(grad(compiled)(X), grad(loss)(X))
    torch.testing.assert_close(vmap(compiled)(_batch(X)), vmap(loss)(_batch(X)))
    torch._dynamo.reset()
    inside = torch.compile(lambda x: grad(loss)(x), backend="aot_eager", fullgraph=True)
    with pytest.raises(Exception, match="cannot trace.*inside a transform"):
        inside(X)
