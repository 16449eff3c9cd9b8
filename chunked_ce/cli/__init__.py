"""The command line, `chunked-ce COMMAND`: a module for each command.

A command imports torch when it runs, so that help, the version and mistakes are shown at once.
"""

from __future__ import annotations

import argparse
import errno
import os
import sys
import warnings
from collections.abc import Sequence
from typing import Any, NoReturn

from .. import __version__
from . import compare, doctor, perplexity, plan
from .errors import INTERRUPTED, UsageError

_COMMANDS = (perplexity, compare, plan, doctor)
_BENCH = (
    "the benchmarks are not installed with the library: run `python -m bench` in a clone of the "
    "repository"
)


class _Parser(argparse.ArgumentParser):
    """A parser whose errors take one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"chunked-ce: {message}; see `{self.prog} --help`\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; every failure takes one line on stderr."""
    try:
        code = _run(sys.argv[1:] if argv is None else argv)
        sys.stdout.flush()
        return code
    except UsageError as error:
        print(f"chunked-ce: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("chunked-ce: interrupted", file=sys.stderr)
        return INTERRUPTED
    except OSError as error:
        return _output_failed(error)


def _run(argv: Sequence[str]) -> int:
    parser = _Parser(
        prog="chunked-ce",
        description="Cross-entropy over large vocabularies, in chunks.",
        epilog=f"Benchmarks: {_BENCH}.",
    )
    parser.add_argument("--version", action="version", version=f"chunked-ce {__version__}")
    subparsers: Any = parser.add_subparsers(metavar="COMMAND")
    for command in _COMMANDS:
        command.add_command(subparsers)
    if argv and argv[0] == "bench":
        raise UsageError(_BENCH)
    args = parser.parse_args(argv)
    if not hasattr(args, "run"):
        parser.print_help()
        return 0
    warnings.filterwarnings("ignore", "Failed to initialize NumPy")  # torch works without it
    code: int = args.run(args)
    return code


def _output_failed(error: OSError) -> int:
    """Return the exit code where stdout cannot be written; say so unless its reader has left."""
    if error.errno not in (errno.EPIPE, errno.ENOSPC, errno.EDQUOT):
        raise error
    # What is still buffered would fail again when the interpreter exits.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if error.errno == errno.EPIPE:
        return 128 + 13  # as a program that SIGPIPE ends
    print(f"chunked-ce: the output cannot be written: {error.strerror}", file=sys.stderr)
    return 2
