"""What every benchmark measures with: interleaved timing, peak memory, results checked first.

Timings on a shared machine drift by tens of percent within a minute, so the things compared take
turns within one loop, where the drift falls on all of them; a ratio is a ratio of medians.
"""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

Key = TypeVar("Key")
Result = TypeVar("Result")
Loss = Callable[..., Tensor]  # of what the gradients are wanted of, and the targets


# Time


class Step(NamedTuple):
    run: Callable[[], object]
    reset: Callable[[], object] = lambda: None  # after each run, not timed


class Quantiles(NamedTuple):
    median: float
    q20: float
    q80: float

    def times(self, factor: float) -> Quantiles:
        return Quantiles(self.median * factor, self.q20 * factor, self.q80 * factor)


def forward(loss: Loss, *batch: Tensor) -> Step:
    """`batch`: leaves and targets, as the loss takes them."""
    batch = tuple(t.detach() for t in batch)

    def run() -> None:
        with torch.no_grad():
            loss(*batch)

    return Step(run)


def forward_backward(loss: Loss, *batch: Tensor) -> Step:
    *leaves, target = batch
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]

    def reset() -> None:
        for leaf in leaves:
            leaf.grad = None

    return Step(lambda: torch.autograd.backward(loss(*leaves, target)), reset)


STEPS = {"forward": forward, "forward+backward": forward_backward}


Clock = Callable[[Callable[[], object]], float]  # seconds that a call took


def wall_clock(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def cuda_events(run: Callable[[], object]) -> float:
    """The GPU's own time, launches and gaps between kernels included."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(end)) / 1e3


def clock_of(device: str) -> Clock:
    return cuda_events if device == "cuda" else wall_clock


def seconds(step: Step, calls: int = 1, clock: Clock = wall_clock) -> float:
    """Per call."""
    total = 0.0
    for _ in range(calls):
        total += clock(step.run)
        step.reset()
    return total / calls


def interleaved(
    steps: Mapping[Key, Step], repeats: int, calls: int = 1, clock: Clock = wall_clock
) -> dict[Key, Quantiles]:
    """Seconds per call of each step. The steps take turns, in an order that reverses each round."""
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


# Memory


def memory_is_measurable() -> bool:
    return Path("/proc/self/status").exists()


def is_out_of_memory(error: BaseException) -> bool:
    """Of a GPU, or of the CPU's allocator."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(
        said in str(error) for said in ("can't allocate memory", "not enough memory")
    )


def extra_peak_memory(run: Callable[[], Result]) -> tuple[int, Result]:
    """Bytes by which the process's peak during `run` exceeds what it held before; run's result.

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
    """Bytes that the caching allocator handed out at the peak, beyond those in use before."""
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


def in_fresh_process(function: Callable[..., Result], *arguments: Any) -> Result:
    """`function` by its importable name, in a Python started for it."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


# Correctness: a fast wrong answer is not reported


class Answer(NamedTuple):
    loss: Tensor
    gradient: Tensor


def answer(loss: Loss, logits: Tensor, target: Tensor) -> Answer:
    leaf = logits.detach().requires_grad_()
    value = loss(leaf, target)
    return Answer(value.detach(), *torch.autograd.grad(value, leaf))


def reference(logits: Tensor, target: Tensor) -> Answer:
    """Eager's, in fp32."""
    return answer(F.cross_entropy, logits.float(), target)


def check(name: str, got: Answer, expected: Answer) -> None:
    """Raises AssertionError unless loss and gradient agree to 1e-5, relatively.

    A half-precision gradient is rounded: it may differ by one unit.
    """
    rtol = max(1e-5, torch.finfo(got.gradient.dtype).eps)
    atol = 1e-6 / got.gradient.numel()
    torch.testing.assert_close(
        got.loss.float(), expected.loss, rtol=1e-5, atol=0, msg=_say(name, "loss")
    )
    torch.testing.assert_close(
        got.gradient.float(), expected.gradient, rtol=rtol, atol=atol, msg=_say(name, "gradient")
    )


def _say(name: str, what: str) -> Callable[[str], str]:
    return lambda message: f"{name}: its {what} is not eager's, so it is not timed. {message}"
