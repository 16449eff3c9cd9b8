"""Tests of the algebra of row statistics: parts are merged and finished, against whole rows in fp64."""

import math

import oracle
import pytest
import torch
from helpers import assert_gradient, batch, gradient

from chunked_ce import backends, cross_entropy, token_stats
from chunked_ce.core.head import Head
from chunked_ce.core.row_stats import Part, concatenate, finish, merge

ALL = dict(entropy=True, mean_logprob=True, rank=True, argmax=True)
NEVER = -100


def part_of(z: torch.Tensor, start: int) -> Part:
    """Return the Part of columns without the target, from its definition."""
    m = z.amax(1)
    shifted = z - torch.where(m == -math.inf, 0.0, m)[:, None]
    e = shifted.exp()
    ez_sum = torch.where(z == -math.inf, 0.0, e * shifted).sum(1)
    return Part(m, e.sum(1), ez_sum, shifted.sum(1), z.shape[1], None, z.argmax(1) + start)


def assert_parts_equal(ours: Part, truth: Part) -> None:
    for name, value in truth._asdict().items():
        torch.testing.assert_close(
            getattr(ours, name), value, rtol=1e-12, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_merge_parts():
    """Merge with the larger maximum on either side; the lower class wins a tie."""
    z = torch.randn(60, 20, dtype=torch.float64) * 5
    z[:20, 12:] += 30
    z[20:40, :12] += 30
    z[50:, 3] = z[50:, 15] = 100
    parts = part_of(z[:, :7], 0), part_of(z[:, 7:12], 7), part_of(z[:, 12:], 12)
    assert_parts_equal(merge(merge(*parts[:2]), parts[2]), part_of(z, 0))
    assert_parts_equal(merge(parts[0], merge(*parts[1:])), part_of(z, 0))


@pytest.mark.parametrize("empty", ["left", "right", "both"])
def test_merge_empty_part(empty):
    z = torch.randn(8, 10, dtype=torch.float64)
    z[:, : (5 if empty == "left" else 0)] = -math.inf
    z[:, (5 if empty == "right" else 10) :] = -math.inf
    z = torch.full_like(z, -math.inf) if empty == "both" else z
    ours, truth = merge(part_of(z[:, :5], 0), part_of(z[:, 5:], 5)), part_of(z, 0)
    for name in ("m", "s", "ez_sum"):
        torch.testing.assert_close(getattr(ours, name), getattr(truth, name))
    assert ours.weight_sum == 10


def test_merge_argmax_first_nan():
    left, right = torch.randn(3, 4, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)
    left[0, 2] = left[1, 1] = right[1, 0] = right[2, 3] = math.nan
    both = merge(part_of(left, 0), part_of(right, 4))
    assert both.best_class.tolist() == [2, 1, 7]


def test_concatenate_parts():
    z = torch.randn(7, 5, dtype=torch.float64)
    whole = concatenate([part_of(z[:3], 0), part_of(z[3:4], 0), part_of(z[4:], 0)])
    assert_parts_equal(whole, part_of(z, 0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("vocab", [301, 905])
def test_token_stats_several_blocks(dtype, vocab):
    """Use enough rows that each block has the maximum of some and the target of others, with ties."""
    x, target = batch(40, vocab, dtype)
    x[5:15] = x[5:15].round()
    x[15:20] = x[15:20].clamp(-1, 1)
    ours, truth = token_stats(x, target, **ALL), oracle.token_stats(x, target)
    rtol = 1e-11 if dtype == torch.float64 else 2e-6
    for name, value in truth.items():
        got = getattr(ours, name)
        torch.testing.assert_close(got.to(value.dtype), value, rtol=rtol, atol=rtol, msg=name)


@pytest.mark.parametrize("leading", [(6,), (2, 3)], ids=str)
@pytest.mark.parametrize("head", [Head(None, 1.0), Head(5.0, 0.5)], ids=str)
def test_shard_parts_merge(backend, leading, head, device):
    """Merge the parts of shards, with unmergeable leading dimensions and infinite targets."""
    vocab, cuts = 70, (0, 11, 12, 70)
    wide = torch.randn(2, *leading, vocab, dtype=torch.float64, device=device) * 3
    x = wide.transpose(0, -2)[..., :-1, :] if len(leading) > 1 else wide[0]
    target = torch.randint(0, vocab, x.shape[:-1], device=device)
    target.view(-1)[:4] = torch.tensor([0, 11, 12, 69], device=device)
    flat_target = target.reshape(-1)
    parts, logits = [], []
    for start, stop in zip(cuts, cuts[1:], strict=False):
        local = flat_target - start
        part, logit = backends.row_part(
            backend, x[..., start:stop], local, NEVER, stop - start, head,
            entropy=True, mean_logprob=True, argmax=True,
        )  # fmt: skip
        assert torch.equal(logit == -math.inf, (local < 0) | (local >= stop - start))
        parts.append(part._replace(best_class=part.best_class + start))
        logits.append(logit)
    part = merge(merge(parts[0], parts[1]), parts[2])
    stats = finish(part, torch.stack(logits).amax(0), flat_target, vocab).stats
    truth = oracle.token_stats(x, target, softcap=head.softcap, logit_scale=head.logit_scale)
    for name in ("lse", "logprob", "entropy", "mean_logprob"):
        torch.testing.assert_close(getattr(stats, name), truth[name].view(-1), msg=name)
    assert torch.equal(stats.argmax, truth["argmax"].view(-1))


def test_shard_infinite_target():
    """Check that a target of +inf is NaN, and rows with the target elsewhere keep their sums."""
    x = torch.randn(3, 9)
    x[0, 4] = math.inf
    part, logit = backends.row_part(
        "torch", x, torch.tensor([4, -1, 2]), NEVER, 9, Head(None, 1.0),
        entropy=False, mean_logprob=False, argmax=False,
    )  # fmt: skip
    assert logit[0].isnan() and logit[1] == -math.inf and logit[2] == x[2, 2]
    torch.testing.assert_close(part.m[1] + part.s[1].log(), x[1].logsumexp(0))


def test_shard_first_class_masked(backend, device):
    """Check the origin of sums when the shard's first class is -inf: mean_logprob is -inf, not NaN."""
    x = torch.randn(3, 9, device=device)
    x[0, 0] = -math.inf
    part, _ = backends.row_part(
        backend, x, torch.tensor([-1, -1, 2], device=device), NEVER, 9, Head(None, 1.0),
        entropy=False, mean_logprob=True, argmax=False,
    )  # fmt: skip
    assert part.logit_sum[0] == -math.inf
    logit_sum = (
        part.logit_sum + (part.m - x.amax(1)) * part.weight_sum
    )  # where the target is the maximum
    exact = (x - x.amax(1, keepdim=True)).sum(1)
    exact[2] -= x[2, 2] - x[2].amax()
    torch.testing.assert_close(logit_sum[1:], exact[1:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_entropy_masked_target(backend, device, dtype):
    """Check that 0 * inf counts as 0 for a target of probability 0."""
    x, target = batch(4, 40, dtype, device, ignored=0)
    x[torch.arange(3), target[:3]] = -math.inf
    ours, truth = token_stats(x, target, backend=backend, **ALL), oracle.token_stats(x, target)
    torch.testing.assert_close(ours.entropy.double(), truth["entropy"], rtol=2e-6, atol=2e-6)
    assert torch.equal(ours.rank, truth["rank"]) and torch.equal(ours.argmax, truth["argmax"])
    assert (ours.logprob[:3] == -math.inf).all()


@pytest.mark.parametrize("vocab", [90, 700])
def test_gradient_blocks_and_row_pieces(vocab):
    x, target = batch((3, 4), vocab)
    upstream = torch.randn(3, 4)
    options = dict(reduction="none", grad_in_forward=True, dim=-1)
    ours = gradient(lambda z: cross_entropy(z, target, **options), x, upstream=upstream)
    truth = gradient(
        lambda z: oracle.cross_entropy(z, target, reduction="none"), x.double(), upstream=upstream
    )
    assert_gradient(ours, truth, torch.float32, upstream.abs().max())


@pytest.mark.parametrize("rank", [False, True])
@pytest.mark.parametrize("vocab", [60, 301])
def test_rows_outside_exp_range(rank, vocab):
    """Use rows with sums of exp(z) inside and outside the range of the dtype."""
    wide, target = batch((2, 6, 2), vocab, torch.float64)
    wide[0, 1] += 60
    wide[:, 2] -= 60
    wide[1, 4] *= 30
    wide[0, 3, :, 7] = 900
    for x, t in ((wide, target), (wide.transpose(0, 1), target.transpose(0, 1))):
        ours, truth = token_stats(x, t, rank=rank), oracle.token_stats(x, t)
        for name in ("lse", "logprob", *(["rank"] if rank else [])):
            torch.testing.assert_close(getattr(ours, name), truth[name], msg=name)
        grad = gradient(lambda z, t=t: token_stats(z, t).logprob.sum(), x)
        exact = gradient(lambda z, t=t: oracle.token_stats(z, t)["logprob"].sum(), x)
        assert_gradient(grad, exact, torch.float64, 1.0)
