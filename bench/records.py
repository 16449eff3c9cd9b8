"""What every benchmark leaves behind: tables on the screen and one tidy CSV, written row by row."""

from __future__ import annotations

import csv
import importlib.metadata
import platform
import subprocess
from collections.abc import Iterable, Sequence
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import NamedTuple

import torch

from .cases import Case, dtype_name
from .measure import Quantiles

# A row is one quantity; a provider that was not measured has a row with the reason in `note`.
COLUMNS = (
    "provider", "mode", "metric", "N", "D", "V", "dtype", "value", "q20", "q80",
    "device", "torch", "triton", "commit", "timestamp", "note",
)  # fmt: skip


class Table:
    """A CSV file, or without a path its rows alone. Each row is in the file when it is added."""

    def __init__(self, path: Path | None, columns: Sequence[str]) -> None:
        self.columns, self.rows = columns, list[dict[str, str]]()
        self._file = path.open("w", newline="", encoding="utf-8") if path else None
        if self._file:
            csv.writer(self._file, lineterminator="\n").writerow(columns)
            self._file.flush()

    def add(self, **cells: object) -> None:
        """Add a row. Cells that are not given are empty; floats have 6 significant digits."""
        row = dict.fromkeys(self.columns, "")
        row |= {k: f"{v:.6g}" if isinstance(v, float) else str(v) for k, v in cells.items()}
        self.rows.append(row)
        if self._file:
            csv.DictWriter(self._file, self.columns, lineterminator="\n").writerow(row)
            self._file.flush()

    def close(self) -> None:
        if self._file:
            self._file.close()


def read_table(path: Path) -> list[dict[str, str]]:
    """Return the rows so far, or none where there is no such file."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


class Comparison(NamedTuple):
    what: str
    measured: float
    bound: float

    @property
    def verdict(self) -> str:
        return "ok" if self.measured <= self.bound else "MISSED"


class Report:
    """Print what is measured as it comes, and add it to the CSV."""

    def __init__(self, device: str, path: Path | None = None) -> None:
        self.environment = environment(device)
        self.table = Table(path, COLUMNS)
        self.comparisons: list[Comparison] = []
        self._reasons: dict[str, str] = {}

    def add(
        self, case: Case, provider: str, mode: str, metric: str, value: float | Quantiles,
        device: str = "", note: str = "",
    ) -> None:  # fmt: skip
        """Add a row; `device`: of a prediction, another than the run's."""
        taken = value if isinstance(value, Quantiles) else (value, "", "")
        cells: dict[str, object] = dict(zip(("value", "q20", "q80"), taken, strict=True))
        cells |= self.environment | ({"device": device} if device else {})
        sizes = dict(N=case.N, D=case.D or "", V=case.V, dtype=dtype_name(case.dtype))
        self.table.add(provider=provider, mode=mode, metric=metric, note=note, **sizes, **cells)

    def not_run(self, case: Case, provider: str, why: str) -> None:
        """Add a row that says why, and print it where it is news."""
        sizes = dict(N=case.N, D=case.D or "", V=case.V, dtype=dtype_name(case.dtype))
        self.table.add(provider=provider, metric="not run", note=why, **sizes, **self.environment)
        key = f"{provider}, {case.form}"
        if self._reasons.get(key) != why:
            self._reasons[key] = why
            print(f"{key}: not run: {why} ({case})", flush=True)

    def title(self, text: str) -> None:
        print(f"\n## {text}\n", flush=True)

    def print_table(self, rows: Sequence[Sequence[str]], labels: int = 1) -> None:
        """Print aligned columns: the header first, the first `labels` columns to the left."""
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        for row in rows:
            cells = (
                cell.ljust(width) if i < labels else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(row, widths, strict=True))
            )
            print("  ".join(cells).rstrip(), flush=True)

    def compare(self, comparisons: Iterable[Comparison]) -> None:
        """Print what is measured beside its bound."""
        comparisons = list(comparisons)
        self.comparisons += comparisons
        if comparisons:
            print()
            rows = [("ratio", "measured", "bound", "")]
            for c in comparisons:
                rows.append((c.what, f"{c.measured:.3f}", f"<= {c.bound:g}", c.verdict))
            self.print_table(rows)

    def summary(self) -> None:
        missed = [c for c in self.comparisons if c.verdict == "MISSED"]
        if self.comparisons:
            held = len(self.comparisons) - len(missed)
            print(f"\n{held} of {len(self.comparisons)} bounds held")
        for c in missed:
            print(f"MISSED  {c.what}: {c.measured:.3f}, bound {c.bound:g}")


def one_line(error: BaseException, length: int = 150) -> str:
    text = " ".join(str(error).split()) or "-"
    return f"{type(error).__name__}: {text[:length]}"


def read_measurements(path: Path) -> list[dict[str, str]]:
    """Return the measured rows of a report. Raise ValueError where no figure can show one."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            columns, rows = tuple(reader.fieldnames or ()), list(reader)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no CSV file: {error}") from error
    if columns != COLUMNS:
        raise ValueError(
            f"{path} has the columns {', '.join(columns) or '(none)'}, expected "
            f"{', '.join(COLUMNS)}: measure again with this version"
        )
    measured = []
    for line, row in enumerate(rows, start=2):
        if wrong := _wrong(row):
            raise ValueError(f"{path} has {wrong} in row {line}: measure again with this version")
        if row["metric"] != "not run":
            measured.append(row)
    if not measured:
        raise ValueError(f"{path} has a header and no rows: measure again")
    return measured


def _wrong(row: dict[str, str]) -> str:
    """Return what a figure could not show of a row read from a file, or ""."""
    if None in row or None in row.values():
        return "another number of cells than of columns"
    for column in ("N", "D", "V"):
        text = row[column]
        is_size = text.isdecimal() and len(text) < 19 and int(text) > 0
        if not is_size and (column != "D" or text):
            return f"{column} {text!r}, expected a positive whole number,"
    for column in ("value", "q20", "q80"):
        may_be_empty = column != "value" or row["metric"] == "not run"
        if not _is_measured(row[column]) and not (may_be_empty and not row[column]):
            return f"{column} {row[column]!r}, expected a number from 0 to 1e30,"
    if not row["dtype"].isidentifier():  # it names a file
        return f"dtype {row['dtype']!r}, expected a name such as bfloat16,"
    return ""


def _is_measured(text: str) -> bool:
    try:
        return 0 <= float(text) <= 1e30  # nor NaN
    except ValueError:
        return False


def environment(device: str) -> dict[str, str]:
    """Return the columns that all rows of a run share."""
    return {
        "device": device,
        "torch": torch.__version__,
        "triton": version_of("triton"),
        "commit": _commit(),
        "timestamp": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def cpu_name() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def version_of(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _commit() -> str:
    """Return the commit, with "-dirty" where files differ from it; "" outside of a repository."""
    command = ["git", "describe", "--always", "--dirty"]
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    except OSError:
        return ""
    return done.stdout.strip()
