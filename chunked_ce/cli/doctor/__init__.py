"""`chunked-ce doctor`: this machine, the backends, and a check of every function."""

from __future__ import annotations

import argparse
from typing import Any

from .machine import examine


def add_command(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "doctor",
        help="versions, devices, backends; checks every function against eager torch",
        description="Says what this machine has and which backend runs on it, and checks every "
        "function of logits or hidden states against eager torch. Exit code 1 where something is "
        "wrong. Paste the output into a bug report.",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    section, wrong = "", 0
    for finding in examine():
        if finding.section != section:
            print(("\n" if section else "") + finding.section, flush=True)
            section = finding.section
        print(f"  {finding.what}: {finding.result}", flush=True)
        wrong += not finding.ok
    print("\n" + _sum(wrong))
    return 1 if wrong else 0


def _sum(wrong: int) -> str:
    if wrong == 1:
        return "1 finding is wrong"
    return f"{wrong} findings are wrong" if wrong else "nothing is wrong"
