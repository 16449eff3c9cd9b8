"""What this machine has, which backend runs here and why, and whether its functions are right.

For `chunked-ce doctor`, whose output goes into a bug report.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

from ... import backends
from ...backends import choose_backend, clusters, cpu_library, gpu
from . import load
from .self_check import checks_of

_PACKAGES = ("chunked-ce", "torch", "triton", "transformers", "numpy")
_VARIABLES = (
    "CHUNKED_CE_CACHE", "CHUNKED_CE_CHECK_TARGETS", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS",
    "TRITON_INTERPRET",
)  # fmt: skip


class Finding(NamedTuple):
    """One line of the report."""

    section: str
    what: str
    result: str
    ok: bool = True
    is_check: bool = False  # of a function, of which there are many


def examine() -> Iterator[Finding]:
    """Yield everything: it takes seconds on a CPU, and on a GPU the time to compile kernels."""
    yield from _versions()
    for device in _devices():
        yield from _device(device)
    for device in _devices():
        for backend in _backends(device):
            yield from _operators(device, backend)


def _versions() -> Iterator[Finding]:
    for package in _PACKAGES:
        yield Finding("versions", package, _version(package))
    if backends.TRITON_INSTALLED:
        yield _attempt("versions", "kernels", _import_kernels)
    yield Finding("versions", "python", platform.python_version())
    yield Finding("versions", "system", f"{platform.system()} {platform.machine()}")
    built_for = torch.version.cuda or torch.version.hip
    yield Finding("versions", "torch built for", f"GPU runtime {built_for}" if built_for else "CPU")
    for name in _VARIABLES:
        if name in os.environ:
            hidden = name == "CUDA_VISIBLE_DEVICES" and not os.environ[name].strip()
            yield Finding(
                "versions", name, "empty: no GPU is visible" if hidden else os.environ[name]
            )


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package) or "unknown"
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
    except Exception as error:  # whatever broken metadata raise
        return f"unknown ({type(error).__name__})"


def _import_kernels() -> str:
    from ...backends import triton as backend_triton  # noqa: F401

    return "can be imported"


def _devices() -> list[torch.device]:
    found = [torch.device("cpu")]
    for kind in ("cuda", "xpu"):
        if torch.get_device_module(kind).is_available():
            count = torch.get_device_module(kind).device_count()
            found += [torch.device(kind, index) for index in range(count)]
    return found


def _device(device: torch.device) -> Iterator[Finding]:
    section = f"device {device}"
    backend = choose_backend("auto", device)
    yield Finding(section, "backend", f"{backend}: {_reason(device, backend)}")
    if device.type == "cpu":
        yield Finding(section, "threads", f"{torch.get_num_threads()} of {os.cpu_count()} cores")
        yield _attempt(section, "busy cores", load.busy_cores)
        yield _attempt(section, "memory", load.free_memory)
        return
    yield _attempt(section, "name", lambda: str(_properties(device).name))
    yield _attempt(section, "memory", lambda: _gpu_memory(device))
    yield _attempt(section, "processors", lambda: str(gpu.processors(device)))
    if backend == "triton":
        yield _attempt(section, "launch table", lambda: _launch_row(device))
        yield _attempt(section, "clusters of CTAs", lambda: _clusters(device))


def _properties(device: torch.device) -> Any:
    return torch.get_device_module(device).get_device_properties(device)


def _gpu_memory(device: torch.device) -> str:
    total = _properties(device).total_memory
    if device.type != "cuda":
        return f"{total / 2**30:.1f} GiB"
    return load.free_of(torch.cuda.mem_get_info(device)[0], total)


def _reason(device: torch.device, backend: str) -> str:
    if device.type == "cpu":
        return (
            _built()
            + "; Triton's kernels need a GPU"
            + (
                ", or backend='triton' now that they are interpreted"
                if backends.INTERPRETED and backends.TRITON_INSTALLED
                else ""
            )
        )
    if backend == "triton":
        return "a GPU, and triton is installed"
    return "triton is not installed; with it (pip install 'chunked-ce[triton]') the kernels run"


def _built() -> str:
    """Return which of the CPU kernels there are, and which is in use."""
    names = [file.stem.removeprefix("cpu_") for file in cpu_library.built_libraries()]
    if not names:
        return "the kernels in C were not built: no C compiler when chunked-ce was installed"
    file, built = cpu_library.path(), ", ".join(names)
    if file is None or not cpu_library.IS_AVAILABLE:
        return f"kernels in C built for {built}, of which none can be loaded"
    return f"kernels in C built for {built}; in use: {file.stem.removeprefix('cpu_')}"


def _launch_row(device: torch.device) -> str:
    from ...kernels import launch

    name = gpu.architecture(device)
    row = launch.TABLE.get(name, launch.GENERIC)
    return f"{name}: tiles of {row.groups} x 16 bytes, {row.num_warps} warps"


def _clusters(device: torch.device) -> str:
    if not clusters.is_supported(device):
        return "not used: they need sm_90 and Triton 3.8"
    return "agree, and are used" if clusters.check(device) else "disagree, and are not used"


def _attempt(section: str, what: str, find_out: Callable[[], str]) -> Finding:
    """Return what was found out, or the failure, which is what the report is for."""
    start = time.perf_counter()
    try:
        result, ok = find_out(), True
    except Exception as error:
        lines = str(error).strip().splitlines() or ["-"]
        result, ok = f"FAILED: {type(error).__name__}: {lines[0][:160]}", False
    taken = time.perf_counter() - start
    return Finding(section, what, result + (f" ({taken:.1f} s)" if taken >= 1 else ""), ok)


def _backends(device: torch.device) -> list[str]:
    names = ["torch"]
    if device.type == "cpu" and cpu_library.IS_AVAILABLE:
        names.insert(0, "cpu")
    if backends.TRITON_INSTALLED and (device.type != "cpu" or backends.INTERPRETED):
        names.insert(0, "triton")
    return names


def _operators(device: torch.device, backend: str) -> Iterator[Finding]:
    section = f"operators, {device}, {backend}"
    for name, check in checks_of(device, backend).items():
        for dtype in (torch.float32, torch.bfloat16):
            what = f"{name}, {str(dtype).removeprefix('torch.')}"
            found = _attempt(section, what, lambda c=check, d=dtype: c(device, backend, d))  # type: ignore[misc]
            yield found._replace(is_check=True)
