"""What a comparison of two models measures, with its errors."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, NamedTuple

from .report import counted, for_json

if TYPE_CHECKING:
    from torch import Tensor


class Measure(NamedTuple):
    """A value with two standard errors; None where there is none.

    `stderr` is of the tokens, as if they were independent. `document_stderr` is of documents that
    are resampled whole (bootstrap): tokens of one document are not independent, so it is the one
    to trust where there are many documents. With one document it is None.

    >>> from chunked_ce import Measure
    >>> Measure(0.25, 0.01).stderr
    0.01
    """

    value: float
    stderr: float | None = None
    document_stderr: float | None = None


class TokenComparison(NamedTuple):
    """Numbers of each scored token [tokens], on the CPU, in the order of the text.

    Attributes:
        document: index of its document, int64.
        position: tokens of context in its window, int64.
        kl: KL(base‖model) in nats, float64, as the next two.
        logprob: log-probability of the token by the model.
        base_logprob: log-probability of the token by the base.
        same_top: True where both models have the same likeliest token.

    >>> import torch, chunked_ce
    >>> def model(ids):
    ...     return torch.zeros(*ids.shape, 16)
    >>> report = chunked_ce.compare_models(model, model, [[1, 2, 3]], context_length=4)
    >>> report.per_token.position.tolist(), report.per_token.same_top.tolist()
    ([1, 2], [True, True])
    """

    document: Tensor
    position: Tensor
    kl: Tensor
    logprob: Tensor
    base_logprob: Tensor
    same_top: Tensor


@dataclass(frozen=True, repr=False)
class Comparison:
    """Measures of two models on the same tokens.

    With q the base's distribution of a token, p the model's, and t the token itself:

    - `mean_kl`: mean of KL(q‖p) = Σ q log(q / p) in nats per token.
    - `kl_quantiles`: share of the tokens to the KL divergence that it does not exceed, with linear
      interpolation between tokens: 0.5 (the median), 0.9, 0.95, 0.99, 0.999 and 1 (the maximum).
    - `same_top`: share of tokens with the same likeliest token in both.
    - `perplexity`, `base_perplexity`: exp(mean NLL) of each.
    - `log_perplexity_ratio`: log(perplexity / base_perplexity). Its errors are paired: of the
      difference of the two losses of a token, which share most of their spread.
    - `correlation`: Pearson's, of log p_t and log q_t over the tokens.
    - `mean_delta_p`, `rms_delta_p`: mean and root mean square of p_t - q_t.

    These are the measures of llama.cpp's `llama-perplexity --kl-divergence`. An error that does
    not exist is None.

    >>> import torch, chunked_ce
    >>> def model(ids):
    ...     return torch.zeros(*ids.shape, 16)
    >>> documents = [[1, 2, 3], [4, 5]]
    >>> report = chunked_ce.compare_models(
    ...     model, model, documents, context_length=4, per_document=True
    ... )
    >>> report.per_document[1]
    Comparison(KL(base‖model) 0 nats per token over 1 token, same top token 100.00%, perplexity \
16 against 16)
    """

    tokens: int
    documents: int
    mean_kl: Measure
    same_top: Measure
    perplexity: Measure
    base_perplexity: Measure
    log_perplexity_ratio: Measure
    correlation: Measure
    mean_delta_p: Measure
    rms_delta_p: Measure
    kl_quantiles: Mapping[float, float]

    def to_dict(self) -> dict[str, Any]:
        """Return every measure; an estimate is a mapping of its value and errors."""
        return {
            f.name: _plain(getattr(self, f.name)) for f in fields(self) if f.name != "per_token"
        }

    def to_json(self) -> str:
        """Return `to_dict` as JSON, which knows no infinity and no NaN: "inf", and null."""
        return json.dumps(for_json(self.to_dict()), indent=2, allow_nan=False)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self})"

    def __str__(self) -> str:
        error = self.mean_kl.stderr
        spread = "" if error is None or math.isnan(error) else f" ± {error:.2g}"
        return (
            f"KL(base‖model) {self.mean_kl.value:.4g}{spread} nats per token over "
            f"{counted(self.tokens, 'token')}, same top token {self.same_top.value:.2%}, "
            f"perplexity {self.perplexity.value:.4g} against {self.base_perplexity.value:.4g}"
        )


@dataclass(frozen=True, repr=False)
class ComparisonReport(Comparison):
    """What was compared and how.

    `per_document` is of each document in turn, if asked for. `per_group` is of each group that
    documents were given. `per_token` holds the numbers of each token, and is not in `to_dict`.
    Only in a partial report are `windows_scored` fewer than `windows`.

    >>> import torch, chunked_ce
    >>> def model(ids):
    ...     return torch.zeros(*ids.shape, 16)
    >>> report = chunked_ce.compare_models(model, model, [[1, 2, 3]], context_length=4)
    >>> report.vocab_size, report.windows, report.mean_kl.value
    (16, 1, 0.0)
    """

    per_token: TokenComparison
    context_length: int = 0
    stride: int = 0
    full_last_window: bool = False
    bos: int | None = None  # ids put around each document
    eos: int | None = None
    vocab_size: int = 0  # classes that were compared
    documents_given: int = 0
    windows: int = 0  # planned
    windows_scored: int = 0
    logits_stored: bool = False  # the model's head could not be deferred
    base_logits_stored: bool = False
    took_turns: bool = False
    seed: int = 0  # of the documents resampled
    resamples: int = 0
    partial: bool = False  # interrupted: some windows are not in it
    per_document: tuple[Comparison, ...] | None = None
    per_group: Mapping[str, Comparison] | None = None


class ComparisonInterrupted(KeyboardInterrupt):
    """Raised on Ctrl-C; `report` is of the windows scored until then, and is marked partial.

    >>> import torch, chunked_ce
    >>> def model(ids):
    ...     return torch.zeros(*ids.shape, 16)
    >>> try:
    ...     report = chunked_ce.compare_models(model, model, [[1, 2, 3]], context_length=4)
    ... except chunked_ce.ComparisonInterrupted as interruption:
    ...     report = interruption.report
    >>> report.partial
    False
    """

    def __init__(self, report: ComparisonReport) -> None:
        super().__init__(str(report))
        self.report = report


def _plain(value: Any) -> Any:
    if isinstance(value, Comparison):
        return value.to_dict()
    if isinstance(value, Measure):
        return value._asdict()
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, tuple) else value
