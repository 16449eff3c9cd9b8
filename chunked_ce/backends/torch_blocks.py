"""Blocks of rows and classes in which the plain-PyTorch backend processes logits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor

# torch adds up to 32768 numbers in one thread. So the sum of a block's row has the same bits for
# any number of threads, and with any other rows in the block.
WIDTH = 1 << 14
ELEMENTS = 1 << 19  # 2 MiB of fp32, which a CPU's caches hold
DEVICE_ELEMENTS = 1 << 26  # few launches on an accelerator

Views = list[Any]  # tensors, or None for an absent tensor


def blocks(columns: int, *tensors: Tensor | None) -> Iterator[tuple[slice, slice, Views]]:
    """Yield (flat rows, columns, view of each tensor [..., V]) for the first `columns` classes.

    The blocks of a row follow one another. Without rows there is one empty block.
    """
    first = tensors[0]
    assert first is not None
    width = min(columns, WIDTH)
    height = max(1, (ELEMENTS if first.is_cpu else DEVICE_ELEMENTS) // width)
    for offset, rows, matrices in _matrices(0, tensors):
        for top in range(0, max(rows, 1), height):
            block_rows = slice(top, min(top + height, rows))
            for left in range(0, columns, width):
                block_columns = slice(left, min(left + width, columns))
                views = [None if t is None else t[block_rows, block_columns] for t in matrices]
                flat_rows = slice(offset + block_rows.start, offset + block_rows.stop)
                yield flat_rows, block_columns, views


def _matrices(offset: int, tensors: Sequence[Tensor | None]) -> Iterator[tuple[int, int, Views]]:
    """Yield (first row, number of rows, each tensor as [rows, V]), once if all strides merge."""
    first = tensors[0]
    assert first is not None
    rows = first.shape[:-1].numel()
    try:
        views = [None if t is None else t.view(rows, t.shape[-1]) for t in tensors]
    except RuntimeError:
        for i in range(len(first)):
            inner = [None if t is None else t[i] for t in tensors]
            yield from _matrices(offset + i * (rows // len(first)), inner)
    else:
        yield offset, rows, views
