"""Speed and memory of the linear layer and the loss together, on the CPU, with bounds.

    python -m bench.linear                                    all sections, some ten minutes
    python -m bench.linear --only memory --csv linear.csv     some, with the figures in a file
    python -m bench.linear --grid --figure linear.png         along N and V too; hours

Compares F.linear + F.cross_entropy (eager; compiled), `F.linear_cross_entropy` with options,
cut-cross-entropy (its torch_compile implementation) and Liger with
`chunked_ce.linear_cross_entropy`; what cannot run here is listed with the reason. Prints medians
(20 % - 80 % quantiles), then ratios (what, measured, bound, "ok" or "MISSED"). The bounds are meant
for the default sizes and two cores. A missed bound fails nothing; a wrong result, looked for before
timing, raises. Occupied cores spoil the times: see `bench.cpu`.

time        seconds of forward, and of forward + backward, in fp32 and bf16
memory      peak extra bytes, gradients of input and weight included, each in a fresh process (needs
            /proc); at 8 N also what is left of it beside the gradients
masked      half of the targets ignored, against none
"""

from __future__ import annotations

import argparse
import importlib.util
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from . import linear_sections, measure, records
from .cpu import positive, writable
from .linear_sections import PROVIDERS, SECTIONS, Config
from .providers import EAGER, OURS

OPTIONAL = tuple(p for p in PROVIDERS if p not in (EAGER, OURS))  # the ratios need these


def main(arguments: Sequence[str] | None = None) -> int:
    parser = _parser()
    args = parser.parse_args(arguments)
    if args.figure and importlib.util.find_spec("matplotlib") is None:
        parser.error("argument --figure: needs matplotlib")
    config = Config(
        args.tokens, args.hidden, args.vocab, args.threads, args.repeats, args.slow_repeats,
        args.grid, tuple(args.without),
    )  # fmt: skip
    torch.set_num_threads(config.threads)
    env = records.environment(f"{records.cpu_name()}, {config.threads} threads")
    print(f"{env.device}; torch {env.torch}; commit {env.commit}; {config.repeats} rounds")
    report = records.Report(env)
    start = time.perf_counter()
    for name, section in SECTIONS.items():
        if name in args.only:
            others = measure.OtherProcesses()
            section(config, report)
            print(f"\n{others}")
    report.summary()
    print(f"{time.perf_counter() - start:.0f} s in all")
    if args.csv:
        report.write_csv(args.csv)
    if args.json:
        report.write_json(args.json)
    if args.figure:
        draw(report, config, args.figure)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.linear",
        description="Speed and memory of chunked_ce.linear_cross_entropy on the CPU.",
    )
    add = parser.add_argument
    add("--tokens", type=positive, default=2048, metavar="N", help="default: %(default)s")
    add("--hidden", type=positive, default=768, metavar="D", help="default: %(default)s")
    add("--vocab", type=positive, default=50257, metavar="V", help="default: %(default)s")
    add("--threads", type=positive, default=2, metavar="T", help="default: %(default)s")
    add("--repeats", type=positive, default=5, metavar="R", help="default: %(default)s")
    add("--slow-repeats", type=positive, default=2, metavar="R",
        help="of " + ", ".join(linear_sections.SLOW) + "; default: %(default)s")  # fmt: skip
    add("--grid", action="store_true", help="more N at this V and more V at this N, as memory lets")
    sections = list(SECTIONS)
    add("--only", nargs="+", choices=sections, default=sections, metavar="SECTION",
        help="of " + ", ".join(sections))  # fmt: skip
    add("--without", nargs="+", choices=OPTIONAL, default=(), metavar="PROVIDER",
        help="leave out of " + ", ".join(OPTIONAL))  # fmt: skip
    add("--csv", type=writable, metavar="FILE", help="write the figures, one a row")
    add("--json", type=writable, metavar="FILE", help="write figures, ratios and bounds")
    add("--figure", type=_png, metavar="FILE.png", help="draw time and memory against N")
    return parser


def _png(text: str) -> Path:
    if not text.endswith(".png"):
        raise argparse.ArgumentTypeError(f"expected a name that ends in .png, got {text!r}")
    return writable(text)


def draw(report: records.Report, config: Config, path: Path) -> None:
    """Time and memory of forward + backward against N, at the V asked for."""
    from .figures import tokens

    tokens([row for row in report.rows() if int(row["V"]) == config.vocab], path)


if __name__ == "__main__":
    raise SystemExit(main())
