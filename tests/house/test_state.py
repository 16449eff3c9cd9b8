"""What surrounds a call does not change it: threads, workers, modes of torch, copies, calls within calls."""

import copy
import io
import multiprocessing
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from helpers import batch
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset

import chunked_ce
from chunked_ce import (
    CrossEntropyLoss,
    EvaluationInterrupted,
    EvaluationReport,
    LinearCrossEntropyLoss,
    Perplexity,
    binary_cross_entropy_with_logits,
    cross_entropy,
    kl_div,
    linear_cross_entropy,
    linear_kl_div,
    linear_token_stats,
    token_stats,
)

ROWS, V, D = 23, 400, 16  # several blocks of the small ones that tests use


def in_place(x, target, **options):
    return cross_entropy(x * 1, target, inplace_backward=True, **options)


def head_loss(x, target, **options):
    """x [N, V], its first columns the hidden states."""
    weight = torch.linspace(-1, 1, V * D, device=x.device).to(x.dtype).view(V, D)
    return linear_cross_entropy(
        x[:, :D], weight.requires_grad_(x.requires_grad), target, token_chunk_size=5, **options
    )


def with_heads(loss):
    """A loss of hidden states and a head, of x [N, V] alone."""

    def of_logits(x, target):
        weight = torch.linspace(-1, 1, V * D, device=x.device).to(x.dtype).view(V, D)
        return loss(x[:, :D], weight.requires_grad_(x.requires_grad), target)

    return of_logits


def two_heads(hidden, weight, target):
    teacher = torch.linspace(1, -2, V * 3, device=hidden.device).to(hidden).view(V, 3)
    return linear_kl_div(
        hidden, weight, hidden.detach()[:, :3], teacher, kind="reverse", target=target,
        cross_entropy_weight=0.5, token_chunk_size=5,
    )  # fmt: skip


LOSSES = {
    "mean": cross_entropy,
    "each": lambda x, t: cross_entropy(x, t, reduction="none", label_smoothing=0.1).square().sum(),
    "entropy": lambda x, t: token_stats(x, t, entropy=True, rank=True).entropy.sum(),
    "in place": in_place,
    "one pass": lambda x, t: cross_entropy(x, t, grad_in_forward=True),
    "one pass in place": lambda x, t: cross_entropy(
        x * 1, t, grad_in_forward=True, inplace_backward=True
    ),
    "top k": lambda x, t: cross_entropy(
        x, (t.clamp(min=0)[:, None], x.detach().sigmoid()[:, :1].to(x.dtype)), reduction="sum"
    ),
    "head": head_loss,
    "head, each": lambda x, t: head_loss(x, t, reduction="none").square().sum(),
    "distillation": lambda x, t: kl_div(x, x.detach().flip(0), kind="jsd", target=t),
    "two heads": with_heads(two_heads),
    "called head": with_heads(
        lambda x, w, t: linear_cross_entropy(x, lambda h: h @ w.T, t, token_chunk_size=5)
    ),
    "statistics of a called head": with_heads(
        lambda x, w, t: linear_token_stats(
            x, lambda h: h @ w.T, t, entropy=True, token_chunk_size=5
        ).entropy.sum()
    ),
    "binary": lambda x, t: binary_cross_entropy_with_logits(x, t[:, None], ignore_index=-100),
}


def value_and_gradient(loss, x, target):
    leaf = x.clone().requires_grad_()
    value = loss(leaf, target)
    value.backward()
    return value.detach(), leaf.grad


def same(found, expected):
    return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.fixture
def case():
    return batch(ROWS, V)


@pytest.mark.parametrize("loss", LOSSES)
def test_threads_at_once(loss, case):
    """Each with its own autograd graph, of logits and weights that they share."""
    expected = value_and_gradient(LOSSES[loss], *case)
    start = threading.Barrier(4)

    def work(_):
        start.wait()
        return [value_and_gradient(LOSSES[loss], *case) for _ in range(5)]

    with ThreadPoolExecutor(4) as pool:
        found = [result for results in pool.map(work, range(4)) for result in results]
    assert len(found) == 20 and all(same(f, expected) for f in found)


def test_threads_of_different_sizes_and_dtypes():
    """They share no memory to work in."""
    cases = [batch(rows, vocab, dtype) for rows, vocab in ((5, 900), (40, 33), (9, 301))
             for dtype in (torch.float32, torch.bfloat16, torch.float64)]  # fmt: skip
    expected = [value_and_gradient(cross_entropy, *case) for case in cases]

    def work(i):
        return value_and_gradient(cross_entropy, *cases[i % len(cases)])

    with ThreadPoolExecutor(4) as pool:
        for i, found in enumerate(pool.map(work, range(90))):
            assert same(found, expected[i % len(cases)])


def test_a_backward_in_another_thread(case):
    """The graph is made here and run there, as a pipeline's schedule does."""
    for loss in LOSSES.values():
        expected = value_and_gradient(loss, *case)
        leaf = case[0].clone().requires_grad_()
        value = loss(leaf, case[1])
        thread = threading.Thread(target=value.backward)
        thread.start()
        thread.join()
        assert torch.equal(leaf.grad, expected[1])


def test_one_graph_in_several_threads(case):
    """Each backward has a gradient of its own; one that was given away is given to one thread."""
    x, target = case
    for loss in (cross_entropy, head_loss):
        leaf = x.clone().requires_grad_()
        value = loss(leaf, target)
        _, expected = value_and_gradient(loss, x, target)
        start = threading.Barrier(4)

        def work(factor, leaf=leaf, value=value, start=start):
            start.wait()
            (grad,) = torch.autograd.grad(value * factor, leaf, retain_graph=True)
            return grad / factor

        with ThreadPoolExecutor(4) as pool:
            for grad in pool.map(work, (1.0, 2.0, 4.0, 8.0)):
                assert torch.equal(grad, expected)
    value = cross_entropy(leaf, target, grad_in_forward=True)

    def once(_):
        try:
            return torch.autograd.grad(value, leaf, retain_graph=True)[0]
        except RuntimeError as error:
            return str(error)

    with ThreadPoolExecutor(4) as pool:
        grads = list(pool.map(once, range(4)))
    assert sum(isinstance(grad, torch.Tensor) for grad in grads) == 1


class Scored(Dataset):
    """Each item scored by the worker that loads it."""

    def __init__(self, size):
        self.size = size

    def __len__(self):
        return self.size

    def __getitem__(self, i):
        generator = torch.Generator().manual_seed(i)
        x = torch.randn(8, 300, generator=generator)
        target = torch.randint(0, 300, (8,), generator=generator)
        stats = token_stats(x, target, entropy=True)
        _, grad = value_and_gradient(cross_entropy, x, target)
        return stats.lse, stats.entropy, grad


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_data_loader_workers(method, case):
    """`fork` copies a process in the midst of its life, `spawn` imports anew."""
    if method not in multiprocessing.get_all_start_methods():
        pytest.skip(f"no {method} on this system")
    value_and_gradient(cross_entropy, *case)  # a fork inherits what a first call leaves
    data = Scored(4)
    loader = DataLoader(data, batch_size=None, num_workers=1, multiprocessing_context=method)
    for i, item in enumerate(loader):
        for ours, expected in zip(item, data[i], strict=True):
            # a spawned worker has none of the small blocks that this test works in
            torch.testing.assert_close(ours, expected, rtol=2e-6, atol=1e-9)
            assert method == "spawn" or torch.equal(ours, expected)


@pytest.mark.parametrize("loss", LOSSES)
def test_deterministic_algorithms(loss, case):
    """Nothing raises, and nothing is read from new memory, which that mode fills with NaN."""
    expected = value_and_gradient(LOSSES[loss], *case)
    torch.use_deterministic_algorithms(True)
    try:
        assert same(value_and_gradient(LOSSES[loss], *case), expected)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("loss", LOSSES)
def test_inference_mode_and_after_it(loss, case):
    x, target = case
    expected = value_and_gradient(LOSSES[loss], x, target)

    def first():  # of its thread: the memory it works in is made under inference mode
        with torch.inference_mode():
            value = LOSSES[loss](x.clone(), target)
            assert value.is_inference() and torch.equal(value, expected[0])
        assert same(value_and_gradient(LOSSES[loss], x, target), expected)

    with ThreadPoolExecutor(1) as pool:
        pool.submit(first).result()


@pytest.mark.real_sizes
def test_another_number_of_threads():
    """A row's sums are not divided among threads; products and sums over tokens are torch's own."""
    x, target = batch(80, 3000)
    found, losses, before = [], [], torch.get_num_threads()
    try:
        for count in (1, 2, 3, 1):
            torch.set_num_threads(count)
            stats = token_stats(x, target, entropy=True, mean_logprob=True, rank=True)
            _, grad = value_and_gradient(cross_entropy, x, target)
            found.append((*(s for s in stats if s is not None), grad))
            losses.append(float(head_loss(x, target.clamp(max=V - 1))))
    finally:
        torch.set_num_threads(before)
    assert all(same(f, found[0]) for f in found)
    assert losses == pytest.approx([losses[0]] * 4, rel=1e-6)


class Within(torch.autograd.Function):
    """A backward that runs another backward, as reentrant checkpointing does."""

    @staticmethod
    def forward(ctx, x, target):
        ctx.save_for_backward(x, target)
        return x.sum() * 0 + 1

    @staticmethod
    def backward(ctx, upstream):
        x, target = ctx.saved_tensors
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            loss = cross_entropy(leaf, target)
        loss.backward(upstream)
        return leaf.grad, None


def test_reentrant_backward(case):
    x, target = case
    _, expected = value_and_gradient(cross_entropy, x, target)
    leaf = x.clone().requires_grad_()
    (Within.apply(leaf, target) + cross_entropy(leaf, target)).backward()
    torch.testing.assert_close(leaf.grad, 2 * expected)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("loss", LOSSES)
def test_checkpointing(loss, reentrant, case):
    x, target = case
    value, grad = value_and_gradient(LOSSES[loss], x, target)
    leaf = x.clone().requires_grad_()
    again = checkpoint(LOSSES[loss], leaf, target, use_reentrant=reentrant)
    again.backward()
    assert same((again.detach(), leaf.grad), (value, grad))


def by_pickle(thing):
    return pickle.loads(pickle.dumps(thing))


def by_torch(thing):
    file = io.BytesIO()
    torch.save(thing, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, by_pickle, by_torch])
def test_copies(copied, case):
    x, target = case
    stats = copied(token_stats(x, target, rank=True))
    assert type(stats) is chunked_ce.TokenStats and torch.equal(
        stats.rank, token_stats(x, target, rank=True).rank
    )
    meter = Perplexity()
    meter.update(x, target, n_bytes=7, rank=True)
    twin = copied(meter)
    assert twin.report() == meter.report() and copied(meter.report()) == meter.report()
    twin.update(x, target)
    assert twin.report() != meter.report(), "a meter of its own"
    for module, given in (
        (CrossEntropyLoss(label_smoothing=0.1, weight=torch.rand(V)), (x, target)),
        (LinearCrossEntropyLoss(V, 50, bias=True), (x, target.clamp(max=49))),
    ):
        assert torch.equal(copied(module)(*given), module(*given))
    report = EvaluationReport(2.0, 3, context_length=4, partial=True)
    interruption = copied(EvaluationInterrupted(report))
    assert type(interruption) is EvaluationInterrupted and interruption.report == report
    assert copied(cross_entropy) is cross_entropy


def test_a_loss_is_copied_with_its_graph_or_not_at_all(case):
    """torch's own rule: leaves and results without history."""
    leaf = case[0].clone().requires_grad_()
    loss = cross_entropy(leaf, case[1])
    with pytest.raises(RuntimeError, match="deepcopy"):
        copy.deepcopy(loss)
    assert torch.equal(copy.deepcopy(loss.detach()), loss)
