"""Measures of a comparison and their errors, from the numbers of each token.

Every measure but the quantiles is a function of a few sums over tokens: of x, of x² for its error,
of the product for a correlation. Sums add up over documents, so a resample of documents is a
weighted sum of the documents' sums.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .comparison_report import Comparison, Measure, TokenComparison

QUANTILES = (0.5, 0.9, 0.95, 0.99, 0.999, 1.0)
_COUNTS = 10_000_000
"""How often each document is in each resample, at a time."""

_COLUMNS = (
    *("one", "kl", "kl2", "same", "nll", "nll2", "base", "base2", "cross"),
    *("ratio", "ratio2", "delta", "delta2", "delta4"),
)
Sums = dict[str, Tensor]


def compare_tokens(tokens: TokenComparison, seed: int, resamples: int) -> Comparison:
    """Return the measures of `tokens`, with errors of tokens and of documents."""
    _, document = tokens.document.unique(return_inverse=True)
    documents = int(document.max()) + 1 if len(document) else 0
    columns = _columns(tokens)
    by_document = columns.new_zeros(documents, len(_COLUMNS)).index_add_(0, document, columns)
    sums = _named(by_document.sum(0))
    errors = _token_errors(sums)
    resampled = None
    if documents > 1:
        resampled = _measures(_named(_resampled(by_document, seed, resamples)))
    estimates = {
        name: Measure(
            value.item(),
            None if name not in errors else _known(errors[name]),
            None if resampled is None else _known(resampled[name].std()),
        )
        for name, value in _measures(sums).items()
    }
    return Comparison(
        tokens=len(document), documents=documents, kl_quantiles=quantiles(tokens.kl), **estimates
    )


def quantiles(values: Tensor) -> dict[float, float]:
    """Return the quantiles of `values` [n], linear between the two nearest; NaN of none."""
    if not len(values):
        return dict.fromkeys(QUANTILES, math.nan)
    ordered = values.sort().values
    return {share: _quantile(ordered, share) for share in QUANTILES}


def _quantile(ordered: Tensor, share: float) -> float:
    place = share * (len(ordered) - 1)
    below = math.floor(place)
    low, high = (float(ordered[min(i, len(ordered) - 1)]) for i in (below, below + 1))
    return low if place == below or high == low else low + (place - below) * (high - low)


def _columns(tokens: TokenComparison) -> Tensor:
    """Return what is added up of each token, [tokens, columns]."""
    nll, base = -tokens.logprob, -tokens.base_logprob
    ratio, delta = nll - base, tokens.logprob.exp() - tokens.base_logprob.exp()
    columns = (
        torch.ones_like(nll), tokens.kl, tokens.kl**2, tokens.same_top.double(),
        nll, nll**2, base, base**2, nll * base, ratio, ratio**2, delta, delta**2, delta**4,
    )  # fmt: skip
    return torch.stack(columns, -1)


def _named(sums: Tensor) -> Sums:
    return dict(zip(_COLUMNS, sums.unbind(-1), strict=True))


def _measures(sums: Sums) -> dict[str, Tensor]:
    n = sums["one"]
    nll, base = sums["nll"] / n, sums["base"] / n
    spreads = (sums["nll2"] / n - nll**2) * (sums["base2"] / n - base**2)
    correlation = (sums["cross"] / n - nll * base) / spreads.clamp(min=0).sqrt()
    return {
        "mean_kl": sums["kl"] / n,
        "same_top": sums["same"] / n,
        "perplexity": nll.exp(),
        "base_perplexity": base.exp(),
        "log_perplexity_ratio": sums["ratio"] / n,
        "correlation": correlation.clamp(-1, 1),
        "mean_delta_p": sums["delta"] / n,
        "rms_delta_p": (sums["delta2"] / n).sqrt(),
    }


def _token_errors(sums: Sums) -> dict[str, Tensor]:
    """Return standard errors as if tokens were independent; of a square root and exp by slopes."""
    n = sums["one"]

    def of_mean(name: str, square: str) -> Tensor:
        mean = sums[name] / n
        variance = (sums[square] - sums[name] * mean) / (n - 1)
        return (variance.clamp(min=0) / n).sqrt()

    rms, of_square = (sums["delta2"] / n).sqrt(), of_mean("delta2", "delta4")
    return {
        "mean_kl": of_mean("kl", "kl2"),
        "same_top": of_mean("same", "same"),  # 0 and 1 are their squares
        "perplexity": of_mean("nll", "nll2") * (sums["nll"] / n).exp(),
        "base_perplexity": of_mean("base", "base2") * (sums["base"] / n).exp(),
        "log_perplexity_ratio": of_mean("ratio", "ratio2"),
        "mean_delta_p": of_mean("delta", "delta2"),
        "rms_delta_p": torch.where(rms > 0, of_square / (2 * rms), of_square),
    }


def _resampled(by_document: Tensor, seed: int, resamples: int) -> Tensor:
    """Return the sums of so many documents, drawn with replacement, [resamples, columns]."""
    generator, documents = torch.Generator().manual_seed(seed), len(by_document)
    at_a_time = max(1, _COUNTS // documents)
    parts = []
    for start in range(0, resamples, at_a_time):
        shape = min(at_a_time, resamples - start), documents
        drawn = torch.randint(documents, shape, generator=generator)
        counts = by_document.new_zeros(shape)
        counts.scatter_add_(1, drawn, torch.ones_like(counts))
        parts.append(counts @ by_document)
    return torch.cat(parts)


def _known(error: Tensor) -> float | None:
    """Return None for the error of a single token, or of what is infinite."""
    return float(error) if math.isfinite(error) else None
