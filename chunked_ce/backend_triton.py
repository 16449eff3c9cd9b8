"""The Triton backend: allocates, gives the kernels their strides, launches."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from itertools import product
from math import prod
from typing import Any

import torch
from torch import Tensor

from .blocks import Head, compute_dtype
from .kernels import launch
from .kernels.token_grad import token_grad_kernel
from .kernels.token_stats import token_stats_kernel
from .stats import Coefficients, TokenStats


def row_statistics(
    input: Tensor,
    target: Tensor,
    ignore_index: int,
    vocab_size: int,
    head: Head,
    *,
    entropy: bool,
    mean_logprob: bool,
    rank: bool,
    argmax: bool,
) -> tuple[TokenStats, Tensor]:
    """The statistics of every row, flat, and what rounding took from lse."""
    target = target.reshape(-1).contiguous()
    dtype = compute_dtype(input.dtype)

    def new(dtype: torch.dtype) -> Tensor:
        return torch.empty(target.numel(), dtype=dtype, device=input.device)

    lse, logprob, lse_low = new(dtype), new(dtype), new(dtype)
    stats = TokenStats(
        lse,
        logprob,
        entropy=new(dtype) if entropy else None,
        mean_logprob=new(dtype) if mean_logprob else None,
        rank=new(torch.int64) if rank else None,
        argmax=new(torch.int64) if argmax else None,
    )
    tile = launch.tile(vocab_size, input.element_size(), strided=input.stride(-1) != 1)
    for rows, (x,) in _strided_rows(input):
        outputs = (
            lse if out is None else out for out in stats[2:]
        )  # one not asked for is not touched
        entropy_out, mean_out, rank_out, argmax_out = (out[rows] for out in outputs)
        with _on(input.device):
            token_stats_kernel[(x.shape[0] * x.shape[1],)](
                x_ptr=x,
                target_ptr=target[rows],
                lse_ptr=lse[rows],
                logprob_ptr=logprob[rows],
                lse_low_ptr=lse_low[rows],
                entropy_ptr=entropy_out,
                mean_logprob_ptr=mean_out,
                rank_ptr=rank_out,
                argmax_ptr=argmax_out,
                vocab_size=vocab_size,
                ignore_index=ignore_index,
                inner_rows=x.shape[1],
                stride_outer=x.stride(0),
                stride_inner=x.stride(1),
                stride_v=x.stride(2),
                ENTROPY=entropy,
                MEAN_LOGPROB=mean_logprob,
                RANK=rank,
                ARGMAX=argmax,
                **_head_arguments(head),
                **tile._asdict(),
            )
    return stats, lse_low


def logits_gradient(
    input: Tensor,
    target: Tensor,
    lse: Tensor,
    logprob: Tensor,
    lse_low: Tensor,
    coefficients: Coefficients,
    ignore_index: int,
    vocab_size: int,
    head: Head,
    *,
    inplace: bool,
) -> Tensor:
    """dL/dinput, in a new tensor or over `input`."""
    grad = input if inplace else torch.empty_like(input)
    target = target.reshape(-1).contiguous()
    tile = launch.tile(input.shape[-1], input.element_size(), strided=input.stride(-1) != 1)
    programs_per_row = -(-input.shape[-1] // (launch.GRAD_TILES * tile.columns))
    for rows, (x, out) in _strided_rows(input, grad):
        a, b, c, u = (lse[rows] if number is None else number[rows] for number in coefficients)
        with _on(input.device):
            token_grad_kernel[(x.shape[0] * x.shape[1], programs_per_row)](
                x_ptr=x,
                grad_ptr=out,
                target_ptr=target[rows],
                lse_ptr=lse[rows],
                logprob_ptr=logprob[rows],
                lse_low_ptr=lse_low[rows],
                a_ptr=a,
                b_ptr=b,
                c_ptr=c,
                u_ptr=u,
                columns_in_memory=input.shape[-1],
                vocab_size=vocab_size,
                ignore_index=ignore_index,
                inner_rows=x.shape[1],
                x_stride_outer=x.stride(0),
                x_stride_inner=x.stride(1),
                x_stride_v=x.stride(2),
                grad_stride_outer=out.stride(0),
                grad_stride_inner=out.stride(1),
                grad_stride_v=out.stride(2),
                HAS_A=coefficients.a is not None,
                HAS_B=coefficients.b is not None,
                HAS_C=coefficients.c is not None,
                HAS_U=coefficients.u is not None,
                TILES=launch.GRAD_TILES,
                **_head_arguments(head),
                **tile._asdict(),
            )
    return grad


def _head_arguments(head: Head) -> dict[str, Any]:
    return dict(
        softcap=1.0 if head.softcap is None else head.softcap,
        logit_scale=head.logit_scale,
        HAS_SOFTCAP=head.softcap is not None,
        HAS_SCALE=head.logit_scale != 1.0,
    )


def _strided_rows(*tensors: Tensor) -> Iterator[tuple[slice, list[Tensor]]]:
    """Tensors of one shape [..., V] as views [outer, inner, V], with the flat rows each covers.

    Almost always one view: leading dimensions are merged wherever their strides allow.
    """
    sizes: list[int] = []
    strides: list[list[int]] = []
    for dim, size in enumerate(tensors[0].shape[:-1]):
        here = [t.stride(dim) for t in tensors]
        if size == 1:
            continue
        if sizes and all(
            above == size * stride for above, stride in zip(strides[-1], here, strict=True)
        ):
            sizes[-1] *= size
            strides[-1] = here
        else:
            sizes.append(size)
            strides.append(here)
    while len(sizes) < 2:
        sizes.insert(0, 1)
        strides.insert(0, [0] * len(tensors))
    rows = sizes[-2] * sizes[-1]
    if prod(sizes) == 0:
        return
    for piece, index in enumerate(product(*(range(size) for size in sizes[:-2]))):
        views = []
        for i, t in enumerate(tensors):
            offset = t.storage_offset() + sum(
                k * s[i] for k, s in zip(index, strides, strict=False)
            )
            shape = (sizes[-2], sizes[-1], t.shape[-1])
            views.append(
                t.as_strided(shape, (strides[-2][i], strides[-1][i], t.stride(-1)), offset)
            )
        yield slice(piece * rows, (piece + 1) * rows), views


def _on(device: torch.device) -> AbstractContextManager[Any]:
    """Triton launches on the current device, which need not be the tensors'."""
    return nullcontext() if device.type == "cpu" else torch.get_device_module(device).device(device)
