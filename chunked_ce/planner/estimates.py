"""What each way to compute head and loss takes, and which one to use."""

from __future__ import annotations

from typing import NamedTuple

from .. import checks
from .head import HeadShape
from .ways import Way, ways

_MOST_TOKENS = 1 << 40


class Estimate(NamedTuple):
    """One way to compute head and loss, and what it takes.

    >>> from chunked_ce.planner import HeadShape, plan
    >>> [e.name for e in plan(HeadShape(50257, 768), tokens=1024) if e.code][:2]
    ['cross_entropy', 'cross_entropy, in place']
    """

    name: str
    peak_bytes: int  # of the batch asked for, on top of hidden states and weight
    largest_batch: int | None  # tokens that fit the memory; None: none was given
    code: str  # an expression of `hidden`, `lm_head` and `labels`; "" for eager and torch.compile
    fits: bool | None = None  # whether the batch asked for does; None: no memory was given
    huggingface: str = ""  # a statement for a `model` of transformers; "" where there is none
    default: bool = False  # of this library, with float32 sums and chunks of the default size
    product_flops: int = 0
    traffic_bytes: int = 0  # of the loss, beside the products


class Recommendation(NamedTuple):
    """The estimate to use, and why; None where no batch fits the memory at all.

    >>> from chunked_ce.planner import HeadShape, plan, recommend
    >>> recommend(plan(HeadShape(50257, 768), tokens=1024, memory=1 << 20)).reason
    'the memory holds no batch at all'
    """

    estimate: Estimate | None
    reason: str


def plan(
    head: HeadShape,
    tokens: int,
    *,
    memory: int | None = None,
    device: str = "cuda",
) -> list[Estimate]:
    """Return what each way to compute head and loss takes at its peak, in training.

    Args:
        head: the head's sizes, see :func:`chunked_ce.planner.head_of_config`.
        tokens: N, of a batch.
        memory: bytes for hidden states, weight and all that the loss adds; gives `largest_batch`.
        device: "cuda" or "cpu", which have other default chunks.

    Returns:
        An estimate for eager, compiled and this library's ways, in that order.

    Raises:
        TypeError, ValueError: a size that is not a positive int, an unknown device,
            a softcap or logit scale that is none.

    >>> from chunked_ce.planner import HeadShape, plan
    >>> eager, *_ = plan(HeadShape(vocab_size=50257, hidden_size=768), tokens=1024)
    >>> f"{eager.name}: {eager.peak_bytes / 2**20:.0f} MiB"
    'eager: 294 MiB'
    """
    checks.plan_sizes(vocab_size=head.vocab_size, hidden_size=head.hidden_size, tokens=tokens)
    checks.plan_device(device)
    checks.plan_dtype(head.dtype)
    checks.softcap(head.softcap)
    checks.logit_scale(head.logit_scale)
    if memory is not None:
        checks.plan_sizes(memory=memory)
    return [_estimate(way, head, tokens, device, memory) for way in ways(head)]


def _estimate(way: Way, head: HeadShape, tokens: int, device: str, memory: int | None) -> Estimate:
    largest = None if memory is None else _largest_batch(way, head, device, memory)
    return Estimate(
        way.name,
        way.peak(head, tokens, device),
        largest,
        way.code,
        None if largest is None else largest >= tokens,
        way.huggingface,
        way.default,
        way.product_flops(head, tokens),
        way.traffic_bytes(head, tokens, device),
    )


def _largest_batch(way: Way, head: HeadShape, device: str, memory: int) -> int:
    """Return the most tokens such that they, and all fewer ones, fit."""
    of_token = head.hidden_size * head.dtype.itemsize

    def fits(tokens: int) -> bool:
        return head.weight_bytes + tokens * of_token + way.bound(head, tokens, device) <= memory

    low, high = 0, _MOST_TOKENS
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def recommend(estimates: list[Estimate]) -> Recommendation:
    """Return which of this library's estimates to use, and the rule that chose it.

    The least peak among the ways with default options: their sums are in float32, and their chunks
    large enough for full speed. `linear_cross_entropy` where its peak is at most a tenth more,
    since it grows least with the batch. If the batch fits the memory in none of these, the least
    peak among the other ways that fit; if it fits in none, the way that fits most tokens.

    >>> from chunked_ce.planner import HeadShape, plan, recommend
    >>> estimates = plan(HeadShape(128256, 4096), tokens=8192, memory=24 << 30)
    >>> recommend(estimates).estimate.code
    'linear_cross_entropy(hidden, lm_head.weight, labels, shift=True)'
    """
    ours = [estimate for estimate in estimates if estimate.code]
    default = [e for e in ours if e.default and e.fits is not False]
    if default:
        return _least(
            default, "least peak of this library's ways with float32 sums and default chunks"
        )
    others = [e for e in ours if e.fits]
    if others:
        return _least(others, "least peak of the ways that fit; none with default options does")
    most = max(ours, key=lambda e: e.largest_batch or 0)
    if most.largest_batch:
        return Recommendation(most, "the batch fits in no way; this one fits most tokens")
    return Recommendation(None, "the memory holds no batch at all")


def _least(estimates: list[Estimate], reason: str) -> Recommendation:
    least = min(estimates, key=lambda e: e.peak_bytes)
    for estimate in estimates:
        close = least.peak_bytes < estimate.peak_bytes <= 1.1 * least.peak_bytes
        if estimate.name == "linear_cross_entropy" and close:
            grows = ", or a tenth more: linear_cross_entropy grows least"
            return Recommendation(estimate, reason + grows)
    return Recommendation(least, reason)
