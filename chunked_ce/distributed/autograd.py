"""Statistics of rows whose classes lie on several ranks, and their gradients.

The gradient of a rank's logits is local, because the row's statistics summarize the other shards.
The gradient of the hidden states, which every rank holds, is a sum over the shards: an all-reduce
in backward.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .. import backends, checks
from ..core.gradient import Coefficients, coefficients
from ..core.head import Head
from ..core.row_stats import TokenStats
from ..ops.chunks import Gradients, chunk_indices, walk
from .shards import IGNORED, Shard, Wanted, exchange, partial_sums


class Options(NamedTuple):
    shard: Shard
    ignore_index: int
    head: Head
    backend: str
    wanted: Wanted
    inplace: bool = False  # of logits
    rows_per_chunk: int = 0  # of a head
    drop_ignored: bool = False
    acc_dtype: torch.dtype = torch.float32


def shard_stats(input: Tensor, target: Tensor, options: Options) -> TokenStats:
    """Compute the statistics of logits [..., C] and targets [...]."""
    return _as_stats(_ShardStats.apply(input, target, options), target, options.wanted)  # type: ignore[no-untyped-call]


def linear_shard_stats(
    input: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, options: Options
) -> TokenStats:
    """Compute the statistics of hidden states [..., D], a head [C, D] and targets [...]."""
    flat = input.reshape(-1, input.shape[-1])
    outputs = _LinearShardStats.apply(flat, weight, bias, target, options)  # type: ignore[no-untyped-call]
    return _as_stats(outputs, target, options.wanted)


def _as_stats(outputs: tuple[Tensor, ...], target: Tensor, wanted: Wanted) -> TokenStats:
    lse, logprob, entropy, mean_logprob, argmax = (
        out.view(target.shape) if asked else None
        for out, asked in zip(outputs, (True, True, *wanted), strict=True)
    )
    assert lse is not None and logprob is not None
    return TokenStats(lse, logprob, entropy, mean_logprob, None, argmax)


def _outputs(ctx: Any, sent: Tensor, target: Tensor, options: Options, *saved: Any) -> Any:
    """Return the flat statistics, empty if not requested, and save what backward needs."""
    stats, lse_low = exchange(
        sent, target.reshape(-1), options.ignore_index, options.shard, options.wanted
    )
    empty = sent.new_empty(0)
    entropy = empty if stats.entropy is None else stats.entropy
    argmax = empty.long() if stats.argmax is None else stats.argmax
    mean_logprob = empty if stats.mean_logprob is None else stats.mean_logprob
    ctx.options = options
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(argmax)
    ctx.save_for_backward(*saved, target, stats.lse, stats.logprob, lse_low, entropy)
    return stats.lse, stats.logprob, entropy, mean_logprob, argmax


def _coefficients(ctx: Any, grads: tuple[Tensor | None, ...], entropy: Tensor) -> Coefficients:
    if torch.is_grad_enabled():
        checks.double_backward()
    checks.not_sharded(grads)
    lse_grad, logprob_grad, entropy_grad, mean_logprob_grad, _ = grads
    wanted = ctx.options.wanted
    numbers = coefficients(
        lse_grad,
        logprob_grad,
        entropy_grad if wanted.entropy else None,
        mean_logprob_grad if wanted.mean_logprob else None,
        entropy,
        ctx.options.shard.vocab_size,
    )
    return Coefficients(*(None if n is None else n.contiguous() for n in numbers))


class _ShardStats(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, target: Tensor, options: Options) -> Any:
        shard = options.shard
        local = shard.local(target, options.ignore_index)
        sent = partial_sums(options.backend, input, local, shard, options.head, options.wanted)
        return _outputs(ctx, sent, target, options, input)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        input, target, lse, logprob, lse_low, entropy = ctx.saved_tensors
        options: Options = ctx.options
        numbers = _coefficients(ctx, grads, entropy)
        if options.shard.columns == 0 or target.numel() == 0:
            return torch.zeros_like(input), None, None
        if options.inplace:  # before the write: what an interruption leaves is not used
            torch.autograd.graph.increment_version(input)
        grad = backends.logits_gradient(
            options.backend, input, options.shard.local(target, options.ignore_index),
            lse, logprob, lse_low, numbers, IGNORED, options.shard.columns, options.head,
            inplace=options.inplace, shard=True,
        )  # fmt: skip
        return input.detach() if options.inplace else grad, None, None


class _LinearShardStats(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,  # [N, D]
        weight: Tensor,
        bias: Tensor | None,
        target: Tensor,
        options: Options,
    ) -> Any:
        shard, wanted = options.shard, options.wanted
        local = shard.local(target, options.ignore_index)
        no_logits = input.new_empty(len(local), 0)
        empty = shard._replace(columns=0)
        sent = partial_sums(options.backend, no_logits, local, empty, options.head, wanted)
        for index, _, logits in _chunks(input, weight, bias, local, options):
            sent[:, index] = partial_sums(
                options.backend, logits, local[index], shard, options.head, wanted
            )
        return _outputs(ctx, sent, target, options, input, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        input, weight, bias, target, lse, logprob, lse_low, entropy = ctx.saved_tensors
        options: Options = ctx.options
        shard, wanted = options.shard, list(ctx.needs_input_grad[:3])
        numbers = _coefficients(ctx, grads, entropy)
        local = shard.local(target, options.ignore_index)
        chunks = _indices(local, options)
        gradients = Gradients(input, weight, bias, shard.columns, wanted, options.acc_dtype, chunks)
        for index, x, logits in _chunks(input, weight, bias, local, options):
            grad = backends.logits_gradient(
                options.backend, logits, local[index], lse[index], logprob[index], lse_low[index],
                Coefficients(*(None if n is None else n[index].contiguous() for n in numbers)),
                IGNORED, shard.columns, options.head, inplace=True, shard=True,
            )  # fmt: skip
            gradients.add(index, x, grad)
        input_grad, weight_grad, bias_grad = gradients.finish()
        if wanted[0]:
            if shard.columns == 0:
                input_grad.zero_()
            dist.all_reduce(input_grad, group=shard.group)
        result = (input_grad, weight_grad, bias_grad)
        return *(g if w else None for g, w in zip(result, wanted, strict=True)), None, None


def _indices(local: Tensor, options: Options) -> Any:
    if options.shard.columns == 0:
        return []
    return chunk_indices(local, IGNORED, options.rows_per_chunk, options.drop_ignored)


def _chunks(
    input: Tensor, weight: Tensor, bias: Tensor | None, local: Tensor, options: Options
) -> Any:
    """Yield (index, hidden states, logits) of each chunk."""
    ignored = None if options.drop_ignored else local == IGNORED
    return walk(
        input.detach(), weight.detach(), None if bias is None else bias.detach(),
        options.shard.columns, _indices(local, options), ignored,
    )  # fmt: skip
