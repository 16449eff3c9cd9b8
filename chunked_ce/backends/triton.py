"""The Triton backend: allocate outputs, collect addresses and strides, and launch the kernels."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from ..core.gradient import Coefficients
from ..core.head import COMPUTE_DTYPE, IDENTITY, Head
from ..core.row_stats import UNIFORM, ClassWeights, RowStatistics, TokenStats
from ..kernels import arguments, launch
from ..kernels.arguments import Options
from ..kernels.loss_and_grad import loss_and_grad_kernel
from ..kernels.merge_parts import merge_parts_kernel
from ..kernels.scale import scale_kernel
from ..kernels.token_grad import token_grad_kernel
from ..kernels.token_stats import token_stats_kernel
from . import gpu
from .strided_rows import (
    gradient_addresses,
    gradient_options,
    kernel_weights,
    rows_with_prob,
    strided_rows,
    weight_options,
    weight_presence,
)


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
    """Return the statistics of every row, [rows]."""
    target = target.reshape(-1).contiguous()

    def new(dtype: torch.dtype) -> Tensor:
        return torch.empty(target.shape, dtype=dtype, device=input.device)

    floats = COMPUTE_DTYPE[input.dtype]
    lse, logprob, lse_low = (new(floats) for _ in range(3))
    stats = TokenStats(
        lse,
        logprob,
        entropy=new(floats) if entropy else None,
        mean_logprob=new(floats) if mean_logprob else None,
        rank=new(torch.int64) if rank else None,
        argmax=new(torch.int64) if argmax else None,
    )
    weights = weights if mean_logprob else UNIFORM
    weight_sum = None if weights is UNIFORM else new(floats)
    wanted = dict(ENTROPY=entropy, MEAN_LOGPROB=mean_logprob, RANK=rank, ARGMAX=argmax)
    sums = launch_sums(input, target, ignore_index, vocab_size, head, weights, **wanted)
    for flat, shared in sums:
        # An output that was not requested is not touched.
        outputs = [lse if t is None else t for t in (lse, logprob, lse_low, *stats[2:], weight_sum)]
        options = Options(**wanted, **_head_options(head), **weight_presence(weights))
        with on_device(input.device):
            merge_parts_kernel[(-(-shared["rows"] // launch.MERGE_ROWS),)](
                **shared,
                out=arguments.Outputs(*[t[flat] for t in outputs]),
                ROWS=launch.MERGE_ROWS,
                OPTIONS=options,
                num_warps=max(1, launch.MERGE_ROWS // 32),
                **launch.COMPILER,
            )
    return RowStatistics(stats, lse_low, weight_sum)


def launch_sums(
    input: Tensor,
    target: Tensor,  # [rows], contiguous
    ignore_index: int,
    vocab_size: int,
    head: Head,
    weights: ClassWeights = UNIFORM,
    **wanted: bool,  # ENTROPY, MEAN_LOGPROB, RANK, ARGMAX
) -> Iterator[tuple[slice, dict[str, Any]]]:
    """Sum the segments of rows. Yield (slice of rows, arguments shared with `merge_parts`)."""
    dtype = COMPUTE_DTYPE[input.dtype]
    tile = _tile(input, vocab_size, plain=head == IDENTITY and not any(wanted.values()))
    segments = launch.segments(vocab_size)
    floats, integers = (6, 2) if any(wanted.values()) else (2, 0)
    for flat, (x, *prob) in rows_with_prob(weights, input):
        rows = x.shape[0] * x.shape[1]
        per_program = launch.segments_per_program(rows, segments, gpu.processors(input.device))
        address = x.address()
        shared: dict[str, Any] = dict(
            x=address,
            target_ptr=target[flat],
            weights=kernel_weights(weights, address, prob),
            parts=arguments.Parts(
                input.new_empty(floats, rows, segments, dtype=dtype),
                input.new_empty(integers, rows, segments, dtype=torch.int32),
            ),
            rows=rows,
            segments=segments,
            inner_rows=x.shape[1],
            vocab_size=vocab_size,
            ignore_index=ignore_index,
            **_numbers(head, weights),
        )
        with on_device(input.device):
            token_stats_kernel[(rows, -(-segments // per_program))](
                **shared,
                segments_per_program=per_program,
                SEGMENT=launch.SEGMENT,
                OPTIONS=Options(
                    **wanted,
                    **_head_options(head),
                    **weight_options(weights, x, prob),
                    CONTIGUOUS=x.stride[2] == 1,
                ),
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
    """Return dL/dinput, in a new tensor or written over `input`."""
    grad = input if inplace else torch.empty_like(input)
    target = target.reshape(-1).contiguous()
    plain = head == IDENTITY and coefficients.b is None and weights is UNIFORM
    tile = _tile(input, input.shape[-1], plain=plain)
    span = launch.SPAN_TILES * tile.columns
    if coefficients.u is None:
        weights = UNIFORM
    for flat, (x, out, *prob) in rows_with_prob(weights, input, grad):
        # An absent coefficient is not touched.
        numbers = [lse[flat] if number is None else number[flat] for number in coefficients]
        addresses = gradient_addresses(x, out)
        with on_device(input.device):
            token_grad_kernel[(x.shape[0] * x.shape[1], -(-input.shape[-1] // span))](
                **addresses,
                target_ptr=target[flat],
                saved=arguments.Saved(lse[flat], logprob[flat], lse_low[flat]),
                coefficients=arguments.Coefficients(*numbers),
                weights=kernel_weights(weights, addresses["x"], prob),
                vocab_size=vocab_size,
                ignore_index=ignore_index,
                **_numbers(head, weights),
                SPAN=span,
                OPTIONS=Options(
                    HAS_A=coefficients.a is not None,
                    HAS_B=coefficients.b is not None,
                    HAS_C=coefficients.c is not None,
                    HAS_U=coefficients.u is not None,
                    **_head_options(head),
                    **weight_options(weights, x, prob),
                    **gradient_options(x, out, vocab_size),
                ),
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
    stats: TokenStats | None = None,  # its lse and logprob are written, memory [rows] each
) -> tuple[Tensor, Tensor]:
    """Return each token's loss [rows], and the gradient of loss * token_weight / divisor.

    The losses are not weighted. The gradient is in a new tensor or written over `input`.
    """
    grad = input if inplace else torch.empty_like(input)
    target = target.reshape(-1).contiguous()
    dtype = COMPUTE_DTYPE[input.dtype]
    loss = torch.empty(target.numel(), dtype=dtype, device=input.device)
    weight = loss if token_weight is None else token_weight.reshape(-1).to(dtype).contiguous()
    of_rows = (loss, *((loss, loss) if stats is None else stats[:2]))
    for flat, (x, out) in strided_rows(input, grad):
        rows = x.shape[0] * x.shape[1]
        plan = _one_pass(input, grad, rows, head, on_clusters)
        with on_device(input.device):
            loss_and_grad_kernel[(plan.programs,)](
                **gradient_addresses(x, out),
                target_ptr=target[flat],
                out=arguments.RowOutputs(*[t[flat] for t in of_rows]),
                weight_ptr=weight[flat],
                divisor_ptr=loss if divisor is None else divisor.to(dtype),
                rows=rows,
                vocab_size=vocab_size,
                ignore_index=ignore_index,
                smoothing=label_smoothing,
                z_loss_weight=z_loss_weight,
                **_numbers(head),
                OPTIONS=Options(
                    HAS_TOKEN_WEIGHT=token_weight is not None,
                    HAS_DIVISOR=divisor is not None,
                    HAS_STATS=stats is not None,
                    MEAN_LOGPROB=label_smoothing > 0,
                    HAS_U=label_smoothing > 0,
                    ON_CHIP=plan.on_chip,
                    **_head_options(head),
                    **gradient_options(x, out, vocab_size),
                ),
                **plan.tile.arguments(),
            )
    return loss, grad


def scale_(grad: Tensor, upstream: Tensor) -> None:
    """Multiply grad [..., V] in place by upstream [...] or [], unless it is 1."""
    upstream = upstream.reshape(-1).to(COMPUTE_DTYPE[grad.dtype])
    block = launch.SCALE_BLOCK
    for flat, (rows,) in strided_rows(grad):
        n = rows.shape[0] * rows.shape[1]
        one = upstream.numel() == 1
        with on_device(grad.device):
            scale_kernel[(n, -(-grad.shape[-1] // block))](
                grad=rows.address(),
                upstream_ptr=upstream if one else upstream[flat],
                columns=grad.shape[-1],
                inner_rows=rows.shape[1],
                upstream_stride=0 if one else upstream.stride(0),
                CONTIGUOUS=rows.stride[2] == 1,
                BLOCK=block,
                **launch.COMPILER,
            )


def _tile(input: Tensor, columns: int, *, plain: bool) -> launch.Tile:
    """Return the tile of a kernel that streams rows of `columns` logits."""
    return launch.tile(
        gpu.architecture(input.device), columns, input.element_size(),
        contiguous=input.stride(-1) == 1, plain=plain,
    )  # fmt: skip


def _one_pass(
    input: Tensor, grad: Tensor, rows: int, head: Head, on_clusters: bool
) -> launch.OnePass:
    return launch.one_pass(
        gpu.architecture(input.device),
        input.shape[-1],
        input.element_size(),
        contiguous=input.stride(-1) == 1 and grad.stride(-1) == 1,
        plain=head == IDENTITY,
        rows=rows,
        processors=gpu.processors(input.device),
        l2_bytes=gpu.l2_bytes(input.device),
        clusters=on_clusters,
    )


def _numbers(head: Head, weights: ClassWeights | None = None) -> dict[str, float]:
    softcap = 1.0 if head.softcap is None else head.softcap
    numbers = dict(softcap=softcap, logit_scale=head.logit_scale)
    if weights is not None:
        numbers |= dict(prob_scale=weights.scale, prob_shift=weights.shift)
    return numbers


def _head_options(head: Head) -> dict[str, bool]:
    return dict(HAS_SOFTCAP=head.softcap is not None, HAS_SCALE=head.logit_scale != 1.0)


def on_device(device: torch.device) -> AbstractContextManager[Any]:
    """Make `device` current, because Triton launches on the current device."""
    return nullcontext() if device.type == "cpu" else torch.get_device_module(device).device(device)
