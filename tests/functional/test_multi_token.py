"""Streams of hidden states that predict several tokens ahead, against eager fp64."""

import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import chunked_ce
from chunked_ce import multi_token_cross_entropy

K, B, T, D, V = 3, 2, 11, 8, 23


def tokens():
    target = torch.randint(0, V, (B, T))
    target[0, 2] = target[1, 7] = -100
    return target


def label(target, documents, b, i, k):
    """The token that position i of stream k predicts, or -100."""
    there = i + k + 1
    if there >= T or documents[b][i] != documents[b][there]:
        return -100
    return int(target[b, there])


ONE = [[0] * T] * B
PACKED = [[0] * 3 + [1] * 1 + [2] * 7, [3] * 5 + [4] * 6]
POSITIONS = torch.tensor([[0, 1, 2, 0, 0, 1, 2, 3, 4, 5, 6], [0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5]])
CU_SEQLENS = torch.tensor([0, 3, 4, 11, 16, 22])


def eager(streams, logits_of, target, documents=ONE, smoothing=0.0):
    """Return the mean loss of each stream, one token at a time."""
    losses = []
    for k, x in enumerate(streams):
        rows = [(b, i) for b in range(B) for i in range(x.shape[-2])]
        labels = torch.tensor([label(target, documents, b, i, k) for b, i in rows])
        logits = torch.stack([logits_of(k, x[b, i]) for b, i in rows])
        losses.append(F.cross_entropy(logits, labels, label_smoothing=smoothing))
    return torch.stack(losses)


def hidden(ragged):
    """Streams of the same length, or each one shorter than the last."""
    streams = torch.randn(K, B, T, D, dtype=torch.float64)
    return [x[:, : T - k * ragged].clone().requires_grad_() for k, x in enumerate(streams)]


DOCUMENTS = {
    "one": ({}, ONE),
    "position_ids": (dict(position_ids=POSITIONS), PACKED),
    "cu_seqlens": (dict(cu_seqlens=CU_SEQLENS), PACKED),
}


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("documents", DOCUMENTS)
def test_loss_and_gradients(documents, shared, ragged, weighted):
    torch.manual_seed(0)
    given, kinds = DOCUMENTS[documents]
    streams, target = hidden(ragged), tokens()
    shape = (V, D) if shared else (K, V, D)
    w = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(shape[:-1], dtype=torch.float64, requires_grad=True)
    factors = torch.tensor([1.0, 0.3, 0.2], dtype=torch.float64)
    given = {**given, "label_smoothing": 0.1, "linear_bias": bias, "token_chunk_size": 4}
    if weighted:
        given["depth_weight"] = factors
    ours = multi_token_cross_entropy(streams, w, target, **given)
    assert ours.shape == (() if weighted else (K,))

    def logits_of(k, x):
        return F.linear(x, w, bias) if shared else F.linear(x, w[k], bias[k])

    exact = eager(streams, logits_of, target, kinds, smoothing=0.1)
    exact = (exact * factors).sum() if weighted else exact
    torch.testing.assert_close(ours, exact, rtol=1e-12, atol=0)
    leaves, upstream = [*streams, w, bias], torch.linspace(1, 2, ours.numel()).double()
    grads = torch.autograd.grad((ours * upstream).sum(), leaves)
    expected = torch.autograd.grad((exact * upstream).sum(), leaves)
    torch.testing.assert_close(grads, expected, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("shared", [False, True])
def test_depth_weight_has_the_dtype_of_the_losses(shared):
    target, weights = tokens(), [1.0, 0.3, 0.1]
    for dtype in (torch.float64, torch.float32):
        x, w = torch.randn(K, B, T, D, dtype=dtype), torch.randn(V, D, dtype=dtype)
        head = w if shared else [w] * K
        weighted = multi_token_cross_entropy(x, head, target, depth_weight=weights)
        exact = multi_token_cross_entropy(x, head, target).double() @ torch.tensor(
            weights, dtype=torch.float64
        )
        assert weighted.dtype == dtype
        tolerance = 1e-14 if dtype == torch.float64 else 1e-6
        torch.testing.assert_close(weighted.double(), exact, rtol=tolerance, atol=0)
        wide = torch.tensor(weights, dtype=torch.float64)
        assert multi_token_cross_entropy(x, head, target, depth_weight=wide).dtype == dtype


def test_a_tensor_of_streams_and_modules():
    streams, target = torch.randn(K, B, T, D), tokens()
    heads = nn.ModuleList(nn.Sequential(nn.Linear(D, V), nn.Tanh()) for _ in range(K))
    ours = multi_token_cross_entropy(streams, heads, target, num_items=7)
    same = multi_token_cross_entropy(list(streams), list(heads), target, num_items=torch.tensor(7))
    assert torch.equal(ours, same)
    for k, head in enumerate(heads):
        labels = F.pad(target[:, k + 1 :], (0, k + 1), value=-100)
        logits = head(streams[k]).flatten(0, 1)
        expected = F.cross_entropy(logits, labels.flatten(), reduction="sum") / 7
        torch.testing.assert_close(ours[k], expected)


@pytest.mark.parametrize("weight", [None, [1.0, 0.5, 0.25]])
def test_num_items_and_one_sequence(weight):
    streams, target, w = torch.randn(K, T, D), torch.randint(0, V, (T,)), torch.randn(V, D)
    ours = multi_token_cross_entropy(streams, w, target, num_items=5, depth_weight=weight)
    sums = torch.stack([
        F.cross_entropy(streams[k, : T - k - 1] @ w.t(), target[k + 1 :], reduction="sum") / 5
        for k in range(K)
    ])  # fmt: skip
    expected = sums if weight is None else (sums * torch.tensor(weight)).sum()
    torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("weighted", [False, True])
def test_a_stream_without_tokens_is_nan(weighted):
    streams, target, w = torch.randn(3, 2, D), torch.tensor([1, 2]), torch.randn(V, D)
    options = dict(depth_weight=[1.0, 0.0, 0.0]) if weighted else {}
    loss = multi_token_cross_entropy(streams.requires_grad_(), w, target, **options)
    loss.sum().backward()
    assert loss.isnan().tolist() == (True if weighted else [False, True, True])
    assert not streams.grad[1:].any() and streams.grad[0, 0].any()


@pytest.mark.parametrize("weighted", [False, True])
def test_one_chunk_of_logits_is_alive_at_a_time(weighted):
    alive, most = weakref.WeakSet(), []

    class Counted(nn.Linear):
        def forward(self, x):
            logits = super().forward(x)
            alive.add(logits.untyped_storage())
            most.append((len(alive), *logits.shape))
            return logits

    streams = torch.randn(K, B, T, D, requires_grad=True)
    options = dict(depth_weight=[1.0, 1.0, 1.0]) if weighted else {}
    head = Counted(D, V)
    loss = multi_token_cross_entropy(streams, head, tokens(), token_chunk_size=4, **options)
    loss.sum().backward()
    assert max(most) == (1, 4, V) and len(most) > 10


def test_one_gradient_of_a_shared_head(monkeypatch):
    """With weights that are known in forward: the head's gradient of all streams is made once."""
    from chunked_ce.ops import chunks

    finished, finish = [], chunks.Gradients.finish

    def counted(self):
        finished.append(self)
        return finish(self)

    monkeypatch.setattr("chunked_ce.ops.linear.Gradients.finish", counted)
    streams = torch.randn(K, B, T, D, requires_grad=True)
    w = torch.randn(V, D, requires_grad=True)
    multi_token_cross_entropy(streams, w, tokens(), depth_weight=[1.0, 0.5, 0.5]).backward()
    assert len(finished) == 1
    multi_token_cross_entropy(streams, w, tokens()).sum().backward()
    assert len(finished) == 1 + K


def test_compiled():
    streams, target = torch.randn(K, B, T, D), tokens()
    w = torch.randn(V, D, requires_grad=True)

    def loss(weight):
        return multi_token_cross_entropy(streams, weight, target, depth_weight=[1.0, 0.5, 0.1])

    found = torch.compile(loss, backend="aot_eager", fullgraph=True)(w)
    torch.testing.assert_close(found, loss(w))
    grads = [torch.autograd.grad(value, w)[0] for value in (found, loss(w))]
    torch.testing.assert_close(*grads)


X, W, TOKENS = torch.randn(K, B, T, D), torch.randn(V, D), torch.zeros(B, T, dtype=torch.int64)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "said"),
    [
        ((3, W, TOKENS), {}, TypeError, r"sequence of K Tensors \[..., T, D\], got int"),
        (([], W, TOKENS), {}, ValueError, "no streams"),
        ((X[0], W, TOKENS), {}, ValueError, r"input\[0\] has shape \[11, 8\]"),
        ((X[:, :, :9], W, TOKENS), {}, ValueError, "has 9 positions, but target"),
        (([X[0], X[1].double()], W, TOKENS), {}, ValueError, "the same hidden size and dtype"),
        (([X[0], None], W, TOKENS), {}, TypeError, r"input\[1\] must be a Tensor"),
        ((X, [W], TOKENS), {}, ValueError, "linear_weight holds 1 heads, but input has 3"),
        ((X, W, TOKENS), dict(linear_bias=[None]), TypeError, "linear_weight is one head"),
        ((X, [W] * 3, TOKENS), dict(linear_bias=W[:, 0]), ValueError, r"expected \[K, V\]"),
        ((X, W, torch.rand(B, T, V)), {}, TypeError, "target"),
        ((X, W, TOKENS), dict(depth_weight=[1.0]), ValueError, r"shape \[1\], expected .*\[3\]"),
        ((X, W, TOKENS), dict(depth_weight=0.3), TypeError, "sequence of K numbers, got float"),
        ((X, W, TOKENS), dict(position_ids=TOKENS[0]), ValueError, "expected target's"),
        ((X, W, TOKENS + V), {}, IndexError, f"target {V}"),
        ((X, W, TOKENS), dict(shift=True), TypeError, "has no argument shift"),
    ],
)
def test_bad_input(arguments, options, error, said):
    with pytest.raises(error, match=said):
        chunked_ce.multi_token_cross_entropy(*arguments, **options)
