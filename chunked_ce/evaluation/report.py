"""Sums of what was scored, and every measure that follows from them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, repr=False)
class PerplexityReport:
    """Sums of what was scored, and the measures that follow from them.

    Units: nats for `nll_sum` and `mean_nll`, bits for the `bits_per_*`. Bits per byte, unlike
    perplexity, can be compared across tokenizers; `bytes` are the UTF-8 bytes of the scored text,
    `words` its runs of characters other than white space. What was not given or gathered is None,
    and so is what follows from it.

    >>> from chunked_ce import PerplexityReport
    >>> print(PerplexityReport(nll_sum=20.0, tokens=10, bytes=40))
    perplexity 7.389 per token over 10 tokens, mean NLL 2.0000 nats, 2.8854 bits per token, \
0.7213 bits per byte over 40 bytes
    """

    nll_sum: float
    tokens: int
    bytes: int | None = None
    words: int | None = None
    nll_square_sum: float | None = None  # of each token's NLL squared
    top1: int | None = None  # tokens that greedy decoding would have given
    reciprocal_rank_sum: float | None = None  # of 1 / (1 + classes that beat the target)

    @property
    def mean_nll(self) -> float:
        """Return nats per token; NaN when nothing was scored."""
        return self.nll_sum / self.tokens if self.tokens else math.nan

    @property
    def mean_nll_stderr(self) -> float | None:
        """Return the standard error of `mean_nll`, s / sqrt(tokens), as if tokens were independent.

        Tokens of one document are not, so it is a lower bound. NaN for fewer than two tokens.
        """
        if self.nll_square_sum is None:
            return None
        if self.tokens < 2:
            return math.nan
        variance = (self.nll_square_sum - self.nll_sum * self.mean_nll) / (self.tokens - 1)
        # Equal losses leave rounding, of either sign.
        return 0.0 if variance < 0 else math.sqrt(variance / self.tokens)

    @property
    def perplexity(self) -> float:
        """Return exp(mean_nll), per token; inf where that overflows."""
        return _exp(self.mean_nll)

    @property
    def perplexity_stderr(self) -> float | None:
        """Return perplexity * mean_nll_stderr, to first order; llama.cpp's "+/-"."""
        error = self.mean_nll_stderr
        return None if error is None else self.perplexity * error

    @property
    def bits_per_token(self) -> float:
        return self.mean_nll / math.log(2)

    @property
    def bits_per_byte(self) -> float | None:
        return self.nll_sum / math.log(2) / self.bytes if self.bytes else None

    @property
    def byte_perplexity(self) -> float | None:
        """Return exp(nll_sum / bytes), which is 2 to the power of `bits_per_byte`."""
        return _exp(self.nll_sum / self.bytes) if self.bytes else None

    @property
    def word_perplexity(self) -> float | None:
        """Return exp(nll_sum / words)."""
        return _exp(self.nll_sum / self.words) if self.words else None

    @property
    def accuracy(self) -> float | None:
        """Return the share of tokens that were the model's first choice."""
        return None if self.top1 is None else _ratio(self.top1, self.tokens)

    @property
    def mean_reciprocal_rank(self) -> float | None:
        """Return the mean of 1 for the model's first choice, 1/2 for its second, and so on."""
        total = self.reciprocal_rank_sum
        return None if total is None else _ratio(total, self.tokens)

    def to_dict(self) -> dict[str, Any]:
        """Return the counts and every measure; inf and NaN are floats still."""
        return asdict(self) | {
            "mean_nll": self.mean_nll,
            "mean_nll_stderr": self.mean_nll_stderr,
            "perplexity": self.perplexity,
            "perplexity_stderr": self.perplexity_stderr,
            "bits_per_token": self.bits_per_token,
            "bits_per_byte": self.bits_per_byte,
            "byte_perplexity": self.byte_perplexity,
            "word_perplexity": self.word_perplexity,
            "accuracy": self.accuracy,
            "mean_reciprocal_rank": self.mean_reciprocal_rank,
        }

    def to_json(self) -> str:
        """Return `to_dict` as JSON, which knows no infinity and no NaN: "inf", and null."""
        return json.dumps(for_json(self.to_dict()), indent=2, allow_nan=False)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self})"

    def __str__(self) -> str:
        error = self.mean_nll_stderr
        spread = "" if error is None or math.isnan(error) else f" ± {error:.4f}"
        parts = [
            f"perplexity {self.perplexity:.4g} per token over {counted(self.tokens, 'token')}",
            f"mean NLL {self.mean_nll:.4f}{spread} nats",
            f"{self.bits_per_token:.4f} bits per token",
        ]
        if self.bits_per_byte is not None:
            n_bytes = counted(self.bytes or 0, "byte")
            parts.append(f"{self.bits_per_byte:.4f} bits per byte over {n_bytes}")
        if self.word_perplexity is not None:
            words = counted(self.words or 0, "word")
            parts.append(f"perplexity {self.word_perplexity:.4g} per word over {words}")
        if self.accuracy is not None:
            parts.append(f"top-1 accuracy {self.accuracy:.4f}")
        if self.mean_reciprocal_rank is not None:
            parts.append(f"mean reciprocal rank {self.mean_reciprocal_rank:.4f}")
        return ", ".join(parts)


@dataclass(frozen=True, repr=False)
class EvaluationReport(PerplexityReport):
    """What was scored and how.

    `per_document` and `per_position`, where asked for: reports of each document in turn, and of the
    targets with 1, 2, ... `context_length` tokens of context in their window. `per_window`: reports
    of each window, in the order of the text. `per_group`: of each group, by its name.
    `mean_nll_document_stderr` is the error of `mean_nll` if documents are independent, and not
    their tokens; NaN for fewer than two documents.

    Only in a partial report are `documents` fewer than `documents_given`, and `windows_scored`
    fewer than `windows`; a document may then be scored in part, and the mean of the documents'
    perplexities is of those that were begun.

    >>> from chunked_ce import EvaluationReport
    >>> EvaluationReport(nll_sum=20.0, tokens=10, documents=1, documents_given=2, partial=True)
    EvaluationReport(perplexity 7.389 per token over 10 tokens, mean NLL 2.0000 nats, \
2.8854 bits per token)
    """

    context_length: int = 0
    stride: int = 0
    full_last_window: bool = False
    bos: int | None = None  # ids put around each document
    eos: int | None = None
    documents: int = 0  # of which something was scored
    documents_given: int = 0
    windows: int = 0  # planned
    windows_scored: int = 0
    logits_stored: bool = False  # the head could not be deferred
    partial: bool = False  # interrupted: some windows are not in it
    mean_nll_document_stderr: float | None = None  # of `mean_nll`, documents as clusters
    recipe: str | None = None  # whose windows and counts these are, see RECIPES
    after: str | None = None  # the marker after which documents are scored
    per_document: tuple[PerplexityReport, ...] | None = None
    per_position: tuple[PerplexityReport, ...] | None = None
    per_window: tuple[PerplexityReport, ...] | None = None
    per_group: Mapping[str, PerplexityReport] | None = None

    def __str__(self) -> str:
        return super().__str__() + ("" if self.recipe is None else f", recipe {self.recipe}")

    @property
    def mean_document_perplexity(self) -> float | None:
        """Return the mean of the documents' perplexities, which is not the corpus perplexity."""
        return _mean([report.perplexity for report in self.per_document or () if report.tokens])

    @property
    def mean_group_perplexity(self) -> float | None:
        """Return the mean of the groups' perplexities: each group has the same weight."""
        return _mean([report.perplexity for report in self._groups()])

    @property
    def mean_group_bits_per_byte(self) -> float | None:
        """Return the mean of the groups' bits per byte; `bits_per_byte` weighs groups by bytes."""
        return _mean([report.bits_per_byte for report in self._groups()])

    def _groups(self) -> list[PerplexityReport]:
        return [report for report in (self.per_group or {}).values() if report.tokens]

    def to_dict(self) -> dict[str, Any]:
        """Return counts and measures, and lists of them for documents, positions and windows."""
        parts = {
            name: None if reports is None else [report.to_dict() for report in reports]
            for name in ("per_document", "per_position", "per_window")
            for reports in (getattr(self, name),)
        }
        groups = None
        if self.per_group is not None:
            groups = {name: report.to_dict() for name, report in self.per_group.items()}
        means = {
            "mean_document_perplexity": self.mean_document_perplexity,
            "mean_group_perplexity": self.mean_group_perplexity,
            "mean_group_bits_per_byte": self.mean_group_bits_per_byte,
        }
        return super().to_dict() | means | parts | {"per_group": groups}


class EvaluationInterrupted(KeyboardInterrupt):
    """Raised on Ctrl-C; `report` is of the windows scored until then, and is marked partial.

    >>> from chunked_ce import EvaluationInterrupted, EvaluationReport
    >>> try:
    ...     raise EvaluationInterrupted(EvaluationReport(nll_sum=20.0, tokens=10, partial=True))
    ... except EvaluationInterrupted as interruption:
    ...     interruption.report.tokens
    10
    """

    def __init__(self, report: EvaluationReport) -> None:
        super().__init__(str(report))
        self.report = report


def counted(number: int, noun: str) -> str:
    """Return "1 token" or "1,234 tokens"."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def _mean(values: Sequence[float | None]) -> float | None:
    """Return None where there is none, or one is not known."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else None


def _exp(x: float) -> float:
    try:
        return math.exp(x)
    except OverflowError:
        return math.inf


def _ratio(sum: float, count: int) -> float:
    return sum / count if count else math.nan


def for_json(value: Any) -> Any:
    """Return `value` without the floats that JSON lacks: "inf" and "-inf", and None for NaN."""
    if isinstance(value, dict):
        return {key: for_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [for_json(item) for item in value]
    if not isinstance(value, float) or math.isfinite(value):
        return value
    return None if math.isnan(value) else str(value)
