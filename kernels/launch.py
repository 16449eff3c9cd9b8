"""Launch tables: how large a tile, how many warps.

WIDTH is 16 bytes of logits, one load of one thread.
"""

from typing import NamedTuple


class Launch(NamedTuple):
    GROUPS: int
    WIDTH: int
    num_warps: int

    @property
    def columns(self) -> int:
        return self.GROUPS * self.WIDTH


def tile(vocab_size: int, itemsize: int, strided: bool = False) -> Launch:
    """Tile of a streamed kernel for rows of `vocab_size` logits of `itemsize` bytes.

    Strided classes need a 64-bit address each: half a tile keeps those in registers.
    """
    width = max(2, 16 // itemsize)
    groups, most = 32, 256 if strided else 512
    while groups < most and groups * width < vocab_size:
        groups *= 2
    return Launch(GROUPS=groups, WIDTH=width, num_warps=max(1, groups // (32 if strided else 64)))


GRAD_TILES = 4
"""Tiles that one program of the gradient kernel walks: enough to amortise its eight row scalars."""
