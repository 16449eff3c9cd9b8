"""Process groups, and shards of a vocabulary."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from ..checks.distillation import TEACHER_NAMES, no_teacher_gradient
from ..checks.group import process_group as process_group
from ..checks.linear import NAMES, HeadNames, hidden_states, linear_bias, no_module
from ..checks.values import LOGIT_DTYPES, floating, integer, same_device, shape


def shard(
    columns: int, vocab_start: Any, vocab_size: Any, rank: int, world: int
) -> tuple[int, int]:
    """Return (first class of this rank's shard, number of classes over all ranks)."""
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
    """Describe one rank's call, for comparison with the other ranks."""

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
    contents: int = 0  # a checksum of the shard itself; 0 where a copy may be meant


_NAMES = ("targets", None, None, "classes in all (vocab_size)")


def shards_agree(reports: list[ShardReport]) -> None:
    """Raise if the ranks disagree. All ranks see the same reports, so all raise, or none."""
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
            has, lacks = (0, rank) if first.input_gradient else (rank, 0)
            raise ValueError(
                f"ranks disagree: input requires a gradient on rank {has} of "
                f"the group, but not on rank {lacks}: backward adds it up over "
                "the ranks, so that it must on all or on none"
            )
    _every_class_once(reports)
    _no_copies(reports)


def _every_class_once(reports: list[ShardReport]) -> None:
    """Raise unless one rank holds each class. Columns from vocab_size on are padding."""
    end, size = 0, reports[0].vocab_size
    for rank, report in enumerate(reports):
        stop = min(report.start + report.columns, size)
        if report.start >= stop:
            continue
        if report.start != end:
            fault = "overlap" if report.start < end else "do not cover the vocabulary"
            raise ValueError(
                f"shards {fault}: that of rank {rank} starts at class {report.start}, but those "
                f"before it end at {end}: give every class to one rank, in the order of the ranks, "
                "and pass each rank's vocab_start; where every rank holds all classes, call "
                "chunked_ce.cross_entropy or chunked_ce.linear_cross_entropy"
            )
        end = stop
    if end < size:
        raise ValueError(
            f"shards do not cover the vocabulary: they end at class {end}, but vocab_size is "
            f"{size}: give every class to a rank"
        )


def _no_copies(reports: list[ShardReport]) -> None:
    """Raise if ranks hold copies: gathered logits, or a whole head, without vocab_start."""
    owners: dict[int, int] = {}
    for rank, report in enumerate(reports):
        owner = owners.setdefault(report.contents, rank)
        if report.contents and owner != rank:
            raise ValueError(
                f"ranks {owner} and {rank} of the group bring the same values, which would count "
                "every class twice: pass each rank's own classes, or call "
                "chunked_ce.cross_entropy or chunked_ce.linear_cross_entropy where every rank "
                "holds all of them; if the shards are meant to be equal, pass vocab_start and "
                "vocab_size"
            )


def logits_of_shard(input: Tensor, name: str = "input") -> None:
    """Check logits [..., C]. A rank may have no class at all."""
    floating(name, input, " of logits")
    if input.dim() == 0:
        raise ValueError(f"{name} is a 0-dimensional tensor, expected logits of shape [..., C]")


def shard_of_logits(input: Tensor, target: Tensor) -> None:
    """Check `input` [..., C] and `target` [...]."""
    logits_of_shard(input)
    targets_of_rows(input, target, "row")


def targets_of_rows(input: Tensor, target: Tensor, row: str) -> None:
    """Check that each row of `input` has a target."""
    if target.shape != input.shape[:-1]:
        raise ValueError(
            f"target has shape {shape(target)}, but input of shape {shape(input)} has one {row} "
            f"per target: give every rank the class index of each {row}, counted over all ranks"
        )
    same_device("target", target, input)


def teachers_logits(input: Tensor, teacher: Tensor, columns: int, *, padded: bool) -> None:
    """Check a teacher's logits of the same classes; `padded`: columns past `columns` may differ."""
    logits_of_shard(teacher, "teacher")
    if teacher.shape[:-1] != input.shape[:-1]:
        raise ValueError(
            f"teacher has shape {shape(teacher)}, but input has shape {shape(input)}: give one row "
            "of the teacher's logits per row of the student's, vocabulary last"
        )
    same_device("teacher", teacher, input)
    no_teacher_gradient("teacher", teacher)
    teachers_classes(input.shape[-1], teacher.shape[-1], columns, padded=padded)


def teachers_classes(student: int, teacher: int, columns: int, *, padded: bool) -> None:
    """Check that this rank has the same classes of both, `columns` of them without padding."""
    if teacher != student and (not padded or min(student, teacher) < columns):
        raise ValueError(
            f"this rank has {student} classes of the student, but {teacher} of the teacher: give "
            "every rank the same classes of both, and where they are padded differently, pass "
            "vocab_start and vocab_size"
        )


def two_shards_of_heads(student: tuple[Any, Any, Any], teacher: tuple[Any, Any, Any]) -> None:
    """Check hidden states, rows of the head and bias of each. The teacher gets no gradient."""
    for (input, weight, bias), called in ((student, NAMES), (teacher, TEACHER_NAMES)):
        no_module(weight, called)
        hidden_states(input, called.input)
        rows_of_head(weight, bias, input, called)
    for name, tensor in zip(TEACHER_NAMES, teacher, strict=True):
        if tensor is not None:
            no_teacher_gradient(name, tensor)


def rows_of_head(
    weight: Tensor, bias: Tensor | None, input: Tensor, names: HeadNames = NAMES
) -> None:
    """Check `weight` [C, D], this rank's rows of the head. There may be none."""
    floating(names.weight, weight, "", "dequantise it, or convert it to input's dtype")
    if weight.dim() != 2 or weight.shape[1] != input.shape[-1]:
        raise ValueError(
            f"{names.weight} has shape {shape(weight)}, expected [C, {input.shape[-1]}]: "
            f"this rank's classes, for hidden states of shape {shape(input)}"
        )
    same_device(names.weight, weight, input)
    linear_bias(bias, weight, names.bias)


def shard_of_weight(weight: Tensor, bias: Tensor | None, input: Tensor, target: Tensor) -> None:
    """Check this rank's rows of the head, and that each hidden state has a target."""
    rows_of_head(weight, bias, input)
    targets_of_rows(input, target, "hidden state")


def placements(name: str, tensor: Any, dim: int, rows: bool) -> int:
    """Return the dimension of the DTensor's mesh that shards its dimension `dim`.

    The other dimensions of the mesh must replicate it. If `rows`, they may shard the rows.
    """
    placed = [p for p in tensor.placements if p.is_shard(dim)]
    others = [p for p in tensor.placements if not p.is_shard(dim)]
    if len(placed) != 1 or not all(p.is_replicate() or (rows and _of_rows(p)) for p in others):
        otherwise = "Replicate() or a Shard of the rows" if rows else "Replicate()"
        raise ValueError(
            f"{name} is a DTensor with placements {tuple(tensor.placements)}, expected one "
            f"Shard({dim}) and otherwise {otherwise}: redistribute it, or pass "
            f"{name}.to_local() with group and vocab_start"
        )
    return [p.is_shard(dim) for p in tensor.placements].index(True)


def _of_rows(placement: Any) -> bool:
    """Return whether it is a plain Shard. A strided one has the rows in another order."""
    return type(placement).__name__ == "Shard"


def placed_as_rows(name: str, tensor: Any, expected: tuple[Any, ...] | None) -> None:
    """Check that a DTensor is placed as the rows of the logits; None: replicated."""
    placed = tuple(tensor.placements)
    if expected is not None and placed == expected:
        return
    if expected is None or all(p.is_replicate() for p in expected):
        if all(p.is_replicate() for p in placed):
            return
        wanted = "Replicate() on every dimension of the mesh"
    else:
        wanted = f"{expected}, as the rows of input"
    raise ValueError(
        f"{name} is a DTensor with placements {placed}, expected {wanted}: redistribute it, or "
        "pass a plain tensor of this rank's rows"
    )


def mesh_only(group: object, vocab_start: object) -> None:
    """Refuse arguments that a DTensor's mesh already gives."""
    if group is not None or vocab_start is not None:
        raise ValueError(
            "group and vocab_start are given, but a DTensor knows both from its mesh: leave them "
            "None, or pass its .to_local()"
        )
