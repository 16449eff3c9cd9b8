"""What every stage is given, and the tables that it leaves behind."""

from __future__ import annotations

import csv
import time
from pathlib import Path
from typing import NamedTuple

import torch

ROOT = Path(__file__).resolve().parents[2]


class Context(NamedTuple):
    out: Path
    deadline: float  # of time.perf_counter()
    dry: bool  # tiny sizes on the CPU, in Triton's interpreter

    @property
    def device(self) -> str:
        return "cpu" if self.dry else "cuda"

    @property
    def late(self) -> bool:
        return time.perf_counter() > self.deadline

    def synchronize(self) -> None:
        if not self.dry:
            torch.cuda.synchronize()

    def release(self) -> None:
        """Give cached memory back, so that the next case finds it."""
        if not self.dry:
            torch.cuda.empty_cache()


class Table:
    """A CSV file. Each row reaches it when it is added."""

    def __init__(self, path: Path, columns: tuple[str, ...]) -> None:
        self._columns = columns
        self._file = path.open("w", newline="", encoding="utf-8")
        self._writer = csv.DictWriter(self._file, columns)
        self._writer.writeheader()
        self._file.flush()

    def add(self, **cells: object) -> None:
        """A cell that is not given is empty. Floats are written with 4 significant digits."""
        row = {name: f"{v:.4g}" if isinstance(v, float) else v for name, v in cells.items()}
        self._writer.writerow(row)
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def read_table(path: Path) -> list[dict[str, str]]:
    """The rows so far, or none where there is no such file."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def one_line(error: BaseException, length: int = 300) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:length]}"


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
