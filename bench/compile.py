"""Compiles every specialization of every kernel with the Triton that is installed. Needs no GPU.

    python -m bench.compile                         sm_80, sm_90, sm_100, gfx942; all dtypes
    python -m bench.compile --target sm_90 --dtype float16 --json built.json

`make compile` runs it once for each Triton version that is supported. The table gives registers
and spills of all variants, and instructions per bfloat16 logit of the three main kernels at
V = 50257 and 128256, with FP fusion and without. Exit code 1 where a kernel does not compile,
spills, or takes more than BOUNDS on sm_90.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch
import triton

from chunked_ce.backends import gpu
from chunked_ce.kernels import launch

from . import audit
from .compiled import build, launches
from .kernel_variants import DTYPES, every_call

TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
BOUNDS = {"statistics": 7.5, "gradient": 5.5, "one pass": 13.5}  # instructions per bfloat16 logit
VOCABULARIES = (50257, 128256)
HEADER = ("Triton", "target", "kernels", "variants", "registers", "spills", *BOUNDS)


class Variant(NamedTuple):
    """A specialization, as built."""

    target: str
    label: str
    kernel: str
    registers: int
    spills: int
    size: int
    error: str = ""


def variants(target: str, dtypes: Sequence[str]) -> list[Variant]:
    """Build all of them for one target."""
    built = []
    with (
        mock.patch.object(gpu, "architecture", lambda device: target),
        mock.patch.object(gpu, "l2_bytes", lambda device: 50 << 20),
    ):
        for label, call in every_call(target, [getattr(torch, name) for name in dtypes]):
            for made in launches(call):
                try:
                    b = build(made, target)
                except Exception as error:  # of the compiler, which has no common type
                    reason = f"{type(error).__name__}: {error}"
                    built.append(Variant(target, label, made.name, 0, 0, 0, reason))
                else:
                    numbers = (b.registers, b.spills, len(b.assembly))
                    built.append(Variant(target, label, made.name, *numbers))
    return built


def instructions(target: str, fusion: bool) -> dict[str, float]:
    """Return each main kernel's largest number of instructions per bfloat16 logit."""
    most: dict[str, float] = {}
    if target.startswith("gfx"):
        return most  # its machine code is not read
    with mock.patch.dict(launch.COMPILER, enable_fp_fusion=fusion):
        for vocab in VOCABULARIES:
            found = list(audit.audit(target, "bfloat16", vocab))
            for kernel in BOUNDS:
                count = audit.instructions_of([f for f in found if f.kernel == kernel])
                most[kernel] = max(most.get(kernel, 0.0), count)
    return most


def row(target: str, built: Sequence[Variant], counts: Sequence[dict[str, float]]) -> list[str]:
    return [
        triton.__version__,
        target,
        str(len({v.kernel for v in built})),
        str(len(built)),
        str(max(v.registers for v in built)),
        str(sum(v.spills for v in built)),
        *(" / ".join(f"{c[k]:.2f}" for c in counts if c) for k in BOUNDS),
    ]


def faults(built: Sequence[Variant], counts: Sequence[dict[str, float]]) -> list[str]:
    """Return one line for each error, spill or missed bound."""
    lines = [f"{v.target}, {v.kernel}, {v.label}: {v.error}" for v in built if v.error]
    lines += [
        f"{v.target}, {v.kernel}, {v.label}: {v.spills} bytes spilled" for v in built if v.spills
    ]
    lines += [
        f"{kernel}: {count[kernel]:.2f} instructions per logit, at most {bound} expected"
        for count in counts
        for kernel, bound in BOUNDS.items()
        if count and count[kernel] > bound
    ]
    return lines


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m bench.compile", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    names = [str(d).removeprefix("torch.") for d in DTYPES]
    parser.add_argument("--target", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--dtype", nargs="+", choices=names, default=names)
    parser.add_argument("--json", type=Path, metavar="FILE", help="every variant")
    args = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET") == "1":
        print("TRITON_INTERPRET=1: an interpreted Triton cannot compile; unset it", file=sys.stderr)
        return 2
    print("Instructions per bfloat16 logit: with FP fusion / without.")
    print(" | ".join(HEADER))
    everything: list[Variant] = []
    wrong: list[str] = []
    with ProcessPoolExecutor(len(os.sched_getaffinity(0)), get_context("spawn")) as pool:
        builds = [pool.submit(variants, target, args.dtype) for target in args.target]
        counting = [
            [pool.submit(instructions, target, fusion) for fusion in (True, False)]
            for target in args.target
        ]
        for target, building, counted in zip(args.target, builds, counting, strict=True):
            built, counts = building.result(), [c.result() for c in counted]
            print(" | ".join(row(target, built, counts)), flush=True)
            wrong += faults(built, counts if target == "sm_90" else ())
            everything += built
    if args.json:
        args.json.write_text(json.dumps([v._asdict() for v in everything], indent=1))
    print("\n".join(wrong), end="\n" if wrong else "")
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
