"""Which digits occur on a canvas? Labels as a multi-hot matrix, and by index without one.

    python examples/multilabel.py

Each of a canvas's four cells has a handwritten digit or none, so a canvas has up to four labels.
By index they are the cells' digits [B, 4] as they come, -100 where a cell is empty and a digit
named twice where it occurs twice; the multi-hot matrix [B, 10] says the same, but with 600 000
labels it would be the largest tensor but the logits. `pos_weight` makes up for how rarely a
digit occurs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import digits
import torch
from side_by_side import Batch, Run, parse_arguments, train_with_each
from torch import Tensor, nn

import chunked_ce

CLASSES = 10
EMPTY = 0.3  # of the cells
BATCH = 16
HELD_OUT = 256  # canvases
LR = 1e-2


class Model(nn.Module):
    """A digit occurs where it is at any place: the logits' smooth maximum over these."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.GELU(),
            nn.Conv2d(16, 48, 3, stride=2, padding=1), nn.BatchNorm2d(48), nn.GELU(),
            nn.Conv2d(48, 64, 5, padding=2), nn.BatchNorm2d(64), nn.GELU(),
            nn.Conv2d(64, CLASSES, 1),
        )  # fmt: skip

    def forward(self, images: Tensor) -> Tensor:
        """[B, CLASSES] logits of images [B, 1, H, W]"""
        logits: Tensor = self.features(images).flatten(2)
        return logits.logsumexp(2) - math.log(logits.shape[2])


def multi_hot(labels: Tensor) -> Tensor:
    """[B, CLASSES] of indices [B, K] padded with -100"""
    hot = torch.zeros(len(labels), CLASSES + 1)
    return hot.scatter(1, labels.where(labels >= 0, CLASSES), 1.0)[:, :CLASSES]


def batch_of(data: digits.Digits, count: int, generator: torch.Generator) -> Batch:
    """(images, multi-hot labels, labels by index)"""
    canvases = digits.paste(data, count, generator, EMPTY)
    return canvases.images, multi_hot(canvases.labels), canvases.labels


@torch.no_grad()
def f1(model: nn.Module, images: Tensor, hot: Tensor) -> float:
    """2 TP / (2 TP + FP + FN), over all canvases and digits (micro)"""
    guess, truth = model.eval()(images) > 0, hot > 0
    return float(2 * (guess & truth).sum() / (guess.sum() + truth.sum()))


def main(argv: Sequence[str] | None = None) -> dict[str, Run]:
    args = parse_arguments("multilabel", "Labels dense and by index.", 250, argv)
    training, held_out = digits.load()
    generator = torch.Generator().manual_seed(args.seed)
    batches = [batch_of(training, BATCH, generator) for _ in range(args.steps)]
    _, hot, _ = batch_of(training, 1000, generator)
    pos_weight = (1 - hot).sum(0) / hot.sum(0)
    theirs = nn.BCEWithLogitsLoss(pos_weight=pos_weight)
    ours = chunked_ce.BCEWithLogitsLoss(pos_weight=pos_weight)
    losses = {
        "nn.BCEWithLogitsLoss": lambda z, hot, index: theirs(z, hot),
        "ours, multi-hot": lambda z, hot, index: ours(z, hot),
        "ours, by index": lambda z, hot, index: ours(z, index),
    }
    runs = train_with_each(losses, Model, batches, LR, args.seed)
    images, hot, _ = batch_of(held_out, HELD_OUT, generator)
    for name, run in runs.items():
        print(f"F1, {name}: {f1(run.model, images, hot):.3f}")
    return runs


if __name__ == "__main__":
    main()
