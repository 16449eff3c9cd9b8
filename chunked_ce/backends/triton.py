"""The Triton backend: allocates, gives the kernels their strides, launches."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..core.gradient import Coefficients
from ..core.head import Head, compute_dtype
from ..core.row_stats import UNIFORM, ClassWeights, RowStatistics, TokenStats
from ..kernels import launch
from ..kernels.finish import finish_kernel
from ..kernels.loss_and_grad import loss_and_grad_kernel
from ..kernels.scale import scale_kernel
from ..kernels.token_grad import token_grad_kernel
from ..kernels.token_stats import token_stats_kernel
from . import gpu
from .strided_rows import Rows, strided_rows


def row_statistics(
    input: Tensor,
    target: Tensor,
    ignore_index: int,
    vocab_size: int,
    head: Head,
    weights: ClassWeights = UNIFORM,
    *,
    entropy: bool,
    mean_logprob: bool,
    rank: bool,
    argmax: bool,
) -> RowStatistics:
    """The statistics of every row, flat."""
    target = target.reshape(-1).contiguous()

    def new(dtype: torch.dtype) -> Tensor:
        return torch.empty(target.shape, dtype=dtype, device=input.device)

    floats = compute_dtype(input.dtype)
    lse, logprob, lse_low = new(floats), new(floats), new(floats)
    stats = TokenStats(
        lse,
        logprob,
        entropy=new(floats) if entropy else None,
        mean_logprob=new(floats) if mean_logprob else None,
        rank=new(torch.int64) if rank else None,
        argmax=new(torch.int64) if argmax else None,
    )
    if not mean_logprob:
        weights = UNIFORM
    mass = None if weights.are_one else new(floats)
    wanted = dict(ENTROPY=entropy, MEAN_LOGPROB=mean_logprob, RANK=rank, ARGMAX=argmax)
    sums = launch_sums(input, target, ignore_index, vocab_size, head, weights, **wanted)
    for flat, shared in sums:
        # One not asked for is not touched.
        outputs = (lse if out is None else out for out in stats[2:])
        entropy_out, mean_out, rank_out, argmax_out = (out[flat] for out in outputs)
        with gpu.on(input.device):
            finish_kernel[(-(-shared["rows"] // launch.FINISH_ROWS),)](
                **shared,
                lse_ptr=lse[flat],
                logprob_ptr=logprob[flat],
                lse_low_ptr=lse_low[flat],
                entropy_ptr=entropy_out,
                mean_logprob_ptr=mean_out,
                mass_ptr=None if mass is None else mass[flat],
                rank_ptr=rank_out,
                argmax_ptr=argmax_out,
                ROWS=launch.FINISH_ROWS,
                num_warps=max(1, launch.FINISH_ROWS // 32),
                **launch.COMPILER,
            )
    return RowStatistics(stats, lse_low, mass)


def launch_sums(
    input: Tensor,
    target: Tensor,  # [rows], contiguous
    ignore_index: int,
    vocab_size: int,
    head: Head,
    weights: ClassWeights = UNIFORM,
    **wanted: bool,  # ENTROPY, MEAN_LOGPROB, RANK, ARGMAX
) -> Iterator[tuple[slice, dict[str, Any]]]:
    """The sums of rows, a segment at a time: (which rows, the arguments that say where)."""
    dtype = compute_dtype(input.dtype)
    contiguous = input.stride(-1) == 1
    tile = launch.tile(
        gpu.architecture(input.device),
        vocab_size,
        input.element_size(),
        contiguous=contiguous,
        plain=head.is_identity and not any(wanted.values()),
    )
    segments = launch.segments(vocab_size)
    floats, integers = (6, 2) if any(wanted.values()) else (2, 0)
    for flat, (x, *q) in _with_prob(weights, input):
        rows = x.shape[0] * x.shape[1]
        per_program = launch.segments_per_program(rows, segments, gpu.processors(input.device))
        shared: dict[str, Any] = dict(
            x_ptr=x.data,
            target_ptr=target[flat],
            floats_ptr=input.new_empty(floats, rows, segments, dtype=dtype),
            integers_ptr=input.new_empty(integers, rows, segments, dtype=torch.int32),
            rows=rows,
            segments=segments,
            vocab_size=vocab_size,
            ignore_index=ignore_index,
            offset=x.offset,
            inner_rows=x.shape[1],
            stride_outer=x.stride[0],
            stride_inner=x.stride[1],
            stride_v=x.stride[2],
            **wanted,
            **_weight_arguments(weights, x, q),
            **_head_arguments(head),
        )
        with gpu.on(input.device):
            token_stats_kernel[(rows, -(-segments // per_program))](
                **shared,
                **_weight_layout(weights, x, q),
                segments_per_program=per_program,
                CONTIGUOUS=contiguous,
                SEGMENT=launch.SEGMENT,
                **tile.arguments(),
            )
        yield flat, shared


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
    weights: ClassWeights = UNIFORM,
    *,
    inplace: bool,
) -> Tensor:
    """dL/dinput, in a new tensor or over `input`."""
    grad = input if inplace else torch.empty_like(input)
    target = target.reshape(-1).contiguous()
    contiguous = input.stride(-1) == 1
    tile = launch.tile(
        gpu.architecture(input.device),
        input.shape[-1],
        input.element_size(),
        contiguous=contiguous,
        plain=head.is_identity and coefficients.b is None and weights.are_one,
    )
    span = launch.SPAN_TILES * tile.columns
    if coefficients.u is None:
        weights = UNIFORM
    for flat, (x, out, *q) in _with_prob(weights, input, grad):
        a, b, c, u = (lse[flat] if number is None else number[flat] for number in coefficients)
        with gpu.on(input.device):
            token_grad_kernel[(x.shape[0] * x.shape[1], -(-input.shape[-1] // span))](
                **_addresses(x, out, vocab_size),
                target_ptr=target[flat],
                lse_ptr=lse[flat],
                logprob_ptr=logprob[flat],
                lse_low_ptr=lse_low[flat],
                a_ptr=a,
                b_ptr=b,
                c_ptr=c,
                u_ptr=u,
                ignore_index=ignore_index,
                HAS_A=coefficients.a is not None,
                HAS_B=coefficients.b is not None,
                HAS_C=coefficients.c is not None,
                HAS_U=coefficients.u is not None,
                SPAN=span,
                **_weight_arguments(weights, x, q),
                **_weight_layout(weights, x, q),
                **_head_arguments(head),
                **tile.arguments(),
            )
    return grad


def loss_and_gradient(
    input: Tensor,
    target: Tensor,
    token_weight: Tensor | None,
    divisor: Tensor | None,
    label_smoothing: float,
    z_loss_weight: float,
    ignore_index: int,
    vocab_size: int,
    head: Head,
    *,
    inplace: bool,
    on_clusters: bool,
) -> tuple[Tensor, Tensor]:
    """Each token's loss before its weight, flat, and the gradient of loss * token_weight / divisor.

    That in a new tensor or over `input`.
    """
    grad = input if inplace else torch.empty_like(input)
    target = target.reshape(-1).contiguous()
    dtype = compute_dtype(input.dtype)
    loss = torch.empty(target.numel(), dtype=dtype, device=input.device)
    weight = loss if token_weight is None else token_weight.reshape(-1).to(dtype).contiguous()
    contiguous = input.stride(-1) == 1 and grad.stride(-1) == 1
    for flat, (x, out) in strided_rows(input, grad):
        rows = x.shape[0] * x.shape[1]
        plan = launch.one_pass(
            gpu.architecture(input.device),
            input.shape[-1],
            input.element_size(),
            contiguous=contiguous,
            plain=head.is_identity,
            rows=rows,
            processors=gpu.processors(input.device),
            l2_bytes=gpu.l2_bytes(input.device),
            clusters=on_clusters,
        )
        with gpu.on(input.device):
            loss_and_grad_kernel[(plan.programs,)](
                **_addresses(x, out, vocab_size),
                target_ptr=target[flat],
                loss_ptr=loss[flat],
                weight_ptr=weight[flat],
                divisor_ptr=loss if divisor is None else divisor.to(dtype),
                rows=rows,
                ignore_index=ignore_index,
                smoothing=label_smoothing,
                z_loss_weight=z_loss_weight,
                HAS_WEIGHT=token_weight is not None,
                HAS_DIVISOR=divisor is not None,
                SMOOTHING=label_smoothing > 0,
                ON_CHIP=plan.on_chip,
                **_head_arguments(head),
                **plan.tile.arguments(),
            )
    return loss, grad


def scale_(grad: Tensor, upstream: Tensor) -> None:
    """grad [..., V] *= upstream [...] or [], unless that is 1."""
    upstream = upstream.reshape(-1).to(compute_dtype(grad.dtype))
    block = launch.SCALE_BLOCK
    for flat, (rows,) in strided_rows(grad):
        n = rows.shape[0] * rows.shape[1]
        one = upstream.numel() == 1
        with gpu.on(grad.device):
            scale_kernel[(n, -(-grad.shape[-1] // block))](
                grad_ptr=rows.data,
                upstream_ptr=upstream if one else upstream[flat],
                columns=grad.shape[-1],
                offset=rows.offset,
                inner_rows=rows.shape[1],
                stride_outer=rows.stride[0],
                stride_inner=rows.stride[1],
                stride_v=rows.stride[2],
                upstream_stride=0 if one else upstream.stride(0),
                BLOCK=block,
                **launch.COMPILER,
            )


def _addresses(x: Rows, grad: Rows, vocab_size: int) -> dict[str, Any]:
    """Where the kernels that write a gradient find logits and gradient."""
    contiguous = x.stride[2] == 1
    return dict(
        x_ptr=x.data,
        grad_ptr=grad.data,
        columns_in_memory=x.shape[2],
        vocab_size=vocab_size,
        inner_rows=x.shape[1],
        x_offset=x.offset,
        x_stride_outer=x.stride[0],
        x_stride_inner=x.stride[1],
        x_stride_v=x.stride[2],
        grad_offset=grad.offset,
        grad_stride_outer=grad.stride[0],
        grad_stride_inner=grad.stride[1],
        grad_stride_v=grad.stride[2],
        PADDED=vocab_size < x.shape[2],
        CONTIGUOUS=contiguous,
        GRAD_CONTIGUOUS=grad.stride[2] == 1,
        GRAD_ALIGNED=contiguous and grad.alignment() == x.alignment(),
    )


def _with_prob(weights: ClassWeights, *tensors: Tensor) -> Iterator[tuple[slice, list[Rows]]]:
    """`strided_rows`, with those of the probabilities last where there are any."""
    return strided_rows(*tensors, *(() if weights.prob is None else (weights.prob,)))


def _weight_arguments(weights: ClassWeights, x: Rows, q: list[Rows]) -> dict[str, Any]:
    prob = q[0] if q else Rows(x.data, 0, x.shape, (0, 0, 0))
    return dict(
        w_ptr=None if weights.weight is None else weights.weight.contiguous(),
        q_ptr=prob.data if q else None,
        q_offset=prob.offset,
        q_stride_outer=prob.stride[0],
        q_stride_inner=prob.stride[1],
        q_stride_v=prob.stride[2],
        q_scale=weights.scale,
        q_shift=weights.shift,
    )


def _weight_layout(weights: ClassWeights, x: Rows, q: list[Rows]) -> dict[str, Any]:
    contiguous = bool(q) and q[0].stride[2] == 1
    same = contiguous and x.stride[2] == 1 and x.data.dtype.itemsize == q[0].data.dtype.itemsize
    return dict(Q_CONTIGUOUS=contiguous, Q_ALIGNED=same and q[0].alignment() == x.alignment())


def _head_arguments(head: Head) -> dict[str, Any]:
    return dict(
        softcap=1.0 if head.softcap is None else head.softcap,
        logit_scale=head.logit_scale,
        HAS_SOFTCAP=head.softcap is not None,
        HAS_SCALE=head.logit_scale != 1.0,
    )
