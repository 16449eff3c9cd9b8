"""python -m bench run --suite cpu|gpu|quick     measures; writes one folder
python -m bench plot                             redraws every figure from the CSV files
python -m bench gpu [STAGE ...] [--dry-run]      checks and measures the kernels on a GPU"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from . import measure, records
from .cpu import positive
from .gpu import runner as gpu
from .linear_providers import Shape
from .suites import ALL_PROVIDERS, DTYPES, SUITES, Suite

RUNS = Path("runs/bench")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench", description="Benchmarks.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _run_command(commands.add_parser("run", help="measure a suite"))
    _plot_command(commands.add_parser("plot", help="draw the figures"))
    gpu.add_command(commands.add_parser("gpu", help="check and measure the kernels on a GPU"))
    args = parser.parse_args(arguments)
    try:
        return int(args.run(args))
    except ValueError as error:
        print(f"python -m bench: {error}", file=sys.stderr)
        return 2


def _run_command(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--suite", choices=SUITES, required=True,
        help=", ".join(f"{n}: {_minutes(s)}" for n, s in SUITES.items()))  # fmt: skip
    add("--device", choices=("cpu", "cuda"), help="default: the suite's")
    add("--out", type=Path, metavar="DIR", help=f"default: {RUNS}/SUITE")
    add("--provider", nargs="+", choices=ALL_PROVIDERS, metavar="PROVIDER",
        help="of " + ", ".join(ALL_PROVIDERS))  # fmt: skip
    add("--dtype", nargs="+", choices=DTYPES, help="default: the suite's")
    add("--tokens", type=positive, metavar="N", help="default: the suite's, as those below")
    add("--hidden", type=positive, metavar="D")
    add("--vocab", type=positive, nargs="+", metavar="V")
    add("--repeats", type=positive, metavar="R", help="rounds, at most")
    add("--threads", type=positive, metavar="T", help="of the CPU; default: torch's choice")
    parser.set_defaults(run=run)


def _plot_command(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("csv", nargs="*", type=Path, help=f"default: every results.csv under {RUNS}")
    add("--out", type=Path, metavar="DIR", help="default: beside each CSV")
    parser.set_defaults(run=plot)


def run(args: argparse.Namespace) -> int:
    """Return 1 where a result of ours was wrong."""
    from . import run as runner

    suite = _suite(args)
    device = args.device or suite.device
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            "device cuda is asked for, but there is no GPU here: give --suite cpu, or --device cpu "
            "with fewer --tokens"
        )
    out: Path = args.out or RUNS / args.suite
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file, expected a folder")
    if args.threads:
        torch.set_num_threads(args.threads)
    start = time.perf_counter()
    env = records.environment(_device_name(device))
    print(f"{env.device}; torch {env.torch}; triton {env.triton or '-'}; commit {env.commit}")
    print(_minutes(suite) if suite == SUITES[args.suite] else _at_most(suite) + " min", flush=True)
    report, others = records.Report(env), measure.OtherProcesses()
    current = runner.Run(suite, device, report, out)
    try:
        current.all()
    finally:  # what was measured since the last case is kept too
        current.write()
    print(f"\n{others}\n{time.perf_counter() - start:.0f} s in all; {out}/results.csv")
    for line in current.faults:
        print(f"WRONG  {line}")
    return 1 if current.faults else 0


def _suite(args: argparse.Namespace) -> Suite:
    suite = SUITES[args.suite]
    vocabularies = args.vocab or [shape.V for shape in suite.shapes]
    first = suite.shapes[0]
    shapes = (Shape(args.tokens or first.N, args.hidden or first.D, v) for v in vocabularies)
    return suite._replace(
        shapes=tuple(shapes),
        also=() if args.tokens or args.hidden or args.vocab or args.dtype else suite.also,
        dtypes=tuple(args.dtype or suite.dtypes),
        providers=tuple(args.provider or suite.providers),
        repeats=args.repeats or suite.repeats,
    )


def _minutes(suite: Suite) -> str:
    if suite.device == "cpu":
        return f"some {suite.minutes:g} min on 2 idle cores, {_at_most(suite)}"
    return f"some {suite.minutes:g} min, {_at_most(suite)}"


def _at_most(suite: Suite) -> str:
    return f"nothing begun after {suite.budget / 60:.2g}"


def _device_name(device: str) -> str:
    if device == "cuda":
        return str(torch.cuda.get_device_name())
    return f"{records.cpu_name()}, {torch.get_num_threads()} threads"


def plot(args: argparse.Namespace) -> int:
    files = args.csv or sorted(RUNS.glob("*/results.csv"))
    if not files:
        raise ValueError(f"nothing to draw under {RUNS}: python -m bench run --suite cpu first")
    if args.out and args.out.exists() and not args.out.is_dir():
        raise ValueError(f"--out {args.out} is a file, expected a folder")
    if args.out and len(files) > 1:
        raise ValueError(
            f"--out takes the figures of one CSV, got {len(files)}: name one, or omit it"
        )
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise ValueError(f"plot needs matplotlib: pip install -e '.[bench]' ({error})") from error
    from . import figures

    tables = {path: records.read_csv(path) for path in files}  # all read before one is drawn
    for path, rows in tables.items():
        folder = args.out or path.parent
        picture = None
        try:
            for picture in figures.draw_all(rows, folder):
                print(picture)
        except OSError as error:
            raise ValueError(f"{folder} cannot be written: {error.strerror or error}") from error
        if picture is None:
            print(f"{path}: no figure shows its rows")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
