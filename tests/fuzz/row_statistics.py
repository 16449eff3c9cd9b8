"""Calls that want statistics of rows, and the truth about them, their gradient included."""

from dataclasses import dataclass
from typing import Any

import cases
import oracle
import torch
import truth
from hypothesis import strategies as st
from torch import Tensor

from chunked_ce import TokenStats

FLOATS = ("lse", "logprob", "entropy", "mean_logprob")


@dataclass
class Call:
    x: Tensor  # [..., columns]
    view: str
    target_spec: cases.TargetSpec
    head: dict[str, Any]
    wanted: dict[str, bool]
    weight: Tensor | None
    inplace: bool
    upstream: list[Tensor]
    cuts: list[int]  # where the vocabulary is cut into shards
    block: int
    vocab: int


@st.composite
def calls(draw, shapes=cases.SHAPES, vocabs=cases.VOCABS, largest=cases.LARGEST["torch"]):
    g, shape, vocab = cases.generator(draw), draw(shapes), draw(vocabs)
    x = cases.values(draw, g, (*shape, vocab), draw(st.sampled_from(cases.DTYPES)), largest)
    padding = draw(st.sampled_from([0, 0, 3]))
    x = torch.nn.functional.pad(x, (0, padding), value=cases.NAN)
    wanted = {name: draw(st.booleans()) for name in ("entropy", "mean_logprob", "rank", "argmax")}
    weight = torch.rand(vocab, generator=g) if draw(st.integers(0, 3)) == 0 else None
    target_spec = cases.index_spec(draw, g, shape, vocab)
    upstream = [cases.upstreams(draw, g, shape) for _ in FLOATS]
    view, inplace = draw(st.sampled_from(cases.VIEWS)), draw(st.integers(0, 3)) == 0
    cuts = sorted(draw(st.lists(st.integers(0, vocab), max_size=3)))
    return Call(
        x, view, target_spec, cases.heads(draw), wanted, weight, inplace and view != "expanded", upstream, cuts,
        draw(cases.BLOCKS), vocab,
    )  # fmt: skip


class Truth:
    """The statistics of a call in fp64, their gradient, and how near to them one must come."""

    def __init__(self, call: Call, wanted: dict[str, bool]) -> None:
        self.dtype, counted = call.x.dtype, call.target_spec.counted
        self.leaf = call.x.double().requires_grad_()
        self.z = z = truth.head_of(cases.seen(self.leaf, call.view), call.head, call.vocab)
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
        t = call.target_spec.prob.argmax(-1, keepdim=True)
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
