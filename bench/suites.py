"""Time and memory of every provider over vocabularies, and the predicted memory beside it.

    python -m bench quick                     small sizes, without what compiles: seconds
    python -m bench full                      the figure in docs: 8 minutes on 2 idle cores
    python -m bench full --dtype float32 --provider eager chunked_ce --out folder

Of the loss alone, of head and loss in one, and of the head followed by the loss ("head + ...").
Results go to one folder, results.csv; `python -m bench figures` draws them.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from chunked_ce import planner

from . import measure, options
from .cases import BOTH, DTYPES, FORWARD, LINEAR, LOGITS, Case, fake_batch, run_loss
from .providers import (
    COMPILED,
    CUT,
    CUT_FILTER,
    EAGER,
    FLASH,
    HEAD,
    INPLACE,
    LIGER,
    OURS,
    QUACK,
    TORCH,
    find,
)
from .records import Report
from .runner import Runner
from .tensor_bytes import predicted_peak

RUNS = Path("runs/bench")
PROVIDERS = (EAGER, COMPILED, TORCH, CUT, CUT_FILTER, LIGER, QUACK, FLASH, OURS, INPLACE)
COMPILING = (COMPILED, CUT, CUT_FILTER)
# No operators but torch's plain ones, or our own: their memory is predicted on fake tensors.
PREDICTABLE = (EAGER, OURS, HEAD + OURS, HEAD + INPLACE)
PREDICTED_DEVICE = "predicted: sm_90"
FULL_SIZE = tuple(
    Case(LINEAR, 8192, 4096, v, torch.bfloat16) for v in (32000, 50257, 128256, 262144)
)


class Suite(NamedTuple):
    tokens: int
    hidden: int
    vocab: tuple[int, ...]
    dtype: tuple[str, ...]
    providers: tuple[str, ...]
    repeats: int  # rounds, at most
    seconds: float  # of timing a mode of a case
    budget: float  # seconds after which nothing more is begun
    memory: bool  # each step is weighed in a process of its own


SUITES = {
    "quick": Suite(
        256, 64, (4096, 32000), ("float32", "bfloat16"),
        tuple(p for p in PROVIDERS if p not in COMPILING), 5, 2.0, 120.0, False,
    ),
    # What is begun in 600 s is done in 720: nothing in it takes two minutes.
    "full": Suite(
        1024, 768, (50257, 16384, 131072), ("bfloat16",), PROVIDERS, 9, 5.0, 600.0, True
    ),
}  # fmt: skip


def quick(arguments: Sequence[str] | None = None) -> int:
    return main("quick", arguments)


def full(arguments: Sequence[str] | None = None) -> int:
    return main("full", arguments)


def main(name: str, arguments: Sequence[str] | None = None) -> int:
    """Return 1 if a result of eager or ours was wrong."""
    suite = SUITES[name]
    args = _parser(name, suite).parse_args(arguments)
    suite = suite._replace(
        tokens=args.tokens, hidden=args.hidden, vocab=tuple(args.vocab),
        dtype=tuple(args.dtype or suite.dtype), providers=tuple(args.provider or suite.providers),
    )  # fmt: skip
    out: Path = args.out or RUNS / name
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file, expected a folder")
    out.mkdir(parents=True, exist_ok=True)
    with options.reporting(args.threads, out / "results.csv") as report:
        print(f"nothing is begun after {suite.budget / 60:.2g} min", flush=True)
        deadline = time.perf_counter() + suite.budget
        runner = Runner(report, "cpu", args.repeats, suite.seconds, deadline, leave_out_slow=True)
        others = measure.OtherProcesses()
        run(runner, suite, cases_of(suite, extra=name == "full" and not args.dtype))
        print(f"\n{others}; {out}/results.csv")
    return runner.exit_code()


def cases_of(suite: Suite, extra: bool) -> Iterator[Case]:
    """Yield all vocabularies in each dtype; with `extra` then the first in float32."""
    sizes = [(v, dtype) for v in suite.vocab for dtype in suite.dtype]
    for v, dtype in [*sizes, *([(suite.vocab[0], "float32")] if extra else [])]:
        yield Case(LINEAR, suite.tokens, suite.hidden, v, DTYPES[dtype])
        yield Case(LOGITS, suite.tokens, 0, v, DTYPES[dtype])


def names_for(form: str, names: Sequence[str]) -> list[str]:
    """Return the providers of a form; with hidden states those after the head too."""
    if form == LOGITS:
        return [n for n in names if n != INPLACE]
    return [*(n for n in names if n != INPLACE), *(HEAD + n for n in names)]


def run(runner: Runner, suite: Suite, cases: Iterator[Case]) -> None:
    for case in cases:
        names = names_for(case.form, suite.providers)
        runner.time(case, names)
        for mode in (FORWARD, BOTH):
            predict(runner.report, case, names, mode, "cpu")
        if suite.memory and measure.memory_is_measurable():
            runner.weigh(case, names, BOTH)
    for case in FULL_SIZE:  # that few machines hold, on a GPU
        predict(runner.report, case, names_for(LINEAR, suite.providers), BOTH, "meta")
    print_memory(runner.report)


def predict(report: Report, case: Case, names: Sequence[str], mode: str, fake: str) -> None:
    """Add the exact peak of tensors on the CPU, or on a GPU where `fake` is "meta"."""
    metric, device = "predicted_peak_extra_bytes", PREDICTED_DEVICE if fake == "meta" else ""
    if COMPILED in names and case.form == LINEAR and mode == BOTH:
        head = planner.HeadShape(case.V, case.D, case.dtype)
        where = "cpu" if fake == "cpu" else "cuda"
        peaks = {e.name: e.peak_bytes for e in planner.plan(head, case.N, device=where)}
        report.add(case, COMPILED, mode, metric, peaks[COMPILED], device)
    for provider in find(case.form, set(names) & set(PREDICTABLE)):
        if mode in provider.modes:
            loss = provider.load("cpu")
            peak = predicted_peak(
                lambda: fake_batch(case, fake),
                lambda *batch, loss=loss: run_loss(loss, batch, mode),
            )
            report.add(case, provider.name, mode, metric, peak, device)


def print_memory(report: Report) -> None:
    """Print predicted and measured peaks side by side, a row a provider, mode and size."""
    keys = ("provider", "mode", "dtype", "N", "D", "V")
    found: dict[tuple[str, ...], dict[str, float]] = {}
    for row in report.table.rows:
        if row["metric"].endswith("peak_extra_bytes"):
            key = (*(row[k] for k in keys), row["device"])
            found.setdefault(key, {})[row["metric"]] = float(row["value"]) / 2**20
    report.title("peak memory of a step beyond its batch, MiB")
    rows = [(*keys, "predicted", "measured", "ratio")]
    for (*cells, _), peaks in found.items():
        both = peaks.get("predicted_peak_extra_bytes"), peaks.get("peak_extra_bytes")
        texts = ("" if x is None else f"{x:.0f}" for x in both)
        ratio = f"{both[1] / both[0]:.2f}" if both[0] and both[1] else ""
        rows.append((*cells, *texts, ratio))  # type: ignore[arg-type]
    report.print_table(rows, labels=3)


def _parser(name: str, suite: Suite) -> argparse.ArgumentParser:
    parser = options.parser_of(name, __doc__)
    add = parser.add_argument
    options.add_sizes(
        parser, tokens=suite.tokens, hidden=suite.hidden, repeats=suite.repeats,
        threads=torch.get_num_threads(),
    )  # fmt: skip
    add("--vocab", type=options.positive, nargs="+", metavar="V", default=suite.vocab,
        help="default: " + " ".join(map(str, suite.vocab)))  # fmt: skip
    add("--dtype", nargs="+", choices=DTYPES, help="default: the suite's")
    add("--provider", nargs="+", choices=PROVIDERS, metavar="PROVIDER",
        help="of " + ", ".join(PROVIDERS))  # fmt: skip
    add("--out", type=Path, metavar="DIR", help=f"default: {RUNS}/{name}")
    return parser
