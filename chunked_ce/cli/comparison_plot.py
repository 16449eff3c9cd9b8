"""The picture of `chunked-ce compare`: KL divergence, also against position, and both models."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch

from ..evaluation.comparison_report import ComparisonReport
from ..evaluation.report import counted
from .perplexity_plot import NORMAL_95, position_bins

BINS = 60
LOWEST_KL = 1e-7
"""Nats; smaller divergences, rounding of the logits among them, are counted here."""
DRAWN_TOKENS = 20_000
"""In the scatter, evenly spaced in the text."""


def draw(report: ComparisonReport, name: str, base_name: str, path: Path) -> None:
    """Draw the distribution of KL(base‖model), its mean against position, and log-probabilities."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 4.6), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    _draw_distribution(left, report)
    _draw_positions(middle, report)
    _draw_tokens(right, report)
    for axes in (left, middle, right):
        axes.grid(alpha=0.3)
        for handle in axes.legend(markerscale=2).legend_handles:
            if handle.get_alpha() is not None:  # that of a point among thousands is faint
                handle.set_alpha(max(handle.get_alpha(), 0.4))
    partial = " (partial: interrupted)" if report.partial else ""
    names = ["/".join(Path(n).parts[-2:]) for n in (name, base_name)]
    title = f"{names[0]} against {names[1]}: mean KL {report.mean_kl.value:.4g} nats per token, "
    title += f"same top token {report.same_top.value:.2%}{partial}"
    figure.suptitle(title)
    figure.savefig(path, dpi=150)


def _draw_distribution(axes: Any, report: ComparisonReport) -> None:
    """Draw a histogram in bins of equal ratio, with the quantiles."""
    values = report.per_token.kl
    finite = values.isfinite()
    infinite = len(values) - int(finite.sum())
    values = values[finite].clamp(min=LOWEST_KL)
    top = max(float(values.max()) if len(values) else 0.0, 10 * LOWEST_KL)
    low = float(values.min()) if len(values) else LOWEST_KL
    low = 10 ** math.floor(math.log10(low))
    edges = torch.logspace(math.log10(low), math.log10(top), BINS + 1, dtype=torch.float64)
    counts = torch.bincount((torch.bucketize(values, edges) - 1).clamp(0, BINS - 1), minlength=BINS)
    share = (100 * counts / max(len(values), 1)).tolist()
    axes.stairs(share, edges.tolist(), fill=True, color="tab:blue", alpha=0.6)
    marks = [(report.mean_kl.value, "-", "mean")]
    marks += [(report.kl_quantiles[q], style, what) for q, style, what in (
        (0.5, "--", "median"), (0.99, ":", "99 %"),
    )]  # fmt: skip
    for value, style, what in marks:
        if math.isfinite(value):
            axes.axvline(max(value, low), color="black", ls=style, label=f"{what}, {value:.3g}")
    axes.set_xscale("log")
    notes = []
    if bool((values <= LOWEST_KL).any()):
        notes.append(f"{LOWEST_KL:g} or less on the left")
    if infinite:
        notes.append(f"without {counted(infinite, 'infinite token')}")
    xlabel = "\n".join(["KL(base‖model) of a token (nats)", *filter(None, [", ".join(notes)])])
    axes.set(xlabel=xlabel, ylabel="tokens (%)")


def _draw_positions(axes: Any, report: ComparisonReport) -> None:
    """Draw the mean against the tokens of context, in bins of equal ratio, with errors."""
    tokens = report.per_token
    counts = torch.bincount(tokens.position)[1:]
    bins, points = position_bins(counts.tolist()), []
    for first, last in bins:
        kl = tokens.kl[(tokens.position >= first) & (tokens.position <= last)]
        error = float(kl.std()) / math.sqrt(len(kl)) if len(kl) > 1 else 0.0
        if kl.isfinite().all():
            points.append((math.sqrt(first * last), float(kl.mean()), NORMAL_95 * error))
    infinite = len(bins) - len(points)
    label = "mean KL(base‖model)"
    if infinite:
        label += f", infinite in {counted(infinite, 'bin')}"
    x, mean, spread = zip(*points, strict=True) if points else ((), (), ())
    axes.plot(x, mean, ".-", color="tab:blue", label=label)
    axes.fill_between(
        x,
        [m - s for m, s in zip(mean, spread, strict=True)],
        [m + s for m, s in zip(mean, spread, strict=True)],
        color="tab:blue", alpha=0.2, linewidth=0, label="± 1.96 standard errors",
    )  # fmt: skip
    of_all = report.mean_kl.value
    if math.isfinite(of_all):
        axes.axhline(of_all, color="gray", ls=":", label=f"of all, {of_all:.3g}")
    elif not points:
        axes.set_xlim(1, len(counts) + 1)
    axes.set_ylim(bottom=0)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set(xlabel="tokens of context in the window", ylabel="KL(base‖model) (nats per token)")


def _draw_tokens(axes: Any, report: ComparisonReport) -> None:
    """Draw a point for each token: its log-probability by the base and by the model."""
    x, y = report.per_token.base_logprob, report.per_token.logprob
    every = -(-len(x) // DRAWN_TOKENS)
    shown = (x.isfinite() & y.isfinite()).nonzero()[::every, 0]
    x, y = x[shown], y[shown]
    label = f"{len(x):,} tokens" + ("" if every == 1 else f", one in {every}")
    axes.scatter(
        x.tolist(), y.tolist(), s=4, alpha=0.2, color="tab:blue", linewidths=0, rasterized=True,
        label=label,
    )  # fmt: skip
    if len(x):
        lowest = float(torch.minimum(x, y).min())
        axes.plot([lowest, 0], [lowest, 0], color="gray", ls=":", label="equal")
    correlation = report.correlation.value
    axes.set(
        xlabel="log-probability by the base (nats)", ylabel="log-probability by the model (nats)",
        title="" if math.isnan(correlation) else f"correlation {correlation:.4f}",
    )  # fmt: skip
