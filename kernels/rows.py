"""Where a row lies in memory, and how it is cut for 16-byte accesses.

A row is read from its first 16-byte boundary on, so that any vocabulary (GPT-2's 50257) and any
row start gets 16-byte accesses:

    | prefix |  body: whole groups of WIDTH logits, 16 bytes each  | tail |

The loops walk the body in tiles [GROUPS, WIDTH] and leave out the target's group. Prefix, tail and
that group, at most 3 WIDTH logits, are a small tile of their own: the edges. Only there is a column
compared with the target.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl


class Row(NamedTuple):
    """One row, or the rest of one: class v is at ptr + v stride_v."""

    ptr: Any
    stride_v: Any  # as `arguments.encode` gives it


class Window(NamedTuple):
    """How a row is cut. Positions are counted from the start of the body."""

    prefix: Any  # logits before the body
    body: Any  # logits of the body
    group: Any  # position of the target's group in the body; -1: not there


@triton.jit
def decode(number):
    """Return the number that `encode` was given."""
    return number >> 2


@triton.jit
def row_start(row, inner_rows, address):
    """Return the offset of a row's first logit.

    Two strides, because `logits[:, :-1]` of [B, T, V] should need no copy. `row` has 32 bits: the
    division of 64 bits is a subroutine.
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
    """Return offsets of columns: 32 bits where classes are neighbours, for 64 cost registers."""
    return columns if CONTIGUOUS else tl.cast(columns, tl.int64) * decode(stride_v)


@triton.jit
def advance(columns: tl.constexpr, stride_v, CONTIGUOUS: tl.constexpr):
    """Return how far a pointer goes in that many columns."""
    return columns if CONTIGUOUS else tl.cast(decode(stride_v), tl.int64) * columns


@triton.jit
def body_row(address, start, prefix, WIDTH: tl.constexpr, CONTIGUOUS: tl.constexpr,
             ALIGNED: tl.constexpr):  # fmt: skip
    """Return the Row that starts at a row's body, on 16 bytes where ALIGNED."""
    offset = start + column_offsets(prefix, address.stride_v, CONTIGUOUS)
    if ALIGNED:  # the compiler cannot see that
        offset = tl.multiple_of(offset, WIDTH)
    return Row(address.ptr + offset, address.stride_v)


@triton.jit
def moved(row, columns, CONTIGUOUS: tl.constexpr):
    """Return the Row from that column on."""
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
    """Return the tile of edges: (columns [4, WIDTH], which exist): prefix, tail, target's group."""
    prefix, body, group = window.prefix, window.body, window.group
    edge = tl.arange(0, 4)[:, None]
    first = tl.where(edge == 0, 0, tl.where(edge == 1, prefix + body, prefix + group))
    count = tl.where(edge == 0, prefix, tl.where(edge == 1, columns - prefix - body, WIDTH))
    count = tl.where((edge == 3) | ((edge == 2) & (group < 0)), 0, count)
    return first + lane_ids(WIDTH), lane_ids(WIDTH) < count
