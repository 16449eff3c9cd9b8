"""Speed and memory on the CPU, with the demanded bound beside each ratio.

    python -m bench cpu                                      all sections, about four minutes
    python -m bench cpu --only time memory --csv cpu.csv     some, with the figures in a file
    python -m bench cpu --busy 2                             also beside two spinning processes

Prints medians (20 % - 80 % quantiles), then ratios (what, measured, bound, "ok" or "MISSED"), and
how much of the CPU others took meanwhile. Cores that data loaders or other programs keep busy are
the normal case: `--busy N` measures every section a second time beside N processes that only spin.
There the bounds on eager's time are 0.15 higher. The bounds are meant for the default sizes and two
cores. A missed bound fails nothing; a wrong result is not timed, and the exit code is 1.

time        N x V against torch, eager and compiled; the seconds of the first call, which compiles
memory      peak extra memory of a step, each in a fresh process (needs /proc)
small       few rows; the fixed cost of a call
vocabulary  time per logit from V = 4096 to a million
masked      half of the classes at -inf, -1e4 or -100, where exp is slow on a CPU
stats       the loss that returns lse and logprob, or entropy, rank and argmax too, against the loss
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import measure, options
from .cases import BOTH, DTYPES, FORWARD, LOGITS, MODES, Case, batch_of
from .providers import ALL_STATS, COMPILED, EAGER, INPLACE, OURS, STATS
from .records import Comparison
from .runner import Runner, Timed, median_of, ratios, spread

TIME_BOUNDS = {  # {dtype: {(provider, mode, the other provider): most of its time}}
    "float32": {
        (OURS, FORWARD, EAGER): 0.2, (OURS, BOTH, EAGER): 0.4, (INPLACE, BOTH, EAGER): 0.15,
        (OURS, FORWARD, COMPILED): 0.75, (OURS, BOTH, COMPILED): 0.8,
    },
    "bfloat16": {
        (OURS, FORWARD, EAGER): 0.3, (OURS, BOTH, EAGER): 0.45, (INPLACE, BOTH, EAGER): 0.2,
        (OURS, FORWARD, COMPILED): 0.75, (OURS, BOTH, COMPILED): 0.8,
    },
}  # fmt: skip
BUSY_SLACK = 0.15
MEMORY_BOUNDS = {(OURS, FORWARD): 0.01, (OURS, BOTH): 1.01, (INPLACE, BOTH): 0.01}  # of the logits
SMALL_BOUNDS = {  # {(rows, dtype): most of eager's time}
    (64, "float32"): 0.6, (64, "bfloat16"): 0.6, (8, "float32"): 0.9, (8, "bfloat16"): 1.3,
}  # fmt: skip
SMALL_CALLS = {(128, 10): 2.5, (1, 100): None}  # {(N, V): most of eager's time}: a call's cost
VOCABULARIES = (4096, 16384, 50257, 131072, 262144, 1048576)
VOCABULARY_LOGITS = 1 << 26
VOCABULARY_BOUND = 1.5  # most time per logit / least
MASKS = (float("-inf"), -1e4, -100.0)
MASKED_TOKENS = 512
MASKED_BOUND = 1.3  # time / time unmasked
STATS_BOUND = 1.03  # time / time without return_stats
UNMASKED = "unmasked"


class Config(NamedTuple):
    tokens: int
    vocab: int
    compile: bool


def compare_times(
    runner: Runner, timed: Sequence[Timed], bounds: Mapping[tuple[str, str, str], float], what: str
) -> None:
    slack = BUSY_SLACK if runner.busy else 0.0
    bounds = {key: bound + slack for key, bound in bounds.items()}
    runner.report.compare(ratios(timed, bounds, what))


def time(config: Config, runner: Runner) -> None:
    names = [EAGER, OURS, INPLACE, *((COMPILED,) if config.compile else ())]
    for dtype, bounds in TIME_BOUNDS.items():
        case = Case(LOGITS, config.tokens, 0, config.vocab, DTYPES[dtype])
        timed = runner.time(case, names)
        compare_times(runner, timed, bounds, dtype)


def memory(config: Config, runner: Runner) -> None:
    if not measure.memory_is_measurable():
        print("memory is not measured: it needs /proc")
        return
    names = [EAGER, OURS, *((COMPILED,) if config.compile else ())]
    for dtype in DTYPES:
        case = Case(LOGITS, config.tokens, 0, config.vocab, DTYPES[dtype])
        runner.report.title(f"peak extra memory of a step: {case}")
        rows, comparisons = [("provider", "mode", "MiB", "/ logits")], []
        for mode in MODES:
            found = runner.weigh(case, [*names, *([INPLACE] if mode == BOTH else [])], mode)
            for name, extra in found.items():
                units = extra / case.logits_bytes
                rows.append((name, mode, f"{extra / 2**20:.0f}", f"{units:.3f}"))
                if bound := MEMORY_BOUNDS.get((name, mode)):
                    what = f"{dtype} {mode}: {name} / logits"
                    comparisons.append(Comparison(what, units, bound))
        runner.report.print_table(rows, labels=2)
        runner.report.compare(comparisons)


def small(config: Config, runner: Runner) -> None:
    rounds, runner.rounds = runner.rounds, 4 * runner.rounds
    for (n, dtype), bound in SMALL_BOUNDS.items():
        case = Case(LOGITS, n, 0, config.vocab, DTYPES[dtype])
        _few_rows(config, runner, case, bound, calls=3)
    for (n, v), of_call in SMALL_CALLS.items():
        for dtype in DTYPES:
            case = Case(LOGITS, n, 0, v, DTYPES[dtype])
            _few_rows(config, runner, case, of_call if dtype == "float32" else None, calls=30)
    runner.rounds = rounds


def _few_rows(config: Config, runner: Runner, case: Case, bound: float | None, calls: int) -> None:
    runner.report.title(f"{case}")
    timed = runner.measure(runner.prepare(case, [EAGER, OURS]), calls=calls)
    runner.print_times(timed, 1e-6, "microseconds")
    if bound:
        modes = MODES if case.V == config.vocab else (BOTH,)
        compare_times(runner, timed, {(OURS, mode, EAGER): bound for mode in modes}, str(case))


def vocabulary(config: Config, runner: Runner) -> None:
    elements = min(VOCABULARY_LOGITS, config.tokens * config.vocab)
    runner.report.title(f"{OURS}, float32, N V = {elements} or a little less")
    entries = []
    for v in VOCABULARIES:
        case = Case(LOGITS, max(1, elements // v), 0, v, torch.float32)
        entries += runner.prepare(case, [OURS])
    rows, comparisons = [("V", "N", "mode", "ns per logit")], []
    for mode in MODES:
        medians = []
        for t in runner.measure(entries, [mode]):
            case = t.entry.case
            unit = 1e-9 * case.N * case.V
            medians.append(t.taken.median / unit)
            rows.append((str(case.V), str(case.N), mode, spread(t.taken, unit)))
        if medians:
            ratio = max(medians) / min(medians)
            what = f"{mode}: most / least time per logit"
            comparisons.append(Comparison(what, ratio, VOCABULARY_BOUND))
    runner.report.print_table(rows)
    runner.report.compare(comparisons)


def masked(config: Config, runner: Runner) -> None:
    case = Case(LOGITS, min(MASKED_TOKENS, config.tokens), 0, config.vocab, torch.float32)
    runner.report.title(f"half of the classes masked: {case}")
    batches, target = _masked_batches(case)
    entries = []
    for name, logits in batches.items():
        entries += runner.prepare(case, [EAGER, OURS], (logits, target), name)
    timed = runner.measure(entries)
    runner.print_times(timed)
    comparisons = []
    for t in timed:
        plain = median_of(timed, OURS, t.mode, UNMASKED)
        if t.entry.provider.name == OURS and t.entry.variant != UNMASKED and plain:
            what = f"{t.mode}, {t.entry.variant}: {OURS} / unmasked"
            comparisons.append(Comparison(what, t.taken.median / plain, MASKED_BOUND))
    runner.report.compare(comparisons)


def _masked_batches(case: Case) -> tuple[dict[str, Tensor], Tensor]:
    logits, target = batch_of(case)
    batches = {UNMASKED: logits}
    halves = {"every other": slice(1, None, 2), "upper half": slice((case.V + 1) // 2, None)}
    for where, columns in halves.items():
        for value in MASKS:
            batches[f"{where} at {value:g}"] = some = logits.clone()
            some[:, columns] = value
    return batches, target % max(1, case.V // 4) * 2  # classes that neither half takes


def stats(config: Config, runner: Runner) -> None:
    bounds = {(STATS, mode, OURS): STATS_BOUND for mode in MODES}
    for name, dtype in DTYPES.items():
        case = Case(LOGITS, config.tokens, 0, config.vocab, dtype)
        timed = runner.time(case, [OURS, STATS, ALL_STATS])
        compare_times(runner, timed, bounds, name)


SECTIONS: dict[str, Callable[[Config, Runner], None]] = {
    "time": time,
    "memory": memory,
    "small": small,
    "vocabulary": vocabulary,
    "masked": masked,
    "stats": stats,
}


def main(arguments: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(arguments)
    with options.reporting(args.threads, args.csv) as report:
        config = Config(args.tokens, args.vocab, not args.no_compile)
        return Runner(report, rounds=args.repeats).run_sections(
            SECTIONS, args.only, config, args.busy
        )


def _parser() -> argparse.ArgumentParser:
    parser = options.parser_of("cpu", __doc__)
    options.add_sizes(parser, tokens=2048, vocab=50257, threads=2, repeats=11)
    options.add_sections(parser, SECTIONS)
    parser.add_argument(
        "--no-compile", action="store_true", help="leave out what torch.compile builds first"
    )
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
