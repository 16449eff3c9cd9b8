"""The same training with several losses: the same weights, batches and steps, then the curves.

Activations are smooth and there is no largest-of, for at a kink the last digit of a loss decides
which way a training goes.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, NoReturn

import torch
from torch import Tensor, nn

Loss = Callable[..., Tensor]  # of logits and a batch's targets
Batch = tuple[Tensor, ...]  # inputs, targets


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def at_least(minimum: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        value = int(text) if text.isascii() and text.isdigit() else -1
        if not minimum <= value < 2**31:
            expected = f"expected an integer from {minimum} to {2**31 - 1}"
            raise argparse.ArgumentTypeError(f"{expected}, got {text!r}")
        return value

    return parse


def parse_arguments(
    name: str, purpose: str, steps: int, argv: Sequence[str] | None
) -> argparse.Namespace:
    parser = Parser(name, description=purpose)
    parser.add_argument("--steps", type=at_least(1), default=steps)
    parser.add_argument("--seed", type=at_least(0), default=0)
    return parser.parse_args(argv)


class Run(NamedTuple):
    curve: list[float]  # the loss of each step
    model: nn.Module


def train(
    make_model: Callable[[], nn.Module], loss: Loss, batches: Sequence[Batch], lr: float, seed: int
) -> Run:
    torch.manual_seed(seed)
    model, curve = make_model(), []
    optimizer = torch.optim.AdamW(model.parameters(), lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=len(batches) + 1)
    for inputs, *targets in batches:
        value = loss(model(inputs), *targets)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        schedule.step()
        curve.append(value.item())
    return Run(curve, model)


def train_with_each(
    losses: Mapping[str, Loss],
    make_model: Callable[[], nn.Module],
    batches: Sequence[Batch],
    lr: float,
    seed: int,
) -> dict[str, Run]:
    """A run for each loss, the first being what the others are compared with."""
    torch.set_num_threads(1)  # models so small gain nothing from more
    runs = {name: train(make_model, loss, batches, lr, seed) for name, loss in losses.items()}
    print("step  " + "".join(f"{name:>24}" for name in runs))
    every = max(1, len(batches) // 8)
    for step in sorted({0, len(batches) - 1, *range(every - 1, len(batches), every)}):
        print(f"{step + 1:4}  " + "".join(f"{run.curve[step]:24.6f}" for run in runs.values()))
    print(f"largest difference of the losses, {len(batches)} steps: {difference(runs):.1e}")
    return runs


def difference(runs: dict[str, Run]) -> float:
    """The largest between the first curve and another."""
    first, *others = (run.curve for run in runs.values())
    return max(abs(a - b) for curve in others for a, b in zip(first, curve, strict=True))
