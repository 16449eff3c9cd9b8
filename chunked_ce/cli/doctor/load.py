"""How busy this machine is: cores that other processes use, and memory that is free."""

from __future__ import annotations

import os
import time
from pathlib import Path

_SAMPLE_SECONDS = 0.5
_GIB = 1 << 30


def busy_cores() -> str:
    """Return how many cores other processes keep busy, from half a second of /proc/stat."""
    before, start = _seconds_of_others(), time.perf_counter()
    time.sleep(_SAMPLE_SECONDS)
    after = _seconds_of_others()
    if before is None or after is None:
        return "not known here"
    busy = max(0.0, after - before) / (time.perf_counter() - start)
    cores = os.cpu_count() or 1
    hint = "; timings are not the library's own" if busy > 0.25 * cores else ""
    return f"other processes use {busy:.1f} of {cores} cores{hint}"


def _seconds_of_others() -> float | None:
    """Return CPU seconds of all processes but this one and its children, or None without /proc."""
    try:
        line = Path("/proc/stat").read_text().split("\n", 1)[0].split()
    except OSError:
        return None
    user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, line[1:9])
    total = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
    return total - sum(os.times()[:4])


def free_memory() -> str:
    """Return the memory that is free, and all there is."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        sizes = {line.split(":")[0]: int(line.split()[1]) << 10 for line in lines}
        return free_of(sizes["MemAvailable"], sizes["MemTotal"])
    except (OSError, KeyError):
        return "not known here"


def free_of(free: int, total: int) -> str:
    """Return how much of the memory is free."""
    return f"{free / _GIB:.1f} of {total / _GIB:.1f} GiB free"
