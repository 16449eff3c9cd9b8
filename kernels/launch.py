"""Launch tables: how large a tile, how many warps, how a row is divided among programs.

A group is 16 bytes of logits, one load of one thread. The figures change speed and, as the order
of a sum does, rounding; none that follows the number of rows changes a result by a bit.
"""

from typing import Any, NamedTuple

from .arguments import TileShape

COMPILER = dict(enable_fp_fusion=True)
"""Options of every launch. Fusion is stated, for Triton 3.10 turns it off where it is not."""


class Tile(NamedTuple):
    GROUPS: int
    WIDTH: int  # logits of a group
    num_warps: int
    maxnreg: int = 0  # 0: the compiler's choice; NVIDIA alone
    num_ctas: int = 1

    @property
    def columns(self) -> int:
        return self.GROUPS * self.WIDTH

    def arguments(self) -> dict[str, Any]:
        """To launch with; options that say nothing are left out, for not all backends know them."""
        shape = TileShape(self.GROUPS, self.WIDTH)
        given: dict[str, Any] = dict(TILE=shape, num_warps=self.num_warps, **COMPILER)
        if self.maxnreg:
            given["maxnreg"] = self.maxnreg
        if self.num_ctas > 1:
            given["num_ctas"] = self.num_ctas
        return given


class Row(NamedTuple):
    """Of the table: groups of a full tile, and its warps."""

    groups: int
    num_warps: int


GENERIC = Row(512, 4)
TABLE = {
    # 4 groups a thread: 40 registers, so 1536 threads an SM, each with 64 bytes under way.
    "sm_90": Row(512, 4),
    # A100 was reported fastest with long tiles of 8 warps.
    "sm_80": Row(1024, 8),
    # As sm_90, with 1536 threads an SM.
    "sm_89": Row(512, 4),
    # B200 was reported 1.5 to 1.9 times faster with short tiles at 4 warps than with long ones;
    # of 1024 groups some kernels spill.
    "sm_100": Row(512, 4),
    # Warps of 64: 2 groups a thread.
    "gfx942": Row(512, 4),
}

SMALLEST_GROUPS = 32
"""Of a tile for a small vocabulary: a group a thread, one warp."""

SEGMENT = 16384
"""Columns whose sums are one part of a row: a constant, whoever walks them."""

SPAN_TILES = 4
"""Tiles that one program of the gradient kernel walks: enough to amortise its eight row scalars."""

PROGRAMS_PER_PROCESSOR = 4
"""Below this, rows are divided: one program of 4 warps cannot keep an SM's memory pipes full."""

MERGE_ROWS = 64
"""Rows of one program that merges parts: a thread each."""

SCALE_BLOCK = 4096
"""Columns of one program that multiplies by the upstream gradient."""

ON_CHIP_GROUPS = 2048
"""A row of so many groups, 32 KiB, fits one CTA of 8 warps: 127 registers, two CTAs an SM."""

MOST_CTAS = 8
"""Of a cluster, whose CTAs hold ON_CHIP_GROUPS each: rows up to 256 KiB. More is not portable."""

STREAMED = Row(2048, 16)
"""One pass, streamed: wide, because few rows may be under way; 64 registers, two CTAs an SM."""

STREAMED_TABLE = {
    # Of longer tiles it spills there in 64 registers, in float16 already of 1024 groups.
    "sm_100": Row(512, 8),
}


def tile(
    architecture: str, vocab_size: int, itemsize: int, *, contiguous: bool, plain: bool
) -> Tile:
    """Tile of a streamed kernel for rows of `vocab_size` logits of `itemsize` bytes.

    `plain`: nothing that wants registers of its own, as the head's tanh and further statistics do.
    """
    row = TABLE.get(architecture, GENERIC)
    return _fitted(architecture, row, vocab_size, itemsize, contiguous, plain, 0)


def _fitted(
    architecture: str,
    row: Row,
    columns: int,
    itemsize: int,
    contiguous: bool,
    plain: bool,
    maxnreg: int,
) -> Tile:
    """The row's tile, or less where that already holds all columns."""
    width = 16 // itemsize
    groups, warps = row.groups, row.num_warps
    if plain:
        groups //= 1 if contiguous else 2  # strided: 64-bit addresses
    else:
        groups = max(1, groups // (2 if contiguous else 8))
    if itemsize == 8:  # twice the registers, and more for exponentials
        groups, warps = max(1, groups // 4), max(1, warps // 2)
    while groups > SMALLEST_GROUPS and groups * width >= 2 * columns:
        groups, warps = groups // 2, max(1, warps // 2)
    if not (plain and contiguous and itemsize < 8):
        maxnreg = 128  # left alone, the compiler spills rather than take more than 64
    elif architecture == "sm_100" and not maxnreg:
        maxnreg = 80  # the same for float16, by Triton 3.7
    return Tile(groups, width, warps, maxnreg if architecture.startswith("sm_") else 0)


def segments(vocab_size: int) -> int:
    return -(-vocab_size // SEGMENT)


def segments_per_program(rows: int, segments: int, processors: int) -> int:
    """All of a row, or less where so few rows would leave processors idle."""
    programs_per_row = min(segments, -(-PROGRAMS_PER_PROCESSOR * processors // rows))
    return -(-segments // programs_per_row)


class OnePass(NamedTuple):
    tile: Tile
    on_chip: bool
    programs: int


def one_pass(
    architecture: str,
    columns: int,
    itemsize: int,
    *,
    contiguous: bool,
    plain: bool,
    rows: int,
    processors: int,
    l2_bytes: int,
    clusters: bool,
) -> OnePass:
    """How rows of `columns` logits get loss and gradient from one read."""
    width = 16 // itemsize
    groups = max(SMALLEST_GROUPS, _power_of_two(-(-columns // width)))
    ctas = max(1, groups // ON_CHIP_GROUPS)
    if (plain and contiguous and itemsize < 8) and (ctas == 1 or clusters and ctas <= MOST_CTAS):
        warps = max(1, groups // ctas * 8 // ON_CHIP_GROUPS)
        maxnreg = 128 if architecture.startswith("sm_") else 0
        return OnePass(Tile(groups, width, warps, maxnreg, ctas), True, rows)
    row = STREAMED_TABLE.get(architecture, STREAMED)
    tile = _fitted(architecture, row, columns, itemsize, contiguous, plain, 64)
    # The second read of a row should find it in the L2: half of that for the rows under way.
    in_cache = l2_bytes // 2 // (columns * itemsize)
    return OnePass(tile, False, min(rows, max(processors, in_cache)))


def _power_of_two(n: int) -> int:
    """The smallest that is at least n."""
    return 1 << max(0, n - 1).bit_length()
