"""A case of a suite, its batch and its answer, and what eager says of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import linear_providers, measure, providers
from .cpu_sections import BOTH, FORWARD
from .linear_providers import TOLERANCE, Shape, demand
from .providers import LINEAR, LOGITS, OURS, Loss
from .records import dtype_name
from .suites import FULL


class Case(NamedTuple):
    form: str
    shape: Shape
    dtype: torch.dtype

    @property
    def modes(self) -> tuple[str, ...]:
        return (FULL,) if self.form == FULL else (FORWARD, BOTH)

    def __str__(self) -> str:
        shape = self.shape if self.form != LOGITS else f"N = {self.shape.N}, V = {self.shape.V}"
        what = {LINEAR: "head and loss in one", FULL: "head, then loss", LOGITS: "loss alone"}
        return f"{what[self.form]}, {shape}, {dtype_name(self.dtype)}"


def loss_of(form: str, provider: str, device: str) -> Loss:
    if form == FULL:
        return providers.behind_its_head(providers.loss_of(LOGITS, provider, device))
    return providers.loss_of(form, provider, device)


def batch_of(case: Case, device: str) -> tuple[Tensor, ...]:
    """Leaves, and targets."""
    n, _, v = case.shape
    if case.form == LOGITS:
        generator = torch.Generator(device).manual_seed(0)
        logits = linear_providers.normal(n, v, case.dtype, generator)
        return logits, torch.randint(v, (n,), generator=generator, device=device)
    return linear_providers.batch_of(case.shape, case.dtype, device)


def batch_for(case: Case, provider: str, batch: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The batch, or a copy for a provider that writes the gradient over the logits it is given."""
    if case.form == LOGITS and provider in providers.OVERWRITING:
        return tuple(tensor.clone() for tensor in batch)
    return batch


def step_of(mode: str) -> Callable[..., measure.Step]:
    return measure.forward if mode == FORWARD else measure.forward_backward


def answer(mode: str, loss: Loss, batch: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The loss and, unless of forward alone, the gradients of the leaves."""
    if mode == FORWARD:
        with torch.no_grad():
            return (loss(*batch),)
    *leaves, target = batch
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    value = loss(*leaves, target)
    return value.detach(), *torch.autograd.grad(value, leaves)


def compare(provider: str, got: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    """Ours to rounding; others may round losses to the logits' dtype, and add up in it."""
    ours = provider.startswith(OURS)
    half = got[-1].dtype != torch.float32
    demand(provider, "loss", got[0], expected[0], 1e-5 if ours or not half else 2**-5)
    tolerance = TOLERANCE[got[-1].dtype] * (1 if ours else 4)
    for i, (one, right) in enumerate(zip(got[1:], expected[1:], strict=True)):
        what = "gradient" if len(got) == 2 else ("input's gradient", "weight's gradient")[i]
        demand(provider, what, one, right, tolerance)


def reference(form: str) -> Loss:
    """Eager's, from the logits on in fp32."""
    if form == LOGITS:
        return lambda logits, target: F.cross_entropy(logits.float(), target)
    return lambda x, w, target: F.cross_entropy(F.linear(x, w).float(), target)


def fake_batch(case: Case, device: str) -> tuple[Tensor, ...]:
    n, d, v = case.shape
    sizes = ((n, v),) if case.form == LOGITS else ((n, d), (v, d))
    leaves = (torch.empty(size, dtype=case.dtype, device=device) for size in sizes)
    return *leaves, torch.empty(n, dtype=torch.int64, device=device)


def weigh(threads: int, provider: str, mode: str, case: Case) -> float:
    """Bytes at the peak of a step. Run in a process that has done nothing bigger yet."""
    torch.set_num_threads(threads)
    loss = loss_of(case.form, provider, "cpu")
    for rows in (4, 8):  # two sizes, so that torch.compile takes the next one as it is
        answer(mode, loss, batch_of(case._replace(shape=case.shape._replace(N=rows)), "cpu"))
    batch = batch_of(case, "cpu")
    extra, _ = measure.extra_peak_memory(lambda: answer(mode, loss, batch))
    return extra
