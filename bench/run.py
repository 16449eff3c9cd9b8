"""The runner of `python -m bench run`: checks, times and weighs every provider of a suite.

Per form, shape and dtype: each provider's loss and gradients are compared with eager's; those that
agree take turns in one timed loop; then the peak memory of a step, measured and, where the code can
run on fake tensors, predicted. Whoever cannot run is listed with the reason.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from chunked_ce import planner

from . import cpu_sections, linear_providers, measure, providers
from .cpu_sections import BOTH, FORWARD, spread
from .linear_providers import TOLERANCE, Shape, demand
from .providers import COMPILED, EAGER, INPLACE, LINEAR, LOGITS, OURS, Loss
from .records import Measurement, NotRun, Report, aligned, dtype_name, reason
from .suites import DTYPES, FULL, FULL_SIZE, OF_FORM, Suite
from .tensor_bytes import predicted_peak

PREDICTABLE = (EAGER, OURS, INPLACE)  # no operators but torch's plain ones, or our own
PREDICTED_DEVICE = "predicted: sm_90"


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
        return cpu_sections.batch(n, v, case.dtype, device)
    return linear_providers.batch_of(case.shape, case.dtype, device)


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


class Run:
    """One suite on one device."""

    def __init__(self, suite: Suite, device: str, report: Report) -> None:
        self.suite, self.device, self.report = suite, device, report
        self.clock = measure.clock_of(device)
        self.not_run = NotRun()
        self.deadline = time.perf_counter() + suite.budget

    def cases(self) -> Iterator[Case]:
        for shape in self.suite.shapes:
            for dtype in self.suite.dtypes:
                for form in OF_FORM:
                    yield Case(form, shape, DTYPES[dtype])

    def all(self) -> None:
        for case in self.cases():
            self.report.title(str(case))
            self._time(case)
            for provider in self._asked(case.form):
                for mode in case.modes:
                    self._predict(case, provider, mode, "cpu" if self.device == "cpu" else "meta")
            if self.device == "cpu" and self.suite.processes and measure.memory_is_measurable():
                self._weigh_in_processes(case)
        self._full_size()
        self._memory_table()

    def _asked(self, form: str) -> list[str]:
        return [p for p in OF_FORM[form] if p in self.suite.providers]

    def _late(self) -> bool:
        return time.perf_counter() > self.deadline

    # Time

    def _time(self, case: Case) -> None:
        batch = batch_of(case, self.device)
        torch.compiler.reset()  # every size and dtype gets code of its own
        agreeing, first = self._checked(case, batch)
        rows = []
        for mode in case.modes:
            steps = {p: step_of(mode)(loss_of(case.form, p, self.device), *batch) for p in agreeing}
            if not steps or self._late():
                continue
            round_seconds = sum(first[p] for p in agreeing) * len(case.modes)
            rounds = max(
                3, min(self.suite.repeats, int(self.suite.seconds_per_case / round_seconds))
            )
            times = measure.interleaved(steps, rounds, clock=self.clock)
            for provider, taken in times.items():
                self._add(case, provider, mode, "seconds", *taken)
                rows.append((provider, mode, spread(taken, 1e-3)))
            if self.device == "cuda":
                self._weigh_on_gpu(case, mode, steps)
        if rows:
            self.report.table([("provider", "mode", "ms"), *rows], labels=2)

    def _checked(self, case: Case, batch: tuple[Tensor, ...]) -> tuple[list[str], dict[str, float]]:
        """The providers whose answer is eager's, and the seconds of a step that is warm."""
        expected: tuple[Tensor, ...] | None = None
        agreeing, first = [], {}
        for provider in self._asked(case.form):
            why = "out of time" if self._late() else self._why_not(case, provider)
            try:
                if not why:
                    loss = loss_of(case.form, provider, self.device)
                    if expected is None and self._checkable(case):
                        expected = answer(BOTH, _reference(case.form), batch)
                    got = answer(BOTH, loss, batch)
                    if expected is not None and provider != EAGER:
                        compare(provider, got, expected)
                    del got
                    step = measure.forward_backward(loss, *batch)
                    measure.seconds(step, clock=self.clock)
                    first[provider] = measure.seconds(step, clock=self.clock)
                    agreeing.append(provider)
            except Exception as error:  # whatever another's code raises, the rest is measured
                if provider in (EAGER, OURS, INPLACE):
                    raise
                why = reason(error)
            if why:
                self.not_run.say(f"{provider}, {case.form}", why, str(case))
        return agreeing, first

    def _checkable(self, case: Case) -> bool:
        return linear_providers.checkable(case.shape, self.device)

    def _why_not(self, case: Case, provider: str) -> str:
        if case.form == LINEAR:
            return linear_providers.why_not(provider, case.shape, case.dtype, self.device)
        return providers.why_not(LOGITS, provider, self.device)

    # Memory

    def _weigh_on_gpu(self, case: Case, mode: str, steps: dict[str, measure.Step]) -> None:
        for provider, step in steps.items():
            extra, _ = measure.extra_peak_cuda_memory(step.run)
            step.reset()
            self._add(case, provider, mode, "peak_extra_bytes", extra)

    def _weigh_in_processes(self, case: Case) -> None:
        mode = case.modes[-1]  # the larger
        for provider in self._asked(case.form):
            why = "out of time" if self._late() else self._why_not(case, provider)
            if not why:
                try:
                    threads = torch.get_num_threads()
                    extra = measure.in_fresh_process(weigh, threads, provider, mode, case)
                except Exception as error:
                    if provider in (EAGER, OURS, INPLACE):
                        raise
                    why = reason(error)
                else:
                    self._add(case, provider, mode, "peak_extra_bytes", extra)
            if why:
                self.not_run.say(f"{provider}, {case.form}", why, str(case))

    def _predict(
        self, case: Case, provider: str, mode: str, fake: str, device: str | None = None
    ) -> None:
        metric = "predicted_peak_extra_bytes"
        if provider == COMPILED and case.form == LINEAR and mode == BOTH:
            head = planner.HeadShape(case.shape.V, case.shape.D, case.dtype)
            where = "cpu" if fake == "cpu" else "cuda"
            peaks = {e.name: e.peak_bytes for e in planner.plan(head, case.shape.N, device=where)}
            self._add(case, provider, mode, metric, peaks[provider], device=device)
        if provider not in PREDICTABLE or providers.why_not(
            LINEAR if case.form == LINEAR else LOGITS, provider
        ):
            return
        loss = loss_of(case.form, provider, "cpu")
        peak = predicted_peak(lambda: _fake_batch(case, fake), lambda *b: answer(mode, loss, b))
        self._add(case, provider, mode, metric, peak, device=device)

    def _full_size(self) -> None:
        """Of training at sizes that few machines hold, on a GPU."""
        for shape in FULL_SIZE:
            for form in (LINEAR, FULL):
                case = Case(form, shape, torch.bfloat16)
                for provider in self._asked(form):
                    self._predict(case, provider, case.modes[-1], "meta", PREDICTED_DEVICE)

    def _memory_table(self) -> None:
        """Predicted and measured side by side."""
        found: dict[tuple[object, ...], dict[str, float]] = {}
        for m in self.report.measurements:
            if m.metric != "seconds":
                key = m.provider, m.mode, m.N, m.D, m.V, m.dtype, m.device
                found.setdefault(key, {})[m.metric] = m.value / 2**20
        self.report.title("peak memory of a step beyond its batch, MiB")
        rows = [("provider", "mode", "dtype", "N", "D", "V", "predicted", "measured", "ratio")]
        for (provider, mode, n, d, v, dtype, _), of in found.items():
            predicted, measured = of.get("predicted_peak_extra_bytes"), of.get("peak_extra_bytes")
            cells = ("" if x is None else f"{x:.0f}" for x in (predicted, measured))
            ratio = f"{measured / predicted:.2f}" if predicted and measured else ""
            shape = (str(x or "") for x in (n, d, v))
            rows.append((str(provider), str(mode), str(dtype), *shape, *cells, ratio))  # type: ignore[arg-type]
        self.report.table(rows, labels=3)

    def _add(
        self, case: Case, provider: str, mode: str, metric: str, value: float,
        q20: float | None = None, q80: float | None = None, device: str | None = None,
    ) -> None:  # fmt: skip
        n, d, v = case.shape
        self.report.measurements.append(
            Measurement(
                provider, mode, metric, n, v, dtype_name(case.dtype), value, q20, q80,
                None if case.form == LOGITS else d, device,
            )
        )  # fmt: skip


def compare(provider: str, got: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    """Ours to rounding; others may round losses to the logits' dtype, and add up in it."""
    ours = provider.startswith(OURS)
    half = got[-1].dtype != torch.float32
    demand(provider, "loss", got[0], expected[0], 1e-5 if ours or not half else 2**-5)
    tolerance = TOLERANCE[got[-1].dtype] * (1 if ours else 4)
    for i, (one, right) in enumerate(zip(got[1:], expected[1:], strict=True)):
        what = "gradient" if len(got) == 2 else ("input's gradient", "weight's gradient")[i]
        demand(provider, what, one, right, tolerance)


def _reference(form: str) -> Loss:
    """Eager's, from the logits on in fp32."""
    if form == LOGITS:
        return lambda logits, target: F.cross_entropy(logits.float(), target)
    return lambda x, w, target: F.cross_entropy(F.linear(x, w).float(), target)


def _fake_batch(case: Case, device: str) -> tuple[Tensor, ...]:
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


def write(report: Report, not_run: NotRun, folder: Path) -> None:
    """results.csv, and not_run.txt with the reasons."""
    folder.mkdir(parents=True, exist_ok=True)
    report.write_csv(folder / "results.csv")
    rows = [("provider", "why"), *not_run.items()]
    (folder / "not_run.txt").write_text(aligned(rows, labels=2) + "\n", encoding="utf-8")
