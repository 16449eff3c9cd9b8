"""The machine for train_gpt.py: its device, Ctrl-C, and the time and peak memory of calls."""

from __future__ import annotations

import ctypes
import math
import os
import platform
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from text_data import InputError

REPEATS = 9
BUSY_CORES = 0.2  # used by other programs: enough to be said

Call = Callable[[], object]


def usable_device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.zeros((), dtype=torch.float64, device=device).item()  # Perplexity sums in float64
    except (AssertionError, NotImplementedError, RuntimeError, TypeError) as error:
        raise InputError(
            f"argument --device: {name!r} cannot be used here; expected cpu, or cuda with a GPU"
        ) from error
    return device


def make_repeatable(seed: int, device: torch.device) -> None:
    torch.manual_seed(seed)
    if device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore


def device_name(device: torch.device) -> str:
    """Return the model name of the GPU or of the processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


@contextmanager
def without_interruption() -> Iterator[None]:
    """Hold Ctrl-C back to the end of the block, so that a checkpoint is of whole steps."""
    pressed: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: pressed.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if pressed:
        raise KeyboardInterrupt


class Seconds(NamedTuple):
    median: float
    fastest: float
    slowest: float

    def __str__(self) -> str:
        median, fastest, slowest = (1e3 * value for value in self)
        return f"{median:.0f} ms ({fastest:.0f} - {slowest:.0f})"


def measure(
    step: Mapping[str, Call], loss: Mapping[str, Call], device: torch.device
) -> dict[str, Any]:
    """Measure training steps, and the head and the loss alone. Both have the same names."""
    others_start, clock_start = cpu_seconds_of_others(), time.perf_counter()
    loss_seconds, step_seconds = seconds_in_turns(loss, device), seconds_in_turns(step, device)
    others_took = cpu_seconds_of_others() - others_start
    return {
        "loss_extra_bytes": {name: extra_bytes(call, device) for name, call in loss.items()},
        "loss_seconds": loss_seconds,
        "step_seconds": step_seconds,
        "cores_used_by_others": others_took / (time.perf_counter() - clock_start),
    }


def seconds_in_turns(calls: Mapping[str, Call], device: torch.device) -> dict[str, Seconds]:
    """Time the calls in turns, so that what else the machine does falls on all alike."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for name in list(calls) * REPEATS:
        start = time.perf_counter()
        calls[name]()
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        times[name].append(time.perf_counter() - start)
    return {name: Seconds(median(t), min(t), max(t)) for name, t in times.items()}


def cpu_seconds_of_others() -> float:
    """Return what all other processes have used since the machine started; NaN if not known."""
    try:
        user, nice, system = map(int, Path("/proc/stat").read_text().split(maxsplit=4)[1:4])
    except OSError:
        return math.nan
    return (user + nice + system) / os.sysconf("SC_CLK_TCK") - sum(os.times()[:4])


def extra_bytes(call: Call, device: torch.device) -> int | None:
    """Return the peak of memory during a call, above what was held before; None if not known."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before
    if device.type != "cpu" or sys.platform != "linux":
        return None
    try:
        if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
            trim(0)  # else the heap's free memory hides a part of the peak
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again
        before = resident_bytes("VmRSS")
        call()
        return resident_bytes("VmHWM") - before
    except (OSError, KeyError):
        return None


def resident_bytes(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(dict(line.split(":", 1) for line in lines)[name].split()[0]) * 1024


def table(measured: dict[str, Any]) -> str:
    """Return a line for each call: median times, with the fastest and the slowest, and memory."""
    lines = [f"{'':24}{'step':>22}{'head and loss':>25}{'its extra memory':>19}"]
    for name, step in measured["step_seconds"].items():
        loss, extra = measured["loss_seconds"][name], measured["loss_extra_bytes"][name]
        memory = "not measured" if extra is None else f"{extra / 2**20:.0f} MiB"
        lines.append(f"{name:24}{str(step):>22}{str(loss):>25}{memory:>19}")
    lines.append(f"(median, fastest and slowest of {REPEATS} calls, in turns)")
    busy = measured["cores_used_by_others"]
    if busy > BUSY_CORES:
        lines.append(
            f"other programs used {busy:.1f} of {os.cpu_count()} cores meanwhile: "
            "compare the fastest times, or repeat on an idle machine"
        )
    return "\n".join(lines)
