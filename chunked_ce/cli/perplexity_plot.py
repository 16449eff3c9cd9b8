"""The picture of `chunked-ce perplexity`: loss against position, and the running perplexity."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..evaluation.report import EvaluationReport, PerplexityReport

NORMAL_95 = 1.96
BINS_PER_OCTAVE = 4
BIN_TOKENS = 30
DRAWN_POINTS = 1000
SETTLED = 0.05  # of the tokens; the axis does not follow the running perplexity of fewer


def draw(report: EvaluationReport, name: str, path: Path) -> None:
    """Draw the loss against the tokens of context, and the perplexity as the text goes by."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    _draw_positions(left, report)
    _draw_running(right, report)
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend()
    partial = " (partial: interrupted)" if report.partial else ""
    title = f"{'/'.join(Path(name).parts[-2:])}: perplexity {report.perplexity:.4g} per token, "
    title += f"context {report.context_length}, stride {report.stride}{partial}"
    figure.suptitle(title)
    figure.savefig(path, dpi=150)


def _draw_positions(axes: Any, report: EvaluationReport) -> None:
    assert report.per_position is not None
    points = [(x, r) for x, r in binned(report.per_position) if r.tokens]
    x = [position for position, _ in points]
    mean = [r.mean_nll for _, r in points]
    spread = [NORMAL_95 * _known(r.mean_nll_stderr) for _, r in points]
    axes.plot(x, mean, ".-", color="tab:blue", label="loss")
    axes.fill_between(
        x,
        [m - s for m, s in zip(mean, spread, strict=True)],
        [m + s for m, s in zip(mean, spread, strict=True)],
        color="tab:blue", alpha=0.2, linewidth=0, label="± 1.96 standard errors",
    )  # fmt: skip
    axes.axhline(report.mean_nll, color="gray", ls=":", label=f"mean, {report.mean_nll:.3f}")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set(xlabel="tokens of context in the window", ylabel="loss (nats per token)")


def _draw_running(axes: Any, report: EvaluationReport) -> None:
    assert report.per_window is not None
    every = -(-len(report.per_window) // DRAWN_POINTS)
    totals = list(itertools.accumulate((r for r in report.per_window if r.tokens), _both))
    totals = totals[:-1][every - 1 :: every] + totals[-1:]
    x = [r.tokens for r in totals]
    low, high = (
        [_exp(r.mean_nll + sign * NORMAL_95 * _known(r.mean_nll_stderr)) for r in totals]
        for sign in (-1, 1)
    )
    axes.plot(x, [r.perplexity for r in totals], color="tab:orange", label="running perplexity")
    axes.fill_between(
        x, low, high, color="tab:orange", alpha=0.2, linewidth=0, label="± 1.96 standard errors"
    )
    settled = [i for i, tokens in enumerate(x) if tokens >= SETTLED * x[-1]]
    bottom, top = min(low[i] for i in settled), max(high[i] for i in settled)
    if math.isfinite(top) and top > bottom:  # the band of the first windows would flatten the rest
        margin = 0.05 * (top - bottom)
        axes.set_ylim(bottom - margin, top + margin)
    axes.set(xlabel="tokens scored, in the order of the text", ylabel="perplexity per token")


def binned(positions: Sequence[PerplexityReport]) -> list[tuple[float, PerplexityReport]]:
    """Return (geometric middle of the positions, their report) of each of the bins."""
    return [
        (math.sqrt(first * last), functools.reduce(_both, positions[first - 1 : last]))
        for first, last in position_bins([report.tokens for report in positions])
    ]


def position_bins(tokens: Sequence[int]) -> list[tuple[int, int]]:
    """Return (first, last) of the positions 1, 2, ... in each bin, 4 bins for each doubling.

    `tokens` is how many tokens each position has. A bin of fewer than 30 tokens has a large error,
    so it is joined to the next. Less than half a bin at the end is joined to the bin before.
    """
    bins: list[tuple[int, int]] = []
    first, last, count = 1, 0, 0
    for last, here in enumerate(tokens, 1):
        count += here
        if count >= BIN_TOKENS and _bin(last) < _bin(last + 1):
            bins.append((first, last))
            first, count = last + 1, 0
    if first <= last:
        wide = bool(bins) and 2 * (last - first + 1) >= bins[-1][1] - bins[-1][0] + 1
        if bins and not (wide and count >= BIN_TOKENS):
            first, _ = bins.pop()
        bins.append((first, last))
    return bins


def _bin(position: int) -> int:
    return int(BINS_PER_OCTAVE * math.log2(position))


def _both(a: PerplexityReport, b: PerplexityReport) -> PerplexityReport:
    squares = _known(a.nll_square_sum) + _known(b.nll_square_sum)
    return PerplexityReport(a.nll_sum + b.nll_sum, a.tokens + b.tokens, nll_square_sum=squares)


def _known(value: float | None) -> float:
    """Return 0 for what is not known, which gives a band of no width."""
    return 0.0 if value is None or math.isnan(value) else value


def _exp(nll: float) -> float:
    return PerplexityReport(nll, 1).perplexity
