"""Binary cross-entropy by Triton: gives the kernel its strides, launches."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..core.head import compute_dtype
from ..kernels import launch
from ..kernels.binary import binary_kernel
from . import gpu
from .strided_rows import Rows, strided_rows


def total(
    input: Tensor,
    labels: Tensor | None,  # as input
    weight: Tensor | None,
    pos_weight: Tensor | None,
    left_out: Tensor | None,  # [rows, K] ascending
) -> Tensor:
    """[] sum of all losses but those left out."""
    segments = launch.segments(input.shape[-1])
    rows = input.numel() // input.shape[-1]
    parts = torch.empty(rows, segments, dtype=compute_dtype(input.dtype), device=input.device)
    _launch(input, labels, weight, pos_weight, None, None, parts, left_out)
    return parts.sum(dtype=torch.float64).to(parts.dtype)


def elementwise(
    input: Tensor, labels: Tensor | None, weight: Tensor | None, pos_weight: Tensor | None
) -> Tensor:
    """The loss of each logit."""
    out = torch.empty_like(input, dtype=compute_dtype(input.dtype))
    _launch(input, labels, weight, pos_weight, out, None, None, None)
    return out


def gradient(
    input: Tensor,
    labels: Tensor | None,
    weight: Tensor | None,
    pos_weight: Tensor | None,
    upstream: Tensor,  # as input, expanded where it is one number
) -> Tensor:
    grad = torch.empty_like(input)
    _launch(input, labels, weight, pos_weight, grad, upstream, None, None)
    return grad


def _launch(
    input: Tensor,
    labels: Tensor | None,
    weight: Tensor | None,
    pos_weight: Tensor | None,
    out: Tensor | None,
    upstream: Tensor | None,
    parts: Tensor | None,
    left_out: Tensor | None,
) -> None:
    classes = input.shape[-1]
    contiguous = input.stride(-1) == 1
    tile = launch.tile(
        gpu.architecture(input.device), classes, input.element_size(),
        contiguous=contiguous, plain=False,
    )  # fmt: skip
    if not contiguous or weight is not None or pos_weight is not None:  # 64-bit addresses a logit
        tile = tile._replace(GROUPS=max(1, tile.GROUPS // 2))
    names = ("x", "y", "w", "v", "out", "up")
    given = (input, labels, weight, pos_weight, out, upstream)
    present = [(name, t) for name, t in zip(names, given, strict=True) if t is not None]
    per_row = 0 if left_out is None else left_out.shape[-1]
    for flat, views in strided_rows(*(t for _, t in present)):
        rows = dict(zip((name for name, _ in present), views, strict=True))
        x = rows["x"]
        with gpu.on(input.device):
            binary_kernel[(x.shape[0] * x.shape[1], launch.segments(classes))](
                **{f"{name}_ptr": None for name in ("y", "w", "v", "out")}
                | {f"{name}_ptr": r.data for name, r in rows.items() if name != "up"},
                part_ptr=None if parts is None else parts[flat],
                upstream_ptr=rows["up"].data if "up" in rows else None,
                label_ptr=None if left_out is None else left_out[flat],
                labels_per_row=per_row,
                classes=classes,
                segments=launch.segments(classes),
                inner_rows=x.shape[1],
                **_strides(names, rows),
                GRADIENT=upstream is not None,
                CONTIGUOUS=contiguous,
                **_layout("Y", rows.get("y"), x),
                **_layout("OUT", rows.get("out"), x),
                SEGMENT=launch.SEGMENT,
                LABELS=1 << max(0, per_row - 1).bit_length(),
                **tile.arguments(),
            )


def _strides(names: tuple[str, ...], rows: dict[str, Rows]) -> dict[str, int]:
    arguments: dict[str, int] = {}
    for name in names:
        r = rows.get(name)
        outer, inner, along = (0, 0, 0) if r is None else r.stride
        arguments |= {
            f"{name}_offset": 0 if r is None else r.offset,
            f"{name}_stride_outer": outer,
            f"{name}_stride_inner": inner,
            f"{name}_stride_v": along,
        }
    return arguments


def _layout(name: str, rows: Rows | None, x: Rows) -> dict[str, Any]:
    contiguous = rows is not None and rows.stride[2] == 1
    aligned = (
        rows is not None
        and contiguous
        and x.stride[2] == 1
        and rows.data.element_size() == x.data.element_size()
        and rows.alignment() == x.alignment()
    )
    return {f"{name}_CONTIGUOUS": contiguous, f"{name}_ALIGNED": aligned}
