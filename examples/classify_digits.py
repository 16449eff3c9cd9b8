"""Handwritten digits, of which half are rare: class weights, with torch's loss and with ours.

    python examples/classify_digits.py

Of the training images of 5 to 9 one in twenty is kept. A class's weight is inverse to its images'
number, as scikit-learn's "balanced". What is held out has all digits alike.
"""

from __future__ import annotations

from collections.abc import Sequence

import digits
import torch
from side_by_side import Batch, Run, parse_arguments, train, train_with_each
from torch import Tensor, nn

import chunked_ce

CLASSES = 10
RARE = 5  # and the digits after it
KEPT = 20  # one in so many
BATCH = 64
LR = 2e-3


def imbalanced(training: digits.Digits) -> digits.Digits:
    rare = training.labels >= RARE
    keep = ~rare | (rare.cumsum(0) % KEPT == 0)
    return digits.Digits(training.images[keep], training.labels[keep])


def balanced_weight(labels: Tensor) -> Tensor:
    """[CLASSES]: the mean over the images is 1"""
    counts = labels.bincount(minlength=CLASSES)
    return len(labels) / (CLASSES * counts.to(torch.get_default_dtype()))


def make_model() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.GELU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.BatchNorm2d(32), nn.GELU(), nn.Flatten(),
        nn.Linear(32 * 4 * 4, CLASSES),
    )  # fmt: skip


def batches_of(data: digits.Digits, steps: int, seed: int) -> list[Batch]:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(len(data.labels), (steps, BATCH), generator=generator)
    return [(data.images[r].unsqueeze(1), data.labels[r]) for r in rows]


@torch.no_grad()
def accuracy(model: nn.Module, data: digits.Digits) -> tuple[float, float]:
    """(of all digits, of the rare ones)"""
    right = model.eval()(data.images.unsqueeze(1)).argmax(1) == data.labels
    return right.double().mean().item(), right[data.labels >= RARE].double().mean().item()


def main(argv: Sequence[str] | None = None) -> dict[str, Run]:
    args = parse_arguments("classify_digits", "Class weights, with two losses.", 300, argv)
    training, held_out = digits.load()
    training = imbalanced(training)
    batches = batches_of(training, args.steps, args.seed)
    weight = balanced_weight(training.labels)
    losses = {
        "nn.CrossEntropyLoss": nn.CrossEntropyLoss(weight),
        "ours": chunked_ce.CrossEntropyLoss(weight),
    }
    runs = train_with_each(losses, make_model, batches, LR, args.seed)
    plain = train(make_model, chunked_ce.CrossEntropyLoss(), batches, LR, args.seed)
    for name, run in (runs | {"ours, without the weights": plain}).items():
        total, rare = accuracy(run.model, held_out)
        print(f"accuracy, {name}: {total:.1%} of all digits, {rare:.1%} of the rare ones")
    return runs


if __name__ == "__main__":
    main()
