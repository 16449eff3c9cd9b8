"""The sections of `python -m bench.linear`: what each measures, against which bounds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from . import measure, providers
from .cpu_sections import BOTH, DTYPES, FORWARD, spread
from .linear_providers import (
    EAGER_COPIES,
    Answer,
    Batch,
    Shape,
    answer,
    batch_of,
    check,
    checkable,
    evaluated,
    why_not,
)
from .measure import Quantiles, Step
from .providers import COMPILING, EAGER, LINEAR, OURS, TORCH, Loss
from .records import Comparison, Measurement, NotRun, Report, dtype_name, reason

PROVIDERS = providers.PROVIDERS[LINEAR]
SLOW = (TORCH,)  # 6 to 11 s a call at the default sizes: measured in fewer rounds
MODES = {FORWARD: measure.forward, BOTH: measure.forward_backward}

TIME_BOUNDS = {  # ours, forward+backward, in units of the other's time
    ("fp32", EAGER): 1.0,
    ("bf16", EAGER): 0.9,
    ("fp32", TORCH): 0.333,
    ("bf16", TORCH): 0.2,
}
MEMORY_BOUND = 0.5  # ours / eager, forward+backward
LARGE = 8  # times --tokens: where memory that does not grow with N is told from memory that does
LARGE_BOUND = 0.1  # (ours - its gradients) / eager, bf16
IGNORED = 0.5  # of the targets
IGNORED_BOUND = 0.6  # time / time with no target ignored
GRID_TOKENS = (1024, 2048, 4096, 8192, 16384)
GRID_VOCABULARIES = (32000, 50257, 128256, 256000)


class Config(NamedTuple):
    tokens: int
    hidden: int
    vocab: int
    threads: int
    repeats: int
    slow_repeats: int
    grid: bool
    without: tuple[str, ...]

    @property
    def providers(self) -> tuple[str, ...]:
        return tuple(p for p in PROVIDERS if p not in self.without)

    @property
    def shapes(self) -> list[Shape]:
        """The sizes asked for; with `grid` those along N, then those along V, too."""
        shapes = [Shape(self.tokens, self.hidden, self.vocab)]
        if self.grid:
            shapes += [Shape(n, self.hidden, self.vocab) for n in GRID_TOKENS]
            shapes += [Shape(self.tokens, self.hidden, v) for v in GRID_VOCABULARIES]
        return list(dict.fromkeys(shapes))


def loss_of(provider: str) -> Loss:
    return providers.loss_of(LINEAR, provider)


def _check_ours(shape: Shape, batch: Batch) -> None:
    if checkable(shape):
        check(OURS, answer(loss_of(OURS), batch), batch)
    else:
        print(f"{OURS}: not checked: eager needs more memory than there is ({shape})")


def time(config: Config, report: Report) -> None:
    not_run = NotRun()
    for shape in config.shapes:
        report.title(f"time: {shape}, s")
        rows: list[tuple[str, ...]] = []
        comparisons: list[Comparison] = []
        for dtype, torch_dtype in DTYPES.items():
            batch = batch_of(shape, torch_dtype)
            _check_ours(shape, batch)
            providers = _running(config, shape, batch, not_run)
            for mode in MODES:
                steps = {p: MODES[mode](loss_of(p), *batch) for p in providers}
                times, ours_beside = _times(config, steps)
                _add_times(report, mode, shape, torch_dtype, times)
                row = (spread(times[p], 1) if p in times else "-" for p in config.providers)
                rows.append((dtype, mode, *row))
                bounded = shape == config.shapes[0] and mode == BOTH
                for p, ours in ours_beside.items():
                    bound = TIME_BOUNDS.get((dtype, p)) if bounded else None
                    what = f"time, {shape}, {dtype} {mode}: {OURS} / {p}"
                    comparisons.append(Comparison(what, ours.median / times[p].median, bound))
        report.table([("dtype", "mode", *config.providers), *rows], labels=2)
        report.compare(comparisons)
    for p in SLOW:
        if p in config.providers and p not in not_run:
            print(f"\n{p}: {config.slow_repeats} rounds, ours beside it, for it is slow")


def _running(config: Config, shape: Shape, batch: Batch, not_run: NotRun) -> list[str]:
    """The providers that can be measured; those that compile have done so."""
    torch.compiler.reset()  # every size and dtype gets code of its own
    running = []
    for p in config.providers:
        why = why_not(p, shape, batch.input.dtype)
        try:
            if not why and p in COMPILING:
                for mode in MODES:
                    measure.seconds(MODES[mode](loss_of(p), *batch))
        except Exception as error:  # whatever another's code raises, the rest is measured
            why = reason(error)
        if why:
            not_run.say(p, why, f"{shape}, {dtype_name(batch.input.dtype)}")
        else:
            running.append(p)
    return running


def _times(
    config: Config, steps: Mapping[str, Step]
) -> tuple[dict[str, Quantiles], dict[str, Quantiles]]:
    """Seconds of each provider; and, by provider, ours in the loop in which that was measured."""
    slow = {p: step for p, step in steps.items() if p in SLOW}
    times = measure.interleaved(
        {p: step for p, step in steps.items() if p not in SLOW}, config.repeats
    )
    ours_beside = dict.fromkeys((p for p in times if p != OURS), times[OURS])
    if slow:
        beside = measure.interleaved({OURS: steps[OURS], **slow}, config.slow_repeats)
        ours = beside.pop(OURS)
        times |= beside
        ours_beside |= dict.fromkeys(beside, ours)
    return times, ours_beside


def _add_times(
    report: Report, mode: str, shape: Shape, dtype: torch.dtype, times: Mapping[str, Quantiles]
) -> None:
    for provider, taken in times.items():
        _add(report, provider, mode, "seconds", shape, dtype, *taken)


def _add(
    report: Report,
    provider: str,
    mode: str,
    metric: str,
    shape: Shape,
    dtype: torch.dtype,
    value: float,
    q20: float | None = None,
    q80: float | None = None,
) -> None:
    n, d, v = shape
    report.measurements.append(
        Measurement(provider, mode, metric, n, v, dtype_name(dtype), value, q20, q80, D=d)
    )


class Memory:
    """Peak extra bytes of steps, each measured once, in a process of its own."""

    def __init__(self, config: Config, report: Report) -> None:
        self.config, self.report, self.not_run = config, report, NotRun()
        self._found: dict[tuple[str, str, Shape, torch.dtype], float | None] = {}

    def of(self, provider: str, mode: str, shape: Shape, dtype: torch.dtype) -> float | None:
        """None where it was not run."""
        key = provider, mode, shape, dtype
        if key not in self._found:
            self._found[key] = found = self._measured(*key)
            if found is not None:
                metric = "peak_extra_bytes"
                _add(self.report, provider, mode, metric, shape, dtype, found)
        return self._found[key]

    def _measured(self, provider: str, mode: str, shape: Shape, dtype: torch.dtype) -> float | None:
        why = why_not(provider, shape, dtype)
        if not why:
            try:
                threads = self.config.threads
                return measure.in_fresh_process(
                    _memory_of_step, threads, provider, mode, shape, dtype
                )
            except Exception as error:
                if provider in (EAGER, OURS):
                    raise
                why = reason(error)
        self.not_run.say(provider, why, f"{shape}, {dtype_name(dtype)}")
        return None


def memory(config: Config, report: Report) -> None:
    if not measure.memory_is_measurable():
        report.title("memory")
        print("not measured: needs /proc")
        return
    memory = Memory(config, report)
    for shape in config.shapes:
        report.title(f"memory: peak extra memory of a step, gradients included, {shape}, MiB")
        _memory_of_shape(memory, shape)
    large = Shape(LARGE * config.tokens, config.hidden, config.vocab)
    report.title(f"memory beside the gradients, {large}, bf16 {BOTH}")
    report.compare([_beside_the_gradients(memory, large)])


def _memory_of_shape(memory: Memory, shape: Shape) -> None:
    rows: list[tuple[str, ...]] = []
    comparisons: list[Comparison] = []
    providers = memory.config.providers
    for dtype, torch_dtype in DTYPES.items():
        for mode in MODES:
            found = {p: memory.of(p, mode, shape, torch_dtype) for p in providers}
            cells = ("-" if (b := found[p]) is None else f"{b / 2**20:.0f}" for p in providers)
            rows.append((dtype, mode, *cells))
            bounded = shape == memory.config.shapes[0] and mode == BOTH
            for p, others in found.items():
                if p != OURS and others is not None and (ours := found[OURS]) is not None:
                    bound = MEMORY_BOUND if bounded and p == EAGER else None
                    what = f"memory, {shape}, {dtype} {mode}: {OURS} / {p}"
                    comparisons.append(Comparison(what, _ratio(ours, others), bound))
    memory.report.table([("dtype", "mode", *providers), *rows], labels=2)
    memory.report.compare(comparisons, header="memory ratio")


def _beside_the_gradients(memory: Memory, shape: Shape) -> Comparison:
    dtype = torch.bfloat16
    ours = memory.of(OURS, BOTH, shape, dtype)
    assert ours is not None
    gradients = (shape.N + shape.V) * shape.D * dtype.itemsize
    eager, how = memory.of(EAGER, BOTH, shape, dtype), "measured"
    if eager is None:
        eager, how = EAGER_COPIES * shape.N * shape.V * dtype.itemsize, "computed"
    mib = 1 << 20
    print(
        f"{OURS} {ours / mib:.0f} MiB, of which gradients {gradients / mib:.0f}; "
        f"{EAGER} {eager / mib:.0f} MiB, {how}"
    )
    what = f"memory, {shape}, bf16 {BOTH}: ({OURS} - gradients) / {EAGER}, {how}"
    return Comparison(what, _ratio(ours - gradients, eager), LARGE_BOUND)


def _ratio(bytes: float, of: float) -> float:
    return bytes / max(of, 4096)  # a page is the least that is noticed


def _memory_of_step(
    threads: int, provider: str, mode: str, shape: Shape, dtype: torch.dtype
) -> float:
    """Bytes. Run in a process that has done nothing bigger yet."""
    torch.set_num_threads(threads)
    loss = loss_of(provider)
    step = answer if mode == BOTH else evaluated
    for rows in (4, 8):  # two sizes, so that torch.compile takes the next one as it is
        step(loss, batch_of(shape._replace(N=rows), dtype))
    batch = batch_of(shape, dtype)
    extra, got = measure.extra_peak_memory(lambda: step(loss, batch))
    if provider == OURS and isinstance(got, Answer) and checkable(shape):
        check(provider, got, batch)
    return extra


def masked(config: Config, report: Report) -> None:
    shape = config.shapes[0]
    report.title(f"masked: {IGNORED:.0%} of the targets ignored, {OURS}, {shape}, s")
    rows: list[tuple[str, ...]] = []
    comparisons: list[Comparison] = []
    for dtype, torch_dtype in DTYPES.items():
        full = batch_of(shape, torch_dtype)
        batches = {"": full, ", half ignored": full._replace(target=_some_ignored(full.target))}
        for batch in batches.values():
            _check_ours(shape, batch)
        for mode in MODES:
            steps = {name: MODES[mode](loss_of(OURS), *b) for name, b in batches.items()}
            times = measure.interleaved(steps, config.repeats)
            for name, taken in times.items():
                _add_times(report, mode + name, shape, torch_dtype, {OURS: taken})
            rows.append((dtype, mode, *(spread(taken, 1) for taken in times.values())))
            of_full, of_half = (taken.median for taken in times.values())
            what = f"{dtype} {mode}: {OURS}, half ignored / none"
            comparisons.append(Comparison(what, of_half / of_full, IGNORED_BOUND))
    report.table([("dtype", "mode", "none", "half"), *rows], labels=2)
    report.compare(comparisons)


def _some_ignored(target: Tensor) -> Tensor:
    chosen = torch.randperm(target.numel(), generator=torch.Generator().manual_seed(0))
    ignored = target.clone()
    ignored[chosen[: round(IGNORED * target.numel())]] = -100
    return ignored


SECTIONS: dict[str, Callable[[Config, Report], None]] = {
    "time": time,
    "memory": memory,
    "masked": masked,
}
