"""Binary cross-entropy with Triton: collect addresses and strides, and launch the kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.head import COMPUTE_DTYPE
from ..kernels import launch
from ..kernels.arguments import BinaryOptions
from ..kernels.binary import binary_kernel
from . import gpu
from .strided_rows import Rows, strided_rows
from .triton import on_device


def loss_sum(
    input: Tensor,
    labels: Tensor | None,  # as input
    weight: Tensor | None,
    pos_weight: Tensor | None,
    left_out: Tensor | None,  # [rows, K] ascending
) -> Tensor:
    """Return the sum [] of all losses but those left out."""
    segments = launch.segments(input.shape[-1])
    rows = input.numel() // input.shape[-1]
    parts = torch.empty(rows, segments, dtype=COMPUTE_DTYPE[input.dtype], device=input.device)
    _launch(input, labels, weight, pos_weight, None, None, parts, left_out)
    return parts.sum(dtype=torch.float64).to(parts.dtype)


def elementwise(
    input: Tensor, labels: Tensor | None, weight: Tensor | None, pos_weight: Tensor | None
) -> Tensor:
    """Return the loss of each logit."""
    out = torch.empty_like(input, dtype=COMPUTE_DTYPE[input.dtype])
    _launch(input, labels, weight, pos_weight, out, None, None, None)
    return out


def gradient(
    input: Tensor,
    labels: Tensor | None,
    weight: Tensor | None,
    pos_weight: Tensor | None,
    upstream: Tensor,  # shape of input; expanded if it is one number
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
    if not contiguous or weight is not None or pos_weight is not None:  # 64-bit addresses
        tile = tile._replace(GROUPS=max(1, tile.GROUPS // 2))
    tensors = dict(x=input, y=labels, w=weight, v=pos_weight, out=out, upstream=upstream)
    present = {name: t for name, t in tensors.items() if t is not None}
    per_row = 0 if left_out is None else left_out.shape[-1]
    segments = launch.segments(classes)
    for flat, views in strided_rows(*present.values()):
        rows = dict(zip(present, views, strict=True))
        x = rows["x"]
        address = x.address()
        with on_device(input.device):
            binary_kernel[(x.shape[0] * x.shape[1], segments)](
                x=address,
                # The logits stand in for absent tensors.
                **{
                    name: rows[name].address() if name in rows else address
                    for name in ("y", "w", "v", "out", "upstream")
                },
                part_ptr=x.data if parts is None else parts[flat],
                label_ptr=x.data if left_out is None else left_out[flat],
                labels_per_row=per_row,
                columns=classes,
                segments=segments,
                inner_rows=x.shape[1],
                SEGMENT=launch.SEGMENT,
                LABELS=1 << max(0, per_row - 1).bit_length(),
                OPTIONS=_options(rows, left_out is not None),
                **tile.arguments(),
            )


def _options(rows: dict[str, Rows], has_left_out: bool) -> BinaryOptions:
    contiguous = {name: r.stride[2] == 1 for name, r in rows.items()}
    aligned = {name: rows[name].is_aligned_as(rows["x"]) for name in ("y", "out") if name in rows}
    return BinaryOptions(
        GRADIENT="upstream" in rows,
        HAS_Y="y" in rows,
        HAS_W="w" in rows,
        HAS_V="v" in rows,
        HAS_OUT="out" in rows,
        HAS_LEFT_OUT=has_left_out,
        CONTIGUOUS=contiguous["x"],
        Y_CONTIGUOUS=contiguous.get("y", False),
        Y_ALIGNED=aligned.get("y", False),
        W_CONTIGUOUS=contiguous.get("w", False),
        V_CONTIGUOUS=contiguous.get("v", False),
        UPSTREAM_CONTIGUOUS=contiguous.get("upstream", False),
        OUT_CONTIGUOUS=contiguous.get("out", False),
        OUT_ALIGNED=aligned.get("out", False),
    )
