"""Speed and memory of the linear layer and the loss together, on the CPU, with bounds.

    python -m bench linear                                    all sections, some ten minutes
    python -m bench linear --only memory --csv linear.csv     some, with the figures in a file
    python -m bench linear --grid --csv linear.csv            along N and V too; hours

Compares eager, torch.compile, `F.linear_cross_entropy` with options and cut-cross-entropy (its
torch_compile implementation) with `chunked_ce.linear_cross_entropy`. What cannot run here is listed
with the reason. Prints medians (20 % - 80 % quantiles), then ratios (what, measured, bound, "ok" or
"MISSED"). The bounds are meant for the default sizes and two cores. A missed bound fails nothing; a
wrong result is not timed, and the exit code is 1. `python -m bench figures` draws the CSV.

time        seconds of forward, and of forward + backward, in float32 and bfloat16
memory      peak extra bytes, gradients of input and weight included, each in a fresh process (needs
            /proc); at 8 N also what is left of it beside the gradients
masked      half of the targets ignored, against none
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import measure, options
from .cases import BOTH, DTYPES, LINEAR, MODES, Case, batch_of
from .providers import COMPILED, CUT, EAGER, LIGER, OURS, QUACK, TORCH
from .records import Comparison
from .runner import Runner, median_of, ratios

PROVIDERS = (EAGER, COMPILED, TORCH, CUT, LIGER, QUACK, OURS)
OPTIONAL = tuple(p for p in PROVIDERS if p not in (EAGER, OURS))  # the ratios need these
TIME_BOUNDS = {  # {dtype: {(provider, mode, the other provider): most of its time}}
    "float32": {(OURS, BOTH, EAGER): 0.85, (OURS, BOTH, TORCH): 0.333},
    "bfloat16": {(OURS, BOTH, EAGER): 0.65, (OURS, BOTH, TORCH): 0.2},
}
MEMORY_BOUND = 0.5  # ours / eager, forward+backward
LARGE = 8  # times --tokens: where memory that grows with N shows
LARGE_BOUND = 0.1  # (ours - its gradients) / eager, bfloat16
IGNORED = 0.5  # of the targets
IGNORED_BOUND = 0.6  # time / time with no target ignored
GRID_TOKENS = (1024, 2048, 4096, 8192, 16384)
GRID_VOCABULARIES = (32000, 50257, 128256, 256000)


class Config(NamedTuple):
    tokens: int
    hidden: int
    vocab: int
    grid: bool = False
    without: tuple[str, ...] = ()

    @property
    def providers(self) -> list[str]:
        return [p for p in PROVIDERS if p not in self.without]

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """Return N and V as asked for; with `grid` those along N, then along V, too."""
        sizes = [(self.tokens, self.vocab)]
        if self.grid:
            sizes += [(n, self.vocab) for n in GRID_TOKENS]
            sizes += [(self.tokens, v) for v in GRID_VOCABULARIES]
        return list(dict.fromkeys(sizes))

    def case(self, size: tuple[int, int], dtype: str) -> Case:
        return Case(LINEAR, size[0], self.hidden, size[1], DTYPES[dtype])


def time(config: Config, runner: Runner) -> None:
    for size in config.sizes:
        for dtype, bounds in TIME_BOUNDS.items():
            timed = runner.time(config.case(size, dtype), config.providers)
            if size == config.sizes[0]:
                runner.report.compare(ratios(timed, bounds, dtype))


def memory(config: Config, runner: Runner) -> None:
    if not measure.memory_is_measurable():
        print("memory is not measured: it needs /proc")
        return
    for size in config.sizes:
        for dtype in DTYPES:
            case = config.case(size, dtype)
            runner.report.title(f"peak extra memory of a step, gradients included: {case}")
            rows = [("provider", "mode", "MiB")]
            for mode in MODES:
                found = runner.weigh(case, config.providers, mode)
                rows += [(p, mode, f"{extra / 2**20:.0f}") for p, extra in found.items()]
            runner.report.print_table(rows, labels=2)
            if {EAGER, OURS} <= found.keys() and size == config.sizes[0]:
                what = f"memory, {dtype} {BOTH}: {OURS} / {EAGER}"
                ratio = found[OURS] / max(found[EAGER], 4096)  # at least a page
                runner.report.compare([Comparison(what, ratio, MEMORY_BOUND)])
    beside_the_gradients(config, runner)


def beside_the_gradients(config: Config, runner: Runner) -> None:
    """Compare at 8 N what memory is left beside the gradients, measured or computed for eager."""
    case = config.case((LARGE * config.tokens, config.vocab), "bfloat16")
    runner.report.title(f"memory beside the gradients: {case}")
    found = runner.weigh(case, [EAGER, OURS], BOTH)
    if OURS not in found:
        return
    gradients = (case.N + case.V) * case.D * case.dtype.itemsize
    source = "measured" if EAGER in found else "computed"
    eager = found.get(EAGER, 3 * case.logits_bytes)
    print(
        f"{OURS} {found[OURS] / 2**20:.0f} MiB, with gradients of {gradients / 2**20:.0f}; "
        f"{EAGER} {eager / 2**20:.0f} MiB, {source}"
    )
    what = f"memory, bfloat16 {BOTH}, 8 N: ({OURS} - gradients) / {EAGER}, {source}"
    ratio = (found[OURS] - gradients) / max(eager, 4096)
    runner.report.compare([Comparison(what, ratio, LARGE_BOUND)])


def masked(config: Config, runner: Runner) -> None:
    for dtype in DTYPES:
        case = config.case(config.sizes[0], dtype)
        runner.report.title(f"{IGNORED:.0%} of the targets ignored: {case}")
        *leaves, target = batch_of(case)
        half = "half ignored"
        entries = runner.prepare(case, [OURS], (*leaves, target))
        entries += runner.prepare(case, [OURS], (*leaves, some_ignored(target)), half)
        timed = runner.measure(entries)
        runner.print_times(timed)
        comparisons = []
        for mode in MODES:
            of_half, of_full = (median_of(timed, OURS, mode, v) for v in (half, ""))
            if of_half and of_full:
                what = f"{dtype} {mode}: {OURS}, half ignored / none"
                comparisons.append(Comparison(what, of_half / of_full, IGNORED_BOUND))
        runner.report.compare(comparisons)


def some_ignored(target: Tensor) -> Tensor:
    chosen = torch.randperm(target.numel(), generator=torch.Generator().manual_seed(0))
    ignored = target.clone()
    ignored[chosen[: round(IGNORED * target.numel())]] = -100
    return ignored


SECTIONS: dict[str, Callable[[Config, Runner], None]] = {
    "time": time,
    "memory": memory,
    "masked": masked,
}


def main(arguments: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(arguments)
    config = Config(args.tokens, args.hidden, args.vocab, args.grid, tuple(args.without))
    with options.reporting(args.threads, args.csv) as report:
        return Runner(report, rounds=args.repeats).run_sections(
            SECTIONS, args.only, config, args.busy
        )


def _parser() -> argparse.ArgumentParser:
    parser = options.parser_of("linear", __doc__)
    add = parser.add_argument
    options.add_sizes(parser, tokens=2048, hidden=768, vocab=50257, threads=2, repeats=5)
    options.add_sections(parser, SECTIONS)
    add("--grid", action="store_true", help="more N at this V and more V at this N, as memory lets")
    add("--without", nargs="+", choices=OPTIONAL, default=(), metavar="PROVIDER",
        help="leave out of " + ", ".join(OPTIONAL))  # fmt: skip
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
