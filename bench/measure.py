"""Measure time and memory: interleaved rounds, busy cores, peak bytes.

Timings on a shared machine drift by tens of percent within a minute, so the things compared take
turns within one loop, where the drift falls on all of them; a ratio is a ratio of medians.
"""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

Key = TypeVar("Key")
Result = TypeVar("Result")


# Time


class Quantiles(NamedTuple):
    median: float
    q20: float
    q80: float


Step = Callable[[], object]
Clock = Callable[[Step], float]  # seconds that a call took


def wall_clock(run: Step) -> float:
    """Return the seconds of a call. The release of its result is not timed."""
    start = time.perf_counter()
    result = run()
    taken = time.perf_counter() - start
    del result
    return taken


def cuda_events(run: Step) -> float:
    """Return the GPU's own time, launches and gaps between kernels included."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(end)) / 1e3


def clock_of(device: str) -> Clock:
    return cuda_events if device == "cuda" else wall_clock


def seconds(step: Step, calls: int = 1, clock: Clock = wall_clock) -> float:
    """Return the seconds per call."""
    return sum(clock(step) for _ in range(calls)) / calls


def interleaved(
    steps: Mapping[Key, Step], repeats: int, calls: int = 1, clock: Clock = wall_clock
) -> dict[Key, Quantiles]:
    """Return the seconds per call. The steps take turns, in an order that reverses each round."""
    names = list(steps)
    samples: dict[Key, list[float]] = {name: [] for name in names}
    for step in steps.values():
        seconds(step, calls, clock)  # warm-up
    for turn in range(repeats):
        for name in names if turn % 2 == 0 else reversed(names):
            samples[name].append(seconds(steps[name], calls, clock))
    return {name: _quantiles(of_step) for name, of_step in samples.items()}


def _quantiles(samples: Sequence[float]) -> Quantiles:
    at = torch.tensor([0.5, 0.2, 0.8], dtype=torch.float64)
    median, q20, q80 = torch.tensor(samples, dtype=torch.float64).quantile(at).tolist()
    return Quantiles(median, q20, q80)


class OtherProcesses:
    """As text: how much of the CPU they have taken since this object was made."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._taken = self._seconds()

    def __str__(self) -> str:
        if self._taken is None or (now := self._seconds()) is None:
            return "what other processes took of the CPU is not known: needs /proc"
        cores = max(0.0, now - self._taken) / (time.perf_counter() - self._start)
        return f"other processes, compilers included, took {cores:.2f} cores of {os.cpu_count()}"

    @staticmethod
    def _seconds() -> float | None:
        try:
            all_cores = Path("/proc/stat").read_text().split("\n", 1)[0].split()
        except OSError:
            return None
        user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, all_cores[1:9])
        busy = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
        return busy - sum(os.times()[:4])  # ours, and our children's


@contextmanager
def spinning(count: int) -> Iterator[None]:
    """Keep `count` cores busy meanwhile, by processes that only spin and end with this one."""
    code = "import os\nparent = os.getppid()\nwhile os.getppid() == parent: sum(range(1000))"
    processes = [subprocess.Popen([sys.executable, "-S", "-c", code]) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


# Memory


def memory_is_measurable() -> bool:
    return Path("/proc/self/status").exists()


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether a GPU or the CPU's allocator had no memory left."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(
        said in str(error) for said in ("can't allocate memory", "not enough memory")
    )


def extra_peak_memory(run: Callable[[], Result]) -> tuple[int, Result]:
    """Return the bytes of the process's peak during `run` beyond those before, and its result.

    For a process that has done nothing bigger yet: where the kernel refuses to forget an older,
    higher peak, that one is measured.
    """
    gc.collect()
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # what earlier steps freed is not held any more
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    before = _status("VmRSS")
    result = run()
    return _status("VmHWM") - before, result


def extra_peak_cuda_memory(run: Callable[[], Result]) -> tuple[int, Result]:
    """Return the peak bytes of the caching allocator beyond those before, and the result."""
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before, result


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def free_bytes(device: str) -> float:
    """Return the memory that a process can still have; infinite where nobody says."""
    if device == "cuda":
        cached = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        return float(torch.cuda.mem_get_info()[0] + cached)  # the allocator reuses what it holds
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return float("inf")
    return next(int(line.split()[1]) * 1024.0 for line in lines if line.startswith("MemAvailable"))


def release() -> None:
    """Release the memory held by a failure's traceback and cached by the GPU's allocator."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def in_fresh_process(function: Callable[..., Result], *arguments: Any) -> Result:
    """Call `function`, by its importable name, in a Python started for it."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()
