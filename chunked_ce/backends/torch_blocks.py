"""How the plain-PyTorch backend walks over logits: blocks of some rows and classes, as views."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor

# torch adds up to 32768 numbers in one thread: the sum of a block's row is the same to the bit
# whatever other rows are in the block, and however many threads there are.
WIDTH = 1 << 14
ELEMENTS = 1 << 19  # 2 MiB of fp32, which a CPU's caches hold
DEVICE_ELEMENTS = 1 << 26  # an accelerator wants few launches

Views = list[Any]  # Tensors, and None where None was given


def blocks(columns: int, *tensors: Tensor | None) -> Iterator[tuple[slice, slice, Views]]:
    """(flat rows, columns, what of each tensor [..., V] is there) of the first `columns` classes.

    The pieces of a row follow one another. Without rows there is one block of none.
    """
    first = tensors[0]
    assert first is not None
    width = min(columns, WIDTH)
    height = max(1, (ELEMENTS if first.is_cpu else DEVICE_ELEMENTS) // width)
    for offset, rows, matrices in _matrices(0, tensors):
        for top in range(0, max(rows, 1), height):
            of_rows = slice(top, min(top + height, rows))
            for left in range(0, columns, width):
                of_columns = slice(left, min(left + width, columns))
                views = [None if t is None else t[of_rows, of_columns] for t in matrices]
                yield slice(offset + of_rows.start, offset + of_rows.stop), of_columns, views


def _matrices(offset: int, tensors: Sequence[Tensor | None]) -> Iterator[tuple[int, int, Views]]:
    """(first row, number of rows, each tensor as [rows, V]); once wherever all strides merge."""
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
