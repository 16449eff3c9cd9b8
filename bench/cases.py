"""A case, its batch, and the check of a result: a fast wrong result is not timed.

A loss from logits takes (logits [N, V], target [N]). A linear loss, which includes the last layer,
takes (input [N, D], weight [V, D], target [N]). Both return the mean.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

LOGITS, LINEAR = "logits", "linear"  # forms
FORWARD, BOTH = "forward", "forward+backward"
MODES = (FORWARD, BOTH)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

ROWS_OF_REFERENCE = 256  # rows per block of the reference
NORMAL_BLOCK = 1 << 24  # random numbers made at a time
# Largest error of a gradient's row, in its norm: some roundings of the dtype.
GRADIENT_LIMIT = {torch.float32: 2e-5, torch.bfloat16: 2.0**-7}
LOSS_LIMIT = 1e-5
# Others round losses to bf16, and add up in it.
ROUNDED_LOSS_LIMIT, ROUNDED_GRADIENT_FACTOR = 2.0**-5, 4

Loss = Callable[..., Tensor]
Batch = tuple[Tensor, ...]  # leaves, then the target
Results = tuple[Tensor, ...]  # loss, then the gradients of the leaves


class Case(NamedTuple):
    form: str
    N: int
    D: int  # 0 for losses from logits
    V: int
    dtype: torch.dtype

    def __str__(self) -> str:
        hidden = f" D = {self.D}," if self.D else ""
        what = "head and loss" if self.form == LINEAR else "loss alone"
        return f"{what}, N = {self.N},{hidden} V = {self.V}, {dtype_name(self.dtype)}"

    @property
    def logits_bytes(self) -> int:
        return self.N * self.V * self.dtype.itemsize


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def batch_of(case: Case, device: str = "cpu") -> Batch:
    """Return logits of variance 1, or hidden states and a weight that give such, and a target."""
    generator = torch.Generator(device).manual_seed(0)
    sizes = ((case.N, case.D), (case.V, case.D)) if case.form == LINEAR else ((case.N, case.V),)
    leaves = [normal(rows, columns, case.dtype, generator) for rows, columns in sizes]
    if case.form == LINEAR:
        leaves[1].mul_(case.D**-0.5)
    return *leaves, torch.randint(case.V, (case.N,), generator=generator, device=device)


def normal(rows: int, columns: int, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Return random numbers [rows, columns] of variance 1, made on the generator's device.

    They are made in float32, a block of rows at a time, and rounded: bf16 ones of a CPU take 20 ns
    each.
    """
    device = generator.device
    made = torch.empty(rows, columns, dtype=dtype, device=device)
    for block in made.split(max(1, NORMAL_BLOCK // columns)):
        block.copy_(torch.randn(block.shape, generator=generator, device=device))
    return made


def fake_batch(case: Case, device: str) -> Batch:
    """Return uninitialized tensors with the batch's shapes."""
    sizes = ((case.N, case.D), (case.V, case.D)) if case.form == LINEAR else ((case.N, case.V),)
    leaves = (torch.empty(size, dtype=case.dtype, device=device) for size in sizes)
    return *leaves, torch.empty(case.N, dtype=torch.int64, device=device)


class Own(torch.autograd.Function):
    """Logits with a history, so that the gradient may be written over them, without a copy."""

    @staticmethod
    def forward(ctx: Any, like: Tensor, x: Tensor, sink: list[Tensor]) -> Tensor:
        ctx.sink = sink
        return x.data

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        ctx.sink.append(grad)
        return grad.new_zeros(1), None, None


def own(x: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Return `x` with a history, and the list that receives its gradient."""
    sink: list[Tensor] = []
    like = torch.zeros(1, device=x.device, dtype=x.dtype, requires_grad=True)
    return Own.apply(like, x, sink), sink


def run_loss(loss: Loss, batch: Batch, mode: str = BOTH, overwrites: bool = False) -> Results:
    """Return the loss and, unless of forward alone, the gradients of the leaves."""
    if mode == FORWARD:
        with torch.no_grad():
            return (loss(*batch),)
    *leaves, target = batch
    if overwrites:
        logits, sink = own(leaves[0])
        value = loss(logits, target)
        value.backward()
        return value.detach(), sink[0]
    wanted = [leaf.detach().requires_grad_() for leaf in leaves]
    value = loss(*wanted, target)
    return value.detach(), *torch.autograd.grad(value, wanted)


def reference(batch: Batch) -> Results:
    """Return eager's results, the product in the batch's dtype and the rest in float32.

    It is computed a block of rows at a time, so that it fits where the gradients do.
    """
    *leaves, target = batch
    total = torch.zeros((), dtype=torch.float64, device=target.device)
    weight = leaves[1].detach().requires_grad_() if len(leaves) == 2 else None
    rows_grad = torch.empty_like(leaves[0])
    weight_grad = None if weight is None else torch.zeros_like(weight, dtype=torch.float32)
    counted = (target != -100).sum().clamp(min=1)
    for start in range(0, len(target), ROWS_OF_REFERENCE):
        block = slice(start, start + ROWS_OF_REFERENCE)
        rows = leaves[0][block].detach().requires_grad_()
        logits = rows if weight is None else F.linear(rows, weight)
        part = F.cross_entropy(logits.float(), target[block], reduction="sum") / counted
        total += part.detach()
        if weight is None or weight_grad is None:
            (rows_grad[block],) = torch.autograd.grad(part, rows)
        else:
            rows_grad[block], more = torch.autograd.grad(part, (rows, weight))
            weight_grad += more
    return (total, rows_grad) if weight_grad is None else (total, rows_grad, weight_grad)


def check(name: str, got: Results, expected: Results, exact: bool) -> tuple[float, float]:
    """Return the errors of the loss and of the worst gradient. Raise ValueError beyond the limits.

    `exact`: loss and gradients are rounded once. Half-precision answers of others may be rounded
    more often. Errors are relative, a gradient's those of its rows by their norm.
    """
    dtype = got[-1].dtype
    rounded = not exact and dtype != torch.float32
    loss_limit = ROUNDED_LOSS_LIMIT if rounded else LOSS_LIMIT
    limit = GRADIENT_LIMIT[dtype] * (1 if exact else ROUNDED_GRADIENT_FACTOR)
    errors = [row_error(one, right) for one, right in zip(got, expected, strict=True)]
    names = ("loss", "gradient") if len(got) == 2 else ("loss", "input's grad", "weight's grad")
    for what, error, allowed in zip(names, errors, (loss_limit, limit, limit), strict=False):
        if not error <= allowed:  # nor NaN
            raise ValueError(
                f"{name}: its {what} is not eager's, so it is not timed: off by {error:.2g} "
                f"relatively, {allowed:.2g} allowed"
            )
    return errors[0], max(errors[1:])


def row_error(got: Tensor, expected: Tensor) -> float:
    """Return the largest error of a row; 0 for a row of zeros that is one in both."""
    blocks = (torch.atleast_2d(t).split(ROWS_OF_REFERENCE) for t in (got, expected))
    worst = []
    for ours, theirs in zip(*blocks, strict=True):
        difference = torch.linalg.vector_norm(ours.float() - theirs.float(), dim=-1)
        norm = torch.linalg.vector_norm(theirs.float(), dim=-1)
        worst.append(torch.where((difference == 0) & (norm == 0), 0.0, difference / norm).max())
    return float(torch.stack(worst).max())  # NaN where one is
