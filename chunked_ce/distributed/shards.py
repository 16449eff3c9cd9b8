"""Shards of a vocabulary: partial sums of each row, exchanged once and merged on every rank.

Every rank sums over its own classes except the target. The owner of the target adds its logit.
One all-gather sends these few numbers per row. Every rank merges them in the order of the classes,
so all ranks hold the same bits. (Megatron-LM, arXiv:1909.08053, section 3, reduces a maximum, a sum
and the target's logit one after the other.)
"""

from __future__ import annotations

import math
import os
import zlib
from functools import reduce
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .. import backends
from ..checks.values import LOGIT_DTYPES, is_dtensor
from ..core.head import COMPUTE_DTYPE, Head
from ..core.reduction import is_scored
from ..core.row_stats import Part, TokenStats, finish, merge, zero_ignored
from . import checks
from .collectives import all_gather

SAMPLED_ROWS = 16  # compared to find copies of a shard; all rows would cost another read
IGNORED, ELSEWHERE = -100, -1  # local targets that are no class of the shard


class Shard(NamedTuple):
    """Hold this rank's classes: `columns` of them from `start`, out of `vocab_size`."""

    group: dist.ProcessGroup
    start: int
    columns: int
    vocab_size: int

    def local(self, target: Tensor, ignore_index: int) -> Tensor:
        """Return targets [rows], counted from `start`."""
        target = target.reshape(-1).long()
        column = target - self.start
        column = column.masked_fill((column < 0) | (column >= self.columns), ELSEWHERE)
        return column.masked_fill(~is_scored(target, ignore_index), IGNORED)


class Wanted(NamedTuple):
    entropy: bool = False
    mean_logprob: bool = False
    argmax: bool = False


def shard_of(
    columns: int, group: dist.ProcessGroup | None, vocab_start: int | None, vocab_size: int | None
) -> Shard:
    """Return the shard of a rank that holds `columns` columns, padding included."""
    group = checks.process_group(group)
    start, size = checks.shard(
        columns, vocab_start, vocab_size, dist.get_rank(group), dist.get_world_size(group)
    )
    return Shard(group, start, min(max(size - start, 0), columns), size)


def local_parts(
    tensors: dict[str, Any],
    dim: int,
    group: dist.ProcessGroup | None,
    vocab_start: int | None,
    vocab_size: int | None,
    rows: bool = False,
) -> tuple[list[Any], dist.ProcessGroup | None, int | None, int | None]:
    """Return this rank's part of tensors with classes in `dim`, its group, start and size."""
    first_name, first = next(iter(tensors.items()))
    if not is_dtensor(first):
        return list(tensors.values()), group, vocab_start, vocab_size
    checks.mesh_only(group, vocab_start)
    mesh, classes = first.device_mesh, first.shape[dim]
    mesh_dim = checks.placements(first_name, first, dim % first.dim(), rows)
    for name, t in tensors.items():
        if is_dtensor(t):
            checks.placements(name, t, dim % t.dim(), rows)
    local = [t.to_local() if is_dtensor(t) else t for t in tensors.values()]
    size = -(-classes // mesh.size(mesh_dim))  # as torch.chunk cuts
    start = min(mesh.get_local_rank(mesh_dim) * size, classes)
    vocab_size = classes if vocab_size is None else vocab_size
    return local, mesh.get_group(mesh_dim), start, vocab_size


def placements_of_rows(logits: Any) -> tuple[Any, ...]:
    """Return the placements of a DTensor's rows: its own, with the classes replicated."""
    from torch.distributed.tensor import Replicate

    last = logits.dim() - 1
    return tuple(Replicate() if p.is_shard(last) else p for p in logits.placements)


def local_tensor(name: str, t: Any, rows: tuple[Any, ...] | None) -> Any:
    """Return the plain tensor that every rank of the group holds whole."""
    if not is_dtensor(t):
        return t
    checks.placed_as_rows(name, t, rows)
    return t.to_local()


def check_agreement(
    shard: Shard,
    columns: int,
    input: Tensor,
    target: Tensor,
    wanted: Wanted,
    options: tuple[object, ...],
    input_gradient: bool,
    contents: Tensor | None,  # [..., C]
) -> None:
    """Raise unless all ranks bring the same rows and options, and every class once.

    On a GPU this waits, so it runs only if CHUNKED_CE_CHECK_TARGETS=1 is set.
    """
    if input.device.type != "cpu" and os.environ.get("CHUNKED_CE_CHECK_TARGETS") != "1":
        return
    dtype = LOGIT_DTYPES.index(input.dtype)
    flat = target.reshape(-1).long()
    options_text = repr([_checksum(o) if isinstance(o, Tensor) else o for o in options])
    fields = [len(flat), shard.start, columns, shard.vocab_size, dtype, *map(int, wanted)]
    fields += [int(_checksum(flat)), zlib.crc32(options_text.encode()), int(input_gradient)]
    fields += [0 if contents is None or not shard.columns else _fingerprint(contents)]
    report = torch.tensor(fields, device=input.device)
    reports = all_gather(report, shard.group).tolist()
    checks.shards_agree([checks.ShardReport(*report) for report in reports])


def _fingerprint(classes: Tensor) -> int:
    """Return a checksum of the bits of some rows [..., C]; 0 if each row has only one value.

    Shards of a head of zeros are equal without being copies.
    """
    rows = classes.detach().reshape(-1, classes.shape[-1])
    rows = rows[:: max(1, len(rows) // SAMPLED_ROWS)].contiguous()
    if not len(rows) or bool((rows == rows[:, :1]).all()):
        return 0
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[rows.element_size()]
    return int(_checksum(rows.view(bits))) or 1


def _checksum(values: Tensor) -> float:
    """Return a checksum that depends on the order of the values."""
    flat = values.detach().reshape(-1)
    dtype = torch.float64 if flat.is_floating_point() else torch.int64  # fp16 would end in inf
    return (flat * torch.arange(1, len(flat) + 1, dtype=dtype, device=flat.device)).sum().item()


def partial_sums(
    backend: str,
    logits: Tensor,  # [..., C]
    target: Tensor,  # [rows], local
    shard: Shard,
    head: Head,
    wanted: Wanted,
) -> Tensor:
    """Return this rank's partial sums as one tensor [fields, rows], ready to send."""
    dtype = COMPUTE_DTYPE[logits.dtype]
    if shard.columns == 0 or target.numel() == 0:
        zeros = torch.zeros(target.shape, dtype=dtype, device=target.device)
        minus_infinity = zeros - math.inf
        best = zeros.long() if wanted.argmax else None
        part, target_logit = (
            Part(minus_infinity, zeros, zeros, zeros, zeros, None, best),
            minus_infinity,
        )
    else:
        part, target_logit = backends.row_part(
            backend, logits, target, IGNORED, shard.columns, head, **wanted._asdict()
        )
    assert part.m is not None
    sent = [part.m, part.s, target_logit]
    if wanted.entropy:
        assert part.ez_sum is not None
        sent.append(part.ez_sum)
    if wanted.mean_logprob:
        assert part.logit_sum is not None and isinstance(part.weight_sum, Tensor)
        sent += [part.logit_sum, part.weight_sum]
    if wanted.argmax:
        assert part.best_class is not None
        integers = torch.int64 if dtype == torch.float64 else torch.int32
        sent.append((part.best_class + shard.start).to(integers).view(dtype))  # its bits
    return torch.stack([field.to(dtype) for field in sent])


def exchange(
    sent: Tensor,  # [fields, rows]
    target: Tensor,  # [rows], of the whole vocabulary
    ignore_index: int,
    shard: Shard,
    wanted: Wanted,
) -> tuple[TokenStats, Tensor]:
    """Exchange the partial sums; return the statistics of whole rows and lse's rounding."""
    received = all_gather(sent, shard.group)
    part = reduce(merge, (_part(rank_sums, wanted) for rank_sums in received))
    target = target.long()
    ignored = ~is_scored(target, ignore_index)
    target_logit = received[:, 2].amax(0)
    outside = (target < 0) | (target >= shard.vocab_size)  # on a GPU: unchecked
    target_logit = target_logit.masked_fill(outside, math.nan)
    stats, lse_low, _ = finish(part, target_logit, target, shard.vocab_size)
    return zero_ignored(stats, ignored), lse_low.masked_fill(ignored, 0.0)


def _part(sent: Tensor, wanted: Wanted) -> Part:
    m, s, _, *others = sent.unbind(0)
    ez_sum = logit_sum = columns = best_class = None
    if wanted.entropy:
        ez_sum, *others = others
    if wanted.mean_logprob:
        logit_sum, columns, *others = others
    if wanted.argmax:
        bits = torch.int64 if m.dtype == torch.float64 else torch.int32
        best_class = others[0].view(bits).long()
    return Part(m, s, ez_sum, logit_sum, columns, None, best_class)
