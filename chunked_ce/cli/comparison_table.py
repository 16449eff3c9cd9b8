"""The tables of `chunked-ce compare`: every measure with its errors, and lines of files."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence

from ..evaluation.comparison_report import Comparison, ComparisonReport, Measure
from ..evaluation.report import counted
from .text_table import aligned, some_of

_QUANTILES = {
    0.5: "median", 0.9: "90 %", 0.95: "95 %", 0.99: "99 %", 0.999: "99.9 %", 1.0: "maximum",
}  # fmt: skip
_PERCENT = 100.0
_NOTE = (
    "± tokens: standard error as if tokens were independent; ± documents: of documents resampled"
)


def table(report: ComparisonReport, name: str, base_name: str, files: Sequence[object] = ()) -> str:
    """Return one measure a line, and below them one file a line, and one folder a line.

    Args:
        report: what was compared.
        name, base_name: of the models.
        files: names of the documents, in their order; without them no file has a line.
    """
    lines = [_heading(report, name, base_name), "", *_measures(report), "", _NOTE]
    if len(files) > 1 and report.per_document is not None:
        names = [str(file) for file in files]
        lines += ["", *_parts("file", zip(names, report.per_document, strict=True))]
    if report.per_group is not None:
        lines += ["", *_parts("folder", report.per_group.items())]
    return "\n".join(lines)


def _measures(report: Comparison) -> Iterator[str]:
    rows = [["", "", "± tokens", "± documents"]]
    units = [""]

    def add(name: str, measure: Measure, unit: str = "", factor: float = 1.0) -> None:
        numbers = ("" if number is None else _number(number * factor) for number in measure)
        rows.append([name, *numbers])
        units.append(unit)

    add("mean KL(base‖model)", report.mean_kl, "nats per token")
    for share, name in _QUANTILES.items():
        add(f"  {name}", Measure(report.kl_quantiles[share]))
    add("same top token", report.same_top, "% of tokens", _PERCENT)
    add("perplexity", report.perplexity, "per token")
    add("perplexity of the base", report.base_perplexity, "per token")
    add("log of their ratio", report.log_perplexity_ratio, "nats per token, paired")
    add("correlation of log-probabilities", report.correlation)
    add("mean Δp", report.mean_delta_p, "% of probability", _PERCENT)
    add("RMS Δp", report.rms_delta_p, "% of probability", _PERCENT)
    lines = list(aligned(rows))
    width = max(map(len, lines))
    return (f"{line:{width}}  {unit}".rstrip() for line, unit in zip(lines, units, strict=True))


def _parts(what: str, parts: Iterable[tuple[str, Comparison]]) -> Iterator[str]:
    """Return a line for each file or folder."""
    rows = [[what, "tokens", "mean KL", "±", "99 %", "same top %", "perplexity", "of the base"]]
    for name, part in parts:
        if not part.tokens:
            rows.append([name, "0", "not scored", "", "", "", "", ""])
            continue
        _, by_token, by_document = part.mean_kl
        error = by_token if by_document is None else by_document
        rows.append([
            name, f"{part.tokens:,}", _number(part.mean_kl.value),
            "" if error is None else _number(error), _number(part.kl_quantiles[0.99]),
            _number(_PERCENT * part.same_top.value), _number(part.perplexity.value),
            _number(part.base_perplexity.value),
        ])  # fmt: skip
    return aligned(rows)


def _heading(report: ComparisonReport, name: str, base_name: str) -> str:
    ends = [
        f"{what} {'not added' if token is None else token}"
        for what, token in (("BOS", report.bos), ("EOS", report.eos))
    ]
    parts = [
        f"{counted(report.tokens, 'token')} of {some_of(report.documents, report.documents_given)}",
        f"{some_of(report.windows_scored, report.windows, 'window')} of up to "
        f"{report.context_length} tokens",
        f"stride {report.stride}",
        *ends,
        f"{report.vocab_size:,} classes",
    ]
    for stored, whose in (
        (report.logits_stored, "the model's"), (report.base_logits_stored, "the base's"),
    ):  # fmt: skip
        if stored:
            parts.append(f"from {whose} own logits")
    partial = "PARTIAL, interrupted: only what was scored is in it\n" if report.partial else ""
    return f"{partial}{name} against {base_name}: {', '.join(parts)}"


def _number(value: float) -> str:
    """Return four digits behind the point, or three that count of what is small."""
    if math.isfinite(value) and 0 < abs(value) < 0.1:
        return f"{value:.3g}"
    return f"{value:.4f}"
