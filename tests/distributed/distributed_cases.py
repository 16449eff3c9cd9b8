"""Cases of the cross-entropy of several ranks, which run_cases.py runs on each.

Each rank builds the same whole tensors from a seed, and compares with the oracle on all of them.
"""

import importlib.util
import math

import oracle
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
import triton_interpreter
from helpers import assert_gradient
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

import chunked_ce
from chunked_ce.backends import torch_blocks
from chunked_ce.distributed.losses import (
    vocab_parallel_cross_entropy,
    vocab_parallel_linear_cross_entropy,
    vocab_parallel_token_stats,
)

CASES = {}
LOSSES = {
    "plain": {},
    "sum": dict(reduction="sum"),
    "none": dict(reduction="none"),
    "smoothing": dict(label_smoothing=0.1),
    "z_loss": dict(z_loss_weight=1e-2),
    "softcap": dict(softcap=5.0, logit_scale=0.5),
    "num_items": dict(num_items=torch.tensor(20)),
    "all": dict(label_smoothing=0.2, z_loss_weight=1e-3, softcap=4.0, num_items=7),
    "class 0 ignored": dict(ignore_index=0),
}
N, D, V = 9, 8, 101


def case(function):
    CASES[function.__name__] = function
    return function


def shards(sizes):
    """(start, stop) of this rank's classes; `sizes` of ranks, repeated or cut to their number."""
    world, rank = dist.get_world_size(), dist.get_rank()
    ends = [0]
    for i in range(world):
        ends.append(min(V, ends[-1] + sizes[i % len(sizes)]) if i < world - 1 else V)
    return ends[rank], ends[rank + 1]


# Uneven ones; a shard of one class; one of none, at the end and in the midst.
SIZES = {
    "uneven": (37, 11),
    "one class": (1, 60),
    "no class last": (V,),
    "no class": (40, 0),
}


def batch(dtype=torch.float32, n=N):
    x = (torch.randn(n, V, dtype=torch.float64) * 3).to(dtype)
    target = torch.randint(0, V, (n,))
    target[::4] = -100
    target[1], target[2], target[3] = 0, V - 1, 50
    return x, target


def of_logits(f, x, target, sizes=(37, 11), upstream=3.7, **options):
    """(result, the gradient of this rank's logits, its classes)"""
    start, stop = shards(sizes)
    leaf = x[..., start:stop].detach().clone().requires_grad_()
    options.setdefault("vocab_size", V)
    loss = f(leaf, target, vocab_start=start, **options)
    (loss * upstream).sum().backward()
    return loss.detach(), leaf.grad, slice(start, stop)


def truth(x, target, upstream=3.7, **options):
    x = x.double().detach().requires_grad_()
    loss = oracle.cross_entropy(x, target, **options)
    (loss * upstream).sum().backward()
    return loss.detach(), x.grad


def assert_loss(loss, expected, dtype):
    """The loss, the same bits on every rank."""
    rtol = 1e-13 if dtype == torch.float64 else 1e-6
    torch.testing.assert_close(loss.double(), expected, rtol=rtol, atol=0.0, equal_nan=True)
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    all_losses = [torch.empty_like(loss) for _ in range(dist.get_world_size())]
    dist.all_gather(all_losses, loss)
    assert all(torch.equal(other.nan_to_num(), loss.nan_to_num()) for other in all_losses)


@case
def test_loss_gradient():
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        for name, options in LOSSES.items():
            x, target = batch(dtype)
            if "ignore_index" in options:
                target = target.clamp(min=0)
            upstream = torch.randn(N, dtype=torch.float64) if name == "none" else 3.7
            loss, grad, here = of_logits(
                vocab_parallel_cross_entropy, x, target, upstream=upstream, **options
            )
            expected, expected_grad = truth(x, target, upstream, **options)
            assert_loss(loss, expected, dtype)
            uncapped = truth(x, target, upstream, **options | dict(softcap=None))[1]
            assert_gradient(grad, expected_grad[:, here], dtype, uncapped.abs().amax())


@case
def test_loss_shard_sizes():
    for dtype in (torch.float32, torch.float64):
        for sizes in SIZES.values():
            x, target = batch(dtype)
            options = dict(label_smoothing=0.1, z_loss_weight=1e-3)
            loss, grad, here = of_logits(vocab_parallel_cross_entropy, x, target, sizes, **options)
            expected, expected_grad = truth(x, target, **options)
            assert_loss(loss, expected, dtype)
            assert_gradient(grad, expected_grad[:, here], dtype)


@case
def test_target_small_integers():
    """More classes than uint8 can count."""
    world, rank = dist.get_world_size(), dist.get_rank()
    x, target = torch.randn(N, 300, dtype=torch.float64), torch.randint(0, 256, (N,))
    here = slice(300 * rank // world, 300 * (rank + 1) // world)
    for dtype in (torch.uint8, torch.int16, torch.int32):
        stats = vocab_parallel_token_stats(
            x[:, here], target.to(dtype), vocab_start=here.start, vocab_size=300, argmax=True
        )
        expected = F.log_softmax(x, 1).gather(1, target[:, None])[:, 0]
        torch.testing.assert_close(stats.logprob, expected, rtol=1e-12, atol=0.0)
        assert torch.equal(stats.argmax, x.argmax(1))


@case
def test_shards_equal_padded():
    world, rank = dist.get_world_size(), dist.get_rank()
    x, target = batch()
    columns = -(-V // world)
    padded = F.pad(x, (0, columns * world - V), value=math.nan)
    mine = padded[:, rank * columns :][:, :columns].clone().requires_grad_()
    loss = vocab_parallel_cross_entropy(mine, target, vocab_size=V, label_smoothing=0.1)
    loss.backward()
    expected, grad = truth(x, target, 1.0, label_smoothing=0.1)
    assert_loss(loss.detach(), expected, torch.float32)
    grad = F.pad(grad, (0, columns * world - V))
    assert_gradient(mine.grad, grad[:, rank * columns :][:, :columns], torch.float32)
    whole = mine.detach()[:, :20].clone()
    vocab_parallel_cross_entropy(whole, target.clamp(max=20 * world - 1))


@case
def test_loss_small_blocks():
    usual, torch_blocks.WIDTH = torch_blocks.WIDTH, 6
    try:
        test_loss_shard_sizes()
        test_statistics_upstream()
    finally:
        torch_blocks.WIDTH = usual


@case
def test_statistics_upstream():
    names = ("lse", "logprob", "entropy", "mean_logprob")
    for dtype in (torch.float32, torch.float64):
        for head in ({}, dict(softcap=4.0)):
            x, target = batch(dtype)
            x[4, 7] = x[4, 90] = x[4].max() + 1  # the lower class wins
            upstream = torch.randn(4, N, dtype=torch.float64)
            start, stop = shards((37, 11))
            leaf = x[:, start:stop].clone().requires_grad_()
            stats = vocab_parallel_token_stats(
                leaf, target, vocab_start=start, vocab_size=V,
                entropy=True, mean_logprob=True, argmax=True, **head,
            )  # fmt: skip
            sum((getattr(stats, n) * u).sum() for n, u in zip(names, upstream)).backward()  # noqa: B905
            exact = x.double().requires_grad_()
            expected = oracle.token_stats(exact, target, **head)
            sum((expected[n] * u).sum() for n, u in zip(names, upstream)).backward()  # noqa: B905
            tolerance = 1e-12 if dtype == torch.float64 else 2e-6
            for name in (*names, "argmax"):
                ours = getattr(stats, name)
                torch.testing.assert_close(
                    ours.to(expected[name].dtype), expected[name], rtol=tolerance, atol=tolerance
                )
            assert stats.rank is None
            assert_gradient(
                leaf.grad, exact.grad[:, start:stop], dtype, 4 * exact.grad.abs().amax()
            )


@case
def test_loss_confident_token():
    for offset in (0.0, 8192.0):
        x = torch.full((2, V), -40.0)
        x[0, 3], x[0, 97] = 30.0, 30.0 - 18.5  # the rest of the sum in another shard
        x[1, 97], x[1, 3] = 0.0, -17.0
        x, target = x + offset, torch.tensor([3, 97])
        loss, grad, here = of_logits(
            vocab_parallel_cross_entropy, x, target, reduction="none", upstream=1.0
        )
        expected, expected_grad = truth(x, target, 1.0, reduction="none")
        assert 0 < loss[0] < 2e-8
        assert_loss(loss, expected, torch.float32)
        assert_gradient(grad, expected_grad[:, here], torch.float32)


@case
def test_loss_non_finite():
    start, stop = shards((37, 11))
    for first, last in ((0, 37), (37, V), (5, 37), (90, V)):
        x, target = batch()
        x[:, first:last] = -math.inf  # a shard of nothing else, or a part of one
        options = dict(reduction="none")
        loss, grad, here = of_logits(vocab_parallel_cross_entropy, x, target, **options)
        expected, expected_grad = truth(x, target, **options)
        assert_loss(loss, expected, torch.float32)
        assert_gradient(grad, expected_grad[:, here], torch.float32)
        assert loss.isinf().any()
    x, target = batch()
    x[1], x[2, 60], x[3, 5], x[5, V - 1] = -math.inf, math.nan, math.inf, -math.inf
    loss, _, _ = of_logits(vocab_parallel_cross_entropy, x, target, reduction="none")
    assert loss[1].isnan() and loss[2].isnan() and loss[3].isnan()
    assert loss[5:].isfinite().all()
    stats = vocab_parallel_token_stats(
        x[:, start:stop], target, vocab_start=start, vocab_size=V, mean_logprob=True, entropy=True
    )
    assert stats.mean_logprob[5] == -math.inf and stats.entropy[5].isfinite() or target[5] == V - 1


@case
def test_loss_ignored_rows():
    x, target = batch()
    x[0] = math.nan
    loss, grad, here = of_logits(vocab_parallel_cross_entropy, x, target)
    expected, expected_grad = truth(x, target)
    assert_loss(loss, expected, torch.float32)
    assert (grad[target == -100] == 0).all()
    loss, grad, _ = of_logits(vocab_parallel_cross_entropy, x, torch.full((N,), -100))
    assert loss.isnan() and (grad == 0).all()
    for reduction, expected in (("sum", 0.0), ("mean", math.nan)):
        loss, grad, _ = of_logits(
            vocab_parallel_cross_entropy, x[:0], target[:0], reduction=reduction
        )
        torch.testing.assert_close(loss, torch.tensor(expected), equal_nan=True)
    # Counted from the shard's start, a class may look like ignore_index.
    world, rank = dist.get_world_size(), dist.get_rank()
    x, target = torch.randn(3, 150 * world), torch.tensor([50, 149, 7])
    mine = x[:, rank * 150 :][:, :150].clone()
    loss = vocab_parallel_cross_entropy(mine, target)
    assert_loss(loss, truth(x, target)[0], torch.float32)


@case
def test_input_strides():
    start, stop = shards((37, 11))
    x = torch.randn(2, 4, V)
    target = torch.randint(0, V, (2, 3), dtype=torch.int32)
    for layout in (lambda t: t, lambda t: t.transpose(0, 1).contiguous().transpose(0, 1)):
        leaf = layout(x[..., start:stop].clone()).requires_grad_()
        loss = vocab_parallel_cross_entropy(
            leaf[:, :-1], target, vocab_start=start, vocab_size=V, reduction="none"
        )
        upstream = torch.randn(3).expand(2, 3)
        loss.backward(upstream)
        expected, grad = truth(x[:, :-1], target, upstream.double(), reduction="none")
        assert_loss(loss.detach(), expected, torch.float32)
        assert_gradient(leaf.grad[:, :-1], grad[..., start:stop], torch.float32)


@case
def test_token_weight_gradient():
    x, target = batch()
    weight = torch.rand(N, requires_grad=True)
    loss, grad, here = of_logits(vocab_parallel_cross_entropy, x, target, token_weight=weight)
    expected, expected_grad = truth(x, target, token_weight=weight.detach())
    assert_loss(loss, expected, torch.float32)
    assert_gradient(grad, expected_grad[:, here], torch.float32)
    assert weight.grad is not None and weight.grad.abs().sum() > 0


@case
def test_gradient_in_place():
    start, stop = shards((37, 11))
    x, target = batch()
    leaf = x[:, start:stop].clone().requires_grad_()
    logits = leaf * 1.0
    loss = vocab_parallel_cross_entropy(
        logits, target, vocab_start=start, vocab_size=V, inplace_backward=True
    )
    loss.backward()
    assert_gradient(leaf.grad, truth(x, target, 1.0)[1][:, start:stop], torch.float32)
    assert torch.equal(logits.detach(), leaf.grad)
    leaf = x[:, start:stop].clone().requires_grad_()
    loss = vocab_parallel_cross_entropy(leaf, target, vocab_start=start, vocab_size=V)
    loss.backward(retain_graph=True)
    once = leaf.grad.clone()
    loss.backward()
    assert torch.equal(leaf.grad, 2 * once)
    with pytest.raises(RuntimeError, match="first derivatives only"):
        torch.autograd.grad(
            vocab_parallel_cross_entropy(leaf, target, vocab_start=start, vocab_size=V),
            leaf, create_graph=True,
        )  # fmt: skip


def of_head(dtype=torch.float32, upstream=3.7, sizes=(37, 11), frozen=(), bias=True, **options):
    """Loss, and gradients of the hidden states and of this rank's rows; the exact ones."""
    h, w, b = torch.randn(N, D), torch.randn(V, D) / 2, torch.randn(V)
    h, w, b = (t.to(dtype) for t in (h, w, b))
    _, target = batch()
    if "ignore_index" in options:
        target = target.clamp(min=0)
    start, stop = shards(sizes)
    mine = [h.clone(), w[start:stop].clone(), b[start:stop].clone() if bias else None]
    for i, t in enumerate(mine):
        if t is not None and i not in frozen:
            t.requires_grad_()
    loss = vocab_parallel_linear_cross_entropy(
        mine[0], mine[1], target, linear_bias=mine[2], vocab_start=start, vocab_size=V, **options
    )
    (loss * upstream).sum().backward()
    exact = [t.double().requires_grad_() for t in (h, w, b)]
    for name in ("token_chunk_size", "drop_ignored", "backend", "group"):
        options.pop(name, None)
    expected = oracle.cross_entropy(
        F.linear(exact[0], exact[1], exact[2] if bias else None), target, **options
    )
    (expected * upstream).sum().backward()
    here = slice(start, stop)
    grads = [exact[0].grad, exact[1].grad[here], exact[2].grad[here] if bias else None]
    return loss.detach(), expected.detach(), [None if t is None else t.grad for t in mine], grads


def assert_near(ours, expected, tolerance):
    largest = expected.abs().amax() if expected.numel() else 1.0
    assert ((ours.double() - expected).abs() <= tolerance * largest).all()


@case
def test_head_loss():
    for dtype, tolerance in ((torch.float32, 2e-6), (torch.float64, 1e-12)):
        for name, options in LOSSES.items():
            upstream = torch.randn(N, dtype=torch.float64) if name == "none" else 3.7
            for extra in (
                {},
                dict(token_chunk_size=2),
                dict(token_chunk_size=4, drop_ignored=False),
            ):
                loss, expected, grads, exact = of_head(dtype, upstream, **options, **extra)
                assert_near(loss, expected, tolerance)
                for a, e in zip(grads, exact, strict=True):
                    assert a.dtype == dtype
                    assert_near(a, e, tolerance)


@case
def test_head_options():
    for sizes in SIZES.values():
        loss, expected, grads, exact = of_head(sizes=sizes, token_chunk_size=4)
        assert_near(loss, expected, 1e-6)
        for a, e in zip(grads, exact, strict=True):
            assert_near(a, e, 2e-6)
    for frozen in ((0,), (1,), (1, 2), (0, 2)):
        _, _, grads, exact = of_head(frozen=frozen, label_smoothing=0.1)
        for i, (a, e) in enumerate(zip(grads, exact, strict=True)):
            assert (a is None) == (i in frozen)
            assert a is None or bool(assert_near(a, e, 2e-6)) is False
    loss, expected, grads, exact = of_head(torch.bfloat16, bias=False)
    assert loss.dtype == torch.float32 and grads[0].dtype == torch.bfloat16
    for a, e in zip((loss, *grads[:2]), (expected, *exact[:2]), strict=True):
        assert_near(a, e, 2e-2)
    with torch.autocast("cpu", torch.bfloat16):
        loss, expected, grads, exact = of_head()
    assert grads[0].dtype == grads[1].dtype == torch.float32
    for a, e in zip((loss, *grads), (expected, *exact), strict=True):
        assert_near(a, e, 3e-2)


@case
def test_backend_triton():
    if dist.get_world_size() > 2 or importlib.util.find_spec("triton") is None:
        return  # the interpreter is slow, and two ranks show it
    triton_interpreter.prepare()
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        x, target = batch(dtype, 5)
        x[3, 40:] = -math.inf
        options = dict(label_smoothing=0.0 if x.isinf().any() else 0.1, reduction="none")
        loss, grad, here = of_logits(
            vocab_parallel_cross_entropy, x, target, backend="triton", **options
        )
        expected, expected_grad = truth(x, target, **options)
        assert_loss(loss, expected, dtype)
        assert_gradient(grad, expected_grad[:, here], dtype)
    start, stop = shards((37, 11))
    for offset in (0.0, 8192.0):
        x, target = batch(torch.float32, 5)
        x = x + offset
        stats = vocab_parallel_token_stats(
            x[:, start:stop], target, vocab_start=start, vocab_size=V, backend="triton",
            entropy=True, mean_logprob=True, argmax=True,
        )  # fmt: skip
        expected = oracle.token_stats(x, target)
        for name in ("lse", "logprob", "entropy", "mean_logprob", "argmax"):
            ours = getattr(stats, name)
            torch.testing.assert_close(
                ours.to(expected[name].dtype), expected[name], rtol=3e-6, atol=0
            )
    x = torch.full((1, V), -40.0)
    x[0, 3], x[0, 97] = 9000.0, 9000.0 - 18.5
    loss, _, _ = of_logits(
        vocab_parallel_cross_entropy, x, torch.tensor([3]), backend="triton", upstream=1.0
    )
    assert_loss(loss, truth(x, torch.tensor([3]))[0], torch.float32)


@case
def test_exchange_count():
    calls = []
    name = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"
    gather, total = getattr(dist, name), dist.all_reduce
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            dist, name,
            lambda out, given, **k: (calls.append((given.dtype, given.numel())), gather(out, given, **k)),
        )  # fmt: skip
        patch.setattr(dist, "all_reduce", lambda t, **k: (calls.append("sum"), total(t, **k)))
        x, target = batch()
        of_logits(vocab_parallel_cross_entropy, x, target)
        agreement, of_rows = calls
        assert agreement[0] == torch.int64  # on a CPU, where looking is free
        assert of_rows == (torch.float32, 3 * N)
        calls.clear()
        of_head(token_chunk_size=2)
        assert calls[1:] == [(torch.float32, 3 * N), "sum"]
        calls.clear()
        of_head(token_chunk_size=2, frozen=(0,))
        assert len(calls) == 2


@case
def test_perplexity_ranks():
    start, stop = shards((37, 11))
    meter, whole = chunked_ce.Perplexity(), chunked_ce.Perplexity()
    for n in (4, 9):
        x, target = batch(n=n)
        nll = vocab_parallel_cross_entropy(
            x[:, start:stop], target, vocab_start=start, vocab_size=V, reduction="sum"
        )
        meter.update_nll(nll, (target != -100).sum())
        whole.update(x, target)
    torch.testing.assert_close(meter.compute(), whole.compute(), rtol=1e-6, atol=0)


@case
def test_evaluation_ranks():
    """Ranks that score unequal numbers of tokens add up sums, not means."""
    rank = dist.get_rank()
    tokens, labels = unequal_batches()
    model = Model()
    with torch.no_grad():
        mine = model(tokens[rank], labels[rank]), (labels[rank] != -100).sum()
        whole = model(tokens.flatten(0, 1), labels.flatten(0, 1)), (labels != -100).sum()
    for ours, expected in zip(mine, whole, strict=True):
        dist.all_reduce(ours)
        torch.testing.assert_close(ours, expected, rtol=1e-6, atol=0)
    meters = chunked_ce.Perplexity(), chunked_ce.Perplexity()
    for meter, (nll, count) in zip(meters, (mine, whole), strict=True):
        meter.update_nll(nll, count)
    torch.testing.assert_close(meters[0].compute(), meters[1].compute(), rtol=1e-6, atol=0)


@case
def test_dtensor_mesh():
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

    world = dist.get_world_size()
    mesh = init_device_mesh("cpu", (world,))
    for classes in (V, 4 * world, world - 1):  # uneven; equal; a rank without classes
        x, target = torch.randn(N, classes), torch.randint(0, classes, (N,))
        logits = distribute_tensor(x, mesh, [Shard(1)]).requires_grad_()
        loss = vocab_parallel_cross_entropy(logits, target, label_smoothing=0.1)
        loss.backward()
        expected, grad = truth(x, target, 1.0, label_smoothing=0.1)
        assert_loss(loss.detach(), expected, torch.float32)
        assert isinstance(logits.grad, DTensor) and logits.grad.placements == (Shard(1),)
        assert_gradient(logits.grad.full_tensor(), grad, torch.float32)
        on_all = distribute_tensor(target, mesh, [Replicate()])
        assert torch.equal(vocab_parallel_cross_entropy(logits, on_all, label_smoothing=0.1), loss)

        h, w = torch.randn(N, D), torch.randn(classes, D)
        weight = distribute_tensor(w, mesh, [Shard(0)]).requires_grad_()
        hidden = distribute_tensor(h, mesh, [Replicate()]).requires_grad_()
        vocab_parallel_linear_cross_entropy(hidden, weight, target).backward()
        h, w = h.double().requires_grad_(), w.double().requires_grad_()
        oracle.cross_entropy(F.linear(h, w), target).backward()
        assert_near(hidden.grad.full_tensor(), h.grad, 2e-6)
        assert_near(weight.grad.full_tensor(), w.grad, 2e-6)
    with pytest.raises(ValueError, match=r"input is a DTensor .* expected one Shard\(1\)"):
        vocab_parallel_cross_entropy(distribute_tensor(x, mesh, [Replicate()]), target)
    with pytest.raises(ValueError, match="knows both from its mesh"):
        vocab_parallel_cross_entropy(logits, target, group=dist.group.WORLD)
    with pytest.raises(ValueError, match=r"target is a DTensor .* expected Replicate"):
        vocab_parallel_cross_entropy(logits, distribute_tensor(target, mesh, [Shard(0)]))


@case
def test_group_of_several():
    world, rank = dist.get_world_size(), dist.get_rank()
    if world < 4:
        return
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "vocabulary"))
    x, target = batch()
    logits = distribute_tensor(x, mesh, [Replicate(), Shard(1)])
    loss = vocab_parallel_cross_entropy(logits, target)
    assert_loss(loss, truth(x, target)[0], torch.float32)
    # Each pair of ranks scores rows of its own.
    mine, group = (x + rank // 2, mesh["vocabulary"].get_group())
    start, stop = (0, 60) if rank % 2 == 0 else (60, V)
    loss = vocab_parallel_cross_entropy(
        mine[:, start:stop], target, group=group, vocab_start=start, vocab_size=V
    )
    torch.testing.assert_close(loss.double(), truth(mine, target)[0], rtol=1e-6, atol=0)
    lower = dist.new_group([0, 1])
    if rank > 1:
        with pytest.raises(ValueError, match="group does not contain this process"):
            vocab_parallel_cross_entropy(x, target, group=lower)


@case
def test_ranks_disagree():
    world, rank = dist.get_world_size(), dist.get_rank()
    x, target = batch()
    start, stop = shards((37, 11))
    mine = x[:, start:stop]

    def loss(x=mine, target=target, vocab_start=start, vocab_size=V, **options):
        return vocab_parallel_cross_entropy(
            x, target, vocab_start=vocab_start, vocab_size=vocab_size, **options
        )

    n = N - (rank == world - 1)
    with pytest.raises(ValueError, match=f"rank 0 .* has 9 targets, rank {world - 1} has 8"):
        loss(mine[:n], target[:n])
    with pytest.raises(ValueError, match=r"rank 0 of the group has 101 classes in all"):
        loss(vocab_size=V - rank)
    with pytest.raises(TypeError, match="torch.float32, rank 1 has torch.float64"):
        loss(mine.double() if rank == 1 else mine)
    with pytest.raises(ValueError, match="want different statistics"):
        loss(label_smoothing=0.1 * rank)
    with pytest.raises(ValueError, match="do not cover the vocabulary: they end at class 101"):
        loss(vocab_size=V + 1)
    with pytest.raises(ValueError, match="that of rank 1 starts at class 38, .* end at 37"):
        loss(vocab_start=start + (rank == 1), vocab_size=V)
    with pytest.raises(ValueError, match="that of rank 0 starts at class 1"):
        loss(vocab_start=start + 1)
    with pytest.raises(ValueError, match="overlap: that of rank 1 starts at class 36, .* at 37"):
        loss(vocab_start=start - (rank == 1))
    with pytest.raises(ValueError, match="overlap: that of rank 1 starts at class 0, .* at 101"):
        loss(x, vocab_start=0)
    with pytest.raises(ValueError, match="overlap: that of rank 1 starts at class 4, .* at 101"):
        loss(x[:, 4 * (rank > 0) :], vocab_start=4 * (rank > 0))  # once all are covered
    with pytest.raises(IndexError, match="target 101 in row 2"):
        loss(target=target.clone().index_fill_(0, torch.tensor([2]), V))
    with pytest.raises(ValueError, match="rank 0 and rank 1 of the group have different targets"):
        loss(target=target.flip(0) if rank == 1 else target)
    for name, value in dict(softcap=5.0, ignore_index=3, logit_scale=0.5, reduction="sum",
                            z_loss_weight=0.1, num_items=7, token_weight=torch.rand(N)).items():  # fmt: skip
        with pytest.raises(ValueError, match="rank 0 and rank 1 of the group have different opti"):
            loss(**({name: value} if rank == 1 else {}))
    hidden, head = torch.randn(N, D), torch.randn(V, D)[start:stop]
    message = "requires a gradient on rank 1 of the group, but not on rank 0"
    with pytest.raises(ValueError, match=message):
        vocab_parallel_linear_cross_entropy(
            hidden.requires_grad_(rank == 1), head, target, vocab_start=start, vocab_size=V
        )
    assert loss().isfinite()  # and the group still works


@case
def test_shards_copies():
    world, rank = dist.get_world_size(), dist.get_rank()
    x, target = batch()
    hidden, head, equal = torch.randn(N, D), torch.randn(V, D), dict(match="bring the same values")
    for form in (vocab_parallel_cross_entropy, vocab_parallel_token_stats):
        with pytest.raises(ValueError, **equal):
            form(x, target)
    with pytest.raises(ValueError, **equal):
        vocab_parallel_linear_cross_entropy(hidden, head, target)
    with pytest.raises(ValueError, match="ranks 0 and 1 of the group bring the same values"):
        vocab_parallel_cross_entropy(x if rank < 2 else torch.randn_like(x) + rank, target)
    # Shards that are equal without being copies: padding, zeros, and whoever says so.
    padded = vocab_parallel_cross_entropy(x, target, vocab_size=V)
    assert_loss(padded, truth(x, target, 1.0)[0], torch.float32)
    zeros = vocab_parallel_cross_entropy(torch.zeros(N, 5), target % 5, reduction="sum")
    assert_loss(zeros, torch.tensor(N * math.log(5 * world)).double(), torch.float32)
    head_of_zeros = torch.zeros(5, D)
    zeros = vocab_parallel_linear_cross_entropy(hidden, head_of_zeros, target % 5, reduction="sum")
    assert_loss(zeros, torch.tensor(N * math.log(5 * world)).double(), torch.float32)
    meant = vocab_parallel_cross_entropy(x, target, vocab_start=rank * V, vocab_size=world * V)
    assert_loss(meant, truth(x.repeat(1, world), target, 1.0)[0], torch.float32)


@case
def test_mesh_data_tensor():
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

    replicas = dist.get_world_size() // 2
    mesh = init_device_mesh("cpu", (replicas, 2), mesh_dim_names=("dp", "tp"))
    x, target = torch.randn(2 * replicas, 3, V), torch.randint(0, V, (2 * replicas, 3))
    mine = slice(2 * mesh.get_local_rank(0), 2 * mesh.get_local_rank(0) + 2)
    expected, grad = truth(x[mine].flatten(0, 1), target[mine].flatten(), 1.0)
    logits = distribute_tensor(x, mesh, [Shard(0), Shard(2)])
    placed = distribute_tensor(target, mesh, [Shard(0), Replicate()])
    for labels in (target[mine], placed):
        leaf = logits.detach().requires_grad_()
        loss = vocab_parallel_cross_entropy(leaf, labels)
        loss.backward()
        torch.testing.assert_close(loss.detach().double(), expected, rtol=1e-6, atol=0)
        assert leaf.grad.placements == leaf.placements
        whole = leaf.grad.full_tensor()[mine].flatten(0, 1)
        assert_gradient(whole, grad, torch.float32)
    argmax = vocab_parallel_token_stats(logits, placed, argmax=True).argmax
    assert torch.equal(argmax, x[mine].argmax(-1))
    if replicas > 1:
        message = r"target is a DTensor .* expected .*Shard\(dim=0\).* as the rows of input"
        with pytest.raises(ValueError, match=message):
            replicated = distribute_tensor(target, mesh, [Replicate(), Replicate()])
            vocab_parallel_cross_entropy(logits, replicated)
    partial = DTensor.from_local(x, mesh, [Partial(), Shard(2)])
    with pytest.raises(ValueError, match=r"otherwise Replicate\(\) or a Shard of the rows: redis"):
        vocab_parallel_cross_entropy(partial, target)
    for form in (chunked_ce.cross_entropy, chunked_ce.token_stats):
        with pytest.raises(TypeError, match=r"input.to_local\(\).*vocab_parallel_cross_entropy"):
            form(distribute_tensor(x, mesh, [Replicate(), Replicate()])[0], target[0])


@case
def test_bad_input():
    x, target = batch()
    for arguments, options, error, message in (
        (([1.0], target), {}, TypeError, "input must be a Tensor of logits, got list"),
        ((x[0, 0], target), {}, ValueError, "0-dimensional"),
        ((x, target[:-1]), {}, ValueError, r"target has shape \[8\]"),
        ((x, target.float()), {}, TypeError, "class indices of an integer dtype"),
        ((x, target), dict(vocab_start=0), ValueError, "but not vocab_size"),
        ((x, target), dict(vocab_start=-1, vocab_size=5), ValueError, "vocab_start is -1"),
        ((x, target), dict(vocab_start=0.5, vocab_size=5), TypeError, "vocab_start must be an int"),
        ((x, target), dict(vocab_size=0), ValueError, "vocab_size is 0"),
        ((x, target), dict(vocab_size=10**6), ValueError, "or pass vocab_start as well"),
        ((x[:, :0], target), {}, ValueError, "this rank holds no class"),
        ((x, target), dict(group="world"), TypeError, "ProcessGroup or None, got str"),
        ((x, target), dict(reduction="max"), ValueError, "reduction is 'max'"),
        ((x, target), dict(backend="fast"), ValueError, "backend is 'fast'"),
        ((x, target), dict(token_weight=torch.ones(3)), ValueError, "token_weight has shape"),
        ((x, target), dict(num_items=0), ValueError, "num_items is 0"),
    ):
        with pytest.raises(error, match=message):
            vocab_parallel_cross_entropy(*arguments, **options)
    h, w = torch.randn(N, D), torch.randn(V, D)
    for arguments, options, error, message in (
        ((h, w[:, :3], target), {}, ValueError, r"linear_weight has shape \[101, 3\]"),
        ((h, w, target[:2]), {}, ValueError, "one hidden state per target"),
        ((h, w.double(), target), {}, TypeError, "linear_weight has dtype torch.float64"),
        ((h, w, target), dict(linear_bias=torch.ones(3)), ValueError, "linear_bias has shape"),
        ((h, w, target), dict(chunk_bytes=3), ValueError, "chunk_bytes is 3"),
    ):
        with pytest.raises(error, match=message):
            vocab_parallel_linear_cross_entropy(*arguments, **options)


class Model(nn.Module):
    """An embedding, a layer, a head and its loss, which is computed inside of the head's module."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.embedding = nn.Embedding(V, D)
        self.layer = nn.Linear(D, D)
        self.head = chunked_ce.LinearCrossEntropyLoss(D, V, bias=True, reduction="sum")

    def forward(self, tokens, labels):
        return self.head(self.layer(self.embedding(tokens)).tanh(), labels)


def unequal_batches():
    """Of all ranks: tokens, labels with unequal padding."""
    world = dist.get_world_size()
    tokens, labels = torch.randint(0, V, (world, 3, 6)), torch.randint(0, V, (world, 3, 6))
    for rank in range(world):
        labels[rank, :, 6 - rank :] = -100
    return tokens, labels


def one_process_step(model, tokens, labels):
    """Gradients, and parameters after a step, of the mean over all tokens of all ranks."""
    tokens, labels = tokens.flatten(0, 1), labels.flatten(0, 1)
    loss = model(tokens, labels) / (labels != -100).sum()
    loss.backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters()}
    torch.optim.SGD(model.parameters(), 0.5).step()
    return loss.detach(), grads, dict(model.named_parameters())


@case
def test_training_ddp():
    world, rank = dist.get_world_size(), dist.get_rank()
    tokens, labels = unequal_batches()
    expected, grads, after = one_process_step(Model(), tokens, labels)
    model = nn.parallel.DistributedDataParallel(Model())
    items = (labels != -100).sum()
    # DDP takes the mean over ranks.
    loss = model(tokens[rank], labels[rank]) * world / items
    loss.backward()
    for name, p in model.module.named_parameters():
        torch.testing.assert_close(p.grad, grads[name], rtol=1e-6, atol=1e-7)
    torch.optim.SGD(model.parameters(), 0.5).step()
    for name, p in model.module.named_parameters():
        torch.testing.assert_close(p, after[name], rtol=1e-6, atol=1e-7)
    mean = loss.detach() / world
    dist.all_reduce(mean)
    torch.testing.assert_close(mean, expected, rtol=1e-6, atol=0)


@case
def test_training_fsdp2():
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    world, rank = dist.get_world_size(), dist.get_rank()
    tokens, labels = unequal_batches()
    expected, grads, after = one_process_step(Model(), tokens, labels)
    model = Model()
    mesh = init_device_mesh("cpu", (world,))
    for module in (model.layer, model.head, model):
        fully_shard(module, mesh=mesh)
    items = (labels != -100).sum()
    loss = model(tokens[rank], labels[rank]) * world / items
    assert isinstance(model.head.linear.weight, DTensor)  # sharded again
    loss.backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad.full_tensor(), grads[name], rtol=1e-6, atol=1e-7)
    torch.optim.SGD(model.parameters(), 0.5).step()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.full_tensor(), after[name], rtol=1e-6, atol=1e-7)
    mean = loss.detach() / world
    dist.all_reduce(mean)
    torch.testing.assert_close(mean, expected, rtol=1e-6, atol=0)
    hidden = torch.randn(3, D)
    with pytest.raises(TypeError, match="linear_weight is a DTensor.*module.unshard"):
        chunked_ce.linear_cross_entropy(hidden, model.head.linear.weight, labels[0, :, 0])
