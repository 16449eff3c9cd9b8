"""Stage `counters`: what the GPU's own counters say of the kernels, by Nsight Compute (`ncu`).

The bytes read from memory show whether the streamed one-pass kernel finds its second read of a row
in the L2: then they are those of the logits, not twice that.
"""

from __future__ import annotations

import csv
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any

import torch

import chunked_ce

from ..providers import BACKEND
from ..records import Table
from .stage import ROOT, Context

COLUMNS = ("kernel", "launch", "metric", "value", "unit", "note")
METRICS = {
    "gpu__time_duration.sum": "duration",
    "dram__bytes_read.sum": "bytes read",
    "dram__bytes_write.sum": "bytes written",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": "memory throughput",
    "lts__t_sector_hit_rate.pct": "L2 hit rate",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "occupancy",
    "launch__registers_per_thread": "registers",
    "smsp__inst_executed.sum": "instructions of warps",
    "smsp__inst_executed_op_local_ld.sum": "loads of spilled registers, of warps",
}
KERNELS = "regex:token_stats_kernel|token_grad_kernel|loss_and_grad_kernel"
LOGITS = 8192 * 128256  # of every launch of the workload


def run(context: Context) -> int:
    """Write counters.csv: a row a kernel and metric. Without `ncu` its one row says so."""
    table = Table(context.out / "counters.csv", COLUMNS)
    workload = [
        sys.executable,
        "-m",
        "bench.gpu.stage",
        "counters.workload",
        str(context.out),
        "999",
    ]
    ncu = shutil.which("ncu")
    if context.dry or ncu is None:
        why = "a GPU's counters are not there in a dry run" if context.dry else "ncu is not here"
        table.add(note=why)
        print(why, flush=True)
        if not context.dry:
            return 0
        # The workload alone, so that it is known to run.
        return subprocess.run([*workload, "--dry-run"], cwd=ROOT).returncode
    command = [
        ncu, "--clock-control", "none", "-k", KERNELS, "--metrics", ",".join(METRICS),
        "--csv", "--page", "raw", "--print-units", "base", *workload,
    ]  # fmt: skip
    seconds = max(10.0, context.deadline - time.perf_counter())
    text = _output(command, seconds)
    (context.out / "ncu.txt").write_text(text, encoding="utf-8")
    rows = list(parse(text.splitlines()))
    for row in rows:
        table.add(**row)
        print(*row.values(), flush=True)
    if not rows:
        table.add(note=(text.strip().splitlines() or ["ncu said nothing"])[-1][:200])
    return 0


def _output(command: list[str], seconds: float) -> str:
    """Return the output of a command, which is ended in time with its children."""
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        errors="replace", start_new_session=True,
    )  # fmt: skip
    try:
        return process.communicate(timeout=seconds)[0]
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        return process.communicate()[0]


def parse(lines: Iterable[str]) -> Iterator[dict[str, object]]:
    """Yield the rows of `ncu --csv --page raw`: a header, its units, then a line a launch."""
    table = [line for line in lines if line.startswith('"')]
    reader = csv.DictReader(table)
    units = next(reader, {})
    for row in reader:
        for metric, name in METRICS.items():
            if text := row.get(metric):
                yield {
                    "kernel": row["Kernel Name"], "launch": row["ID"], "metric": name,
                    "value": text.replace(",", ""), "unit": units.get(metric, ""),
                }  # fmt: skip
        if text := row.get("smsp__inst_executed.sum"):
            value = 32 * float(text.replace(",", "")) / LOGITS
            yield {
                "kernel": row["Kernel Name"], "launch": row["ID"],
                "metric": "instructions per logit", "value": f"{value:.3f}", "unit": "",
            }  # fmt: skip


def workload(context: Context) -> int:
    """Run each main kernel once, over the same bytes of logits: what `ncu` watches."""
    workloads: tuple[tuple[int, dict[str, Any]], ...] = (
        (128256, {}),
        (128256, dict(grad_in_forward=True)),  # streamed
        (16032, dict(grad_in_forward=True)),  # on chip
    )
    for vocab, options in workloads:
        rows, columns = (2, 300) if context.dry else (LOGITS // vocab, vocab)
        x = torch.randn(rows, columns, device=context.device, dtype=torch.bfloat16)
        target = torch.randint(columns, (rows,), device=context.device)
        loss = chunked_ce.cross_entropy(x.requires_grad_(), target, backend=BACKEND, **options)
        loss.backward()
        context.synchronize()
        print(f"V={vocab} {options}: loss {float(loss.detach()):.4f}", flush=True)
    return 0
