"""What every stage is given, and the process that runs one:

python -m bench.gpu.stage NAME DIR SECONDS [--dry-run]
"""

from __future__ import annotations

import importlib
import sys
import time
from collections.abc import Sequence
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
    def provider_device(self) -> str:
        return "interpreter" if self.dry else "cuda"

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


def main(arguments: Sequence[str] | None = None) -> int:
    name, out, seconds, *rest = arguments or sys.argv[1:]
    context = Context(Path(out), time.perf_counter() + float(seconds), "--dry-run" in rest)
    if context.dry:
        _prepare_interpreter()
    module, _, function = name.partition(".")
    run = getattr(importlib.import_module(f".{module}", __package__), function or "run")
    return int(run(context))


def _prepare_interpreter() -> None:
    """Set up the interpreter as the tests do."""
    sys.path.append(str(ROOT / "tests"))
    importlib.import_module("triton_interpreter").prepare()


if __name__ == "__main__":
    raise SystemExit(main())
