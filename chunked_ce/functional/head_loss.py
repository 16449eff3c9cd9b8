"""What the linear forms share: operands, options, and the loss or statistics of a head [V, D]."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from .. import checks
from ..backends import choose_backend
from ..checks.loss import LossOptions
from ..core.reduction import Reduction
from ..core.row_stats import TokenStats
from ..ops.chunks import default_rows, padded_row_bytes
from ..ops.head_calls import AnyHead
from ..ops.library import Classes, Outputs, flat_classes, in_target_shape, stats_from_list
from . import several_heads
from .heads import loss_of_called_head, outputs_of_called_head, split_head
from .targets import AnyTarget, Target, describe_target, loss_and_stats

LinearHead = Tensor | AnyHead
Shared = tuple[int, int, float | None, float, str, int, bool, torch.dtype, torch.dtype]


def as_weight(
    head: LinearHead, bias: Tensor | None, input: Tensor, logits_dtype: torch.dtype | None
) -> tuple[AnyHead | None, Tensor, Tensor | None]:
    """Return (head that is called, weight, bias); no head where the weight says all."""
    if callable(head):
        return split_head(head, bias, input, logits_dtype)
    return None, head, bias


def linear_loss(
    head: AnyHead | None,
    input: Tensor,
    target: AnyTarget,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    weight: Tensor | None,
    options: LossOptions,
    shared: Shared,
) -> Tensor | tuple[Tensor, TokenStats]:
    """Return the loss of a head [V, D], or of all heads in a weight [V, d1, ..., D]."""
    ignore_index, vocab_size, *_ = shared
    if weight is not None:
        weight = checks.head_class_weight(weight, linear_weight, vocab_size)
    labels, reducer = describe_target(input, target, -1, weight, ignore_index, vocab_size, options)
    loss_of = partial(_loss_of_head, head, input, shared, options)
    if linear_weight.dim() == 2:
        loss, stats = loss_of(linear_weight, linear_bias, reducer, labels)
    else:
        parts = (linear_weight, linear_bias, reducer, labels)
        loss, stats = several_heads.loss_of_heads(loss_of, *parts)
    return loss if stats is None else (loss, stats)


def _loss_of_head(
    head: AnyHead | None,
    input: Tensor,
    shared: Shared,
    options: LossOptions,
    weight: Tensor,
    bias: Tensor | None,
    reducer: Reduction,
    labels: Target,
) -> tuple[Tensor, TokenStats | None]:
    """Return the loss of one [V, D] head: a sum, or that of each token."""
    smoothing, z_loss_weight = options.label_smoothing, options.z_loss_weight
    shared = (labels.ignore_index, *shared[1:])
    if head is not None:
        return loss_of_called_head(head, input, shared, options, weight, reducer, labels)
    fused = labels.is_plain and reducer.allows_grad_in_forward(input.dtype)
    if reducer.name == "none" or not fused:
        statistics = partial(
            outputs_of_head, None, input, weight, bias, labels.index, labels.classes, shared
        )
        return loss_and_stats(statistics, labels, reducer, options, shared[4])
    token_weight = None if reducer.weight is None else reducer.weight.reshape(-1)
    reuse = not torch.compiler.is_compiling()
    # Autograd fills in which gradients are wanted.
    loss, _, _, _, found = torch.ops.chunked_ce.linear_loss(
        input.reshape(-1, input.shape[-1]), weight, bias, labels.index.reshape(-1), token_weight,
        reducer.divisor, smoothing, z_loss_weight, *shared, [False, False, False], reuse,
        list(options.stats),
    )  # fmt: skip
    return loss, stats_from_list(found, options.stats, labels.index) if options.stats else None


def operands_and_options(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    head: AnyHead | None,
    ignore_index: int,
    vocab_size: int | None,
    softcap: float | None,
    logit_scale: float,
    backend: str,
    chunk_bytes: int | None,
    token_chunk_size: int | None,
    drop_ignored: bool | None,
    acc_dtype: torch.dtype,
    logits_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor | None, Shared]:
    """Return input, weight and bias under autocast, and the arguments that both operators share."""
    input, weight, bias = autocast(input, weight, bias, head)
    logits_dtype = checks.logits_dtype(logits_dtype, weight)
    classes = checks.linear_vocab_size(vocab_size, weight)
    row_bytes = padded_row_bytes(classes, logits_dtype.itemsize)
    tokens = input.numel() // input.shape[-1]
    known = not torch.compiler.is_compiling()  # 0: the operator chooses, for any number of tokens
    default = default_rows(tokens, row_bytes, input.device.type) if known else 0
    shared = (
        ignore_index,
        classes,
        checks.softcap(softcap),
        checks.logit_scale(logit_scale),
        choose_backend(backend, input.device),
        checks.rows_per_chunk(chunk_bytes, token_chunk_size, row_bytes, default),
        checks.drop_ignored(drop_ignored, input.device),
        checks.acc_dtype(acc_dtype, weight),
        logits_dtype,
    )
    return input, weight, bias, shared


def outputs_of_head(
    head: AnyHead | None,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    classes: Classes,
    shared: Shared,
    wanted: tuple[bool, ...],  # entropy, mean_logprob, rank, argmax
) -> Outputs:
    """Return the statistics' operator's outputs in the shape of `target`."""
    if head is not None:
        return outputs_of_called_head(head, input, shared, weight, target, classes, wanted)
    outputs = torch.ops.chunked_ce.linear_stats(
        input.reshape(-1, input.shape[-1]), weight, bias, target.reshape(-1),
        *flat_classes(classes), *shared, *wanted,
    )  # fmt: skip
    return in_target_shape(outputs, target)


def autocast(
    input: Tensor, weight: Tensor, bias: Tensor | None, head: AnyHead | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the operands in the dtype that `F.linear` computes in under autocast.

    A head that is called chooses its dtype itself.
    """
    if head is not None:
        return input, weight, bias
    device = input.device.type
    # torch.compile of torch 2.6 cannot trace is_autocast_available.
    available = device in ("cpu", "cuda", "xpu") or torch.amp.is_autocast_available(device)
    enabled = available and torch.is_autocast_enabled(device)
    if enabled and input.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
        bias = None if bias is None else bias.to(dtype)
        return input.to(dtype), weight.to(dtype), bias
    checks.same_dtype(input, weight, bias)
    return input, weight, bias
