"""The first stage: which machine this is, and the rates that bound every kernel on it."""

from __future__ import annotations

import subprocess

import torch

from .. import measure
from ..records import Table, cpu_name, one_line, read_table, version_of
from .stage import Context

ROUNDS = 10


def run(context: Context) -> int:
    """Print one line and write machine.csv: quantity, value, unit."""
    table = Table(context.out / "machine.csv", ("quantity", "value", "unit"))
    names = {
        "device": cpu_name() if context.dry else torch.cuda.get_device_name(),
        "driver": "-" if context.dry else _driver(),
        "torch": torch.__version__,
        "triton": version_of("triton") or "-",
    }
    for quantity, value in names.items():
        table.add(quantity=quantity, value=value)
    rates = ceilings(context)
    for quantity, (rate, unit) in rates.items():
        table.add(quantity=quantity, value=rate, unit=unit)
    texts = [f"{name} {value}" for name, value in list(names.items())[1:]]
    texts += [f"{quantity} {rate:.4g} {unit}" for quantity, (rate, unit) in rates.items()]
    print("; ".join([names["device"], *texts]), flush=True)
    return 0


def ceilings(context: Context) -> dict[str, tuple[float, str]]:
    """Measure bytes copied (read and written), bytes read, and a bf16 matrix product, a second."""
    size = 1 << (20 if context.dry else 32)
    source = torch.zeros(size // 8, dtype=torch.int64, device=context.device)
    target = torch.empty_like(source)
    n = 64 if context.dry else 8192
    matrix = torch.randn(n, n, device=context.device).bfloat16()
    steps = {
        "copy bandwidth": lambda: target.copy_(source),
        "read bandwidth": lambda: source.sum(),
        "matrix rate": lambda: matrix @ matrix,
    }
    clock = measure.clock_of(context.device)
    median = {k: q.median for k, q in measure.interleaved(steps, ROUNDS, clock=clock).items()}
    return {
        "copy bandwidth": (2 * size / median["copy bandwidth"] / 1e9, "GB/s"),
        "read bandwidth": (size / median["read bandwidth"] / 1e9, "GB/s"),
        "matrix rate": (2 * n**3 / median["matrix rate"] / 1e12, "TFLOP/s"),
    }


def measured(context: Context, quantity: str) -> float | None:
    """Return a rate that this stage has written, or None where it did not come so far."""
    for row in read_table(context.out / "machine.csv"):
        if row["quantity"] == quantity:
            return float(row["value"])
    return None


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"unknown ({one_line(error, 60)})"
    return (done.stdout.splitlines() or ["unknown"])[0].strip()
