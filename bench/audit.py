"""What the compiler makes of every kernel, and what that lets a GPU do. Needs no GPU.

    python -m bench.audit --target sm_90 --dtype bfloat16 --vocab 50257 128256
    python -m bench.audit --against liger          the same figures of Liger-Kernel's loops
    python -m bench.audit --pairs                  of the kernels of two rows, distillation's
    python -m bench.audit --growth                 programs and bytes from N = 1 to a million
    python -m bench.audit --csv audit.csv --json audit.json

Compiles the launches that the library really makes, for GPUs that are not here, and reads the
machine code. `instr` and `ex2` are per logit: of a loop, or of a whole kernel that has none. A
bound is the least time that memory traffic and instruction issue allow a GPU; it is not a
measurement. CTAs are those resident on one SM by registers and warps; `in flight` the bytes their
loads ask for before the first arrives.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

from chunked_ce.backends import clusters, gpu, triton_pair
from chunked_ce.backends import triton as backend_triton
from chunked_ce.core.divergence import KINDS, Divergence, PairStats
from chunked_ce.core.gradient import Coefficients
from chunked_ce.core.head import Head
from chunked_ce.core.row_stats import UNIFORM

from . import sass
from .compiled import TARGETS, Built, Launch, build, launches


class Gpu(NamedTuple):
    """From the makers' data sheets; the clock is the one that issue can hold."""

    name: str
    target: str
    processors: int
    gigahertz: float
    terabytes: float  # of memory traffic a second
    l2_bytes: int


GPUS = (
    Gpu("A100", "sm_80", 108, 1.41, 1.94, 40 << 20),
    Gpu("L40S", "sm_89", 142, 2.52, 0.864, 96 << 20),
    Gpu("H100", "sm_90", 132, 1.755, 3.35, 50 << 20),
    Gpu("H200", "sm_90", 132, 1.755, 4.8, 50 << 20),
    Gpu("B200", "sm_100", 148, 1.85, 8.0, 126 << 20),
    Gpu("MI300X", "gfx942", 304, 2.1, 5.3, 4 << 20),
)
ISSUE = 4 * 32  # instructions that the lanes of an SM start in a cycle
ROWS = 8192
VOCABULARIES = (32000, 50257, 128256, 151936, 262144)
DTYPES = ("bfloat16", "float16", "float32")
CLUSTERED = ("sm_90", "sm_100")
THREADS = {"sm_89": 1536}  # that an SM holds; 2048 elsewhere


class Finding(NamedTuple):
    """One loop, or one kernel without loops."""

    provider: str
    target: str
    dtype: str
    vocab: int
    kernel: str
    part: str
    registers: int
    spills: int
    shared: int
    ctas_per_sm: int
    in_flight: int  # bytes an SM
    instructions: float | None  # per logit; None where the machine code is not read
    exponentials: float | None
    accesses: str
    bytes_per_logit: float


Call = Callable[[], Any]


def calls(vocab: int, dtype: torch.dtype, rows: int = ROWS) -> dict[str, tuple[Call, float]]:
    """Return by name: (a call of the backend, bytes of memory that it moves per logit)."""
    x = torch.empty(rows, vocab, dtype=dtype, device="meta")
    target = torch.empty(rows, dtype=torch.int64, device="meta")
    numbers = torch.empty(rows, device="meta")
    divisor = torch.empty((), device="meta")
    plain = Head(None, 1.0)
    no_statistics = dict.fromkeys(("entropy", "mean_logprob", "rank", "argmax"), False)

    def statistics() -> Any:
        return backend_triton.row_statistics(
            x, target, -100, vocab, plain, UNIFORM, **no_statistics
        )

    def gradient() -> Any:
        only_c = Coefficients(None, None, numbers, None)
        return backend_triton.logits_gradient(
            x, target, numbers, numbers, numbers, only_c, -100, vocab, plain, inplace=False
        )

    def one_pass(on_clusters: bool) -> Call:
        return lambda: backend_triton.loss_and_gradient(
            x, target, None, divisor, 0.0, 0.0, -100, vocab, plain,
            inplace=True, on_clusters=on_clusters,
        )  # fmt: skip

    size = dtype.itemsize
    return {
        "statistics": (statistics, size),
        "gradient": (gradient, 2 * size),
        "one pass": (one_pass(False), 2 * size),
        "one pass, clusters": (one_pass(True), 2 * size),
    }


def pair_calls(vocab: int, dtype: torch.dtype) -> dict[str, tuple[Call, float]]:
    """Return the same of two rows of logits. Statistics read both rows twice."""
    x, y = (torch.empty(ROWS, vocab, dtype=dtype, device="meta") for _ in range(2))
    numbers, found = torch.empty(ROWS, device="meta"), dict[str, tuple[Call, float]]()
    stats = PairStats(*[numbers] * len(PairStats._fields))
    for kind in KINDS:
        how = Divergence(kind, 0.5, 2.0)
        given = (x, y, None, stats, numbers, how, vocab)
        found[f"pair statistics, {kind}"] = (
            partial(triton_pair.pair_stats, x, y, None, how, vocab), 4 * dtype.itemsize
        )  # fmt: skip
        found[f"pair gradient, {kind}"] = (
            partial(triton_pair.pair_gradient, *given), 3 * dtype.itemsize
        )  # fmt: skip
    return found


def recorded(call: Call, on: Gpu) -> list[Launch]:
    """Return the launches of `call` on a GPU."""
    with (
        mock.patch.object(gpu, "architecture", lambda device: on.target),
        mock.patch.object(gpu, "processors", lambda device: on.processors),
        mock.patch.object(gpu, "l2_bytes", lambda device: on.l2_bytes),
        mock.patch.object(backend_triton, "on_device", lambda device: nullcontext()),
        mock.patch.object(triton_pair, "on_device", lambda device: nullcontext()),
    ):
        return launches(call)


def audit(target: str, dtype: str, vocab: int, pairs: bool = False) -> Iterator[Finding]:
    on = next(g for g in GPUS if g.target == target)
    audited = pair_calls if pairs else calls
    for name, (call, moved) in audited(vocab, getattr(torch, dtype)).items():
        for launch in recorded(call, on):
            if launch.name == "merge_parts_kernel":
                continue  # a few numbers a row
            if name == "one pass, clusters" and not (
                target in CLUSTERED
                and clusters.triton_supports_clusters()
                and launch.arguments.get("num_ctas", 1) > 1
            ):
                continue  # no other than "one pass", or not to be had
            built = build(launch, target)
            found = findings("chunked_ce", target, dtype, vocab, name, launch, built, moved)
            for i, finding in enumerate(found):  # of pairs the second visit brings the divergence
                second = pairs and i and finding.part == "sums"
                yield finding._replace(part="divergence") if second else finding


def findings(
    provider: str, target: str, dtype: str, vocab: int, name: str,
    launch: Launch, built: Built, moved: float, tile: int | None = None,
) -> Iterator[Finding]:  # fmt: skip
    arguments = launch.arguments
    tile = tile or math.prod(arguments["TILE"])
    warps, ctas = arguments.get("num_warps", 4), arguments.get("num_ctas", 1)
    per_thread = tile / (warps * ctas * TARGETS[target].warp_size)
    threads = warps * TARGETS[target].warp_size
    resident = min(
        65536 // (threads * -(-built.registers // 8) * 8), THREADS.get(target, 2048) // threads
    )
    if target.startswith("gfx"):
        resident = 0  # not computed
    shared = (resident, resident * tile // ctas * getattr(torch, dtype).itemsize)
    measures = (built.registers, built.spills, built.shared, *shared)

    def finding(part: str, code: sass.Code | None, logits: float) -> Finding:
        if code is None:
            return Finding(provider, target, dtype, vocab, name, part, *measures,
                           None, None, "", moved)  # fmt: skip
        accesses = " ".join((*code.loads, *code.stores))
        rates = (code.instructions / logits, code.exponentials / logits)
        return Finding(provider, target, dtype, vocab, name, part, *measures,
                       *rates, accesses, moved)  # fmt: skip

    if target.startswith("gfx"):
        yield finding("kernel", None, 1)
    elif getattr(arguments.get("OPTIONS"), "ON_CHIP", False):
        # A tile of a power of two holds the row: per logit that exists.
        yield finding("whole row", sass.whole(built.assembly), per_thread * vocab / tile)
    else:
        yield from (finding(c.name, c, per_thread) for c in sass.loops(built.assembly))


def bound(on: Gpu, instructions: float, moved: float, logits: float) -> tuple[float, str]:
    """Return (lower bound in seconds on a GPU, which resource sets it: memory or issue)."""
    memory = logits * moved / (on.terabytes * 1e12)
    issue = logits * instructions / (on.processors * ISSUE * on.gigahertz * 1e9)
    return max((memory, "memory"), (issue, "issue"))


def bounds(found: Sequence[Finding], rows: int = ROWS) -> Iterator[tuple[str, ...]]:
    for on in GPUS:
        for kernel in dict.fromkeys(f.kernel for f in found):
            parts = [f for f in found if f.kernel == kernel and f.target == on.target]
            if not parts or any(f.instructions is None for f in parts):
                continue
            vocab, moved = parts[0].vocab, parts[0].bytes_per_logit
            seconds, because = bound(on, instructions_of(parts), moved, rows * vocab)
            yield on.name, kernel, f"{seconds * 1e3:.3f}", because


def instructions_of(parts: Sequence[Finding]) -> float:
    """Return a kernel's instructions per logit: its summing loop plus its shortest writing loop."""
    best: dict[str, float] = {}
    for f in parts:
        if f.part != "zeros" and f.instructions is not None:
            best[f.part] = min(best.get(f.part, f.instructions), f.instructions)
    return sum(best.values())


def liger(target: str, dtype: str, vocab: int) -> Iterator[Finding]:
    """Yield the findings about Liger-Kernel's cross-entropy, one kernel with two loops."""
    from liger_kernel.ops import cross_entropy as ops

    x = torch.empty(ROWS, vocab, dtype=getattr(torch, dtype), device="meta")
    tile = min(32768, 1 << (vocab - 1).bit_length())
    blackwell = target == "sm_100" and x.element_size() == 2
    warps = 16 if target.startswith("gfx") else 8 if blackwell else 32
    numbers = torch.empty(ROWS, device="meta")
    values = dict(
        X_ptr=x, X_stride=vocab, Y_ptr=torch.empty(ROWS, dtype=torch.int64, device="meta"),
        Y_stride=1, weight_ptr=None, loss_ptr=numbers, z_loss_ptr=None, loss_stride=1,
        token_accuracy_ptr=None, token_accuracy_stride=0, predicted_tokens_ptr=None,
        predicted_tokens_stride=0, n_cols=vocab, n_non_ignore=float(ROWS),
        sum_non_ignore_weight=float(ROWS), weight_sum=0.0, ignore_index=-100, lse_square_scale=0.0,
        label_smoothing=0.0, reduction="mean", softcap=None, RETURN_Z_LOSS=False,
        RETURN_TOKEN_ACCURACY=False, RETURN_PREDICTED_TOKENS=False, BLOCK_SIZE=tile,
        HAS_WEIGHT=False, HAS_SOFTCAPPING=False, HAS_GRADIENTS=True, num_warps=warps,
    )  # fmt: skip
    launch = Launch(ops.liger_cross_entropy_kernel, (ROWS,), values)
    built = build(launch, target)
    moved = 3 * x.element_size()
    yield from findings("liger", target, dtype, vocab, "one kernel", launch, built, moved, tile)


def growth(target: str = "sm_90") -> Iterator[tuple[str, ...]]:
    """Yield rows with programs, bytes moved and buffers of the launches, for growing N and V."""
    on = next(g for g in GPUS if g.target == target)
    for vocab in (32, 1000, 50257, 128256, 1200000):
        for rows in (1, 8, 64, 512, 4096, 65536, 1048576):
            row = [str(rows), str(vocab)]
            for name, (call, moved) in calls(vocab, torch.bfloat16, rows).items():
                if name == "one pass, clusters":
                    continue
                made = recorded(call, on)
                grids = " + ".join("x".join(map(str, launch.grid)) for launch in made)
                row += [grids, f"{moved * rows * vocab:.3g}"]
                if name == "statistics":
                    row.append(str(sum(_bytes(b) for b in made[0].arguments["parts"])))
            yield tuple(row)


def _bytes(t: Tensor) -> int:
    return t.numel() * t.element_size()


GROWTH_HEADER = (
    "N", "V", "statistics_programs", "statistics_bytes", "partial_buffer_bytes",
    "gradient_programs", "gradient_bytes", "one_pass_programs", "one_pass_bytes",
)  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(arguments)
    if args.growth:
        rows = list(growth(args.target[0]))
        _table(GROWTH_HEADER, rows)
        if args.csv:
            _write_csv(args.csv, GROWTH_HEADER, rows)
        return 0
    found: list[Finding] = []
    for target in args.target:
        for dtype in args.dtype:
            for vocab in args.vocab:
                target_findings = list(audit(target, dtype, vocab, args.pairs))
                if args.against:
                    target_findings += liger(target, dtype, vocab)
                found += target_findings
                print(f"\n## {target}, {dtype}, V = {vocab}\n")
                _table(
                    ("provider", "kernel", "part", "regs", "spills", "shared", "CTAs", "in flight",
                     "instr", "ex2", "bytes", "accesses"),
                    [_row(f) for f in target_findings],
                )  # fmt: skip
                ours = [f for f in target_findings if f.provider == "chunked_ce"]
                if lines := list(bounds(ours)):
                    print(f"\nLower bounds for N = {ROWS}, not measurements:\n")
                    _table(("GPU", "kernel", "ms", "bound by"), lines)
    if args.csv:
        _write_csv(args.csv, Finding._fields, found)
    if args.json:
        args.json.write_text(json.dumps([f._asdict() for f in found], indent=1))
    return 0


def _row(f: Finding) -> tuple[str, ...]:
    def number(x: float | None) -> str:
        return "" if x is None else f"{x:.2f}"

    return (
        f.provider, f.kernel, f.part, str(f.registers), str(f.spills), str(f.shared),
        str(f.ctas_per_sm), str(f.in_flight), number(f.instructions), number(f.exponentials),
        f"{f.bytes_per_logit:g}", f.accesses,
    )  # fmt: skip


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    for row in (header, *rows):
        print("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip())


def _write_csv(path: Path, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        for row in rows:
            writer.writerow([f"{x:.4g}" if isinstance(x, float) else x for x in row])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.audit", description="The compiled kernels, read without a GPU."
    )
    add = parser.add_argument
    add("--target", nargs="+", choices=list(TARGETS), default=["sm_90"])
    add("--dtype", nargs="+", choices=DTYPES, default=["bfloat16"])
    add("--vocab", nargs="+", type=_vocab, default=list(VOCABULARIES), metavar="V")
    add("--against", choices=["liger"], help="a peer that is installed")
    add("--pairs", action="store_true", help="the kernels of two rows of logits instead")
    add("--growth", action="store_true", help="what launches do as N and V grow")
    add("--csv", type=Path, metavar="FILE")
    add("--json", type=Path, metavar="FILE")
    return parser


def _vocab(text: str) -> int:
    if not text.isdecimal() or not 0 < int(text) < 2**31:
        raise argparse.ArgumentTypeError(f"expected a number of classes, got {text!r}")
    return int(text)


if __name__ == "__main__":
    raise SystemExit(main())
