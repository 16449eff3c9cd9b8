"""Addresses of rows, and how a row is split for 16-byte accesses.

The body of a row starts at its first 16-byte boundary. So every vocabulary (GPT-2's 50257) and
every row start has 16-byte accesses:

    | prefix |  body: whole groups of WIDTH logits, 16 bytes each  | tail |

The loops walk the body in tiles [GROUPS, WIDTH] and leave out the target's group. The edges are the
prefix, the tail and the target's group: at most 3 WIDTH logits, in one small tile. Only in the
edges are columns compared with the target.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl


class Row(NamedTuple):
    """A row, or the rest of one. Class v is at ptr + v stride_v."""

    ptr: Any
    stride_v: Any  # encoded by `arguments.encode`


class Window(NamedTuple):
    """The split of a row. Positions are counted from the start of the body."""

    prefix: Any  # number of logits before the body
    body: Any  # number of logits in the body
    group: Any  # position of the target's group in the body, or -1


@triton.jit
def decode(number):
    """Return n from its encoding 4 n + 3."""
    return number >> 2


@triton.jit
def row_start(row, inner_rows, address):
    """Return the offset of a row's first logit.

    There are two strides so that `logits[:, :-1]` of [B, T, V] needs no copy. `row` has 32 bits
    because a division of 64 bits is a subroutine.
    """
    outer, inner = row // inner_rows, row % inner_rows
    start = decode(address.offset) + outer.to(tl.int64) * decode(address.stride_outer)
    return start + inner.to(tl.int64) * decode(address.stride_inner)


@triton.jit
def row_window(start, columns, target_column, WIDTH: tl.constexpr, CONTIGUOUS: tl.constexpr):
    """Return the Window of a row of `columns` logits at `start`. target_column: -1 for none."""
    prefix = tl.zeros([], tl.int32)
    if CONTIGUOUS:
        prefix += tl.minimum((WIDTH - start % WIDTH) % WIDTH, columns).to(tl.int32)
    body = tl.multiple_of((columns - prefix) // WIDTH * WIDTH, WIDTH)
    position = (target_column - prefix).to(tl.int32)
    inside = (position >= 0) & (position < body)
    return Window(prefix, body, tl.where(inside, position // WIDTH * WIDTH, -1))


@triton.jit
def column_offsets(columns, stride_v, CONTIGUOUS: tl.constexpr):
    """Return the offsets of columns, with 32 bits if CONTIGUOUS because 64 cost registers."""
    return columns if CONTIGUOUS else tl.cast(columns, tl.int64) * decode(stride_v)


@triton.jit
def advance(columns: tl.constexpr, stride_v, CONTIGUOUS: tl.constexpr):
    """Return the offset of `columns` columns."""
    return columns if CONTIGUOUS else tl.cast(decode(stride_v), tl.int64) * columns


@triton.jit
def body_row(address, start, prefix, WIDTH: tl.constexpr, CONTIGUOUS: tl.constexpr,
             ALIGNED: tl.constexpr):  # fmt: skip
    """Return the Row that starts at a row's body. ALIGNED: it starts on 16 bytes."""
    offset = start + column_offsets(prefix, address.stride_v, CONTIGUOUS)
    if ALIGNED:  # the compiler cannot infer it
        offset = tl.multiple_of(offset, WIDTH)
    return Row(address.ptr + offset, address.stride_v)


@triton.jit
def move_row(row, columns, CONTIGUOUS: tl.constexpr):
    """Return the Row that starts `columns` further on."""
    return Row(row.ptr + column_offsets(columns, row.stride_v, CONTIGUOUS), row.stride_v)


@triton.jit
def group_starts(TILE: tl.constexpr):
    """Return the position [GROUPS, 1] of each group in a tile."""
    return tl.arange(0, TILE.GROUPS)[:, None] * TILE.WIDTH


@triton.jit
def lane_ids(WIDTH: tl.constexpr):
    """Return the position [1, WIDTH] of each logit in its group."""
    return tl.arange(0, WIDTH)[None, :]


@triton.jit
def edge_columns(window, columns, WIDTH: tl.constexpr):
    """Return (columns [4, WIDTH], valid) of the edges: prefix, tail, target's group."""
    prefix, body, group = window.prefix, window.body, window.group
    edge = tl.arange(0, 4)[:, None]
    first = tl.where(edge == 0, 0, tl.where(edge == 1, prefix + body, prefix + group))
    count = tl.where(edge == 0, prefix, tl.where(edge == 1, columns - prefix - body, WIDTH))
    count = tl.where((edge == 3) | ((edge == 2) & (group < 0)), 0, count)
    return first + lane_ids(WIDTH), lane_ids(WIDTH) < count
