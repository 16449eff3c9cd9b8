"""Cross-entropy where the vocabulary lies on several ranks (tensor parallelism).

Every rank holds the logits, or the rows of the head, of some classes and calls with the same
targets; every rank gets the loss over all classes. One all-gather of a few numbers a row in
forward; none in backward but the sum of the hidden states' gradients in the linear form.

Programs are started by `torchrun`; gloo works on a CPU, NCCL on GPUs.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from .. import checks
from ..core.head import COMPUTE_DTYPE
from ..core.reduction import make_reduction, token_loss
from ..core.row_stats import TokenStats
from ..functional.head_loss import autocast
from ..ops import transforms
from . import checks as shard_checks
from .autograd import linear_shard_stats, shard_stats
from .calls import Call, call_on_logits, checked_options, chunk_options
from .shards import Wanted, local_parts, local_tensor, shard_of

__all__ = [
    "vocab_parallel_cross_entropy",
    "vocab_parallel_linear_cross_entropy",
    "vocab_parallel_token_stats",
]


@checks.names_unknown
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

    Example:
        >>> import torch
        >>> import torch.distributed as dist
        >>> import chunked_ce.distributed
        >>> # With torchrun: dist.init_process_group() on every rank, and each rank's own shard.
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> target = torch.tensor([2, -100, 4])  # -100 is ignored
        >>> shard = torch.zeros(3, 8, requires_grad=True)  # this rank's logits
        >>> stats = chunked_ce.distributed.vocab_parallel_token_stats(shard, target, entropy=True)
        >>> stats.lse  # ln 8, and 0 in the ignored row
        tensor([2.0794, 0.0000, 2.0794], grad_fn=<ViewBackward0>)
        >>> (stats.logprob - 0.1 * stats.entropy).sum().backward()
        >>> dist.destroy_process_group()
    """
    checks.no_transforms("vocab_parallel_token_stats", transforms.is_active())
    call = call_on_logits(input, target, group, vocab_start, vocab_size)
    checks.flags(entropy=entropy, mean_logprob=mean_logprob, argmax=argmax)
    wanted = Wanted(entropy, mean_logprob, argmax)
    options = checked_options(
        call, wanted, ignore_index, softcap, logit_scale, inplace_backward, backend
    )
    return shard_stats(call.input, call.target, options)


@checks.names_unknown
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

    Example:
        >>> import torch
        >>> import torch.distributed as dist
        >>> import chunked_ce.distributed
        >>> # With torchrun: dist.init_process_group() on every rank, and each rank's own shard.
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> target = torch.tensor([2, -100, 4])  # -100 is ignored
        >>> shard = torch.zeros(3, 8, requires_grad=True)  # this rank's logits
        >>> loss = chunked_ce.distributed.vocab_parallel_cross_entropy(shard, target)
        >>> loss.backward()
        >>> round(loss.item(), 4), shard.grad[0, 2].item()
        (2.0794, -0.4375)
        >>> dist.destroy_process_group()
    """
    checks.no_transforms("vocab_parallel_cross_entropy", transforms.is_active())
    call = call_on_logits(input, target, group, vocab_start, vocab_size)
    checks.reduction(reduction)
    label_smoothing = checks.label_smoothing(label_smoothing)
    z_loss_weight = checks.z_loss_weight(z_loss_weight)
    checks.token_weight(token_weight, call.target.shape, call.input)
    num_items = checks.num_items(num_items, reduction, call.input)
    options = checked_options(
        call, Wanted(mean_logprob=label_smoothing > 0), ignore_index, softcap, logit_scale,
        inplace_backward, backend,
        (reduction, label_smoothing, z_loss_weight, token_weight, num_items),
    )  # fmt: skip
    reducer = make_reduction(
        reduction, call.target, options.ignore_index, token_weight, num_items,
        COMPUTE_DTYPE[call.input.dtype],
    )  # fmt: skip
    stats = shard_stats(call.input, call.target, options)
    return reducer.reduce(token_loss(stats, label_smoothing, z_loss_weight))


@checks.names_unknown
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

    Example:
        >>> import torch
        >>> import torch.distributed as dist
        >>> import chunked_ce.distributed
        >>> # With torchrun: dist.init_process_group() on every rank, and each rank's own shard.
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> target = torch.tensor([2, -100, 4])  # -100 is ignored
        >>> hidden = torch.ones(3, 4, requires_grad=True)  # the same on every rank
        >>> weight = torch.zeros(8, 4, requires_grad=True)  # this rank's rows of the head
        >>> loss = chunked_ce.distributed.vocab_parallel_linear_cross_entropy(
        ...     hidden, weight, target
        ... )
        >>> loss.backward()
        >>> round(loss.item(), 4), weight.grad[2, 0].item()
        (2.0794, -0.375)
        >>> dist.destroy_process_group()
    """
    checks.no_transforms("vocab_parallel_linear_cross_entropy", transforms.is_active())
    head = dict(linear_weight=linear_weight, linear_bias=linear_bias)
    (weight, bias), group, vocab_start, vocab_size = local_parts(
        head, 0, group, vocab_start, vocab_size
    )
    input, target = local_tensor("input", input, None), local_tensor("target", target, None)
    checks.target_indices(target)
    checks.hidden_states(input)
    shard_checks.shard_of_weight(weight, bias, input, target)
    label_smoothing, z_loss_weight, num_items, *_ = checks.loss_options(
        input, target, target.shape, reduction, label_smoothing, z_loss_weight, False,
        token_weight, num_items,
    )  # fmt: skip
    input, weight, bias = autocast(input, weight, bias)
    shard = shard_of(weight.shape[0], group, vocab_start, vocab_size)
    loss_options = (reduction, label_smoothing, z_loss_weight, token_weight, num_items)
    call = Call(input, target, shard, weight.shape[0], weight.t() if vocab_start is None else None)
    chunks = chunk_options(call, weight, chunk_bytes, token_chunk_size, drop_ignored, acc_dtype)
    options = checked_options(
        call, Wanted(mean_logprob=label_smoothing > 0), ignore_index, softcap, logit_scale, False,
        backend, loss_options, input.requires_grad and torch.is_grad_enabled(),
    )._replace(**chunks)  # fmt: skip
    reducer = make_reduction(
        reduction, target, options.ignore_index, token_weight, num_items, COMPUTE_DTYPE[input.dtype]
    )
    stats = linear_shard_stats(input, weight, bias, target, options)
    return reducer.reduce(token_loss(stats, label_smoothing, z_loss_weight))
