"""The arguments of the vocabulary-parallel forms, checked and gathered."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .. import backends, checks
from ..backends import choose_backend
from ..checks.values import is_dtensor
from ..core.head import Head
from ..ops.chunks import default_rows, padded_row_bytes
from . import checks as shard_checks
from .autograd import Options
from .shards import (
    Shard,
    Wanted,
    check_agreement,
    local_parts,
    local_tensor,
    placements_of_rows,
    shard_of,
)


class Call(NamedTuple):
    """Hold this rank's tensors and its shard of the vocabulary."""

    input: Tensor
    target: Tensor
    shard: Shard
    columns: int  # of this rank, padding included
    contents: Tensor | None  # [..., C], to find copies of a shard; None where copies are allowed


def call_on_logits(
    input: Any,
    target: Any,
    group: dist.ProcessGroup | None,
    vocab_start: int | None,
    vocab_size: int | None,
) -> Call:
    """Take this rank's part of the logits and the targets, out of DTensors too."""
    rows = placements_of_rows(input) if is_dtensor(input) else None
    (local,), group, vocab_start, vocab_size = local_parts(
        dict(input=input), -1, group, vocab_start, vocab_size, rows=True
    )
    target = local_tensor("target", target, rows)
    checks.target_indices(target)
    shard_checks.shard_of_logits(local, target)
    columns = local.shape[-1]
    shard = shard_of(columns, group, vocab_start, vocab_size)
    return Call(local, target, shard, columns, local if vocab_start is None else None)


def checked_options(
    call: Call,
    wanted: Wanted,
    ignore_index: int,
    softcap: float | None,
    logit_scale: float,
    inplace_backward: bool,
    backend: str,
    loss_options: tuple[object, ...] = (),
    input_gradient: bool = False,
) -> Options:
    """Check the arguments that all forms share, and that the ranks agree on them."""
    ignore_index = checks.ignore_index(ignore_index)
    head = Head(checks.softcap(softcap), checks.logit_scale(logit_scale))
    checks.inplace_backward(inplace_backward, call.input)
    backend = choose_backend(backend, call.input.device)
    on_host = call.target.device.type == "cpu"
    agreed = (ignore_index, head, *loss_options)
    check_agreement(
        call.shard, call.columns, call.input, call.target, wanted, agreed, input_gradient,
        call.contents,
    )  # fmt: skip
    backends.check_targets(call.target, call.shard.vocab_size, ignore_index, on_host=on_host)
    return Options(call.shard, ignore_index, head, backend, wanted, inplace_backward)


def chunk_options(
    call: Call,
    weight: Tensor,
    chunk_bytes: int | None,
    token_chunk_size: int | None,
    drop_ignored: bool | None,
    acc_dtype: torch.dtype,
) -> dict[str, Any]:
    """Return the fields of Options that divide the rows of the linear form into chunks."""
    row_bytes = padded_row_bytes(max(1, call.shard.columns), weight.element_size())
    rows = default_rows(call.target.numel(), row_bytes, call.input.device.type)
    return dict(
        rows_per_chunk=checks.rows_per_chunk(chunk_bytes, token_chunk_size, row_bytes, rows),
        drop_ignored=checks.drop_ignored(drop_ignored, call.input.device),
        acc_dtype=checks.acc_dtype(acc_dtype, weight),
    )
