"""Divergences of two rows of logits by Triton: gives the kernels their strides, launches."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..core.divergence import KINDS, Divergence, PairStats
from ..core.head import COMPUTE_DTYPE
from ..kernels import launch
from ..kernels.arguments import PairOptions
from ..kernels.pair import PairNumbers, pair_grad_kernel, pair_stats_kernel
from . import gpu
from .strided_rows import Rows, strided_rows
from .triton import on_device


def pair_stats(
    input: Tensor,  # [..., V] logits of the student
    teacher: Tensor,  # [..., at least vocab_size]
    ignored: Tensor | None,  # [rows]
    how: Divergence,
    vocab_size: int,
) -> PairStats:
    """Return the statistics of every pair of rows, flat."""
    rows, dtype = input.shape[:-1].numel(), COMPUTE_DTYPE[input.dtype]
    stats = PairStats(
        *(torch.empty(rows, dtype=dtype, device=input.device) for _ in PairStats._fields)
    )
    _fill(stats, input, teacher, ignored, how, vocab_size, has_norms=False)
    return stats


def pair_terms(
    input: Tensor,
    teacher: Tensor,
    ignored: Tensor | None,  # [rows]
    stats: PairStats,
    how: Divergence,
    vocab_size: int,
) -> PairStats:
    """Return the statistics with `loss` and `student_kl` of these classes, flat."""
    stats = PairStats(*(t.clone(memory_format=torch.contiguous_format) for t in stats))
    _fill(stats, input, teacher, ignored, how, vocab_size, has_norms=True)
    return stats


def _fill(
    stats: PairStats,
    input: Tensor,
    teacher: Tensor,
    ignored: Tensor | None,
    how: Divergence,
    vocab_size: int,
    has_norms: bool,
) -> None:
    for flat, (x, y) in strided_rows(input, teacher):
        with on_device(input.device):
            pair_stats_kernel[(x.shape[0] * x.shape[1],)](
                numbers=PairNumbers(*(t[flat] for t in stats)),
                **_arguments(x, y, None, ignored, flat, how, vocab_size, has_norms),
            )


def pair_gradient(
    input: Tensor,
    teacher: Tensor,
    ignored: Tensor | None,  # [rows]
    stats: PairStats,
    upstream: Tensor,  # [rows]
    how: Divergence,
    vocab_size: int,
    *,
    inplace: bool = False,
) -> Tensor:
    """Return dL/dinput, in a new tensor or over `input`."""
    grad = input if inplace else torch.empty_like(input)
    upstream = upstream.to(COMPUTE_DTYPE[input.dtype]).contiguous()
    stats = PairStats(*(t.contiguous() for t in stats))
    for flat, (x, y, out) in strided_rows(input, teacher, grad):
        given = _arguments(x, y, out, ignored, flat, how, vocab_size)
        span = launch.SPAN_TILES * given["TILE"].GROUPS * given["TILE"].WIDTH
        with on_device(input.device):
            pair_grad_kernel[(x.shape[0] * x.shape[1], -(-x.shape[2] // span))](
                numbers=PairNumbers(*(t[flat] for t in stats)),
                grad=out.address(),
                upstream_ptr=upstream[flat],
                columns_in_memory=x.shape[2],
                SPAN=span,
                **given,
            )
    return grad


def _arguments(
    x: Rows,
    y: Rows,
    grad: Rows | None,
    ignored: Tensor | None,
    flat: slice,
    how: Divergence,
    vocab_size: int,
    has_norms: bool = False,
) -> dict[str, Any]:
    """What both kernels take."""
    contiguous = x.stride[2] == 1
    tile = launch.tile(
        gpu.architecture(x.data.device), vocab_size, x.data.element_size(),
        contiguous=contiguous and y.stride[2] == 1, plain=False,
    )  # fmt: skip
    if how.kind == "jsd":  # its mixture wants registers: sm_100 spilled
        tile = tile._replace(GROUPS=max(1, tile.GROUPS // 2))
    options = PairOptions(
        KIND=KINDS.index(how.kind),
        HAS_IGNORED=ignored is not None,
        HAS_NORMS=has_norms,
        PADDED=vocab_size < x.shape[2],
        CONTIGUOUS=contiguous,
        Y_CONTIGUOUS=y.stride[2] == 1,
        Y_ALIGNED=y.is_aligned_as(x),
        GRAD_CONTIGUOUS=grad is not None and grad.stride[2] == 1,
        GRAD_ALIGNED=grad is not None and grad.is_aligned_as(x),
    )
    return dict(
        x=x.address(),
        y=y.address(),
        ignored_ptr=x.data if ignored is None else ignored[flat].contiguous(),
        inner_rows=x.shape[1],
        vocab_size=vocab_size,
        temperature=how.temperature,
        beta=how.beta,
        OPTIONS=options,
        **tile.arguments(),
    )
