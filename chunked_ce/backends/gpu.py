"""What the launch tables ask of a device."""

from __future__ import annotations

import warnings
from functools import cache

import torch

from ..kernels import launch


@cache
def architecture(device: torch.device) -> str:
    """Its row in the launch tables; one that is not there is said once to use the generic row."""
    if device.type == "cpu":  # Triton's interpreter
        return "generic"
    properties = torch.get_device_module(device).get_device_properties(device)
    name = getattr(properties, "gcnArchName", "").split(":")[0]
    if not name and hasattr(properties, "major"):
        name = f"sm_{properties.major}{properties.minor}"
    if name not in launch.TABLE:
        warnings.warn(
            f"chunked_ce has no launch table for {name or device.type}: it uses the generic one, "
            "which is correct but perhaps not the fastest (`python -m bench gpu tune` measures "
            "the choices)",
            stacklevel=2,
        )
        return "generic"
    return name


@cache
def processors(device: torch.device) -> int:
    """Streaming multiprocessors (compute units)."""
    if device.type == "cpu":
        return 1
    properties = torch.get_device_module(device).get_device_properties(device)
    for name in ("multi_processor_count", "gpu_subslice_count"):
        if hasattr(properties, name):
            return int(getattr(properties, name))
    return 64


@cache
def l2_bytes(device: torch.device) -> int:
    """Of the cache that all processors share."""
    if device.type == "cpu":
        return 1 << 20
    properties = torch.get_device_module(device).get_device_properties(device)
    return int(getattr(properties, "L2_cache_size", 0)) or 16 << 20
