"""A case of stage `check`: what it runs, and how its numbers are compared."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .stage import ROOT, Context

# Relative step of each dtype's rounding; the interpreter truncates where a GPU rounds to nearest.
STEP = {torch.bfloat16: 2.0**-7, torch.float32: 2e-6, torch.float16: 2.0**-10, torch.float64: 1e-12}
SUBNORMAL = {torch.float16: 6.1e-8, torch.float64: 1e-14}  # absolute; the others' are smaller
FP32_NOISE = 4e-7  # of the largest gradient


class Case(NamedTuple):
    kernel: str  # the public function, with the options that choose its kernels
    dtype: str
    input: str
    run: Callable[[], float]  # largest relative error; raises Wrong, NotHere


class Wrong(Exception):
    def __init__(self, message: str, error: float | None = None) -> None:
        super().__init__(message)
        self.error = error


class NotHere(Exception):
    """The case cannot run on this machine, with the reason."""


def oracle() -> Any:
    """Return the tests' oracle: eager torch in fp64."""
    folder = str(ROOT / "tests")
    if folder not in sys.path:
        sys.path.append(folder)
    return importlib.import_module("oracle")


def near(what: str, ours: Tensor, truth: Tensor, rtol: float, atol: float = 0.0) -> float:
    """Return the largest relative error. Raise Wrong where one is beyond rtol * |truth| + atol."""
    ours, truth = ours.detach().double(), truth.detach().double()
    difference = (ours - truth).abs()
    same = (difference <= rtol * truth.abs() + atol) | (ours == truth)
    same |= ours.isnan() & truth.isnan()
    relative = (difference / truth.abs().clamp(min=atol or 1e-30)).nan_to_num(0.0)
    error = float(relative.max()) if relative.numel() else 0.0
    if not bool(same.all()):
        index = (~same).nonzero()[0].tolist()
        got, expected = float(ours[tuple(index)]), float(truth[tuple(index)])
        raise Wrong(
            f"{what}: {int((~same).sum())} of {same.numel()} are off, the first at {index}: "
            f"{got:.9g}, expected {expected:.9g}",
            error,
        )
    return error


def near_gradient(ours: Tensor, truth: Tensor, dtype: torch.dtype) -> float:
    """Compare within one step of the dtype, or fp32's noise on the largest gradient."""
    largest = float(truth.abs().max()) if truth.numel() else 0.0
    atol = SUBNORMAL.get(dtype, 2e-9) + (0 if dtype == torch.float64 else FP32_NOISE * largest)
    return near("gradient", ours, truth, STEP[dtype], atol)


def near_norm(what: str, ours: Tensor, truth: Tensor, limit: float) -> float:
    """Return the relative error in the norm. Raise Wrong where it is beyond the limit."""
    error = float((ours.double() - truth.double()).norm() / truth.double().norm())
    if not error <= limit:  # nor NaN
        raise Wrong(f"{what}: off by {error:.2g} in the norm, {limit:.2g} allowed", error)
    return error


def demand(condition: object, message: str) -> None:
    if not condition:
        raise Wrong(message)


def logits(
    context: Context, rows: int, vocab: int, dtype: torch.dtype, layout: str = "plain"
) -> tuple[Tensor, Tensor]:
    """Return logits [..., vocab] in a layout, and targets; every fifth target is ignored."""
    generator = torch.Generator(context.device).manual_seed(rows + vocab)

    def normal(*shape: int) -> Tensor:
        return (3 * torch.randn(shape, generator=generator, device=context.device)).to(dtype)

    if layout == "shifted":  # [:, :-1] of [B, T, V]
        x = normal(2, rows // 2 + 1, vocab)[:, :-1]
    elif layout == "strided":
        x = normal(rows, 2 * vocab)[:, ::2]
    elif layout == "transposed":
        x = normal(vocab, rows).t()
    else:
        x = normal(rows, vocab)
    target = torch.randint(vocab, x.shape[:-1], generator=generator, device=context.device)
    target.view(-1)[::5] = -100
    target.view(-1)[-1] = vocab - 1
    return x, target
