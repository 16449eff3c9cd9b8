"""Speed and memory on the CPU, with the demanded bound beside each ratio.

    python -m bench.cpu                                       all sections, about four minutes
    python -m bench.cpu --only time memory --csv cpu.csv      some, with the figures in a file
    python -m bench.cpu --busy 2                              also beside two spinning processes

Prints for each section a table of medians (20 % - 80 % quantiles), then the ratios (what, measured,
bound, "ok" or "MISSED"), and how much of the CPU others took meanwhile. Cores that data loaders or
other programs keep busy are the normal case: `--busy N` measures every section a second time beside
N processes that do nothing but spin; there the bounds are meant with 0.15 more.
The bounds are meant for the default sizes and two cores. A missed bound fails nothing; a wrong
result, looked for before timing, raises.

time        N x V against torch, eager and compiled, and the fewest compiled loops that could do it;
            the seconds that compiling took
memory      peak extra memory in units of the logits, each in a fresh process (needs /proc)
small       few rows, beside the fewest torch calls that could do it; the fixed cost of a call
vocabulary  time per logit from V = 4096 to a million
masked      half of the classes at -inf, -1e4 or -100, where exp is slow on a CPU
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from . import measure, records
from .cpu_sections import SECTIONS, Config


def main(arguments: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(arguments)
    config = Config(args.tokens, args.vocab, args.threads, args.repeats, not args.no_compile)
    torch.set_num_threads(config.threads)
    policy = os.environ.get("OMP_WAIT_POLICY", "")
    device = f"{records.cpu_name()}, {config.threads} threads" + (policy and f", {policy} waiting")
    env = records.environment(device)
    print(f"{env.device}; torch {env.torch}; commit {env.commit}; {config.repeats} rounds")
    report = records.Report(env)
    start = time.perf_counter()
    for name, section in SECTIONS.items():
        if name in args.only:
            for busy in (0, args.busy) if args.busy else (0,):
                print(f"\n{name}, beside {busy} spinning processes" if args.busy else "")
                with spinning(busy):
                    others = measure.OtherProcesses()
                    section(config, report)
                    print(f"\n{others}")
    report.summary()
    print(f"{time.perf_counter() - start:.0f} s in all")
    if args.csv:
        report.write_csv(args.csv)
    if args.json:
        report.write_json(args.json)
    return 0


@contextmanager
def spinning(count: int) -> Iterator[None]:
    """Beside so many processes that keep a core busy each, for no longer than this one lives."""
    code = "import os\nparent = os.getppid()\nwhile os.getppid() == parent: sum(range(1000))"
    processes = [subprocess.Popen([sys.executable, "-S", "-c", code]) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.cpu", description="Speed and memory of chunked_ce on the CPU."
    )
    add = parser.add_argument
    add("--tokens", type=positive, default=2048, metavar="N", help="default: %(default)s")
    add("--vocab", type=positive, default=50257, metavar="V", help="default: %(default)s")
    add("--threads", type=positive, default=2, metavar="T", help="default: %(default)s")
    add("--repeats", type=positive, default=11, metavar="R", help="default: %(default)s")
    add("--busy", type=positive, metavar="B", help="again beside B processes that only spin")
    sections = list(SECTIONS)
    add("--only", nargs="+", choices=sections, default=sections, metavar="SECTION",
        help="of " + ", ".join(sections))  # fmt: skip
    add("--no-compile", action="store_true", help="leave out what torch.compile builds first")
    add("--csv", type=writable, metavar="FILE", help="write the figures, one a row")
    add("--json", type=writable, metavar="FILE", help="write figures, ratios and bounds")
    return parser


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"expected a positive whole number, got {text!r}")
    return int(text)


def writable(text: str) -> Path:
    path = Path(text)
    if path.is_dir() or not path.parent.is_dir():  # said now rather than after four minutes
        raise argparse.ArgumentTypeError(f"no file can be written at {text!r}")
    return path


if __name__ == "__main__":
    raise SystemExit(main())
