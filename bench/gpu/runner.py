"""Check and measure the kernels on a GPU.

    python -m bench gpu                       all stages
    python -m bench gpu check speed           some
    python -m bench gpu --dry-run             all, tiny, on the CPU, in Triton's interpreter

Each stage runs in a process of its own with its own time limit. All files go to one folder, and a
row is in its file as soon as it is known, so a stop loses nothing. Nothing needs a network.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from .. import options
from ..records import Table, read_table
from .stage import ROOT
from .versions import installed_interpreter_fault

# Seconds. A stage begins nothing after 90 % of its limit, and is ended at it.
LIMITS = {"check": 540, "speed": 420, "tune": 240, "counters": 180, "train": 300}
MACHINE_LIMIT = 60
STOPPED = 124  # as `timeout` says it


def _parser() -> argparse.ArgumentParser:
    parser = options.parser_of("gpu", __doc__)
    add = parser.add_argument
    add("stages", nargs="*", metavar="STAGE",
        help="of " + ", ".join(LIMITS) + "; default: all, in this order")  # fmt: skip
    add("--out", type=Path, metavar="DIR", help="default: runs/bench/gpu, or .../gpu-dry-run")
    add("--dry-run", action="store_true", help="tiny, on the CPU, in Triton's interpreter")
    defaults = ", ".join(f"{stage} {seconds}" for stage, seconds in LIMITS.items())
    add("--limit", type=_seconds, metavar="SECONDS", help=f"of each stage; default: {defaults}")
    return parser


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a positive number of seconds, got {text!r}")
    return value


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the stages. Return 0, or 1 where a kernel was wrong or a stage failed."""
    args = _parser().parse_args(arguments)
    if unknown := [stage for stage in args.stages if stage not in LIMITS]:
        raise ValueError(f"no stage {unknown[0]!r}, expected one of {', '.join(LIMITS)}")
    if not args.dry_run and not torch.cuda.is_available():
        raise ValueError("there is no GPU here; --dry-run tries the programs on the CPU")
    if args.dry_run and (fault := installed_interpreter_fault()):
        raise ValueError(fault)
    out: Path = args.out or Path("runs/bench") / ("gpu-dry-run" if args.dry_run else "gpu")
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file, expected a folder")
    out.mkdir(parents=True, exist_ok=True)
    stages = [stage for stage in LIMITS if stage in args.stages or not args.stages]
    if "check" in stages:  # speed must not go by what an earlier run has found
        (out / "check.csv").unlink(missing_ok=True)
    table = Table(out / "stages.csv", ("stage", "result", "seconds"))
    bad = []
    for stage in ["machine", *stages]:
        limit = args.limit or LIMITS.get(stage, MACHINE_LIMIT)
        start = time.perf_counter()
        code = run_stage(stage, out, limit, args.dry_run)
        result = {0: "done", 1: "found faults", STOPPED: f"stopped after {limit:g} s"}.get(
            code, f"ended with exit code {code}"
        )
        table.add(stage=stage, result=result, seconds=time.perf_counter() - start)
        print(f"== {stage}: {result} ({time.perf_counter() - start:.0f} s)", flush=True)
        bad += [stage] if code else []
    table.close()
    _say_what_is_wrong(out)
    print(f"{out}: {', '.join(sorted(p.name for p in out.iterdir()))}")
    return 1 if bad else 0


def _say_what_is_wrong(out: Path) -> None:
    for row in read_table(out / "check.csv"):
        if row["result"] == "wrong":
            print("WRONG", row["kernel"], row["input"], row["detail"], flush=True)


def environment(dry: bool) -> dict[str, str]:
    """Return a stage's variables. The interpreter is chosen before Triton is imported."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    names = os.environ | {
        "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", "PYTHONWARNINGS": "ignore",
        "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1",
    }  # fmt: skip
    names.pop("TRITON_INTERPRET", None)
    if dry:
        names |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    return names


def run_stage(stage: str, out: Path, limit: float, dry: bool) -> int:
    """Return the stage's exit code. Its lines go to the screen and to STAGE.log."""
    command = [sys.executable, "-m", "bench.gpu.stage", stage, str(out.resolve()), f"{0.9 * limit}"]
    process = subprocess.Popen(
        [*command, "--dry-run"] if dry else command,
        cwd=ROOT, env=environment(dry), start_new_session=True,  # its children end with it
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
    )  # fmt: skip
    stopped = threading.Event()

    def stop() -> None:
        stopped.set()
        _end(process)

    timer = threading.Timer(limit, stop)
    timer.start()
    try:
        with (out / f"{stage}.log").open("w", encoding="utf-8") as log:
            assert process.stdout is not None
            for line in process.stdout:
                log.write(line)
                print(line, end="", flush=True)
        code = process.wait()
    finally:
        timer.cancel()
        _end(process)
    return STOPPED if stopped.is_set() else code


def _end(process: subprocess.Popen[str]) -> None:
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        process.kill()


if __name__ == "__main__":
    raise SystemExit(main())
