"""Time of head and loss, predicted from a GPU's peak rates; nothing here is measured."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

import torch

from .. import checks
from .estimates import Estimate


class Gpu(NamedTuple):
    """Peak rates of a GPU, from its vendor's data sheet.

    >>> from chunked_ce.planner import GPUS
    >>> GPUS["h100"].bytes_per_second
    3350000000000.0
    """

    name: str
    half_flops: float  # a second, dense products of bfloat16 or float16
    float32_flops: float  # without TF32, which torch does not use by default
    bytes_per_second: float


GPUS: Mapping[str, Gpu] = MappingProxyType(
    {
        "a100": Gpu("A100 SXM 80 GB", 312e12, 19.5e12, 2.04e12),
        "h100": Gpu("H100 SXM", 989e12, 67e12, 3.35e12),
        "h200": Gpu("H200 SXM", 989e12, 67e12, 4.8e12),
        "b200": Gpu("B200 SXM", 2250e12, 80e12, 8.0e12),
    }
)
"""By the names that `chunked-ce plan --gpu` takes."""


def predicted_seconds(estimate: Estimate, dtype: torch.dtype, gpu: Gpu) -> float:
    """Return the time of forward and backward at the GPU's peak rates: a lower bound.

    Products and the loss's traffic are added up. Real kernels reach some 60 to 90 % of the peaks.

    Args:
        estimate: one of :func:`chunked_ce.planner.plan`'s for `device="cuda"`.
        dtype: of the head; bfloat16, float16 or float32.
        gpu: one of :data:`chunked_ce.planner.GPUS`, or rates of your own.

    Raises:
        ValueError: float64, whose rate is not known here.

    >>> import torch
    >>> from chunked_ce.planner import GPUS, HeadShape, plan, predicted_seconds
    >>> eager = plan(HeadShape(128256, 4096), tokens=8192)[0]
    >>> f"{1e3 * predicted_seconds(eager, torch.bfloat16, GPUS['h100']):.0f} ms"
    '30 ms'
    """
    checks.timed_dtype(dtype)
    flops = gpu.float32_flops if dtype == torch.float32 else gpu.half_flops
    return estimate.product_flops / flops + estimate.traffic_bytes / gpu.bytes_per_second
