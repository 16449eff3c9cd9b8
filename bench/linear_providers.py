"""The linear layer and the loss as others compute them, and whether ours agrees.

What `python -m bench.linear` measures: providers, batches, steps, the check before a measurement.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import chunked_ce

from .cpu_sections import COMPILED, EAGER, FORWARD, OURS
from .measure import Step

TORCH, CUT, LIGER = "F.linear_cross_entropy", "cut-cross-entropy", "liger"
PROVIDERS = (EAGER, COMPILED, TORCH, CUT, LIGER, OURS)

EAGER_COPIES = 3  # of the logits: log-softmax, the gradient of that, the gradient of the logits
REFERENCE_COPIES = 4  # of the logits in fp32, bf16 ones beside them included
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2**-7}  # of a row of a gradient, in its norm

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]  # (input [N, D], weight [V, D], target [N])
GIB = 1 << 30


class Shape(NamedTuple):
    N: int
    D: int
    V: int

    def __str__(self) -> str:
        return f"N = {self.N}, D = {self.D}, V = {self.V}"


class Batch(NamedTuple):
    input: Tensor
    weight: Tensor
    target: Tensor


class Answer(NamedTuple):
    loss: Tensor
    input_grad: Tensor
    weight_grad: Tensor


@cache
def loss_of(provider: str) -> Loss:
    """Raises ImportError where what the provider needs is not installed."""
    if provider == COMPILED:
        return torch.compile(_eager)
    if provider == TORCH:
        options = torch.nn.LinearCrossEntropyOptions()
        return lambda x, w, target: F.linear_cross_entropy(x, w, target, options=options)
    if provider == CUT:
        cut = importlib.import_module("cut_cross_entropy").linear_cross_entropy
        return lambda x, w, target: cut(x, w, target, impl="torch_compile")
    losses: dict[str, Loss] = {EAGER: _eager, OURS: chunked_ce.linear_cross_entropy}
    return losses[provider]


def _eager(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(x, weight), target)


def batch_of(shape: Shape, dtype: torch.dtype) -> Batch:
    """Logits have a variance of 1."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape.N, shape.D, generator=generator, dtype=dtype)
    weight = torch.randn(shape.V, shape.D, generator=generator, dtype=dtype).mul_(shape.D**-0.5)
    return Batch(x, weight, torch.randint(shape.V, (shape.N,), generator=generator))


# What runs


def why_not(provider: str, shape: Shape, dtype: torch.dtype) -> str:
    """Why the provider cannot be measured here; empty where it can."""
    if provider == LIGER:
        return "its kernels need a GPU"
    if provider == TORCH and not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        return f"torch {torch.__version__} has none with options"
    try:
        loss_of(provider)
    except ImportError as error:
        return f"not installed ({error})"
    needed, free = _bytes_needed(provider, shape, dtype), _bytes_available()
    if needed > free:
        return f"needs {needed / GIB:.1f} GiB of {free / GIB:.1f}"
    return ""


def _bytes_needed(provider: str, shape: Shape, dtype: torch.dtype) -> float:
    """Of a step and its batch, from above."""
    parameters = 3 * (shape.V + shape.N) * shape.D * 4  # themselves, gradients, sums
    if provider in (EAGER, COMPILED):
        return parameters + EAGER_COPIES * shape.N * shape.V * dtype.itemsize
    if provider == CUT:  # in fp32 whatever the dtype
        return parameters + REFERENCE_COPIES * shape.N * shape.V * 4
    return parameters + GIB


def _bytes_available() -> float:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return float("inf")
    return next(int(line.split()[1]) * 1024.0 for line in lines if line.startswith("MemAvailable"))


# Steps


def step_of(mode: str, loss: Loss, batch: Batch) -> Step:
    leaves = batch.input.detach(), batch.weight.detach()
    if mode == FORWARD:
        return Step(lambda: evaluated(loss, Batch(*leaves, batch.target)))
    for leaf in leaves:
        leaf.requires_grad_()

    def reset() -> None:
        for leaf in leaves:
            leaf.grad = None

    return Step(lambda: torch.autograd.backward(loss(*leaves, batch.target)), reset)


def evaluated(loss: Loss, batch: Batch) -> Tensor:
    with torch.no_grad():
        return loss(*batch)


def answer(loss: Loss, batch: Batch) -> Answer:
    x, weight = batch.input.detach().requires_grad_(), batch.weight.detach().requires_grad_()
    value = loss(x, weight, batch.target)
    return Answer(value.detach(), *torch.autograd.grad(value, (x, weight)))


# Correctness: a fast wrong answer is not reported


def check(name: str, got: Answer, batch: Batch) -> None:
    """Raises AssertionError unless the loss is eager's to 1e-5, relatively, and the gradients too.

    Eager: the product in the batch's dtype, the rest in fp32. Gradients are compared a row at a
    time, by the norm of the difference in units of that of eager's: to 2e-5, in bf16 to 2**-7.
    """
    expected = answer(lambda x, w, t: F.cross_entropy(F.linear(x, w).float(), t), batch)
    off = (got.loss.double() / expected.loss.double() - 1).abs()
    _demand(name, "loss", float(off), 1e-5)
    tolerance = TOLERANCE[batch.input.dtype]
    _demand(name, "input's gradient", _row_error(got.input_grad, expected.input_grad), tolerance)
    _demand(name, "weight's gradient", _row_error(got.weight_grad, expected.weight_grad), tolerance)


def _row_error(got: Tensor, expected: Tensor) -> float:
    """The largest; 0 for a row of zeros that is one in both."""
    difference = torch.linalg.vector_norm(got.float() - expected.float(), dim=1)
    norm = torch.linalg.vector_norm(expected.float(), dim=1)
    return float(torch.where((difference == 0) & (norm == 0), 0.0, difference / norm).max())


def _demand(name: str, what: str, off: float, tolerance: float) -> None:
    if not off <= tolerance:  # nor NaN
        raise AssertionError(
            f"{name}: its {what} is not eager's, so it is not measured: off by {off:.2g} "
            f"relatively, {tolerance:.2g} allowed"
        )


def checkable(shape: Shape) -> bool:
    parameters = 6 * (shape.V + shape.N) * shape.D * 4
    return parameters + REFERENCE_COPIES * shape.N * shape.V * 4 <= _bytes_available()
