"""`chunked-ce doctor`: this machine, the backends, and a check of every function."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from ..interrupts import exit_on_interrupt


def add_command(subparsers: Any) -> None:
    """Add the command to the parser's."""
    parser = subparsers.add_parser(
        "doctor",
        help="check this installation: versions, devices, backends, every function",
        description="Shows what this machine has and which backend runs on it, and checks every "
        "function of logits or hidden states against eager torch. Exit code 1 where something is "
        "wrong. Paste the output of --verbose into a bug report.",
    )
    parser.add_argument("--verbose", "-v", action="store_true", help="show every check")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Examine the machine; print the verdict and then the findings."""
    if sys.stderr.isatty():
        print("checking every function, which takes some seconds", file=sys.stderr, flush=True)
    with exit_on_interrupt():
        from .machine import examine
        from .verdict import summary

        findings = list(examine())
    print(summary(findings, verbose=args.verbose))
    return 0 if all(finding.ok for finding in findings) else 1
