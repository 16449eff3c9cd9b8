"""Launch tables: the size of a tile, the number of warps, and the programs of a row.

A group is 16 bytes of logits, which one thread loads at once. The figures change the speed. Those
of a tile also change the order of sums, and so their rounding. Figures that depend on the number of
rows change no bit of a result.
"""

from typing import Any, NamedTuple

from .arguments import TileShape

COMPILER = dict(enable_fp_fusion=True)
"""Options of every launch. Triton 3.10 turns fusion off unless it is requested."""


class Tile(NamedTuple):
    """Shape of a tile, and the options to compile its kernel with."""

    GROUPS: int
    WIDTH: int  # logits of a group
    num_warps: int
    maxnreg: int = 0  # registers per thread, NVIDIA only; 0 leaves the choice to the compiler
    num_ctas: int = 1

    @property
    def columns(self) -> int:
        return self.GROUPS * self.WIDTH

    def arguments(self) -> dict[str, Any]:
        """Return the launch arguments. Unused options are left out: not all backends know them."""
        shape = TileShape(self.GROUPS, self.WIDTH)
        arguments: dict[str, Any] = dict(TILE=shape, num_warps=self.num_warps, **COMPILER)
        if self.maxnreg:
            arguments["maxnreg"] = self.maxnreg
        if self.num_ctas > 1:
            arguments["num_ctas"] = self.num_ctas
        return arguments


class Row(NamedTuple):
    """Row of a launch table: groups and warps of a full tile."""

    groups: int
    num_warps: int


GENERIC = Row(512, 4)
TABLE = {
    # 4 groups a thread take 40 registers. So an SM holds 1536 threads, each loading 64 bytes.
    "sm_90": Row(512, 4),
    # A100 was reported fastest with long tiles of 8 warps.
    "sm_80": Row(1024, 8),
    # The same as sm_90; an SM holds 1536 threads.
    "sm_89": Row(512, 4),
    # B200 was reported 1.5 to 1.9 times faster with short tiles at 4 warps than with long ones.
    # With 1024 groups some kernels spill.
    "sm_100": Row(512, 4),
    # Warps of 64: 2 groups a thread.
    "gfx942": Row(512, 4),
}

SMALLEST_GROUPS = 32
"""Groups of a tile for a small vocabulary: one warp, one group a thread."""

SEGMENT = 16384
"""Columns in a segment of a row. It is constant, so results do not depend on the launch."""

SPAN_TILES = 4
"""Tiles per program of the gradient kernel: enough to amortize loading eight numbers a row."""

PROGRAMS_PER_PROCESSOR = 4
"""Rows are divided to reach this many programs: one of 4 warps cannot saturate an SM's memory."""

MERGE_ROWS = 64
"""Rows per program of the kernel that merges parts: one thread a row."""

SCALE_BLOCK = 4096
"""Columns per program of the kernel that multiplies by the upstream gradient."""

ON_CHIP_GROUPS = 2048
"""Groups of the longest row (32 KiB) that one CTA holds: 8 warps, 127 registers, 2 CTAs an SM."""

MOST_CTAS = 8
"""CTAs of the largest cluster. They hold rows up to 256 KiB. More is not portable."""

STREAMED = Row(2048, 16)
"""Row of the streamed one-pass kernel: wide tiles, since few rows run at once; 2 CTAs an SM."""

STREAMED_TABLE = {
    # Longer tiles spill with 64 registers; in float16 from 1024 groups on.
    "sm_100": Row(512, 8),
}


def tile(
    architecture: str, vocab_size: int, itemsize: int, *, contiguous: bool, plain: bool
) -> Tile:
    """Return the tile of a streamed kernel for rows of `vocab_size` logits of `itemsize` bytes.

    plain: the kernel needs no extra registers, for example for tanh or further statistics.
    """
    row = TABLE.get(architecture, GENERIC)
    return _fit_tile(architecture, row, vocab_size, itemsize, contiguous, plain, 0)


def _fit_tile(
    architecture: str,
    row: Row,
    columns: int,
    itemsize: int,
    contiguous: bool,
    plain: bool,
    maxnreg: int,
) -> Tile:
    """Return the tile of a table row, or a smaller one that already holds all columns."""
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
        maxnreg = 128  # by default the compiler takes at most 64, and spills
    elif architecture == "sm_100" and not maxnreg:
        maxnreg = 80  # Triton 3.7 would spill in float16
    return Tile(groups, width, warps, maxnreg if architecture.startswith("sm_") else 0)


def segments(vocab_size: int) -> int:
    """Return the number of segments of a row."""
    return -(-vocab_size // SEGMENT)


def segments_per_program(rows: int, segments: int, processors: int) -> int:
    """Return the segments per program: all of a row, or fewer if few rows leave processors idle."""
    programs_per_row = min(segments, -(-PROGRAMS_PER_PROCESSOR * processors // rows))
    return -(-segments // programs_per_row)


class OnePass(NamedTuple):
    """Launch of the one-pass kernel."""

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
    """Return the launch that computes loss and gradient of rows of `columns` logits in one read."""
    width = 16 // itemsize
    groups = max(SMALLEST_GROUPS, _next_power_of_two(-(-columns // width)))
    ctas = max(1, groups // ON_CHIP_GROUPS)
    if (plain and contiguous and itemsize < 8) and (ctas == 1 or clusters and ctas <= MOST_CTAS):
        warps = max(1, groups // ctas * 8 // ON_CHIP_GROUPS)
        maxnreg = 128 if architecture.startswith("sm_") else 0
        return OnePass(Tile(groups, width, warps, maxnreg, ctas), True, rows)
    row = STREAMED_TABLE.get(architecture, STREAMED)
    tile = _fit_tile(architecture, row, columns, itemsize, contiguous, plain, 64)
    # The second read of a row should hit the L2, so the rows in progress may fill half of it.
    in_cache = l2_bytes // 2 // (columns * itemsize)
    return OnePass(tile, False, min(rows, max(processors, in_cache)))


def _next_power_of_two(n: int) -> int:
    """Return the smallest power of two that is at least n."""
    return 1 << max(0, n - 1).bit_length()
