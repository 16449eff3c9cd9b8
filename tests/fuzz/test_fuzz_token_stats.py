"""token_stats, perplexity, and a vocabulary cut into shards, against the truth."""

from dataclasses import dataclass
from typing import Any
from unittest import mock

import cases
import oracle
import pytest
import torch
import truth
from hypothesis import strategies as st
from torch import Tensor

from chunked_ce import Perplexity, TokenStats, perplexity, shards, token_stats
from chunked_ce.blocks import Head
from chunked_ce.shard_autograd import Options, shard_stats
from chunked_ce.stats import is_scored

FLOATS = ("lse", "logprob", "entropy", "mean_logprob")


@dataclass
class Call:
    x: Tensor
    view: str
    goal: cases.Goal
    head: dict[str, Any]
    wanted: dict[str, bool]
    weight: Tensor | None
    inplace: bool
    upstream: list[Tensor]
    cuts: list[int]  # where the vocabulary is cut into shards
    block: int


@st.composite
def calls(draw, shapes=cases.SHAPES, vocabs=cases.VOCABS):  # noqa: B008
    g, shape, vocab = cases.generator(draw), draw(shapes), draw(vocabs)
    x = cases.values(draw, g, (*shape, vocab), draw(st.sampled_from(cases.DTYPES)))
    wanted = {name: draw(st.booleans()) for name in ("entropy", "mean_logprob", "rank", "argmax")}
    weight = torch.rand(vocab, generator=g) if draw(st.integers(0, 3)) == 0 else None
    goal = cases.indices_goal(draw, g, shape, vocab)
    upstream = [cases.upstreams(draw, g, shape) for _ in FLOATS]
    view, inplace = draw(st.sampled_from(cases.VIEWS)), draw(st.integers(0, 3)) == 0
    cuts = sorted(draw(st.lists(st.integers(0, vocab), max_size=3)))
    return Call(
        x, view, goal, cases.heads(draw), wanted, weight, inplace and view != "expanded", upstream, cuts,
        draw(cases.BLOCKS),
    )  # fmt: skip


class Truth:
    """The statistics of a call in fp64, their gradient, and how near to them one must come."""

    def __init__(self, call: Call, wanted: dict[str, bool]) -> None:
        self.dtype, counted = call.x.dtype, call.goal.counted
        self.leaf = call.x.double().requires_grad_()
        self.z = z = truth.head_of(cases.seen(self.leaf, call.view), call.head, None)
        z = torch.where(counted[..., None], z, 0.0)
        bad = (z.isnan() | (z == torch.inf)).any(-1) | (z == -torch.inf).all(-1)
        self.broken = bad & counted
        z = torch.where(bad[..., None], 0.0, z)
        largest = z.detach().amax(-1, keepdim=True)
        near = z - largest
        above = near.logsumexp(-1, keepdim=True)
        logp = near - above
        finite = torch.where(logp == -torch.inf, 0.0, logp)
        w = torch.ones(z.shape[-1]) if call.weight is None else call.weight
        t = call.goal.prob.argmax(-1, keepdim=True)
        stats = dict(
            lse=(largest + above)[..., 0],
            logprob=logp.gather(-1, t)[..., 0],
            entropy=-(finite.exp() * finite).where(logp > -torch.inf, 0.0).sum(-1),
            mean_logprob=(w.double() * logp).sum(-1) / z.shape[-1],
        )
        self.moved = truth.rounding(call.x, z, call.head)
        self.stats = {
            k: torch.where(counted, v, 0.0) for k, v in stats.items() if wanted.get(k, True)
        }
        self.counted = counted
        exact = oracle.token_stats(z.detach(), torch.where(counted, t[..., 0], -100))
        self.integers = {k: exact[k] for k in ("rank", "argmax")}

    def assert_stats(self, ours: TokenStats) -> None:
        for name, exact in self.stats.items():
            got = getattr(ours, name)
            size = self.z.detach().abs().nan_to_num(0.0, 0.0, 0.0).amax(-1)
            slack = self.moved * (1.0 + size.clamp(max=100.0) * (name == "entropy"))
            if name in ("lse", "entropy"):  # near 0 they are a sum of larger terms
                slack = slack + 4.0 * truth.EPSILON[got.dtype]
            assert got[self.broken].isnan().all(), name
            truth.assert_values(
                got[~self.broken], exact[~self.broken], self.dtype, slack[~self.broken]
            )
        for name, exact in self.integers.items():
            got = getattr(ours, name)
            if got is None:
                continue
            assert got.dtype == torch.int64 and (got[~self.counted] == -1).all()
            if not self.moved.any():
                assert torch.equal(got[~self.broken], exact[~self.broken]), name

    def backward(self, upstream: dict[str, Tensor], call: Call) -> tuple[Tensor, Tensor, Tensor]:
        """(the gradient, its tolerance, where it is not defined)"""
        total = sum(
            (torch.where(s.isfinite(), s, 0.0) * upstream[k].double()).sum()
            for k, s in self.stats.items()
        )
        total.backward()
        infinite = torch.zeros_like(self.broken)
        bound = torch.zeros_like(self.moved)
        for name, s in self.stats.items():
            infinite |= ~s.isfinite()
            size = {"entropy": s.detach().abs() + 20.0, "mean_logprob": torch.tensor(2.0)}.get(
                name, torch.tensor(2.0)
            )
            bound = bound + upstream[name].abs() * size.nan_to_num(0.0, 0.0, 0.0)
        bound = bound * abs(call.head.get("logit_scale", 1.0))
        moved, skip, added = self.moved, self.broken | infinite, 0.0
        if call.view == "expanded" and skip.dim() and skip.numel():
            bound, moved, skip = bound.sum(0, True), moved.amax(0, True), skip.any(0, True)
            added = truth.ULP[self.dtype] * bound[..., None]
        grad = self.leaf.grad.nan_to_num(0.0)  # of an ignored row's NaN
        tolerance = truth.gradient_tolerance(grad, self.dtype, bound, moved)
        return grad, tolerance + added, skip[..., None]


def check(call: Call, backend: str = "torch") -> None:
    leaf = call.x.clone().requires_grad_()
    x = cases.seen(leaf, call.view)
    beside = cases.outside(x)
    with cases.block_size(call.block):
        stats = token_stats(
            x, call.goal.target, **call.goal.options, **call.head, **call.wanted, weight=call.weight,
            inplace_backward=call.inplace, backend=backend,
        )  # fmt: skip
        exact = Truth(call, call.wanted)
        exact.assert_stats(stats)
        given = dict(zip(FLOATS, call.upstream, strict=True))
        wanted = [name for name in FLOATS if getattr(stats, name) is not None]
        assert all((getattr(stats, k) is not None) == v for k, v in call.wanted.items())
        outs = [getattr(stats, name) for name in wanted]
        torch.autograd.backward(outs, [given[n].to(o) for n, o in zip(wanted, outs, strict=True)])
    torch.testing.assert_close(cases.outside(x), beside, rtol=0, atol=0, equal_nan=True)
    expected, tolerance, skip = exact.backward(given, call)
    truth.assert_gradient(leaf.grad, expected, tolerance, call.x.dtype, skip)


def check_shards(call: Call, backend: str = "torch") -> None:
    """Every rank of a vocabulary cut anywhere, but for the processes: their all-gather is a stack."""
    vocab = call.x.shape[-1]
    names = ("entropy", "mean_logprob", "argmax")
    wanted = shards.Wanted(*(call.wanted[name] for name in names))
    ignore_index = call.goal.options.get("ignore_index", -100)
    head = Head(call.head.get("softcap"), call.head.get("logit_scale", 1.0))
    call.weight = None
    leaf = call.x.clone().requires_grad_()
    x = cases.seen(leaf, call.view)
    edges = [0, *call.cuts, vocab]
    parts = [shards.Shard(None, a, b - a, vocab) for a, b in zip(edges, edges[1:], strict=False)]
    pieces = [x[..., p.start : p.start + p.columns] for p in parts]
    options = [Options(p, ignore_index, head, backend, wanted) for p in parts]
    with cases.block_size(call.block):
        sent = [
            shards.fields(
                backend, piece.detach(), p.local(call.goal.target, ignore_index), p, head, wanted
            )
            for piece, p in zip(pieces, parts, strict=True)
        ]
        with mock.patch.object(shards, "_gather", lambda *_: torch.stack(sent)):
            stats = [
                shard_stats(piece, call.goal.target, o)
                for piece, o in zip(pieces, options, strict=True)
            ]
        for name in TokenStats._fields:  # the same bits on every rank
            a, *others = (getattr(s, name) for s in stats)
            assert all(
                (a is None and b is None) or torch.equal(a.nan_to_num(), b.nan_to_num())
                for b in others
            )
        exact = Truth(call, dict(entropy=wanted.entropy, mean_logprob=wanted.mean_logprob))
        exact.assert_stats(stats[0])
        given = dict(zip(FLOATS, call.upstream, strict=True))
        outs = [(getattr(s, n), given[n]) for s in stats for n in exact.stats]
        torch.autograd.backward([o for o, _ in outs], [u.to(o) for o, u in outs])
    expected, tolerance, skip = exact.backward(given, call)
    truth.assert_gradient(leaf.grad, expected, tolerance, call.x.dtype, skip)


def check_perplexity(call: Call) -> None:
    """Of a batch, and of the batches that it is cut into, in two meters."""
    x, target = cases.seen(call.x, call.view), call.goal.target
    call.head, call.weight = {}, None
    exact = Truth(call, {})
    nll = -exact.stats["logprob"].detach().where(~exact.broken, torch.nan)
    counted = call.goal.counted
    mean = nll.sum() / counted.sum()
    ignore_index = call.goal.options.get("ignore_index", -100)
    value = perplexity(x, target, ignore_index=ignore_index)
    assert value.dtype == torch.float64 and value.dim() == 0
    size = nll.abs().nan_to_num(0.0, 0.0).sum() / counted.sum().clamp(min=1)
    rtol = (
        min(1e-11 * (1 + size), 1.0)
        if call.x.dtype == torch.float64
        else min(2e-6 * (1 + size), 1.0)
    )
    expected = mean.exp()
    if mean.isnan() or mean < 700 or mean > 720:  # exp overflows between
        torch.testing.assert_close(value, expected, rtol=float(rtol), atol=0.0, equal_nan=True)
    flat, labels = x.reshape(-1, x.shape[-1]), target.reshape(-1)
    meters = Perplexity(ignore_index=ignore_index), Perplexity(ignore_index=ignore_index)
    for i, rows in enumerate(torch.arange(labels.numel()).split(max(1, call.block % 5))):
        meters[i % 2].update(flat[rows], labels[rows], rank=True, n_bytes=3, words=1)
    both = meters[0] + meters[1]
    synced, report = both.sync(), both.report()
    torch.testing.assert_close(
        both.compute(), value, rtol=1e-9 * (1 + float(size)), atol=0.0, equal_nan=True
    )
    assert torch.equal(synced.compute().nan_to_num(), both.compute().nan_to_num())
    assert report.tokens == int(counted.sum()) == int(is_scored(target, ignore_index).sum())
    if not exact.broken.any() and report.tokens:
        rank = exact.integers["rank"][counted]
        assert report.top1 == int((rank == 0).sum())
        assert report.reciprocal_rank_sum == pytest.approx(
            float((1.0 / (1 + rank).double()).sum()), rel=1e-12
        )
    again = Perplexity(ignore_index=ignore_index)
    again.load_state_dict(both.state_dict())
    assert again.report().to_json() == report.to_json()


@cases.backends(torch=100, triton=3, long=60)
def test_token_stats(explore, backend):
    explore(calls(**cases.sizes(backend)), check)


@cases.backends(torch=40, triton=1, long=20)
def test_shards(explore, backend):
    explore(calls(**cases.sizes(backend)), check_shards)


@pytest.mark.cases(60)
def test_perplexity(explore):
    explore(calls(), check_perplexity)
