"""Binary cross-entropy and the scaling of gradients with the kernels in C."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from ..core.head import COMPUTE_DTYPE
from . import cpu_library
from .cpu_library import DTYPES, Elementwise, Rows
from .strided_rows import strided_rows

_SUM, _LOSS, _GRADIENT, _SCALE = range(4)


def loss_sum(
    input: Tensor,
    labels: Tensor | None,  # as input
    weight: Tensor | None,
    pos_weight: Tensor | None,
    left_out: Tensor | None,  # [rows, K] int32, ascending
) -> Tensor:
    """Return the sum [] of all losses but those left out."""
    sum = _run(_SUM, input, None, labels, weight, pos_weight, left_out=left_out)
    return torch.tensor(sum, dtype=COMPUTE_DTYPE[input.dtype])


def elementwise(
    input: Tensor, labels: Tensor | None, weight: Tensor | None, pos_weight: Tensor | None
) -> Tensor:
    """Return the loss of each logit."""
    out = torch.empty_like(input, dtype=COMPUTE_DTYPE[input.dtype])
    _run(_LOSS, input, out, labels, weight, pos_weight)
    return out


def gradient(
    input: Tensor,
    labels: Tensor | None,
    weight: Tensor | None,
    pos_weight: Tensor | None,
    upstream: Tensor,  # shape of input; expanded if it is one number
) -> Tensor:
    grad = torch.empty_like(input)
    _run(_GRADIENT, input, grad, labels, weight, pos_weight, upstream)
    return grad


def scale_(grad: Tensor, upstream: Tensor) -> None:
    """Multiply grad [..., V] in place by upstream [...] or []. Zeros stay 0."""
    upstream = upstream if upstream.dim() == 0 else upstream.reshape(*grad.shape[:-1], 1)
    _run(_SCALE, grad, grad, upstream=upstream.expand(grad.shape))


def _run(
    kind: int,
    input: Tensor,
    out: Tensor | None,
    labels: Tensor | None = None,
    weight: Tensor | None = None,
    pos_weight: Tensor | None = None,
    upstream: Tensor | None = None,
    left_out: Tensor | None = None,
) -> float:
    """Run an elementwise call. Return the sum of the losses, or 0 for other kinds."""
    library = cpu_library.LIBRARY
    assert library is not None
    names = ("x", "out", "label", "weight", "pos_weight", "upstream")
    arguments = (input, out, labels, weight, pos_weight, upstream)
    tensors = {
        name: t.detach() if t.dtype in DTYPES else t.detach().to(COMPUTE_DTYPE[input.dtype])
        for name, t in zip(names, arguments, strict=True)
        if t is not None
    }
    if not all(t.data_ptr() for t in tensors.values()):
        raise ValueError("logits without memory, as fake tensors are: pass backend='torch'")
    sum = 0.0
    for flat, views in strided_rows(*tensors.values()):
        job = Elementwise(
            outer=views[0].shape[0], inner=views[0].shape[1], columns=input.shape[-1],
            kind=kind, threads=torch.get_num_threads(),
        )  # fmt: skip
        for name, view in zip(tensors, views, strict=True):
            start = view.data.data_ptr() + view.offset * view.data.element_size()
            setattr(job, name, Rows(start, view.stride, DTYPES[view.data.dtype]))
        if left_out is not None:
            left_out = left_out.contiguous()
            job.left_out_per_row = left_out.shape[-1]
            job.left_out = left_out.data_ptr() + 4 * flat.start * left_out.shape[-1]
        if library.chunked_ce_elementwise(ctypes.byref(job)):
            raise MemoryError("no memory for the sums of the tasks of a binary cross-entropy")
        sum += job.loss_sum
    return sum
