"""Distillation where the vocabulary of both models lies on several ranks (tensor parallelism).

Every rank holds the logits, or the rows of both heads, of the same classes; every rank gets the
divergence over all classes.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .. import checks
from ..backends import choose_backend
from ..checks.values import is_dtensor
from ..core.divergence import Divergence
from ..core.head import COMPUTE_DTYPE, Head
from ..core.reduction import Reduction, is_scored, make_reduction
from ..functional.distillation import FlatHead, flat_head, rows_of_both, targets_or_zeros
from ..ops import transforms
from . import checks as shard_checks
from .pair import PairOptions, linear_shard_pair, shard_pair
from .shards import Wanted, check_agreement, local_parts, local_tensor, placements_of_rows, shard_of

__all__ = ["vocab_parallel_kl_div", "vocab_parallel_linear_kl_div"]


@checks.names_unknown
def vocab_parallel_kl_div(
    input: Tensor,
    teacher: Tensor,
    *,
    group: dist.ProcessGroup | None = None,
    vocab_start: int | None = None,
    vocab_size: int | None = None,
    kind: str = "forward",
    beta: float = 0.5,
    temperature: float = 1.0,
    target: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    token_weight: Tensor | None = None,
    num_items: int | Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """:func:`chunked_ce.kl_div` of logits [..., C] whose classes lie on several ranks.

    Every rank gets the same loss, bit for bit, and the gradient of its own logits. One all-gather
    of 28 bytes a token and rank; for "jsd" another of 8 and one more visit of the logits, for its
    mixture needs the softmax of whole rows.

    Args:
        input: the student's logits of this rank [..., C]; float16, bfloat16, float32 or float64,
            any strides. Or a DTensor [..., V] with one Shard(-1), as for
            :func:`vocab_parallel_token_stats`.
        teacher: the teacher's logits of the same classes [..., C], any of these dtypes; with
            `vocab_start` it may have other columns of padding. A DTensor where `input` is one. It
            gets no gradient.
        group, vocab_start, vocab_size: see :func:`vocab_parallel_token_stats`.
        kind, beta, temperature, target, ignore_index: see :func:`chunked_ce.kl_div`.
        reduction, token_weight, num_items, backend: see :func:`chunked_ce.kl_div`.

    Returns:
        The loss, a 0-d tensor, or one loss per token for "none"; float32 (float64 for float64
        `input`).

    Raises:
        RuntimeError: no process group.
        TypeError, ValueError: as :func:`chunked_ce.kl_div`; and on every rank alike where ranks
            disagree, as :func:`vocab_parallel_token_stats` says.

    Example:
        >>> import torch
        >>> import torch.distributed as dist
        >>> import chunked_ce.distributed
        >>> # With torchrun: dist.init_process_group() on every rank, and each rank's own shard.
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> student, teacher = torch.randn(2, 5, 8, requires_grad=True), torch.randn(2, 5, 8)
        >>> loss = chunked_ce.distributed.vocab_parallel_kl_div(student, teacher, kind="jsd")
        >>> loss.backward()
        >>> dist.destroy_process_group()
    """
    checks.no_transforms("vocab_parallel_kl_div", transforms.is_active())
    rows = placements_of_rows(input) if is_dtensor(input) else None
    (input, teacher), group, vocab_start, vocab_size = local_parts(
        dict(input=input, teacher=teacher), -1, group, vocab_start, vocab_size, rows=True
    )
    how = checks.divergence(kind, beta, temperature)
    shard_checks.logits_of_shard(input)
    tokens = _tokens(input, local_tensor("target", target, rows), ignore_index, reduction,
                     token_weight, num_items)  # fmt: skip
    columns = input.shape[-1]
    shard = shard_of(columns, group, vocab_start, vocab_size)
    shard_checks.teachers_logits(input, teacher, shard.columns, padded=vocab_start is not None)
    options = PairOptions(shard, Divergence(*how), choose_backend(backend, input.device))
    check_agreement(
        shard, columns, input, tokens.target, Wanted(), (how, *tokens.agreed), False,
        input if vocab_start is None else None,
    )  # fmt: skip
    return tokens.reducer.reduce(shard_pair(input, teacher.detach(), tokens.ignored, options))


@checks.names_unknown
def vocab_parallel_linear_kl_div(
    input: Tensor,
    linear_weight: Tensor,
    teacher_input: Tensor,
    teacher_weight: Tensor,
    *,
    group: dist.ProcessGroup | None = None,
    vocab_start: int | None = None,
    vocab_size: int | None = None,
    linear_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    teacher_softcap: float | None = None,
    teacher_logit_scale: float = 1.0,
    kind: str = "forward",
    beta: float = 0.5,
    temperature: float = 1.0,
    target: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    token_weight: Tensor | None = None,
    num_items: int | Tensor | None = None,
    acc_dtype: torch.dtype = torch.float32,
    chunk_bytes: int | None = None,
    token_chunk_size: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """:func:`chunked_ce.linear_kl_div` where each rank holds the rows of both heads of its classes.

    Every rank gets the loss and the gradients of its own rows. The gradient of `input`, which all
    ranks hold, is summed over them in backward, as
    :func:`vocab_parallel_linear_cross_entropy` does. Backward computes the logits again, and for
    "jsd" so does forward: its mixture needs the softmax of whole rows.

    Args:
        input: the student's hidden states [..., D], the same on every rank.
        linear_weight: this rank's rows of the student's head, [C, D]; or a DTensor [V, D] with one
            Shard(0), which brings its own group and its own vocab_start.
        teacher_input: the teacher's hidden states [..., another D], the same on every rank.
        teacher_weight: this rank's rows of the teacher's head, of the same classes; a DTensor
            where `linear_weight` is one.
        group, vocab_start, vocab_size: see :func:`vocab_parallel_token_stats`.
        linear_bias: the student's bias [C], or None; a DTensor where `linear_weight` is one.
        teacher_bias: the teacher's bias, or None.
        others: see :func:`chunked_ce.linear_kl_div`. It has no `cross_entropy_weight`: add
            :func:`vocab_parallel_linear_cross_entropy`.

    Returns:
        The loss, a 0-d tensor, or one loss per token for "none"; float32 (float64 for float64
        `input`).

    Raises:
        RuntimeError, TypeError, ValueError: as :func:`vocab_parallel_kl_div`.

    Example:
        >>> import torch
        >>> import torch.distributed as dist
        >>> import chunked_ce.distributed
        >>> # With torchrun: dist.init_process_group() on every rank, and each rank's own shard.
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> hidden, head = torch.randn(3, 4, requires_grad=True), torch.randn(8, 4)
        >>> teacher_hidden, teacher_head = torch.randn(3, 6), torch.randn(8, 6)
        >>> loss = chunked_ce.distributed.vocab_parallel_linear_kl_div(
        ...     hidden, head, teacher_hidden, teacher_head
        ... )
        >>> loss.backward()
        >>> dist.destroy_process_group()
    """
    checks.no_transforms("vocab_parallel_linear_kl_div", transforms.is_active())
    heads = dict(
        linear_weight=linear_weight, teacher_weight=teacher_weight,
        linear_bias=linear_bias, teacher_bias=teacher_bias,
    )  # fmt: skip
    local, group, vocab_start, vocab_size = local_parts(heads, 0, group, vocab_start, vocab_size)
    how = checks.divergence(kind, beta, temperature)
    transform = checks.two_transforms(softcap, logit_scale, teacher_softcap, teacher_logit_scale)
    input, teacher_input = (
        local_tensor(name, t, None)
        for name, t in (("input", input), ("teacher_input", teacher_input))
    )
    student, teacher = (input, local[0], local[2]), (teacher_input, local[1], local[3])
    shard_checks.two_shards_of_heads(student, teacher)
    checks.distilled_tokens(input, teacher_input, None, 0.0)
    tokens = _tokens(input, local_tensor("target", target, None), ignore_index, reduction,
                     token_weight, num_items)  # fmt: skip
    chunks = chunk_bytes, token_chunk_size, acc_dtype
    where = group, vocab_start, vocab_size
    return _loss_of_heads(student, teacher, tokens, where, how, transform, chunks, backend)


def _loss_of_heads(
    student: FlatHead,
    teacher: FlatHead,
    tokens: _Tokens,
    where: tuple[dist.ProcessGroup | None, int | None, int | None],  # group, start, size
    how: tuple[str, float, float],
    transform: tuple[float | None, float, float | None, float],
    chunks: tuple[int | None, int | None, torch.dtype],  # their bytes, tokens, acc_dtype
    backend: str,
) -> Tensor:
    """Check that the ranks agree; return the loss of hidden states [..., D] and heads [C, D]."""
    (group, vocab_start, vocab_size), (chunk_bytes, token_chunk_size, acc_dtype) = where, chunks
    input, weight, _ = student
    shard = shard_of(len(weight), group, vocab_start, vocab_size)
    shard_checks.teachers_classes(
        len(weight), len(teacher[1]), shard.columns, padded=vocab_start is not None
    )
    flat, of_teacher, classes = flat_head(*student), flat_head(*teacher), max(1, shard.columns)
    options = PairOptions(
        shard, Divergence(*how), choose_backend(backend, input.device),
        Head(*transform[:2]), Head(*transform[2:]),
        rows_of_both(flat, of_teacher, classes, chunk_bytes, token_chunk_size),
        checks.acc_dtype(acc_dtype, flat[1]),
    )  # fmt: skip
    check_agreement(
        shard, len(weight), input, tokens.target, Wanted(), (how, transform, *tokens.agreed),
        input.requires_grad and torch.is_grad_enabled(),
        weight.t() if vocab_start is None else None,
    )  # fmt: skip
    losses = linear_shard_pair(flat, of_teacher, tokens.ignored, options)
    return tokens.reducer.reduce(losses.view(input.shape[:-1]))


class _Tokens(NamedTuple):
    """Hold targets [...], what is ignored [rows], the reduction; and what ranks must agree on."""

    target: Tensor
    ignored: Tensor | None
    reducer: Reduction
    agreed: tuple[Any, ...]


def _tokens(
    input: Tensor,
    target: Tensor | None,
    ignore_index: int,
    reduction: str,
    token_weight: Tensor | None,
    num_items: int | Tensor | None,
) -> _Tokens:
    """Check how the losses of rows become one."""
    if target is not None:
        checks.target_indices(target)
        shard_checks.targets_of_rows(input, target, "row")
    ignore_index = checks.ignore_index(ignore_index)
    checks.reduction(reduction)
    checks.token_weight(token_weight, input.shape[:-1], input)
    items = checks.num_items(num_items, reduction, input)
    labels, skipped = targets_or_zeros(input, target, ignore_index)
    dtype = COMPUTE_DTYPE[input.dtype]
    return _Tokens(
        labels,
        None if target is None else ~is_scored(labels, skipped).reshape(-1),
        make_reduction(reduction, labels, skipped, token_weight, items, dtype),
        (skipped, reduction, token_weight, items),
    )
