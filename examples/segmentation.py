"""Which digit is each pixel of? Logits [B, C, H, W] and borders that are not scored.

    python examples/segmentation.py

A canvas has four handwritten digits at random places. A pixel is background, or of a digit where
it is more than half inked; the grey ones between are neither, and have class 255 as the borders of
Pascal VOC: `ignore_index=255`.
"""

from __future__ import annotations

from collections.abc import Sequence

import digits
import torch
import torch.nn.functional as F
from side_by_side import Batch, Run, parse_arguments, train_with_each
from torch import Tensor, nn

import chunked_ce

CLASSES = 11  # the background and ten digits
IGNORE = 255
INK = 0.5  # from here on a pixel is the digit's
BATCH = 16
HELD_OUT = 128  # canvases
LR = 1e-2


def classes_of(canvases: digits.Canvases) -> Tensor:
    """[B, H, W]: 0 for the background, 1 to 10 for a digit, IGNORE for its border"""
    grey = (canvases.inked >= 0) & (canvases.images[:, 0] < INK)
    return (canvases.inked + 1).masked_fill(grey, IGNORE)


def make_model() -> nn.Module:
    """At half the resolution, where a digit is 4 x 4 and a place sees 7 x 7."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.GELU(),
        nn.Conv2d(16, 48, 3, stride=2, padding=1), nn.BatchNorm2d(48), nn.GELU(),
        nn.Conv2d(48, 48, 3, padding=1), nn.BatchNorm2d(48), nn.GELU(),
        nn.Conv2d(48, 48, 3, padding=1), nn.BatchNorm2d(48), nn.GELU(),
        nn.Conv2d(48, CLASSES * 4, 1), nn.PixelShuffle(2),
    )  # fmt: skip


def batch_of(data: digits.Digits, count: int, generator: torch.Generator) -> Batch:
    canvases = digits.paste(data, count, generator, empty=0.0)
    return canvases.images, classes_of(canvases)


@torch.no_grad()
def mean_iou(model: nn.Module, images: Tensor, classes: Tensor) -> float:
    """Intersection over union, the mean over the classes that occur; over the scored pixels."""
    scored = classes != IGNORE
    truth, guess = classes[scored], model.eval()(images).argmax(1)[scored]
    pairs = (truth * CLASSES + guess).bincount(minlength=CLASSES**2).view(CLASSES, CLASSES)
    union = pairs.sum(0) + pairs.sum(1) - pairs.diagonal()
    return float((pairs.diagonal()[union > 0] / union[union > 0]).mean())


def main(argv: Sequence[str] | None = None) -> dict[str, Run]:
    args = parse_arguments("segmentation", "A class per pixel, with two losses.", 250, argv)
    training, held_out = digits.load()
    generator = torch.Generator().manual_seed(args.seed)
    batches = [batch_of(training, BATCH, generator) for _ in range(args.steps)]
    losses = {
        "F.cross_entropy": lambda z, y: F.cross_entropy(z, y, ignore_index=IGNORE),
        "ours": lambda z, y: chunked_ce.cross_entropy(z, y, ignore_index=IGNORE),
    }
    runs = train_with_each(losses, make_model, batches, LR, args.seed)
    images, classes = batch_of(held_out, HELD_OUT, generator)
    print(f"borders: {(classes == IGNORE).double().mean():.1%} of the pixels, not scored")
    for name, run in runs.items():
        print(f"mean IoU, {name}: {mean_iou(run.model, images, classes):.3f}")
    return runs


if __name__ == "__main__":
    main()
