"""How rows of logits are cut into blocks: many whole rows, or a piece of one long row."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor


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
