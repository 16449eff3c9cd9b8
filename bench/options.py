"""What the programs' command lines share, and the report that they open and close."""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from . import records


def parser_of(command: str, text: str | None) -> argparse.ArgumentParser:
    """Return the parser of `python -m bench COMMAND`, described by its module's docstring."""
    return argparse.ArgumentParser(
        prog=f"python -m bench {command}",
        description=text,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def add_sizes(parser: argparse.ArgumentParser, **defaults: int) -> None:
    """Add an option for each number."""
    for name, default in defaults.items():
        parser.add_argument(
            "--" + name.replace("_", "-"), type=positive, default=default,
            metavar=name[0].upper(), help="default: %(default)s",
        )  # fmt: skip


def add_csv(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--csv", type=writable, metavar="FILE", help="write the figures, one a row")


def add_sections(parser: argparse.ArgumentParser, sections: Iterable[str]) -> None:
    sections = list(sections)
    add = parser.add_argument
    add("--only", nargs="+", choices=sections, default=sections, metavar="SECTION",
        help="of " + ", ".join(sections))  # fmt: skip
    add("--busy", type=positive, metavar="B", help="again beside B processes that only spin")
    add_csv(parser)


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"expected a positive whole number, got {text!r}")
    return int(text)


def writable(text: str) -> Path:
    path = Path(text)
    if path.is_dir() or not path.parent.is_dir():  # fail now rather than after four minutes
        raise argparse.ArgumentTypeError(f"no file can be written at {text!r}")
    return path


def device_name(threads: int) -> str:
    policy = os.environ.get("OMP_WAIT_POLICY", "")
    return f"{records.cpu_name()}, {threads} threads" + (policy and f", {policy} waiting")


@contextmanager
def reporting(threads: int, path: Path | None) -> Iterator[records.Report]:
    """Print where this runs, then the bounds that were missed and the seconds in all."""
    torch.set_num_threads(threads)
    report = records.Report(device_name(threads), path)
    env, start = report.environment, time.perf_counter()
    print(f"{env['device']}; torch {env['torch']}; commit {env['commit']}", flush=True)
    try:
        yield report
    finally:
        report.table.close()
    report.summary()
    print(f"{time.perf_counter() - start:.0f} s in all")
