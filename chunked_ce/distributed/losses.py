"""Cross-entropy where the vocabulary lies on several ranks (tensor parallelism).

Every rank holds the logits, or the rows of the head, of some classes and calls with the same
targets; every rank gets the loss over all classes. One all-gather of a few numbers a row in
forward; none in backward but the sum of the hidden states' gradients in the linear form.

Programs are started by `torchrun`; gloo works on a CPU, NCCL on GPUs.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .. import backends, checks
from ..backends import choose_backend
from ..checks.values import is_dtensor
from ..core.head import Head, compute_dtype
from ..core.reduction import make_reduction, token_loss
from ..core.row_stats import TokenStats
from ..functional.linear import autocast
from ..ops import transforms
from ..ops.chunks import default_rows, padded_row_bytes
from . import checks as shard_checks
from .autograd import Options, linear_shard_stats, shard_stats
from .shards import Shard, Wanted, check_agreement, local_parts, placements_of_rows, plain, shard_of

__all__ = [
    "vocab_parallel_cross_entropy",
    "vocab_parallel_linear_cross_entropy",
    "vocab_parallel_token_stats",
]


def vocab_parallel_token_stats(
    input: Tensor,
    target: Tensor,
    *,
    group: dist.ProcessGroup | None = None,
    vocab_start: int | None = None,
    vocab_size: int | None = None,
    ignore_index: int = -100,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    entropy: bool = False,
    mean_logprob: bool = False,
    argmax: bool = False,
    inplace_backward: bool = False,
    backend: str = "auto",
) -> TokenStats:
    """:func:`chunked_ce.token_stats` of logits whose classes lie on several ranks.

    Every rank gets the same statistics, bit for bit. They are differentiable in this rank's logits
    with any upstream gradient, which must be the same on all ranks: the gradient is that of one
    loss which all compute, not of a sum over ranks. No `rank`, for a class is beaten by those of
    other shards, which would take a second exchange.

    Args:
        input: this rank's logits [..., C]; float16, bfloat16, float32 or float64, any strides. Or
            a DTensor [..., V] with one Shard(-1), which brings its own group and its own
            vocab_start. Where other dimensions of its mesh shard the rows (data parallelism), the
            result is that of this rank's rows.
        target: class indices [...] in the whole vocabulary, the same on every rank of the group;
            a plain tensor, or a DTensor placed as the rows of `input`.
        group: the ranks among which the vocabulary is divided, in the order of the classes; None
            is the default process group.
        vocab_start: first class of this rank; None where all ranks hold equally many.
        vocab_size: number of classes that exist over all ranks; columns at or past it (a padded
            head) are not read. Must be given with `vocab_start`; else None is all of them.
        inplace_backward: backward writes the gradient over `input`.
        others: see :func:`chunked_ce.token_stats`.

    Returns:
        TokenStats of shape [...], plain tensors; `rank` is None.

    Raises:
        RuntimeError: no process group.
        TypeError, ValueError, IndexError: as :func:`chunked_ce.token_stats`; and on every rank
            alike where ranks disagree on the targets, the options or the vocabulary, or on whether
            hidden states require a gradient, where shards overlap or leave classes out, or where
            they are copies without `vocab_start` (gathered logits). That takes a small
            exchange of its own, on a CPU always; on a GPU, where it means waiting, with
            `CHUNKED_CE_CHECK_TARGETS=1` in the environment.
    """
    checks.no_transforms("vocab_parallel_token_stats", transforms.is_active())
    call = _of_logits(input, target, group, vocab_start, vocab_size)
    checks.flags(entropy=entropy, mean_logprob=mean_logprob, argmax=argmax)
    wanted = Wanted(entropy, mean_logprob, argmax)
    options = _options(call, wanted, ignore_index, softcap, logit_scale, inplace_backward, backend)
    return shard_stats(call.input, call.target, options)


def vocab_parallel_cross_entropy(
    input: Tensor,
    target: Tensor,
    *,
    group: dist.ProcessGroup | None = None,
    vocab_start: int | None = None,
    vocab_size: int | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss_weight: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    token_weight: Tensor | None = None,
    num_items: int | Tensor | None = None,
    inplace_backward: bool = False,
    backend: str = "auto",
) -> Tensor:
    """:func:`chunked_ce.cross_entropy` of logits [..., C] whose classes lie on several ranks.

    Classes last. Every rank gets the same loss, bit for bit, and the gradient of its own logits;
    6 bytes moved per bf16 logit, and one all-gather of 12 bytes a token and rank (20 with label
    smoothing).

    Args:
        input, target, group, vocab_start, vocab_size: see :func:`vocab_parallel_token_stats`.
        others: see :func:`chunked_ce.cross_entropy`.

    Returns:
        The loss, a 0-d tensor, or one loss per target for "none"; float32 (float64 for float64
        logits).

    Raises:
        RuntimeError, TypeError, ValueError, IndexError: as :func:`vocab_parallel_token_stats`.
    """
    checks.no_transforms("vocab_parallel_cross_entropy", transforms.is_active())
    call = _of_logits(input, target, group, vocab_start, vocab_size)
    checks.reduction(reduction)
    label_smoothing = checks.label_smoothing(label_smoothing)
    z_loss_weight = checks.z_loss_weight(z_loss_weight)
    checks.token_weight(token_weight, call.target.shape, call.input)
    num_items = checks.num_items(num_items, reduction, call.input)
    options = _options(
        call, Wanted(mean_logprob=label_smoothing > 0), ignore_index, softcap, logit_scale,
        inplace_backward, backend,
        (reduction, label_smoothing, z_loss_weight, token_weight, num_items),
    )  # fmt: skip
    how = make_reduction(
        reduction, call.target, options.ignore_index, token_weight, num_items,
        compute_dtype(call.input.dtype),
    )  # fmt: skip
    stats = shard_stats(call.input, call.target, options)
    return how.reduce(token_loss(stats, label_smoothing, z_loss_weight))


def vocab_parallel_linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    group: dist.ProcessGroup | None = None,
    vocab_start: int | None = None,
    vocab_size: int | None = None,
    linear_bias: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss_weight: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    token_weight: Tensor | None = None,
    num_items: int | Tensor | None = None,
    acc_dtype: torch.dtype = torch.float32,
    chunk_bytes: int | None = None,
    token_chunk_size: int | None = None,
    drop_ignored: bool | None = None,
    backend: str = "auto",
) -> Tensor:
    """:func:`chunked_ce.linear_cross_entropy` with a head whose rows lie on several ranks.

    Every rank gets the same loss and the gradients of its own rows. The gradient of `input`, which
    all ranks hold, is summed over them in backward in `input`'s dtype, as Megatron-LM's
    column-parallel layer does: do not reduce it again. 8 N D C FLOPs a rank, one chunk of local
    logits in memory, one all-gather in forward whatever the number of chunks.

    Args:
        input: hidden states [..., D], the same on every rank.
        linear_weight: this rank's rows of the head, [C, D]; or a DTensor [V, D] with one Shard(0),
            which brings its own group and its own vocab_start.
        target: class indices [...] in the whole vocabulary, the same on every rank.
        linear_bias: [C] or None; a DTensor sharded as `linear_weight` is.
        group, vocab_start, vocab_size: see :func:`vocab_parallel_token_stats`.
        others: see :func:`chunked_ce.linear_cross_entropy`.

    Returns:
        The loss, a 0-d tensor, or one loss per target for "none"; float32 (float64 for float64
        input).

    Raises:
        RuntimeError, TypeError, ValueError, IndexError: as :func:`vocab_parallel_token_stats`.
    """
    checks.no_transforms("vocab_parallel_linear_cross_entropy", transforms.is_active())
    checks.target_indices(target)
    head = dict(linear_weight=linear_weight, linear_bias=linear_bias)
    (weight, bias), group, vocab_start, vocab_size = local_parts(
        head, 0, group, vocab_start, vocab_size
    )
    input, target = plain("input", input, None), plain("target", target, None)
    checks.hidden_states(input)
    shard_checks.shard_of_weight(weight, bias, input, target)
    label_smoothing, z_loss_weight, num_items, *_ = checks.loss_options(
        input, target, target.shape, reduction, label_smoothing, z_loss_weight, False,
        token_weight, num_items,
    )  # fmt: skip
    input, weight, bias = autocast(input, weight, bias)
    shard = shard_of(weight.shape[0], group, vocab_start, vocab_size)
    of_loss = (reduction, label_smoothing, z_loss_weight, token_weight, num_items)
    contents = weight.t() if vocab_start is None else None
    call = _Call(input, target, shard, weight.shape[0], contents)
    chunks = _chunks(call, weight, chunk_bytes, token_chunk_size, drop_ignored, acc_dtype)
    options = _options(
        call, Wanted(mean_logprob=label_smoothing > 0), ignore_index, softcap, logit_scale, False,
        backend, of_loss, input.requires_grad and torch.is_grad_enabled(),
    )._replace(**chunks)  # fmt: skip
    dtype = compute_dtype(input.dtype)
    how = make_reduction(reduction, target, options.ignore_index, token_weight, num_items, dtype)
    stats = linear_shard_stats(input, weight, bias, target, options)
    return how.reduce(token_loss(stats, label_smoothing, z_loss_weight))


def _chunks(
    call: _Call,
    weight: Tensor,
    chunk_bytes: int | None,
    token_chunk_size: int | None,
    drop_ignored: bool | None,
    acc_dtype: torch.dtype,
) -> dict[str, Any]:
    row_bytes = padded_row_bytes(max(1, call.shard.columns), weight.element_size())
    rows = default_rows(call.target.numel(), row_bytes, call.input.device.type)
    return dict(
        rows_per_chunk=checks.rows_per_chunk(chunk_bytes, token_chunk_size, row_bytes, rows),
        drop_ignored=checks.drop_ignored(drop_ignored, call.input.device),
        acc_dtype=checks.acc_dtype(acc_dtype, weight),
    )


class _Call(NamedTuple):
    input: Tensor
    target: Tensor
    shard: Shard
    columns: int  # of this rank, padding included
    contents: Tensor | None  # [..., C]: what copies are told by; None where they may be meant


def _of_logits(
    input: Any,
    target: Any,
    group: dist.ProcessGroup | None,
    vocab_start: int | None,
    vocab_size: int | None,
) -> _Call:
    checks.target_indices(target)
    rows = placements_of_rows(input) if is_dtensor(input) else None
    (local,), group, vocab_start, vocab_size = local_parts(
        dict(input=input), -1, group, vocab_start, vocab_size, rows=True
    )
    target = plain("target", target, rows)
    shard_checks.shard_of_logits(local, target)
    columns = local.shape[-1]
    shard = shard_of(columns, group, vocab_start, vocab_size)
    return _Call(local, target, shard, columns, local if vocab_start is None else None)


def _options(
    call: _Call,
    wanted: Wanted,
    ignore_index: int,
    softcap: float | None,
    logit_scale: float,
    inplace_backward: bool,
    backend: str,
    of_loss: tuple[object, ...] = (),
    input_gradient: bool = False,
) -> Options:
    """The arguments that all forms share, checked; those that ranks must agree on last."""
    ignore_index = checks.ignore_index(ignore_index)
    head = Head(checks.softcap(softcap), checks.logit_scale(logit_scale))
    checks.inplace_backward(inplace_backward, call.input)
    backend = choose_backend(backend, call.input.device)
    on_host = call.target.device.type == "cpu"
    agreed = (ignore_index, head, *of_loss)
    check_agreement(
        call.shard, call.columns, call.input, call.target, wanted, agreed, input_gradient,
        call.contents,
    )  # fmt: skip
    backends.check_targets(call.target, call.shard.vocab_size, ignore_index, on_host=on_host)
    return Options(call.shard, ignore_index, head, backend, wanted, inplace_backward)
