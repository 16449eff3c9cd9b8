"""The one runner: check every provider of a case, time them in interleaved rounds, weigh them.

A provider with another result than eager's is not timed. One that fails gets a row with the
reason, and the others go on. An error of eager or chunked_ce is a fault, unless memory ran out.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import measure
from .cases import BOTH, MODES, Batch, Case, Loss, Results, batch_of, check, reference, run_loss
from .measure import Quantiles
from .providers import EAGER, HEAD, OURS, Provider, Unavailable, bytes_needed, find
from .records import Comparison, Report, one_line

# With `leave_out_slow`: what takes more than 4 times eager's time, and 0.1 s, is not timed.
SLOW, SHORT = 4, 0.1
LEAST_ROUNDS = 3


class Entry(NamedTuple):
    """A provider with a correct result, and what it is timed with."""

    provider: Provider
    case: Case
    loss: Loss
    batch: Batch
    errors: tuple[float, float] = (0.0, 0.0)  # of the loss, of the worst gradient
    variant: str = ""  # of the batch
    first_seconds: float = 0.0

    @property
    def name(self) -> str:
        return self.provider.name + (f", {self.variant}" if self.variant else "")

    def step(self, mode: str) -> measure.Step:
        return lambda: run_loss(self.loss, self.batch, mode, self.provider.overwrites)


class Timed(NamedTuple):
    entry: Entry
    mode: str
    taken: Quantiles


class Runner:
    """Measures cases on one device.

    rounds: of timing, at most; seconds: of timing a mode of a case, where LEAST_ROUNDS allow it;
    deadline: of time.perf_counter(), nothing is begun after it.
    """

    strict = True  # what is rounded once must be right to that

    def __init__(
        self, report: Report, device: str = "cpu", rounds: int = 9,
        seconds: float = float("inf"), deadline: float = float("inf"), leave_out_slow: bool = False,
    ) -> None:  # fmt: skip
        self.report, self.device, self.rounds = report, device, rounds
        self.seconds, self.deadline, self.leave_out_slow = seconds, deadline, leave_out_slow
        self.tensor_device = "cuda" if device == "cuda" else "cpu"
        self.clock = measure.clock_of(self.tensor_device)
        self.faults: list[str] = []
        self.busy = 0  # processes beside this one that only spin

    def run_sections(
        self, sections: Mapping[str, Callable[[Any, Runner], None]], names: Iterable[str],
        config: Any, busy: int,
    ) -> int:  # fmt: skip
        """Run sections, each again beside `busy` spinning processes. Return the exit code."""
        plain = self.report.environment["device"]
        for name in names:
            for self.busy in (0, busy) if busy else (0,):
                beside = f", beside {self.busy} spinning processes" if busy else ""
                self.report.environment["device"] = plain + beside
                print(f"\n# {name}{beside}", flush=True)
                with measure.spinning(self.busy):
                    others = measure.OtherProcesses()
                    sections[name](config, self)
                    print(f"\n{others}", flush=True)
        return self.exit_code()

    def exit_code(self) -> int:
        """Print what was wrong. Return 1 where something was, else 0."""
        for line in self.faults:
            print(f"WRONG  {line}")
        return 1 if self.faults else 0

    @property
    def late(self) -> bool:
        return time.perf_counter() > self.deadline

    # Right or wrong

    def prepare(
        self, case: Case, names: Iterable[str], batch: Batch | None = None, variant: str = ""
    ) -> list[Entry]:
        """Return the providers with the loss and gradients of eager."""
        providers, entries = find(case.form, names), list[Entry]()
        torch.compiler.reset()  # every size and dtype gets code of its own
        try:
            batch = batch or batch_of(case, self.tensor_device)
            expected = reference(batch)
        except Exception as error:
            for provider in providers:
                self.failed(case, provider, error)
            return []
        for provider in providers:
            try:
                entry = self._checked(case, provider, batch, expected, variant)
                self._leave_out_slow(entry, entries)
            except Exception as error:
                self.failed(case, provider, error)
                measure.release()
            else:
                entries.append(entry)
        return entries

    def _checked(
        self, case: Case, provider: Provider, batch: Batch, expected: Results, variant: str
    ) -> Entry:
        loss = self._load(case, provider)
        if provider.overwrites:
            batch = tuple(t.clone() for t in batch)
        got: list[Tensor] = []
        first = self.clock(lambda: got.extend(run_loss(loss, batch, BOTH, provider.overwrites)))
        errors = check(provider.name, tuple(got), expected, provider.exact and self.strict)
        if provider.compiles and self.device != "interpreter":
            self.report.add(case, provider.name, BOTH, "first_call_seconds", first)
        return Entry(provider, case, loss, batch, errors, variant, first)

    def _load(self, case: Case, provider: Provider) -> Loss:
        """Raise Unavailable where the provider cannot run, or not at that size."""
        if self.late:
            raise Unavailable("out of time")
        loss = provider.load(self.device)
        needed, free = bytes_needed(case, provider), measure.free_bytes(self.tensor_device)
        if needed > free:
            raise Unavailable(f"needs {needed / 2**30:.1f} GiB of {free / 2**30:.1f}")
        return loss

    def _leave_out_slow(self, entry: Entry, others: Sequence[Entry]) -> None:
        eager = next((e.first_seconds for e in others if e.provider.name == EAGER), 0.0)
        ratio = entry.first_seconds / max(eager, SHORT)
        exempt = entry.provider.exact or entry.provider.compiles or not self.leave_out_slow
        if eager and not exempt and ratio > SLOW:
            raise Unavailable(f"some {ratio:.0f} times eager's time")

    def failed(self, case: Case, provider: Provider, error: Exception) -> None:
        """Record the reason. An error of eager or ours is a fault, unless memory ran out."""
        if isinstance(error, Unavailable):
            why = str(error)
        elif measure.is_out_of_memory(error):
            why = "out of memory"
        elif isinstance(error, BrokenProcessPool):
            why = "its process was killed, perhaps for want of memory"
        else:
            why = one_line(error)
            if provider.name.removeprefix(HEAD).startswith((EAGER, OURS)):
                self.faults.append(f"{why} ({case})")
        self.report.not_run(case, provider.name, why)

    # Time

    def time(self, case: Case, names: Iterable[str], modes: Sequence[str] = MODES) -> list[Timed]:
        """Check and time the providers of a case; print a table of them."""
        self.report.title(str(case))
        timed = self.measure(self.prepare(case, names), modes)
        self.print_times(timed)
        return timed

    def measure(
        self, entries: Sequence[Entry], modes: Sequence[str] = MODES, calls: int = 1
    ) -> list[Timed]:
        """Time entries that take turns, `calls` calls at a time, and add the rows."""
        timed = []
        for mode in modes:
            wanted = [e for e in entries if mode in e.provider.modes]
            for t in self._interleaved(wanted, mode, calls):
                entry, where = t.entry, f"{mode}, {t.entry.variant}" if t.entry.variant else mode
                self.report.add(entry.case, entry.provider.name, where, "seconds", t.taken)
                self.also(t)
                timed.append(t)
        return timed

    def also(self, timed: Timed) -> None:
        """Add more rows about a step that was timed: on a GPU its peak memory."""
        if self.tensor_device == "cuda":
            entry, mode = timed.entry, timed.mode
            try:
                extra, _ = measure.extra_peak_cuda_memory(entry.step(mode))
            except Exception as error:
                self.failed(entry.case, entry.provider, error)
            else:
                self.report.add(entry.case, entry.provider.name, mode, "peak_extra_bytes", extra)

    def _interleaved(self, entries: list[Entry], mode: str, calls: int) -> list[Timed]:
        """Time all in turn. Where one fails it is taken out, and the others start again."""
        at_work: list[int] = []

        def watched(i: int, step: measure.Step) -> measure.Step:
            def run() -> object:
                at_work[:] = [i]
                return step()

            return run

        while entries and not self.late:
            steps = {i: watched(i, e.step(mode)) for i, e in enumerate(entries)}
            try:
                spent = sum(measure.seconds(s, calls, self.clock) for s in steps.values())
                least = min(LEAST_ROUNDS, self.rounds)
                rounds = max(least, int(min(self.rounds, self.seconds / (spent * calls))))
                times = measure.interleaved(steps, rounds, calls, self.clock)
            except Exception as error:
                entry = entries.pop(at_work[0])
                self.failed(entry.case, entry.provider, error)
                measure.release()
            else:
                return [Timed(entries[i], mode, taken) for i, taken in times.items()]
        return []

    def print_times(self, timed: Sequence[Timed], unit: float = 1e-3, name: str = "ms") -> None:
        """Print medians (20 % - 80 % quantiles), in units of eager's, and the load of others."""
        header = ("provider", "mode", name, "/ eager", "loss error", "gradient error")
        rows: list[tuple[str, ...]] = [header]
        for t in timed:
            eager = median_of(timed, EAGER, t.mode, t.entry.variant)
            ratio = f"{t.taken.median / eager:.3f}" if eager else ""
            errors = (f"{error:.1e}" for error in t.entry.errors)
            rows.append((t.entry.name, t.mode, spread(t.taken, unit), ratio, *errors))
        self.report.print_table(rows, labels=2)

    # Memory

    def weigh(self, case: Case, names: Iterable[str], mode: str) -> dict[str, int]:
        """Return the peak bytes of a step beyond its batch, each in a fresh process of the CPU."""
        found = {}
        for provider in find(case.form, names):
            try:
                self._load(case, provider)
                extra = measure.in_fresh_process(
                    peak_bytes, torch.get_num_threads(), case, provider.name, mode
                )
            except Exception as error:
                self.failed(case, provider, error)
            else:
                found[provider.name] = extra
                self.report.add(case, provider.name, mode, "peak_extra_bytes", extra)
        return found


def peak_bytes(threads: int, case: Case, name: str, mode: str) -> int:
    """Return the peak of a step. Run it in a process that has done nothing bigger yet."""
    torch.set_num_threads(threads)
    (provider,) = find(case.form, [name])
    loss = provider.load("cpu")
    for rows in (4, 8):  # two sizes, so that torch.compile takes the next one as it is
        run_loss(loss, batch_of(case._replace(N=rows)), mode, provider.overwrites)
    batch = batch_of(case)
    extra, got = measure.extra_peak_memory(lambda: run_loss(loss, batch, mode, provider.overwrites))
    if provider.exact and mode == BOTH:
        check(name, got, reference(batch_of(case)), exact=True)
    return extra


def spread(q: Quantiles, unit: float) -> str:
    return f"{q.median / unit:.4g} ({q.q20 / unit:.4g} - {q.q80 / unit:.4g})"


def median_of(timed: Iterable[Timed], name: str, mode: str, variant: str = "") -> float | None:
    """Return the median of a provider in a mode, or None where it was not timed."""
    for t in timed:
        if (t.entry.provider.name, t.mode, t.entry.variant) == (name, mode, variant):
            return t.taken.median
    return None


def ratios(
    timed: Sequence[Timed], bounds: Mapping[tuple[str, str, str], float], what: str
) -> Iterable[Comparison]:
    """Compare medians. `bounds`: {(provider, mode, the other provider): most of its time}."""
    for (name, mode, other), bound in bounds.items():
        ours, theirs = median_of(timed, name, mode), median_of(timed, other, mode)
        if ours and theirs:
            yield Comparison(f"{what} {mode}: {name} / {other}", ours / theirs, bound)
