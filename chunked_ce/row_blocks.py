"""How rows of logits are cut into blocks: many whole rows, or a piece of one long row."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from .blocks import compute_dtype


class Block(NamedTuple):
    where: tuple[int | slice, ...] | None  # into the leading dimensions; None: everything
    rows: slice  # the same rows, counted flat
    start: int  # columns start to stop
    stop: int

    def of(self, x: Tensor) -> Tensor:
        """[R, columns] of logits; [..., columns] where the leading dimensions do not merge."""
        if self.where is not None:
            x = x[self.where]
        return x if self.stop - self.start == x.shape[-1] else x[..., self.start : self.stop]

    def of_rows(self, t: Tensor) -> Tensor:
        """[R, ...] of something that each row has."""
        return t if self.where is None else t[self.rows]


def blocks(
    leading: torch.Size, columns: int, elements: int, together: int | None = None
) -> Iterator[Block]:
    """Blocks of about `elements` of [*leading, columns], or of one row of up to twice as many.

    The pieces of a longer row follow one another. `together`: how many of the leading dimensions,
    from the last, a block may span; None: all.
    """
    outermost = 0 if together is None else len(leading) - together
    if outermost == 0 and leading.numel() * columns <= _most_together(elements):
        yield Block(None, slice(None), 0, columns)
        return
    width = -(-columns // -(-columns // longest_row(elements)))  # pieces of like size
    limit = elements // width
    dim, inner = len(leading) - 1, 1
    while dim > outermost and inner * leading[dim] <= limit:
        inner *= leading[dim]
        dim -= 1
    step = _rows_together(leading[dim], max(1, limit // inner))
    row = 0
    for outer in product(*(range(size) for size in leading[:dim])):
        for first in range(0, leading[dim], step):
            last = min(first + step, leading[dim])
            rows = slice(row, row + (last - first) * inner)
            row = rows.stop
            for start in range(0, columns, width):
                yield Block((*outer, slice(first, last)), rows, start, min(start + width, columns))


def _rows_together(rows: int, limit: int) -> int:
    """From 3/4 to 4/3 of `limit`: as many for one thread as for another, and for the last block."""
    threads = torch.get_num_threads()
    most = -(-limit // threads) * threads
    if most > _most_together(limit):
        most = limit - limit % threads or limit
    for fewer in range(most, limit * 3 // 4, -threads)[:16]:  # of many, the last counts for little
        if rows % fewer == 0:
            return fewer
    return most


def _most_together(elements: int) -> int:
    return elements * 4 // 3


def largest_block(columns: int, elements: int) -> int:
    """Of the `blocks` of any number of rows."""
    return max(_most_together(elements), min(columns, longest_row(elements)))


def longest_row(elements: int) -> int:
    """Which is not cut into pieces."""
    return 2 * elements


def flat(x: Tensor) -> Tensor:
    """[rows, V] where strides allow it without a copy, else as it came."""
    if x.dim() == 2:
        return x
    try:
        return x.view(-1, x.shape[-1])
    except RuntimeError:
        return x


def mergeable(*tensors: Tensor) -> int:
    """How many leading dimensions of [..., V], from the last, are one in all of these tensors."""
    count = 1
    for dim in range(tensors[0].dim() - 3, -1, -1):
        if any(
            t.shape[dim] != 1 and t.stride(dim) != t.stride(dim + 1) * t.shape[dim + 1]
            for t in tensors
        ):
            break
        count += 1
    return min(count, tensors[0].dim() - 1)


def two_dimensional(block: Tensor) -> Tensor:
    return block if block.dim() == 2 else block.reshape(-1, block.shape[-1])


_kept = threading.local()
_NOTHING: tuple[Tensor | None, object] = None, None


class Scratch:
    """Memory for the work on one block after another.

    The CPU keeps the latest, one per thread: touching fresh pages would cost more than the
    arithmetic. Whoever works in it has it alone, until it is left to the next: a signal handler or
    a finalizer that computes a loss in the midst of another's block gets memory of its own. After
    an exception in that midst there is none to take over, and the next allocates it.
    """

    __slots__ = ("_found", "_memory")

    def __init__(self, elements: int, dtype: torch.dtype, device: torch.device) -> None:
        memory, self._found = _NOTHING
        if device.type == "cpu" and dtype == torch.float32:
            memory, self._found = _kept.__dict__.pop("memory", _NOTHING)
        if memory is None or memory.numel() < elements:
            with torch.inference_mode(False):  # made within, it could not be written to outside
                memory, self._found = torch.empty(elements, dtype=dtype, device=device), None
        self._memory: Tensor = memory

    def leave(self) -> object:
        """To the next. Returns by what that one may know what this one left."""
        left = object()
        if self._memory.is_cpu and self._memory.dtype == torch.float32:
            _kept.memory = self._memory, left
        return left

    def holds(self, left: object) -> bool:
        """Whether nobody had the memory since this was left there; None: nothing was."""
        return left is not None and self._found is left

    @classmethod
    def of_blocks(cls, x: Tensor, columns: int, elements: int) -> Scratch:
        """Memory for any of the `blocks` of the first columns of x [..., V]."""
        most = min(x.shape[:-1].numel() * columns, largest_block(columns, elements))
        return cls(most, compute_dtype(x.dtype), x.device)

    def like(self, block: Tensor) -> Tensor:
        """[rows, columns] for a block of that many, in its order of memory."""
        columns = block.shape[-1]
        rows = block.numel() // columns
        by_column = block.stride(-1) != 1 and block.dim() > 1 and block.stride(-2) == 1
        return self._memory.as_strided((rows, columns), (1, rows) if by_column else (columns, 1))
