"""The tables of `chunked-ce perplexity`: every measure, and a line for each file."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from ..evaluation.recipes import describe
from ..evaluation.report import EvaluationReport, PerplexityReport, counted
from .text_table import aligned, some_of


def table(report: EvaluationReport, name: str, files: Sequence[object] = ()) -> str:
    """Return one measure a line with its unit, and below them one file a line.

    Args:
        report: what was scored.
        name: of the model.
        files: names of the documents, in their order; without them no file has a line, nor where
            a recipe joined the files.
    """
    rows = [
        (
            "perplexity",
            f"{report.perplexity:.4f}",
            f"per token, {counted(report.tokens, 'token')}{_spread(report.perplexity_stderr)}",
        ),
        ("mean NLL", f"{report.mean_nll:.4f}", "nats per token" + _spreads(report)),
        ("bits per token", f"{report.bits_per_token:.4f}", ""),
    ]
    if report.bits_per_byte is not None:
        n_bytes = counted(report.bytes or 0, "byte")
        rows.append(("bits per byte", f"{report.bits_per_byte:.4f}", n_bytes))
    if report.word_perplexity is not None:
        words = counted(report.words or 0, "word")
        rows.append(("word perplexity", f"{report.word_perplexity:.4g}", f"per word, {words}"))
    if report.accuracy is not None and report.mean_reciprocal_rank is not None:
        rows.append(("top-1 accuracy", f"{report.accuracy:.4f}", ""))
        rows.append(("mean reciprocal rank", f"{report.mean_reciprocal_rank:.4f}", ""))
    mean = report.mean_document_perplexity
    if mean is not None and report.documents > 1:
        what = f"mean of the perplexities of {some_of(report.documents, report.documents_given)}"
        what += ", partly scored" if report.partial else ""
        rows.append(("document perplexity", f"{mean:.4f}", what))
    lines = [_heading(report, name), *_aligned(rows)]
    parts = report.per_document or ()
    if len(files) > 1 and len(parts) == len(files):
        lines += ["", *_by_part("file", list(zip(files, parts, strict=True)))]
    if report.per_group is not None:
        lines += ["", *_by_part("group", [*report.per_group.items()], _averages(report))]
    return "\n".join(lines)


def _spreads(report: EvaluationReport) -> str:
    """Return the standard errors of independent tokens and of independent documents."""
    of_tokens, of_documents = report.mean_nll_stderr, report.mean_nll_document_stderr
    if of_documents is None or math.isnan(of_documents):
        return _spread(of_tokens)
    return f"{_spread(of_tokens)} over tokens, {of_documents:.4f} over documents"


def _averages(report: EvaluationReport) -> list[list[str]]:
    """Return the mean over groups, and the mean over all tokens and bytes."""
    perplexity, bits = report.mean_group_perplexity, report.mean_group_bits_per_byte
    rows: list[tuple[str, str, float | None, float | None]] = [
        ("mean of groups", "", perplexity, bits),
        ("all tokens, all bytes", f"{report.tokens:,}", report.perplexity, report.bits_per_byte),
    ]
    return [[*row[:2], *("" if x is None else f"{x:.4f}" for x in row[2:])] for row in rows]


def _by_part(
    kind: str,
    parts: Sequence[tuple[object, PerplexityReport]],
    averages: Sequence[list[str]] = (),
) -> Iterable[str]:
    """Return a line for each file or group: tokens, perplexity, bits per byte; then averages."""
    with_bytes = any(report.bytes is not None for _, report in parts)
    rows = [[kind, "tokens", "perplexity", "bits per byte"]]
    for name, report in parts:
        bits = report.bits_per_byte
        perplexity = f"{report.perplexity:.4f}" if report.tokens else "not scored"
        row = [str(name), f"{report.tokens:,}", perplexity, "" if bits is None else f"{bits:.4f}"]
        rows.append(row)
    rows = [row if with_bytes else row[:-1] for row in (*rows, *averages)]
    return aligned(rows)


def _aligned(rows: Sequence[tuple[str, str, str]]) -> Iterable[str]:
    width = max(len(value) for _, value, _ in rows)
    return [f"  {what:22}{value:>{width}}  {unit}".rstrip() for what, value, unit in rows]


def _heading(report: EvaluationReport, name: str) -> str:
    documents = some_of(report.documents, report.documents_given)
    windows = some_of(report.windows_scored, report.windows, "window")
    ends = [
        f"{what} {'not added' if token is None else token}"
        for what, token in (("BOS", report.bos), ("EOS", report.eos))
    ]
    parts = [
        f"{name}: {documents}, {windows} of up to {report.context_length} tokens",
        f"stride {report.stride}",
        *ends,
    ]
    if report.after is not None:
        parts.append(f"only what follows {report.after!r} is scored")
    if report.logits_stored:
        parts.append("from the model's own logits")
    partial = "PARTIAL, interrupted: only what was scored is in it\n" if report.partial else ""
    recipe = "" if report.recipe is None else "\n" + describe(report.recipe, report.bos)
    return partial + ", ".join(parts) + recipe


def _spread(error: float | None) -> str:
    return "" if error is None or math.isnan(error) else f", standard error {error:.4f}"
