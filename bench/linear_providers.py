"""Batches of hidden states, the memory that a provider needs for one, the check of its answer."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import providers
from .providers import COMPILED, CUT, CUT_FILTER, EAGER, LINEAR, Loss

EAGER_COPIES = 3  # of the logits: log-softmax, the gradient of that, the gradient of the logits
REFERENCE_COPIES = 4  # of the logits in fp32, bf16 ones beside them included
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2**-7}  # of a row of a gradient, in its norm

GIB = 1 << 30
BLOCK = 1 << 24  # random numbers that are made at a time


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


def batch_of(shape: Shape, dtype: torch.dtype, device: str = "cpu") -> Batch:
    """Logits have a variance of 1."""
    generator = torch.Generator(device).manual_seed(0)
    x = normal(shape.N, shape.D, dtype, generator)
    weight = normal(shape.V, shape.D, dtype, generator).mul_(shape.D**-0.5)
    target = torch.randint(shape.V, (shape.N,), generator=generator, device=device)
    return Batch(x, weight, target)


def normal(rows: int, columns: int, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Random numbers [rows, columns] of variance 1, made on the generator's device.

    In float32 and then rounded, some rows at a time: bf16 ones of a CPU take 20 ns each.
    """
    device = generator.device
    made = torch.empty(rows, columns, dtype=dtype, device=device)
    for block in made.split(max(1, BLOCK // columns)):
        block.copy_(torch.randn(block.shape, generator=generator, device=device))
    return made


# What runs


def why_not(provider: str, shape: Shape, dtype: torch.dtype, device: str = "cpu") -> str:
    """Why the provider cannot be measured at that size; empty where it can."""
    if why := providers.why_not(LINEAR, provider, device):
        return why
    needed, free = _bytes_needed(provider, shape, dtype), _bytes_available(device)
    if needed > free:
        return f"needs {needed / GIB:.1f} GiB of {free / GIB:.1f}"
    return ""


def _bytes_needed(provider: str, shape: Shape, dtype: torch.dtype) -> float:
    """Of a step and its batch, from above."""
    parameters = 3 * (shape.V + shape.N) * shape.D * 4  # themselves, gradients, sums
    if provider in (EAGER, COMPILED):
        return parameters + EAGER_COPIES * shape.N * shape.V * dtype.itemsize
    if provider in (CUT, CUT_FILTER):  # in fp32 whatever the dtype
        return parameters + REFERENCE_COPIES * shape.N * shape.V * 4
    return parameters + GIB


def _bytes_available(device: str = "cpu") -> float:
    if device == "cuda":
        cached = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        return float(torch.cuda.mem_get_info()[0] + cached)  # the allocator reuses what it holds
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return float("inf")
    return next(int(line.split()[1]) * 1024.0 for line in lines if line.startswith("MemAvailable"))


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
    tolerances = (1e-5, *[TOLERANCE[batch.input.dtype]] * 2)
    names = ("loss", "input's gradient", "weight's gradient")
    for what, one, right, tolerance in zip(names, got, expected, tolerances, strict=True):
        demand(name, what, one, right, tolerance)


def demand(name: str, what: str, got: Tensor, expected: Tensor, tolerance: float) -> None:
    """Raises AssertionError where a row is further off, relatively and by its norm."""
    off = _row_error(got, expected)
    if not off <= tolerance:  # nor NaN
        raise AssertionError(
            f"{name}: its {what} is not eager's, so it is not measured: off by {off:.2g} "
            f"relatively, {tolerance:.2g} allowed"
        )


def _row_error(got: Tensor, expected: Tensor) -> float:
    """The largest; 0 for a row of zeros that is one in both. A loss is a row of one."""
    got, expected = torch.atleast_1d(got.float()), torch.atleast_1d(expected.float())
    difference = torch.linalg.vector_norm(got - expected, dim=-1)
    norm = torch.linalg.vector_norm(expected, dim=-1)
    return float(torch.where((difference == 0) & (norm == 0), 0.0, difference / norm).max())


def checkable(shape: Shape, device: str = "cpu") -> bool:
    parameters = 6 * (shape.V + shape.N) * shape.D * 4
    return parameters + REFERENCE_COPIES * shape.N * shape.V * 4 <= _bytes_available(device)
