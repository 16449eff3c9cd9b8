"""Process groups, and shards of a vocabulary."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch.distributed as dist
from torch import Tensor

from .values import LOGIT_DTYPES, floating, integer, same_device, shape


def process_group(group: Any) -> dist.ProcessGroup:
    """`group`, or the default one, of which this process must be a member."""
    if not dist.is_available():
        raise RuntimeError(
            "this build of torch has no torch.distributed: use chunked_ce.cross_entropy, "
            "or install a build that has it"
        )
    if group is None:
        if not dist.is_initialized():
            raise RuntimeError(
                "group is None, and there is no default process group: call "
                "torch.distributed.init_process_group() first, in a program started by torchrun"
            )
        return dist.group.WORLD  # type: ignore[return-value]
    if group == dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError(
            "group does not contain this process: call the loss on its ranks alone, "
            "or pass the group of this rank"
        )
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(
            f"group must be a torch.distributed.ProcessGroup or None, got {type(group).__name__}: "
            "make one with torch.distributed.new_group(), or take mesh.get_group()"
        )
    return group


def shard(
    columns: int, vocab_start: Any, vocab_size: Any, rank: int, world: int
) -> tuple[int, int]:
    """(first class of this rank's shard, number of classes over all ranks)."""
    if vocab_start is None:
        if columns == 0:
            raise ValueError(
                "this rank holds no class, and vocab_start is None, which means shards of equal "
                "size: pass vocab_start and vocab_size"
            )
        start, size = rank * columns, columns * world
        if vocab_size is None:
            return start, size
        size = integer("vocab_size", vocab_size, "an int or None")
        if not 1 <= size <= columns * world:
            raise ValueError(
                f"vocab_size is {size}, but {world} shards of {columns} classes make "
                f"{columns * world}: give a number from 1 to that, or pass vocab_start as well "
                "where shards differ in size"
            )
        return start, size
    start = integer("vocab_start", vocab_start, "an int or None")
    if vocab_size is None:
        raise ValueError(
            "vocab_start is given, but not vocab_size, the number of classes over all ranks: "
            "pass both, or neither where all shards have one size"
        )
    size = integer("vocab_size", vocab_size, "an int")
    if start < 0 or size < 1:
        raise ValueError(
            f"vocab_start is {start} and vocab_size {size}, expected at least 0 and at least 1"
        )
    return start, size


class ShardReport(NamedTuple):
    """What a rank says of its call."""

    rows: int
    start: int
    columns: int
    vocab_size: int
    dtype: int
    entropy: int
    mean_logprob: int
    argmax: int
    targets: int  # a checksum
    options: int  # another
    input_gradient: int  # whether backward adds up over the ranks


_NAMES = ("targets", None, None, "classes in all (vocab_size)")


def shards_agree(reports: list[ShardReport]) -> None:
    """All ranks see the same reports, so all raise, or none."""
    first = reports[0]
    for rank, report in enumerate(reports):
        for name, a, b in zip(_NAMES, first, report, strict=False):
            if name is not None and a != b:
                raise ValueError(
                    f"ranks disagree: rank 0 of the group has {a} {name}, rank {rank} has {b}: "
                    "every rank must score the same tokens, each with its own classes"
                )
        if report.dtype != first.dtype:
            raise TypeError(
                f"ranks disagree: rank 0 of the group has {LOGIT_DTYPES[first.dtype]}, "
                f"rank {rank} has {LOGIT_DTYPES[report.dtype]}: convert one of them"
            )
        if report[5:8] != first[5:8]:
            raise ValueError(
                f"ranks disagree: rank 0 and rank {rank} of the group want different statistics: "
                "pass the same options on every rank"
            )
        if report.targets != first.targets:
            raise ValueError(
                f"ranks disagree: rank 0 and rank {rank} of the group have different targets: "
                "every rank must score the same tokens, each with its own classes"
            )
        if report.options != first.options:
            raise ValueError(
                f"ranks disagree: rank 0 and rank {rank} of the group have different options, such "
                "as ignore_index, softcap, reduction or num_items: pass the same ones on every rank"
            )
        if report.input_gradient != first.input_gradient:
            raise ValueError(
                f"ranks disagree: input requires a gradient on rank {0 if first[-1] else rank} of "
                f"the group, but not on rank {rank if first[-1] else 0}: backward adds it up over "
                "the ranks, so that it must on all or on none"
            )
    end = 0
    for rank, report in enumerate(reports):
        if report.start != end and end < first.vocab_size:
            raise ValueError(
                f"shards do not cover the vocabulary: that of rank {rank} starts at class "
                f"{report.start}, but those before it end at {end}: pass each rank's vocab_start, "
                "in the order of the ranks"
            )
        end = report.start + report.columns
    if end < first.vocab_size:
        raise ValueError(
            f"shards do not cover the vocabulary: they end at class {end}, but vocab_size is "
            f"{first.vocab_size}: give every class to a rank"
        )


def shard_of_logits(input: Tensor, target: Tensor) -> None:
    """`input` [..., C] and `target` [...]; a rank may have no class at all."""
    floating("input", input, " of logits")
    if input.dim() == 0:
        raise ValueError("input is a 0-dimensional tensor, expected logits of shape [..., C]")
    if target.shape != input.shape[:-1]:
        raise ValueError(
            f"target has shape {shape(target)}, but input of shape {shape(input)} has one row per "
            "target: give every rank the class index of each row, counted over all ranks"
        )
    same_device("target", target, input)


def shard_of_weight(weight: Tensor, input: Tensor, target: Tensor) -> None:
    """`weight` [C, D], the rows of a head that this rank holds, perhaps none."""
    floating("linear_weight", weight, "", "dequantise it, or convert it to input's dtype")
    if weight.dim() != 2 or weight.shape[1] != input.shape[-1]:
        raise ValueError(
            f"linear_weight has shape {shape(weight)}, expected [C, {input.shape[-1]}]: "
            f"this rank's classes, for hidden states of shape {shape(input)}"
        )
    same_device("linear_weight", weight, input)
    if target.shape != input.shape[:-1]:
        raise ValueError(
            f"target has shape {shape(target)}, but input of shape {shape(input)} has one hidden "
            "state per target: give every rank the class index of each, counted over all ranks"
        )
    same_device("target", target, input)


def placements(name: str, tensor: Any, dim: int) -> int:
    """Which dimension of the DTensor's mesh shards its dimension `dim`, whole otherwise."""
    sharding = [i for i, p in enumerate(tensor.placements) if p.is_shard(dim)]
    others = [p for i, p in enumerate(tensor.placements) if i not in sharding]
    if len(sharding) != 1 or not all(p.is_replicate() for p in others):
        raise ValueError(
            f"{name} is a DTensor with placements {tuple(tensor.placements)}, expected one "
            f"Shard({dim}) and otherwise Replicate(): redistribute it, or pass "
            f"{name}.to_local() with group and vocab_start"
        )
    return sharding[0]


def whole(name: str, tensor: Any) -> None:
    if not all(p.is_replicate() for p in tensor.placements):
        raise ValueError(
            f"{name} is a DTensor with placements {tuple(tensor.placements)}, expected Replicate() "
            "on every dimension of the mesh: redistribute it, or pass a plain tensor"
        )


def mesh_only(group: object, vocab_start: object) -> None:
    if group is not None or vocab_start is not None:
        raise ValueError(
            "group and vocab_start are given, but a DTensor knows both from its mesh: leave them "
            "None, or pass its .to_local()"
        )
