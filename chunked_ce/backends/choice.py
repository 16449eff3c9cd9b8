"""Which backend runs: the one asked for, or the best one for a device."""

from __future__ import annotations

import importlib.util
import os

import torch

from .. import checks
from . import cpu_library

_TRITON_INSTALLED = importlib.util.find_spec("triton") is not None

# As Triton reads it, and when it does: a change after the import comes too late for both.
_INTERPRETED = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")


def choose_backend(backend: str, device: torch.device) -> str:
    checks.backend_name(backend)
    if backend == "triton":
        checks.triton_can_run(
            device,
            installed=_TRITON_INSTALLED,
            interpreted=_INTERPRETED,
        )
    if backend == "cpu":
        checks.cpu_can_run(device, built=cpu_library.is_there())
    if backend == "auto":
        if device.type in ("cuda", "xpu") and _TRITON_INSTALLED:
            return "triton"
        return "cpu" if device.type == "cpu" and cpu_library.is_there() else "torch"
    return backend
