"""The command line, `chunked-ce COMMAND`: a module for each command."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from . import doctor, perplexity, plan
from .errors import UsageError

_COMMANDS = (perplexity, plan, doctor)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="chunked-ce", description="Cross-entropy over large vocabularies, in chunks."
    )
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in _COMMANDS:
        command.add_command(subparsers)
    args = parser.parse_args(argv)
    try:
        code: int = args.run(args)
    except UsageError as error:
        print(f"chunked-ce: {error}", file=sys.stderr)
        return 2
    return code
