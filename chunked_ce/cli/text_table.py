"""Rows of words and numbers as lines of text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ..evaluation.report import counted


def aligned(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Return lines of cells: the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for first, *others in rows:
        cells = (cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True))
        yield "  ".join(["", first.ljust(widths[0]), *cells]).rstrip()


def some_of(scored: int, given: int, what: str = "document") -> str:
    """Return "3 windows", or "1 of 3 windows" where an interruption left some out."""
    return ("" if scored == given else f"{scored:,} of ") + counted(given, what)
