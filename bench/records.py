"""What every benchmark leaves behind: tables on the screen, one tidy CSV, one JSON."""

from __future__ import annotations

import csv
import importlib.metadata
import json
import platform
import subprocess
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from .measure import Quantiles

COLUMNS = (
    "provider", "mode", "metric", "N", "D", "V", "dtype", "value", "q20", "q80",
    "device", "torch", "triton", "commit", "timestamp",
)  # fmt: skip


@dataclass(frozen=True)
class Measurement:
    """One row of the CSV, less what the whole run shares."""

    provider: str
    mode: str
    metric: str
    N: int
    V: int
    dtype: str
    value: float
    q20: float | None = None
    q80: float | None = None
    D: int | None = None
    device: str | None = None  # of a prediction, another than the run's


@dataclass(frozen=True)
class Environment:
    device: str
    torch: str
    triton: str
    commit: str
    timestamp: str


class Comparison(NamedTuple):
    what: str
    measured: float
    bound: float | None = None

    @property
    def verdict(self) -> str:
        if self.bound is None:
            return ""
        return "ok" if self.measured <= self.bound else "MISSED"


@dataclass
class Report:
    """Prints what it is given as it comes, and keeps it for the files."""

    environment: Environment
    measurements: list[Measurement] = field(default_factory=list)
    comparisons: list[Comparison] = field(default_factory=list)

    def title(self, text: str) -> None:
        print(f"\n## {text}\n", flush=True)

    def table(self, rows: Sequence[Sequence[str]], labels: int = 1) -> None:
        print(aligned(rows, labels), flush=True)

    def add(
        self, provider: str, mode: str, logits: Tensor, value: Quantiles, metric: str = "seconds"
    ) -> None:
        n, v = logits.shape
        dtype = dtype_name(logits.dtype)
        self.measurements.append(Measurement(provider, mode, metric, n, v, dtype, *value))

    def compare(self, comparisons: Iterable[Comparison], header: str = "ratio") -> None:
        comparisons = list(comparisons)
        self.comparisons += comparisons
        print()
        rows = [
            (c.what, f"{c.measured:.3f}", "" if c.bound is None else f"<= {c.bound}", c.verdict)
            for c in comparisons
        ]
        self.table([(header, "measured", "bound", ""), *rows])

    def summary(self) -> None:
        bounded = [c for c in self.comparisons if c.bound is not None]
        missed = [c for c in bounded if c.verdict == "MISSED"]
        print(f"\n{len(bounded) - len(missed)} of {len(bounded)} bounds held")
        for c in missed:
            print(f"MISSED  {c.what}: {c.measured:.3f}, bound {c.bound}")

    def rows(self) -> list[dict[str, str]]:
        """As the CSV has them."""
        rows = []
        for m in self.measurements:
            own = {k: v for k, v in asdict(m).items() if k != "device" or v is not None}
            row = asdict(self.environment) | own
            rows.append({c: "" if row[c] is None else str(row[c]) for c in COLUMNS})
        return rows

    def write_csv(self, path: Path) -> None:
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(self.rows())

    def write_json(self, path: Path) -> None:
        content = {
            "environment": asdict(self.environment),
            "measurements": [asdict(m) for m in self.measurements],
            "comparisons": [{**c._asdict(), "verdict": c.verdict} for c in self.comparisons],
        }
        path.write_text(json.dumps(content, indent=1) + "\n")


class NotRun(dict[str, str]):
    """Says of each provider once why it was not measured."""

    def say(self, provider: str, why: str, where: str) -> None:
        if self.get(provider) != why:
            self[provider] = why
            print(f"{provider}: not run: {why} ({where})", flush=True)


def write_folder(report: Report, not_run: NotRun, folder: Path) -> None:
    """results.csv, and not_run.txt with the reasons."""
    folder.mkdir(parents=True, exist_ok=True)
    report.write_csv(folder / "results.csv")
    rows = [("provider", "why"), *not_run.items()]
    (folder / "not_run.txt").write_text(aligned(rows, labels=2) + "\n", encoding="utf-8")


def reason(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip() or '-').splitlines()[0][:150]}"


def read_csv(path: Path) -> list[dict[str, str]]:
    """The rows of a file that `Report.write_csv` wrote; ValueError where no figure can show it."""
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
    if not rows:
        raise ValueError(f"{path} has a header and no rows: measure again")
    for line, row in enumerate(rows, start=2):
        if wrong := _wrong(row):
            raise ValueError(f"{path} has {wrong} in row {line}: measure again with this version")
    return rows


_SIZES = {"N": False, "V": False, "D": True}  # may it be empty?
_FLOATS = {"value": False, "q20": True, "q80": True}


def _wrong(row: dict[str, str]) -> str:
    """Of a row read from a file, what a figure could not show; empty where nothing is."""
    if None in row or None in row.values():
        return "another number of cells than of columns"
    for column, may_be_empty in _SIZES.items():
        text = row[column]
        is_size = text.isdecimal() and len(text) < 19 and int(text) > 0
        if not is_size and not (may_be_empty and not text):
            return f"{column} {text!r}, expected a positive whole number,"
    for column, may_be_empty in _FLOATS.items():
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


def environment(device: str) -> Environment:
    return Environment(
        device=device,
        torch=torch.__version__,
        triton=_version("triton"),
        commit=_commit(),
        timestamp=datetime.now(timezone.utc).isoformat(timespec="seconds"),
    )


def cpu_name() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def aligned(rows: Sequence[Sequence[str]], labels: int = 1) -> str:
    """Columns: the first `labels` of them to the left, figures to the right; the header first."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i < labels else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _commit() -> str:
    """With "-dirty" where files differ from it; empty outside of a repository."""
    command = ["git", "describe", "--always", "--dirty"]
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    except OSError:
        return ""
    return done.stdout.strip()
