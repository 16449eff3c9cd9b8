"""Divergences of rows of logits whose classes lie on several ranks, and their gradients.

One all-gather brings the rows' softmax, and of forward and reverse divergences the loss too. The
mixture of "jsd" needs every row's softmax before its sums: a second visit, a second all-gather.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .. import backends, checks
from ..core.divergence import Divergence, PairStats, merge_shards
from ..core.head import COMPUTE_DTYPE, IDENTITY, Head
from ..ops.chunks import Gradients, Index, chunk_indices, walk
from .collectives import all_gather
from .shards import Shard

Visit = Callable[[], Iterable[tuple[Index, Tensor, Tensor]]]  # (tokens, logits, teacher's logits)


class PairOptions(NamedTuple):
    shard: Shard
    how: Divergence
    backend: str
    head: Head = IDENTITY
    teacher_head: Head = IDENTITY
    rows_per_chunk: int = 0
    acc_dtype: torch.dtype = torch.float32

    def gradient(
        self, z: Tensor, y: Tensor, ignored: Tensor | None, stats: PairStats, upstream: Tensor,
        *, inplace: bool,
    ) -> Tensor:  # fmt: skip
        """Return the gradient of logits on this rank; 0 in columns that are padding."""
        run = backends.pair_backend(self.backend)
        rows = (z, y, ignored, stats, upstream, self.how, self.shard.columns)
        grad: Tensor = run.pair_gradient(*rows, inplace=inplace)
        return grad


def shard_pair(
    input: Tensor, teacher: Tensor, ignored: Tensor | None, options: PairOptions
) -> Tensor:
    """Return the divergence of each row of logits [..., C]; ignored: [rows]."""
    loss: Tensor = _ShardPair.apply(input, teacher, ignored, options)  # type: ignore[no-untyped-call]
    return loss


def linear_shard_pair(
    student: tuple[Tensor, Tensor, Tensor | None],
    teacher: tuple[Tensor, Tensor, Tensor | None],
    ignored: Tensor | None,
    options: PairOptions,
) -> Tensor:
    """Return the divergence of each token, of hidden states [N, D] and heads [C, D]."""
    loss: Tensor = _LinearShardPair.apply(*student, *teacher, ignored, options)  # type: ignore[no-untyped-call]
    return loss


def _statistics(
    visit: Visit, rows: int, like: Tensor, ignored: Tensor | None, options: PairOptions
) -> PairStats:
    """Return the statistics of whole rows, the same bits on every rank."""
    run, how, shard = backends.pair_backend(options.backend), options.how, options.shard
    dtype = COMPUTE_DTYPE[like.dtype]
    sent = like.new_zeros(len(PairStats._fields), rows, dtype=dtype)
    for name in ("max", "teacher_max"):  # of a shard without classes
        sent[PairStats._fields.index(name)] = -torch.inf
    for index, z, y in visit():
        skip = None if ignored is None else ignored[index]
        sent[:, index] = torch.stack(run.pair_stats(z, y, skip, how, shard.columns))
    received = all_gather(sent, shard.group)
    stats = merge_shards(PairStats(*received.unbind(1)), how).masked(ignored)
    if how.kind != "jsd":
        return stats
    sums = like.new_zeros(2, rows, dtype=dtype)
    for index, z, y in visit():
        skip = None if ignored is None else ignored[index]
        of_rows = PairStats(*(t[index] for t in stats))
        sums[:, index] = torch.stack(run.pair_terms(z, y, skip, of_rows, how, shard.columns)[:2])
    loss, student_kl = all_gather(sums, shard.group).sum(0)
    return stats._replace(loss=loss, student_kl=student_kl)


def _upstream(grad: Tensor) -> Tensor:
    if torch.is_grad_enabled():
        checks.double_backward()
    checks.not_sharded((grad,))
    return grad.reshape(-1).contiguous()


class _ShardPair(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, input: Tensor, teacher: Tensor, ignored: Tensor | None, options: PairOptions
    ) -> Tensor:
        rows = input.shape[:-1]
        x, y = (t if t.dim() > 1 else t[None] for t in (input, teacher))
        exists = rows.numel() > 0 and options.shard.columns > 0
        visited = [(slice(None), x, y)] if exists else []
        stats = _statistics(lambda: visited, rows.numel(), input, ignored, options)
        ctx.options = options
        ctx.save_for_backward(input, teacher, ignored, *stats)
        return stats.loss.view(rows)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        upstream = _upstream(grad)
        input, teacher, ignored, *stats = ctx.saved_tensors
        options: PairOptions = ctx.options
        if len(upstream) == 0 or options.shard.columns == 0:
            return torch.zeros_like(input), None, None, None
        x, y = (t if t.dim() > 1 else t[None] for t in (input, teacher))
        result = options.gradient(x, y, ignored, PairStats(*stats), upstream, inplace=False)
        return result.view(input.shape), None, None, None


class _LinearShardPair(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        input, _, _, _, _, _, ignored, options = arguments

        def visit() -> Iterator[tuple[Index, Tensor, Tensor]]:
            for index, _, z, y in _chunks(arguments[:-1], options):
                options.head.apply_(z)
                options.teacher_head.apply_(y)
                yield index, z, y

        stats = _statistics(visit, len(input), input, ignored, options)
        ctx.options = options
        ctx.save_for_backward(*arguments[:-1], *stats)
        return stats.loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        upstream = _upstream(grad)
        saved, options = ctx.saved_tensors, ctx.options
        given, stats = saved[:7], saved[7:]
        (input, weight, bias), ignored = given[:3], given[-1]
        wanted, head = list(ctx.needs_input_grad[:3]), options.head
        chunks = _indices(input, options)
        gradients = Gradients(
            input, weight, bias, options.shard.columns, wanted, options.acc_dtype, chunks
        )
        for index, x, z, y in _chunks(given, options):
            derivative = head.derivative(z)
            head.apply_(z)
            options.teacher_head.apply_(y)
            skip = None if ignored is None else ignored[index]
            of_rows = PairStats(*(t[index] for t in stats))
            of_logits = options.gradient(z, y, skip, of_rows, upstream[index], inplace=True)
            gradients.add(index, x, of_logits if head == IDENTITY else of_logits.mul_(derivative))
            del z, y, derivative, of_logits  # before the gradients are rounded
        found = gradients.finish()
        if wanted[0]:
            if options.shard.columns == 0:
                found[0].zero_()
            dist.all_reduce(found[0], group=options.shard.group)
        return *(g if w else None for g, w in zip(found, wanted, strict=True)), *(None,) * 5


def _indices(input: Tensor, options: PairOptions) -> list[Index]:
    if options.shard.columns == 0:
        return []
    tokens = input.new_zeros(len(input), dtype=torch.int64)
    return chunk_indices(tokens, -1, options.rows_per_chunk, drop_ignored=False)


def _chunks(
    given: tuple[Any, ...], options: PairOptions
) -> Iterator[tuple[Index, Tensor, Tensor, Tensor]]:
    """Yield (index, hidden states, logits, teacher's logits) of each chunk, before transforms."""
    input, weight, bias, teacher_input, teacher_weight, teacher_bias, ignored = given
    chunks, columns = _indices(input, options), options.shard.columns
    student = (input.detach(), weight.detach(), None if bias is None else bias.detach())
    for (index, x, z), (_, _, y) in zip(
        walk(*student, columns, chunks, ignored),
        walk(teacher_input, teacher_weight, teacher_bias, columns, chunks, ignored),
        strict=True,
    ):
        yield index, x, z, y
