"""Stage `train`: examples/train_gpt.py as it stands, fused, and fused and compiled."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from ..records import Table
from .stage import ROOT, Context

COLUMNS = ("run", "quantity", "value", "note")
WAYS: dict[str, tuple[str, ...]] = {
    "plain": (), "fused": ("--fused",), "fused, compiled": ("--fused", "--compile"),
}  # fmt: skip
SIZE = (
    "--steps 300 --batch-size 32 --context 256 --layers 6 --width 512 --heads 8 --dtype bfloat16"
).split()
TINY = (
    "--steps 2 --batch-size 1 --context 16 --layers 1 --width 16 --heads 2 --vocab-size 300"
).split()


def run(context: Context) -> int:
    """Write train.csv: the numbers of each run's report. Return 1 where a run fails."""
    table = Table(context.out / "train.csv", COLUMNS)
    failed = False
    for way, options in WAYS.items():
        left = context.deadline - time.perf_counter()
        if left <= 0:
            table.add(run=way, note="out of time")
            continue
        if context.dry and "--compile" in options:
            table.add(run=way, note="not run: the compiler's time is left out of a dry run")
            continue
        failed |= not _train(context, table, way, options, left)
    return int(failed)


def _train(
    context: Context, table: Table, way: str, options: tuple[str, ...], seconds: float
) -> bool:
    name = "train_" + "_".join(way.replace(",", "").split())
    command = [sys.executable, str(ROOT / "examples/train_gpt.py"), *options]
    command += ["--name", name, "--device", context.device]
    pages = map(str, sorted((ROOT / "docs").glob("*.md")))
    command += [*TINY, "--text", *pages] if context.dry else SIZE
    with tempfile.TemporaryDirectory() as folder:  # of the report alone is something kept
        return _run([*command, "--out", folder], context, table, way, Path(folder) / name, seconds)


def _run(
    command: list[str], context: Context, table: Table, way: str, folder: Path, seconds: float
) -> bool:
    start = time.perf_counter()
    try:
        done = subprocess.run(
            command, cwd=ROOT, timeout=seconds, text=True, errors="replace",
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        table.add(run=way, note="out of time")
        return True
    taken = time.perf_counter() - start
    lines = done.stdout.strip().splitlines()
    if done.returncode:
        print(done.stdout[-3000:], flush=True)
        table.add(run=way, note=f"exit code {done.returncode}: {(lines or [''])[-1][:200]}")
        return False
    text = (folder / "report.json").read_text(encoding="utf-8")
    (context.out / f"{folder.name}.json").write_text(text, encoding="utf-8")
    report = json.loads(text)
    for quantity, value in numbers(report).items():
        table.add(run=way, quantity=quantity, value=value)
    print(f"{way}: {taken:.0f} s", flush=True)
    return True


def numbers(report: Any, prefix: str = "") -> dict[str, float]:
    """Return all numbers of a report by their path; of a list the last."""
    if isinstance(report, bool):
        return {}
    if isinstance(report, (int, float)):
        return {prefix: report}
    if isinstance(report, list):
        return numbers(report[-1], prefix) if report else {}
    found: dict[str, float] = {}
    if isinstance(report, dict):
        for key, value in report.items():
            found |= numbers(value, f"{prefix}.{key}" if prefix else key)
    return found
