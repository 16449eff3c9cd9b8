"""The tables of `chunked-ce perplexity`: every measure, and a line for each file."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from ..evaluation.report import EvaluationReport, counted
from .text_table import aligned, some_of


def table(report: EvaluationReport, name: str, files: Sequence[object] = ()) -> str:
    """Return one measure a line with its unit, and below them one file a line.

    Args:
        report: what was scored.
        name: of the model.
        files: names of the documents, in their order; without them no file has a line.
    """
    error = report.mean_nll_stderr
    rows = [
        ("perplexity", f"{report.perplexity:.4f}", f"per token, {counted(report.tokens, 'token')}"),
        ("mean NLL", f"{report.mean_nll:.4f}", "nats per token" + _spread(error)),
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
    if len(files) > 1 and report.per_document is not None:
        lines += ["", *_by_file(report, files)]
    return "\n".join(lines)


def _by_file(report: EvaluationReport, files: Sequence[object]) -> Iterable[str]:
    """Return a line for each file: tokens, perplexity, bits per byte."""
    with_bytes = any(document.bytes is not None for document in report.per_document or ())
    rows = [["file", "tokens", "perplexity", *(["bits per byte"] if with_bytes else [])]]
    for file, document in zip(files, report.per_document or (), strict=True):
        row = [str(file), f"{document.tokens:,}"]
        row.append(f"{document.perplexity:.4f}" if document.tokens else "not scored")
        if with_bytes:
            bits = document.bits_per_byte
            row.append("" if bits is None else f"{bits:.4f}")
        rows.append(row)
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
    if report.logits_stored:
        parts.append("from the model's own logits")
    partial = "PARTIAL, interrupted: only what was scored is in it\n" if report.partial else ""
    return partial + ", ".join(parts)


def _spread(error: float | None) -> str:
    return "" if error is None or math.isnan(error) else f", standard error {error:.4f}"
