"""One stage in a process of its own: python -m bench.gpu.stage NAME DIR SECONDS [--dry-run]"""

from __future__ import annotations

import importlib
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from .context import ROOT, Context


def main(arguments: Sequence[str] | None = None) -> int:
    name, out, seconds, *rest = arguments or sys.argv[1:]
    context = Context(Path(out), time.perf_counter() + float(seconds), "--dry-run" in rest)
    if context.dry:
        _prepare_interpreter()
    module = importlib.import_module(f".{name}", __package__)
    return int(module.run(context))


def _prepare_interpreter() -> None:
    """As the tests do: round as a GPU does, and in half the time."""
    sys.path.append(str(ROOT / "tests"))
    helpers = importlib.import_module("helpers")
    helpers.fuse_multiply_add()
    helpers.patch_the_language_once()


if __name__ == "__main__":
    raise SystemExit(main())
