"""The runner of `python -m bench run`: checks, times and weighs every provider of a suite.

Per form, shape and dtype: each provider's loss and gradients are compared with eager's; those that
agree take turns in one timed loop; then the peak memory of a step, measured and, where the code can
run on fake tensors, predicted. Whoever cannot run is listed with the reason.
"""

from __future__ import annotations

import gc
import itertools
import time
from collections.abc import Iterator
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import torch
from torch import Tensor

from chunked_ce import planner

from . import linear_providers, measure, providers
from .cases import (
    Case,
    answer,
    batch_for,
    batch_of,
    compare,
    fake_batch,
    loss_of,
    reference,
    step_of,
    weigh,
)
from .cpu_sections import BOTH, spread
from .memory_table import memory_table
from .providers import COMPILED, EAGER, INPLACE, LINEAR, LOGITS, OURS, TORCH
from .records import Measurement, NotRun, Report, dtype_name, reason, write_folder
from .suites import DTYPES, FULL, FULL_SIZE, OF_FORM, Suite
from .tensor_bytes import predicted_peak

PREDICTABLE = (EAGER, OURS, INPLACE)  # no operators but torch's plain ones, or our own
# So that a suite ends in time, what takes more than 4 times eager's is left out, and 0.1 s:
# F.linear_cross_entropy in bfloat16, which `bench.linear` measures.
_SLOW, _SHORT = 4, 0.1
PREDICTED_DEVICE = "predicted: sm_90"


class _TooSlow(Exception):
    pass


class Run:
    """One suite on one device."""

    def __init__(self, suite: Suite, device: str, report: Report, folder: Path) -> None:
        self.suite, self.device, self.report, self.folder = suite, device, report, folder
        self.faults: list[str] = []  # of eager's results and ours
        self.clock = measure.clock_of(device)
        self.not_run = NotRun()
        self.deadline = time.perf_counter() + suite.budget

    def cases(self) -> Iterator[Case]:
        sizes = [*itertools.product(self.suite.shapes, self.suite.dtypes), *self.suite.also]
        for (shape, dtype), form in itertools.product(sizes, OF_FORM):
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
            self.write()
        self._full_size()
        memory_table(self.report)

    def _asked(self, form: str) -> list[str]:
        return [p for p in OF_FORM[form] if p in self.suite.providers]

    def _late(self) -> bool:
        return time.perf_counter() > self.deadline

    def write(self) -> None:
        """All that is measured so far, so that a stop loses no more than a case."""
        if self.report.measurements:
            write_folder(self.report, self.not_run, self.folder)

    # Time

    def _time(self, case: Case) -> None:
        try:
            batch = batch_of(case, self.device)
        except Exception as error:
            self._all_failed(case, error)
            return
        torch.compiler.reset()  # every size and dtype gets code of its own
        agreeing, first = self._checked(case, batch)
        rows = []
        for mode in case.modes:
            if not agreeing or self._late():
                continue
            round_seconds = sum(first[p] for p in agreeing) * len(case.modes)
            rounds = max(
                3, min(self.suite.repeats, int(self.suite.seconds_per_case / round_seconds))
            )
            for provider, taken in self._interleaved(case, mode, agreeing, batch, rounds).items():
                self._add(case, provider, mode, "seconds", *taken)
                rows.append((provider, mode, spread(taken, 1e-3)))
        if rows:
            self.report.table([("provider", "mode", "ms"), *rows], labels=2)

    def _interleaved(
        self, case: Case, mode: str, agreeing: list[str], batch: tuple[Tensor, ...], rounds: int
    ) -> dict[str, measure.Quantiles]:
        """Who runs out of memory is taken out of `agreeing`, and the others start again."""
        while agreeing:
            at_work = agreeing[0]

            def watched(provider: str) -> measure.Step:
                step = step_of(mode)(
                    loss_of(case.form, provider, self.device), *batch_for(case, provider, batch)
                )

                def run() -> None:
                    nonlocal at_work
                    at_work = provider
                    step.run()

                return measure.Step(run, step.reset)

            steps = {p: watched(p) for p in agreeing}
            try:
                times = measure.interleaved(steps, rounds, clock=self.clock)
            except Exception as error:
                self._failed(case, at_work, error)
                agreeing.remove(at_work)
            else:
                if self.device == "cuda":
                    self._weigh_on_gpu(case, mode, steps)
                return times
            del steps
            _release()
        return {}

    def _checked(self, case: Case, batch: tuple[Tensor, ...]) -> tuple[list[str], dict[str, float]]:
        """The providers whose answer is eager's, and the seconds of a step that is warm."""
        expected: tuple[Tensor, ...] | None = None
        wanted = self._checkable(case)
        agreeing: list[str] = []
        first: dict[str, float] = {}
        for provider in self._asked(case.form):
            if why := "out of time" if self._late() else self._why_not(case, provider):
                self.not_run.say(f"{provider}, {case.form}", why, str(case))
                continue
            if wanted:
                expected, wanted = self._expected(case, batch), False
            try:
                first[provider] = self._warm_seconds(
                    case, provider, batch, expected, first.get(EAGER, 0.0)
                )
                agreeing.append(provider)
            except Exception as error:
                self._failed(case, provider, error)
                _release()
        return agreeing, first

    def _warm_seconds(
        self, case: Case, provider: str, batch: tuple[Tensor, ...],
        expected: tuple[Tensor, ...] | None, eager_seconds: float,
    ) -> float:  # fmt: skip
        """Of a step, once its answer has been compared."""
        loss = loss_of(case.form, provider, self.device)
        batch = batch_for(case, provider, batch)
        start = time.perf_counter()
        got = answer(BOTH, loss, batch)
        times_eager = (time.perf_counter() - start) / max(eager_seconds, _SHORT)
        if expected is not None and provider != EAGER:
            compare(provider, got, expected)
        if self.device == "cpu" and provider == TORCH and times_eager > _SLOW:
            raise _TooSlow(f"some {times_eager:.0f} times eager's time")
        del got
        step = measure.forward_backward(loss, *batch)
        measure.seconds(step, clock=self.clock)
        return measure.seconds(step, clock=self.clock)

    def _expected(self, case: Case, batch: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        """None where it does not fit the memory, and nothing can be compared."""
        try:
            return answer(BOTH, reference(case.form), batch)
        except Exception as error:
            if not measure.is_out_of_memory(error):
                raise
            print(f"not compared with eager in float32: out of memory ({case})", flush=True)
        _release()
        return None

    def _failed(self, case: Case, provider: str, error: Exception) -> None:
        """The rest is measured. What eager and ours raise, but for want of memory, is a fault."""
        if measure.is_out_of_memory(error):
            why = "out of memory"
        elif isinstance(error, BrokenProcessPool):
            why = "its process was killed, perhaps for want of memory"
        elif isinstance(error, _TooSlow):
            why = str(error)
        else:
            why = reason(error)
            if provider in (EAGER, OURS, INPLACE):
                self.faults.append(f"{why} ({case})")
        self.not_run.say(f"{provider}, {case.form}", why, str(case))

    def _all_failed(self, case: Case, error: Exception) -> None:
        for provider in self._asked(case.form):
            self._failed(case, provider, error)

    def _checkable(self, case: Case) -> bool:
        return linear_providers.checkable(case.shape, self.device)

    def _why_not(self, case: Case, provider: str) -> str:
        if case.form == LINEAR:
            return linear_providers.why_not(provider, case.shape, case.dtype, self.device)
        return providers.why_not(LOGITS, provider, self.device)

    # Memory

    def _weigh_on_gpu(self, case: Case, mode: str, steps: dict[str, measure.Step]) -> None:
        for provider, step in steps.items():
            try:
                extra, _ = measure.extra_peak_cuda_memory(step.run)
            except Exception as error:
                self._failed(case, provider, error)
            else:
                self._add(case, provider, mode, "peak_extra_bytes", extra)
            step.reset()

    def _weigh_in_processes(self, case: Case) -> None:
        mode = case.modes[-1]  # the larger
        for provider in self._asked(case.form):
            if why := "out of time" if self._late() else self._why_not(case, provider):
                self.not_run.say(f"{provider}, {case.form}", why, str(case))
                continue
            try:
                threads = torch.get_num_threads()
                extra = measure.in_fresh_process(weigh, threads, provider, mode, case)
            except Exception as error:
                self._failed(case, provider, error)
            else:
                self._add(case, provider, mode, "peak_extra_bytes", extra)

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
        peak = predicted_peak(lambda: fake_batch(case, fake), lambda *b: answer(mode, loss, b))
        self._add(case, provider, mode, metric, peak, device=device)

    def _full_size(self) -> None:
        """Of training at sizes that few machines hold, on a GPU."""
        for shape in FULL_SIZE:
            for form in (LINEAR, FULL):
                case = Case(form, shape, torch.bfloat16)
                for provider in self._asked(form):
                    self._predict(case, provider, case.modes[-1], "meta", PREDICTED_DEVICE)

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


def _release() -> None:
    """After a failure, whose traceback has held tensors."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
