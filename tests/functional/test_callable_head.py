"""A head in the place of its weight: as the head followed by the loss, a chunk at a time."""

import copy
import weakref
from functools import partial

import oracle
import pytest
import torch
import torch.nn.functional as F
from helpers import AdaptedHead
from torch import nn

from chunked_ce import backends, linear_cross_entropy, linear_token_stats
from chunked_ce.functional.heads import plain_linear

N, D, V = 23, 16, 101
adapted = partial(AdaptedHead, D, V)


class RoundedWeight(torch.autograd.Function):
    """A fake-quantised weight: rounded in forward, straight through in backward."""

    @staticmethod
    def forward(ctx, weight):
        return (weight * 8).round() / 8

    @staticmethod
    def backward(ctx, grad):
        return grad


class FakeQuantized(nn.Linear):
    def forward(self, x):
        return F.linear(x, RoundedWeight.apply(self.weight), self.bias)


class Outside(nn.Module):
    """As a function that closes over what was computed before: its graph is shared by all chunks."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(V, D))

    def forward(self, x):
        return x @ self.weight.tanh().t()


def capped():  # whose last operator keeps the logits for backward
    return nn.Sequential(nn.Linear(D, V), nn.Tanh())


HEADS = {
    "adapted": adapted,
    "fake_quantized": lambda: FakeQuantized(D, V),
    "capped": capped,
    "outside": Outside,
    "strided": lambda: nn.Sequential(nn.Linear(D, V), Transposed()),
    "plain": lambda: nn.Linear(D, V),
    "shared": lambda: nn.Sequential(nn.Linear(D, V), Shift()),
}


class Transposed(nn.Module):
    def forward(self, x):
        return x.t().contiguous().t()


class Shift(nn.Module):
    """Two parameters whose gradients are one tensor."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Parameter(torch.zeros(V)), nn.Parameter(torch.ones(V))

    def forward(self, x):
        return x + (self.one + self.two)


OPTIONS = {
    "plain": {},
    "none": dict(reduction="none"),
    "all": dict(label_smoothing=0.1, z_loss_weight=1e-2, softcap=5.0, vocab_size=90),
    "sum": dict(reduction="sum", logit_scale=0.5),
}


def batch(dtype=torch.float32, n=N):
    x, target = torch.randn(n, D, dtype=dtype), torch.randint(0, 90, (n,))
    target[::5] = -100
    return x.requires_grad_(), target


@pytest.mark.parametrize(("chunk", "drop"), [(None, False), (7, True)])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("name", HEADS)
def test_loss_and_gradients(name, options, chunk, drop):
    torch.manual_seed(0)
    head, (x, target) = HEADS[name](), batch()
    options = OPTIONS[options]
    upstream = torch.linspace(-1, 2, N) if options.get("reduction") == "none" else 3.7
    ours = linear_cross_entropy(
        x, head, target, token_chunk_size=chunk, drop_ignored=drop, **options
    )
    (ours * upstream).sum().backward()
    twin, wide = copy.deepcopy(head).double(), x.detach().double().requires_grad_()
    twin.zero_grad()
    exact = oracle.cross_entropy(twin(wide), target, **options)
    (exact * upstream).sum().backward()
    torch.testing.assert_close(ours.double(), exact, rtol=3e-6, atol=3e-6)
    pairs = zip([x, *head.parameters()], [wide, *twin.parameters()], strict=True)
    for a, e in pairs:
        assert (a.grad is None) == (e.grad is None)
        if e.grad is not None:
            torch.testing.assert_close(
                a.grad.double(), e.grad, rtol=1e-5, atol=float(e.grad.abs().max()) * 5e-6
            )


def test_a_function_and_the_graph_before_it():
    w, (x, target) = torch.randn(V, D, requires_grad=True), batch()
    scaled = w * 2.0

    def loss(x):
        return linear_cross_entropy(x, lambda h: h @ scaled.t(), target, token_chunk_size=4)

    ours = torch.autograd.grad(loss(x), (x, w), retain_graph=True)
    expected = torch.autograd.grad(F.cross_entropy(x @ scaled.t(), target), (x, w))
    torch.testing.assert_close(ours, expected)


def test_lora_of_peft():
    peft = pytest.importorskip("peft")
    model = nn.Sequential()
    model.add_module("lm_head", nn.Linear(D, V, bias=False))
    config = peft.LoraConfig(r=4, target_modules=["lm_head"], init_lora_weights=False)
    model = peft.get_peft_model(model, config)
    head, (x, target) = model.base_model.model.lm_head, batch()
    named = dict(head.named_parameters())
    trained = [p for p in named.values() if p.requires_grad]
    assert 0 < len(trained) < len(named)
    loss = linear_cross_entropy(x, head, target, token_chunk_size=6)
    ours = torch.autograd.grad(2 * loss, [x, *trained])
    expected = torch.autograd.grad(2 * F.cross_entropy(head(x), target), [x, *trained])
    torch.testing.assert_close(ours, expected)


def test_sums_in_float32():
    """Of bf16 parameters' gradients over many chunks: no worse than of one."""
    torch.manual_seed(0)
    head = FakeQuantized(D, V, bias=False, dtype=torch.bfloat16)
    x, target = batch(torch.bfloat16, 512)
    wide = head.weight.detach().double().requires_grad_()
    F.cross_entropy(F.linear(x.detach().double(), RoundedWeight.apply(wide)), target).backward()
    errors = []
    for chunk in (512, 8):
        loss = linear_cross_entropy(x, head, target, token_chunk_size=chunk)
        (grad,) = torch.autograd.grad(loss, head.weight)
        assert grad.dtype == torch.bfloat16
        errors.append((grad.double() - wide.grad).norm() / wide.grad.norm())
    assert errors[1] < 1.4 * errors[0]


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_one_chunk_of_logits_is_alive_at_a_time(reduction):
    alive, most = weakref.WeakSet(), []

    class Counted(FakeQuantized):
        def forward(self, x):
            logits = super().forward(x)
            alive.add(logits.untyped_storage())
            most.append(len(alive))
            return logits

    x, target = batch()
    loss = linear_cross_entropy(x, Counted(D, V), target, token_chunk_size=4, reduction=reduction)
    loss.sum().backward()
    assert max(most) == 1 and len(most) == (5 if reduction == "mean" else 10)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_dropout_is_the_same_in_backward(reduction):
    head, (x, target) = nn.Sequential(nn.Dropout(0.5), nn.Linear(D, V)), batch()
    torch.manual_seed(4)
    loss = linear_cross_entropy(x, head, target, reduction=reduction, drop_ignored=False).sum()
    after = torch.rand(())
    first = torch.autograd.grad(loss, x, retain_graph=True)[0]
    again = torch.autograd.grad(loss, x)[0]
    assert torch.equal(first, again)
    torch.manual_seed(4)
    head(torch.zeros(1, D))  # whose width was asked for
    masked = x.masked_fill((target == -100)[:, None], 0.0)
    expected = F.cross_entropy(head(masked), target, reduction=reduction).sum()
    assert torch.equal(after, torch.rand(()))
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(first, torch.autograd.grad(expected, x)[0])


def test_token_stats():
    head, (x, target) = adapted(), batch()
    wanted = dict(entropy=True, mean_logprob=True, rank=True, argmax=True)
    stats = linear_token_stats(x, head, target, token_chunk_size=5, **wanted)
    expected = oracle.token_stats(head(x), target)
    for name, value in expected.items():
        torch.testing.assert_close(getattr(stats, name), value.to(getattr(stats, name).dtype))
    leaves = [x, head.a.weight, head.b.weight]
    ours = torch.autograd.grad((stats.logprob * stats.entropy).sum(), leaves)
    exact = torch.autograd.grad((expected["logprob"] * expected["entropy"]).sum(), leaves)
    torch.testing.assert_close(ours, exact, rtol=1e-4, atol=1e-4)


def test_probabilities_and_class_weights():
    head, (x, target) = adapted(), batch()
    prob, weight = torch.randn(N, V).softmax(-1), torch.rand(V)
    for labels, options in ((prob, {}), (target, dict(weight=weight)), (prob, dict(weight=weight))):
        loss = linear_cross_entropy(x, head, labels, token_chunk_size=5, **options)
        torch.testing.assert_close(loss, F.cross_entropy(head(x), labels, **options))


def test_shifted_tokens():
    head, x, tokens = adapted(), torch.randn(2, 9, D), torch.randint(0, V, (2, 9))
    shifted = F.pad(tokens[:, 1:], (0, 1), value=-100)
    expected = F.cross_entropy(head(x).flatten(0, 1), shifted.flatten())
    loss = linear_cross_entropy(x, head, tokens, shift=True, token_chunk_size=5)
    torch.testing.assert_close(loss, expected)
    stats = linear_token_stats(x, head, tokens, shift=True)
    torch.testing.assert_close(-stats.logprob.sum() / 16, expected)


@pytest.mark.parametrize("n", [0, 5])
def test_no_token_counts(n):
    head, x = adapted(), torch.randn(n, D, requires_grad=True)
    loss = linear_cross_entropy(x, head, torch.full((n,), -100), reduction="sum")
    loss.backward()
    assert loss == 0 and not x.grad.any() and not head.a.weight.grad.any()


def test_autocast_as_the_head_has_it():
    head, (x, target) = adapted(), batch()
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(x, head, target, token_chunk_size=5, reduction="none")
        expected = F.cross_entropy(head(x).float(), target, reduction="none")
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    grads = [torch.autograd.grad(v.sum(), head.a.weight)[0] for v in (loss, expected)]
    torch.testing.assert_close(*grads, rtol=3e-2, atol=3e-2)


def test_a_plain_linear_layer_is_its_weight():
    layer, (x, target) = nn.Linear(D, V), batch()
    loss = linear_cross_entropy(x, layer, target)
    expected = linear_cross_entropy(x, layer.weight, target, linear_bias=layer.bias)
    assert torch.equal(loss, expected) and plain_linear(layer) is layer
    hooked = nn.Linear(D, V)
    hooked.register_forward_hook(lambda module, args, out: out * 2.0)
    assert plain_linear(hooked) is None and plain_linear(FakeQuantized(D, V)) is None
    parametrized = torch.nn.utils.parametrizations.weight_norm(nn.Linear(D, V))
    assert plain_linear(parametrized) is None
    torch.testing.assert_close(
        linear_cross_entropy(x, hooked, target), F.cross_entropy(hooked(x), target)
    )


def test_without_gradients():
    head, (x, target) = adapted(), batch()
    with torch.no_grad():
        loss = linear_cross_entropy(x, head, target)
    assert not loss.requires_grad
    frozen = adapted().requires_grad_(False)
    assert not linear_cross_entropy(x.detach(), frozen, target).requires_grad


def test_double_backward_and_transforms_are_errors():
    head, (x, target) = adapted(), batch()
    loss = linear_cross_entropy(x, head, target)
    with pytest.raises(RuntimeError, match="first derivatives only"):
        torch.autograd.grad(loss, x, create_graph=True)
    with pytest.raises(TypeError, match="transforms cannot see into"):
        torch.func.grad(lambda x: linear_cross_entropy(x, head, target))(x.detach())


X, T = torch.randn(3, D), torch.tensor([0, 5, -100])


@pytest.mark.parametrize(
    ("head", "options", "error", "said"),
    [
        (lambda h: (h, h), {}, TypeError, "the head returned tuple, expected its logits"),
        (lambda h: h.long(), {}, TypeError, "logits have dtype torch.int64"),
        (lambda h: h[None], {}, ValueError, r"of shape \[1, 1, 16\] of hidden states"),
        (lambda h: h.to("meta"), {}, ValueError, "the head's output is on meta"),
        (lambda h: h[:, : 8 + h.shape[0]], {}, ValueError, "expected the same for every token"),
        (lambda h: h[:, :4], {}, IndexError, "target 5 in row 1"),
        (nn.Linear(D, V), dict(linear_bias=torch.ones(V)), ValueError, "leave it out"),
        (adapted(), dict(logits_dtype=torch.float32), ValueError, "computes its logits itself"),
        (adapted(), dict(vocab_size=102), ValueError, "has 101 classes"),
        (adapted(), dict(backend="no"), ValueError, "backend"),
        ("no head", {}, TypeError, "linear_weight must be a Tensor"),
    ],
)
def test_bad_heads(head, options, error, said):
    with pytest.raises(error, match=said):
        linear_cross_entropy(X, head, T, **options)


def test_a_head_that_stops_the_gradient_of_hidden_states():
    w, (x, target) = torch.randn(V, D, requires_grad=True), batch()
    loss = linear_cross_entropy(x, lambda h: h.detach() @ w.t(), target, token_chunk_size=5)
    loss.backward()
    torch.testing.assert_close(loss, F.cross_entropy(x @ w.t(), target))
    assert not x.grad.any() and w.grad.any()


def test_a_head_without_gradients_says_so():
    with pytest.raises(RuntimeError, match="do not depend on it differentiably"):
        linear_cross_entropy(X.clone().requires_grad_(), lambda h: h.detach(), T)


@pytest.mark.framework
@pytest.mark.parametrize(
    ("name", "reduction"),
    [("adapted", "mean"), ("adapted", "none"), ("adapted", "statistics")]
    + [("fake_quantized", "mean"), ("function", "none")],
)
def test_compile_breaks_the_graph_at_a_head_that_is_called(name, reduction):
    w, (x, target) = torch.randn(V, D, requires_grad=True), batch()
    head = (lambda h: h @ w.t()) if name == "function" else HEADS[name]()
    leaves = [w] if name == "function" else [p for p in head.parameters() if p.requires_grad]
    traced = []

    def seen(hidden):
        traced.append(torch.compiler.is_compiling())
        return head(hidden)

    def loss(x):
        if reduction == "statistics":
            return -linear_token_stats(2.0 * x, seen, target, token_chunk_size=5).logprob.sum()
        options = dict(token_chunk_size=5, reduction=reduction)
        return 2.0 * linear_cross_entropy(2.0 * x, seen, target, **options).sum()

    def values(function):
        out = function(x)
        return [out, *torch.autograd.grad(out, [x, *leaves])]

    compiled = torch.compile(loss, backend="aot_eager")
    for _ in range(2):
        for ours, expected in zip(values(compiled), values(loss), strict=True):
            torch.testing.assert_close(ours, expected)
    assert traced and not any(traced)
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(loss, backend="aot_eager", fullgraph=True)(x)


@pytest.mark.framework
def test_compile_fullgraph_with_a_linear_layer():
    layer, (x, target) = nn.Linear(D, V), batch()

    def loss(x):
        return linear_cross_entropy(2.0 * x, layer, target, token_chunk_size=5)

    leaves = [x, layer.weight, layer.bias]
    found = torch.compile(loss, backend="aot_eager", fullgraph=True)(x)
    ours, expected = (torch.autograd.grad(value, leaves) for value in (found, loss(x)))
    torch.testing.assert_close(found, loss(x))
    torch.testing.assert_close(ours, expected)


class Centered(nn.Linear):
    """A head that keeps a running mean of what it sees."""

    def __init__(self):
        super().__init__(D, V)
        self.register_buffer("center", torch.zeros(D))

    def forward(self, hidden):
        if self.training:
            self.center.lerp_(hidden.detach().mean(0), 0.1)
        return super().forward(hidden - self.center)


def test_head_with_state_error():
    """Each chunk would see another mean than the one before."""
    head, (x, target) = Centered(), batch()
    with pytest.raises(ValueError, match=r"keeps state between calls.*'center'.*head.eval\(\)"):
        linear_cross_entropy(x, head, target)
    loss = linear_cross_entropy(x, head.eval(), target, token_chunk_size=5)
    torch.testing.assert_close(loss, F.cross_entropy(head(x), target))


@pytest.mark.parametrize("size", [5, None])
def test_gradients_in_memory_of_their_own(size):
    """Autograd has one gradient for two weights that are added; clipping one must not clip both."""
    a, b = (nn.Parameter(torch.randn(V, D)) for _ in range(2))
    x, target = batch()
    linear_cross_entropy(x, lambda h: h @ (a + b).T, target, token_chunk_size=size).backward()
    expected = b.grad.clone()
    a.grad.zero_()
    assert torch.equal(b.grad, expected) and expected.any()


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("frozen", ["hidden states", "head"])
def test_one_side_frozen(frozen, reduction):
    x, target = batch()
    x, w = x.detach(), torch.randn(V, D)
    leaf = (w if frozen == "hidden states" else x).requires_grad_()

    def gradient(loss):
        return torch.autograd.grad(loss.sum(), leaf)[0]

    ours = linear_cross_entropy(x, lambda h: h @ w.T, target, reduction=reduction)
    expected = F.cross_entropy(x @ w.T, target, reduction=reduction)
    torch.testing.assert_close(gradient(ours), gradient(expected))


def test_options_without_gradients(monkeypatch):
    """No gradient is computed under no_grad, also of hidden states that are a leaf."""
    (x, target), w = batch(), torch.randn(V, D)
    options = dict(label_smoothing=0.2, z_loss_weight=0.01, token_chunk_size=5)
    with torch.no_grad(), monkeypatch.context() as patch:
        patch.setattr(backends, "loss_and_gradient", None)
        ours = linear_cross_entropy(x, lambda h: h @ w.T, target, **options)
    expected = linear_cross_entropy(x, lambda h: h @ w.T, target, **options)
    torch.testing.assert_close(ours, expected.detach())
