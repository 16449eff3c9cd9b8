"""The sections of `python -m bench.cpu`: what each measures, against which bounds."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from . import floors, measure, providers
from .floors import CALLS, LOOPS
from .measure import Answer, Loss, Quantiles
from .providers import COMPILED, EAGER, INPLACE, LOGITS, OURS
from .records import Comparison, Measurement, Report, dtype_name

FORWARD, BOTH = "forward", "forward+backward"
MODES = {FORWARD: measure.forward, BOTH: measure.forward_backward}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

TIME_BOUNDS = {  # in units of eager's time
    (OURS, "fp32", FORWARD): 0.5,
    (OURS, "fp32", BOTH): 0.5,
    (OURS, "bf16", FORWARD): 0.8,
    (OURS, "bf16", BOTH): 0.9,
}
COMPILED_BOUNDS = {("fp32", BOTH): 0.9}  # ours, in units of torch.compile's time
MEMORY_BOUNDS = {(OURS, FORWARD): 0.02, (OURS, BOTH): 1.05, (INPLACE, BOTH): 0.05}
SMALL_BOUNDS = {64: 1.0, 8: 1.5}  # rows: units of eager's time
VOCABULARIES = (4096, 16384, 50257, 131072, 262144, 1048576)
VOCABULARY_LOGITS = 1 << 26
VOCABULARY_BOUND = 1.5  # most time per logit / least
MASKS = (float("-inf"), -1e4, -100.0)
MASKED_TOKENS = 512
MASKED_BOUND = 1.5  # time / time unmasked


class Config(NamedTuple):
    tokens: int
    vocab: int
    threads: int
    repeats: int
    compile: bool


def loss_of(provider: str) -> Loss:
    return providers.loss_of(LOGITS, provider)


def batch(
    tokens: int, vocab: int, dtype: torch.dtype, device: str = "cpu"
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(tokens, vocab, generator=generator, dtype=dtype)
    target = torch.randint(vocab, (tokens,), generator=generator)
    return logits.to(device), target.to(device)


def check(losses: Mapping[str, Loss], logits: Tensor, target: Tensor) -> None:
    expected = measure.reference(logits, target)
    for name, loss in losses.items():
        measure.check(name, measure.answer(loss, logits, target), expected)


def spread(q: Quantiles, unit: float) -> str:
    return f"{q.median / unit:.4g} ({q.q20 / unit:.4g} - {q.q80 / unit:.4g})"


MS, US = 1e-3, 1e-6


def time(config: Config, report: Report) -> None:
    providers = (EAGER, COMPILED, OURS) if config.compile else (EAGER, OURS)
    report.title(f"time: N = {config.tokens}, V = {config.vocab}, ms")
    rows: list[tuple[str, ...]] = []
    first_calls: list[tuple[str, ...]] = []
    comparisons: list[Comparison] = []
    for dtype, torch_dtype in DTYPES.items():
        logits, target = batch(config.tokens, config.vocab, torch_dtype)
        for provider in providers:
            if provider == COMPILED:
                first_calls += _first_calls(provider, dtype, logits, target, report)
        losses = {p: loss_of(p) for p in providers}
        if config.compile:
            losses[LOOPS] = floors.bare_loops
        written = {p: f for p, f in losses.items() if p not in (EAGER, COMPILED)}
        check(written, logits, target)
        for mode, step in MODES.items():
            steps = {p: step(loss, logits, target) for p, loss in losses.items()}
            times = measure.interleaved(steps, config.repeats)
            for provider, taken in times.items():
                report.add(provider, mode, logits, taken)
            rows.append((dtype, mode, *(spread(taken, MS) for taken in times.values())))
            comparisons += _time_comparisons(dtype, mode, times)
    floor = (LOOPS,) if config.compile else ()
    report.table([("dtype", "mode", *providers, *floor), *rows], labels=2)
    if first_calls:
        print(
            "\nThe first call compiles (in less time where torch's cache on disk has the code):\n"
        )
        report.table([("provider", "dtype", "mode", "s"), *first_calls], labels=3)
    report.compare(comparisons)


def _first_calls(
    provider: str, dtype: str, logits: Tensor, target: Tensor, report: Report
) -> Iterable[tuple[str, ...]]:
    for mode, step in MODES.items():
        taken = measure.seconds(step(loss_of(provider), logits, target))
        report.add(provider, mode, logits, Quantiles(taken, taken, taken), "first_call_seconds")
        yield provider, dtype, mode, f"{taken:.1f}"


def _time_comparisons(
    dtype: str, mode: str, times: Mapping[str, Quantiles]
) -> Iterable[Comparison]:
    for provider, taken in times.items():
        if provider != EAGER:
            bound = TIME_BOUNDS.get((provider, dtype, mode))
            ratio = taken.median / times[EAGER].median
            yield Comparison(f"{dtype} {mode}: {provider} / eager", ratio, bound)
    if COMPILED in times:
        bound = COMPILED_BOUNDS.get((dtype, mode))
        ratio = times[OURS].median / times[COMPILED].median
        yield Comparison(f"{dtype} {mode}: {OURS} / {COMPILED}", ratio, bound)


def memory(config: Config, report: Report) -> None:
    n, v = config.tokens, config.vocab
    report.title(f"memory: peak extra memory of a step, N = {n}, V = {v}")
    if not measure.memory_is_measurable():
        print("not measured: needs /proc")
        return
    providers = (EAGER, COMPILED, OURS) if config.compile else (EAGER, OURS)
    cases = [(p, mode) for p in providers for mode in MODES] + [(INPLACE, BOTH)]
    comparisons: list[Comparison] = []
    for dtype, torch_dtype in DTYPES.items():
        for provider, mode in cases:
            units = measure.in_fresh_process(_memory_of_step, config, provider, mode, torch_dtype)
            metric = "peak_extra_memory_in_logits"
            report.measurements.append(
                Measurement(provider, mode, metric, n, v, dtype_name(torch_dtype), units)
            )
            bound = MEMORY_BOUNDS.get((provider, mode))
            comparisons.append(Comparison(f"{dtype} {mode}: {provider}", units, bound))
    report.compare(comparisons, header="in units of the logits")


def _memory_of_step(config: Config, provider: str, mode: str, dtype: torch.dtype) -> float:
    torch.set_num_threads(config.threads)
    loss = loss_of(provider)
    step = _differentiated if mode == BOTH else _evaluated
    for rows in (4, 8):  # two sizes, so that torch.compile takes the next one as it is
        logits, target = _computed_batch(rows, config.vocab, dtype)
        target[0] = -100  # else they take few rows' path, and the code of others is loaded later
        step(loss, logits, target)
    logits, target = _computed_batch(config.tokens, config.vocab, dtype)
    kept = logits.detach().clone()
    extra, got = measure.extra_peak_memory(lambda: step(loss, logits, target))
    if provider in (OURS, INPLACE):
        expected = measure.reference(kept, target)
        if mode == FORWARD:
            got = got._replace(gradient=expected.gradient)
        measure.check(provider, got, expected)
    return extra / (logits.numel() * logits.element_size())


def _computed_batch(tokens: int, vocab: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Logits as a model's last layer leaves them: not a leaf, so that they may be overwritten."""
    logits, target = batch(tokens, vocab, dtype)
    return logits.add_(torch.zeros((), dtype=dtype, requires_grad=True)), target


def _differentiated(loss: Loss, logits: Tensor, target: Tensor) -> Answer:
    """Up to the logits' gradient; that of what computed them would need memory of its own."""
    mean = loss(logits, target)
    return Answer(mean.detach(), *torch.autograd.grad(mean, logits))


def _evaluated(loss: Loss, logits: Tensor, target: Tensor) -> Answer:
    with torch.no_grad():
        return Answer(loss(logits, target), logits.new_empty(0))


def small(config: Config, report: Report) -> None:
    report.title(f"small: few rows, V = {config.vocab}; the fixed cost of a call, N = 1, V = 100")
    rows: list[tuple[str, ...]] = []
    comparisons: list[Comparison] = []
    for tokens, bound in SMALL_BOUNDS.items():
        for dtype, mode, times in _small(config, report, tokens, config.vocab, calls=3):
            rows.append((f"N = {tokens}, ms", dtype, mode, *_spreads(times, MS)))
            for provider, of_provider in ((OURS, bound), (CALLS, None)):
                ratio = times[provider].median / times[EAGER].median
                what = f"N = {tokens} {dtype} {mode}: {provider} / eager"
                comparisons.append(Comparison(what, ratio, of_provider))
    for dtype, mode, times in _small(config, report, 1, 100, calls=30):
        rows.append(("a call, microseconds", dtype, mode, *_spreads(times, US)))
    report.table([("", "dtype", "mode", EAGER, OURS, CALLS), *rows], labels=3)
    report.compare(comparisons)


def _spreads(times: Mapping[str, Quantiles], unit: float) -> Iterable[str]:
    return (spread(times[p], unit) for p in (EAGER, OURS, CALLS))


def _small(
    config: Config, report: Report, tokens: int, vocab: int, calls: int
) -> Iterable[tuple[str, str, Mapping[str, Quantiles]]]:
    for dtype, torch_dtype in DTYPES.items():
        logits, target = batch(tokens, vocab, torch_dtype)
        ours = {OURS: loss_of(OURS), CALLS: floors.bare_calls(logits)}
        check(ours, logits, target)
        for mode, step in MODES.items():
            losses = {EAGER: loss_of(EAGER), **ours}
            steps = {p: step(loss, logits, target) for p, loss in losses.items()}
            times = measure.interleaved(steps, 4 * config.repeats, calls)
            for provider, taken in times.items():
                report.add(provider, mode, logits, taken)
            yield dtype, mode, times


def vocabulary(config: Config, report: Report) -> None:
    elements = min(VOCABULARY_LOGITS, config.tokens * config.vocab)
    report.title(f"vocabulary: {OURS}, fp32, N V = {elements} or a little less, ns per logit")
    everything, _ = batch(1, max(elements, *VOCABULARIES), torch.float32)
    batches: dict[int, tuple[Tensor, Tensor]] = {}
    for v in VOCABULARIES:
        n = max(1, elements // v)
        target = torch.randint(v, (n,), generator=torch.Generator().manual_seed(0))
        batches[v] = everything[0, : n * v].view(n, v), target
        check({OURS: loss_of(OURS)}, *batches[v])
    per_logit = {mode: _time_per_logit(mode, batches, config, report) for mode in MODES}
    rows = [
        (str(v), str(len(batches[v][0])), *(spread(per_logit[mode][v], 1) for mode in MODES))
        for v in VOCABULARIES
    ]
    report.table([("V", "N", *MODES), *rows], labels=0)
    medians = {mode: [q.median for q in of_mode.values()] for mode, of_mode in per_logit.items()}
    report.compare(
        Comparison(f"{mode}: most / least time per logit", max(m) / min(m), VOCABULARY_BOUND)
        for mode, m in medians.items()
    )


def _time_per_logit(
    mode: str, batches: Mapping[int, tuple[Tensor, Tensor]], config: Config, report: Report
) -> dict[int, Quantiles]:
    steps = {v: MODES[mode](loss_of(OURS), *of_v) for v, of_v in batches.items()}
    per_logit = {}
    for v, taken in measure.interleaved(steps, config.repeats).items():
        logits, _ = batches[v]
        per_logit[v] = taken.times(1e9 / logits.numel())
        report.add(OURS, mode, logits, per_logit[v], "ns_per_logit")
    return per_logit


def masked(config: Config, report: Report) -> None:
    n, v = min(MASKED_TOKENS, config.tokens), config.vocab
    report.title(f"masked: half of the classes masked, fp32, N = {n}, V = {v}, ms")
    batches, target = _masked_batches(n, v)
    for logits in batches.values():
        check({OURS: loss_of(OURS)}, logits, target)
    rows: list[tuple[str, ...]] = []
    comparisons: list[Comparison] = []
    for mode, step in MODES.items():
        steps = {
            (p, name): step(loss_of(p), logits, target)
            for p in (EAGER, OURS)
            for name, logits in batches.items()
        }
        times = measure.interleaved(steps, config.repeats)
        for (provider, name), taken in times.items():
            report.add(provider, f"{mode}, {name}", batches[name], taken)
        slowdown = {
            (p, name): t.median / times[p, "unmasked"].median for (p, name), t in times.items()
        }
        for name in batches:
            spreads = (spread(times[p, name], MS) for p in (EAGER, OURS))
            rows.append((mode, name, *spreads, f"{slowdown[EAGER, name]:.2f}"))
            if name != "unmasked":
                what = f"{mode}, {name}: {OURS} / unmasked"
                comparisons.append(Comparison(what, slowdown[OURS, name], MASKED_BOUND))
    report.table([("mode", "classes", EAGER, OURS, "eager / unmasked"), *rows], labels=2)
    report.compare(comparisons)


def _masked_batches(tokens: int, vocab: int) -> tuple[dict[str, Tensor], Tensor]:
    logits, target = batch(tokens, vocab, torch.float32)
    batches = {"unmasked": logits}
    halves = {"every other": slice(1, None, 2), "upper half": slice((vocab + 1) // 2, None)}
    for where, columns in halves.items():
        for value in MASKS:
            batches[f"{where} at {value:g}"] = some = logits.clone()
            some[:, columns] = value
    return batches, target % max(1, vocab // 4) * 2  # classes that neither half takes


SECTIONS: dict[str, Callable[[Config, Report], None]] = {
    "time": time,
    "memory": memory,
    "small": small,
    "vocabulary": vocabulary,
    "masked": masked,
}
