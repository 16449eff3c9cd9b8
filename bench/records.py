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

    def write_csv(self, path: Path) -> None:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(asdict(m) | asdict(self.environment) for m in self.measurements)

    def write_json(self, path: Path) -> None:
        content = {
            "environment": asdict(self.environment),
            "measurements": [asdict(m) for m in self.measurements],
            "comparisons": [{**c._asdict(), "verdict": c.verdict} for c in self.comparisons],
        }
        path.write_text(json.dumps(content, indent=1) + "\n")


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
