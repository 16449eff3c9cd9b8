"""The data of three examples: handwritten digits that scikit-learn ships, alone and on canvases.

1797 images [8, 8] of 43 writers (the test set of UCI's Optical Recognition of Handwritten Digits,
Alpaydin and Kaynak, 1998); nothing is downloaded. A quarter is held out.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

SIDE = 8  # pixels of a digit
CANVAS = 24  # pixels of a canvas: 2 x 2 cells with at most a digit each


class Digits(NamedTuple):
    images: Tensor  # [N, 8, 8], ink from 0 to 1
    labels: Tensor  # [N], 0 to 9


class Canvases(NamedTuple):
    images: Tensor  # [B, 1, CANVAS, CANVAS]
    inked: Tensor  # [B, CANVAS, CANVAS], which digit a pixel is of, -1 where of none
    labels: Tensor  # [B, 4], the digit of each cell, -100 where it is empty


def load() -> tuple[Digits, Digits]:
    """(training, held out)"""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise SystemExit("scikit-learn is missing: pip install -e '.[examples]'") from None
    data = load_digits()
    images = torch.tensor(data.images / 16, dtype=torch.get_default_dtype())
    digits = Digits(images, torch.tensor(data.target))
    held_out = torch.arange(len(digits.labels)) % 4 == 3
    training, rest = (Digits(*(t[rows] for t in digits)) for rows in (~held_out, held_out))
    return training, rest


def paste(digits: Digits, count: int, generator: torch.Generator, empty: float) -> Canvases:
    """`count` canvases of digits at random places; a cell is left empty with probability `empty`"""
    images = digits.images.new_zeros(count, 1, CANVAS, CANVAS)
    inked = torch.full((count, CANVAS, CANVAS), -1)
    cell = CANVAS // 2
    chosen = torch.randint(len(digits.labels), (count, 4), generator=generator)
    places = torch.randint(cell - SIDE + 1, (count, 4, 2), generator=generator).tolist()
    labels = digits.labels[chosen]
    labels[torch.rand(count, 4, generator=generator) < empty] = -100
    for i in range(count):
        for k in range(4):
            if labels[i, k] < 0:
                continue
            top, left = places[i][k][0] + cell * (k // 2), places[i][k][1] + cell * (k % 2)
            window = (i, slice(top, top + SIDE), slice(left, left + SIDE))
            image = digits.images[chosen[i, k]]
            images[:, 0][window] = image
            inked[window][image > 0] = labels[i, k]
    return Canvases(images, inked, labels)
