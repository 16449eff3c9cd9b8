"""Speed and memory of `linear_kl_div` beside eager on the CPU: a student and a wider teacher.

    python -m bench distillation                              some minutes
    python -m bench distillation --kind forward --csv distillation.csv

Eager is `F.kl_div` of two log-softmaxes, for "jsd" of each and of their mixture: what TRL's GKD
trainer computes. Both take hidden states and heads. Time and peak extra memory of forward +
backward, gradients of the student's hidden states and head included; medians (20 % - 80 %
quantiles) of rounds in turns, and each memory in a fresh process. A wrong result is not timed, and
the exit code is 1.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import chunked_ce

from . import measure, options
from .cases import BOTH, DTYPES, GRADIENT_LIMIT, LINEAR, Case, normal
from .providers import EAGER, OURS
from .records import Report
from .runner import spread

KINDS = ("forward", "reverse", "jsd")
BETA = 0.5
LOSS_LIMIT = {torch.float32: 1e-5, torch.bfloat16: 2.0**-6}  # eager rounds its softmax to bf16
Batch = tuple[Tensor, Tensor, Tensor, Tensor]  # hidden states and head of student and of teacher


def eager(kind: str, x: Tensor, w: Tensor, teacher_x: Tensor, teacher_w: Tensor) -> Tensor:
    log_p, log_q = (x @ w.T).log_softmax(-1), (teacher_x @ teacher_w.T).log_softmax(-1)
    kl = partial(F.kl_div, reduction="batchmean", log_target=True)
    if kind == "forward":
        return kl(log_p, log_q)
    if kind == "reverse":
        return kl(log_q, log_p)
    log_m = torch.logaddexp(log_p + math.log(1 - BETA), log_q + math.log(BETA))
    return BETA * kl(log_m, log_q) + (1 - BETA) * kl(log_m, log_p)


def ours(kind: str, *batch: Tensor) -> Tensor:
    return chunked_ce.linear_kl_div(*batch, kind=kind, beta=BETA)


LOSSES: dict[str, Callable[..., Tensor]] = {EAGER: eager, OURS: ours}


def batch_of(case: Case, teacher_width: int) -> Batch:
    """Return hidden states and heads that give logits of variance 1."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for width in (case.D, teacher_width):
        made += [normal(n, width, case.dtype, generator) for n in (case.N, case.V)]
        made[-1].mul_(width**-0.5)
    return tuple(made)  # type: ignore[return-value]


def step(name: str, kind: str, batch: Batch) -> tuple[Tensor, ...]:
    """Return the loss and the gradients of the student's hidden states and head."""
    student = [t.detach().requires_grad_() for t in batch[:2]]
    loss = LOSSES[name](kind, *student, *batch[2:])
    return loss.detach(), *torch.autograd.grad(loss, student)


def peak_bytes(threads: int, case: Case, teacher_width: int, name: str, kind: str) -> int:
    torch.set_num_threads(threads)
    step(name, kind, batch_of(case._replace(N=4), teacher_width))  # what is loaded at first use
    batch = batch_of(case, teacher_width)
    extra, _ = measure.extra_peak_memory(lambda: step(name, kind, batch))
    return extra


def differences(case: Case, kind: str, batch: Batch) -> str:
    """Return how far ours is from eager of few rows, or raise ValueError where it is too far."""
    few: Batch = (batch[0][:64], batch[1], batch[2][:64], batch[3])
    theirs = step(EAGER, kind, tuple(t.float() for t in few))  # type: ignore[arg-type]
    (loss, *grads), (truth, *true_grads) = step(OURS, kind, few), theirs
    error = float((loss / truth - 1).abs())
    worst = max(
        float((a.float() - b).norm() / b.norm()) for a, b in zip(grads, true_grads, strict=True)
    )
    if not (error <= LOSS_LIMIT[case.dtype] and worst <= GRADIENT_LIMIT[case.dtype]):
        raise ValueError(f"{OURS} is wrong: loss by {error:.1e}, gradient by {worst:.1e} ({kind})")
    return f"loss error {error:.1e}, gradient error {worst:.1e}"


def run(args: argparse.Namespace, report: Report, dtype: str, kind: str) -> None:
    case = Case(LINEAR, args.tokens, args.hidden, args.vocab, DTYPES[dtype])
    mode, note = f"{BOTH}, {kind}", f"teacher D = {args.teacher_hidden}"
    report.title(f"{case}, {note}, {kind}")
    batch = batch_of(case, args.teacher_hidden)
    print(differences(case, kind, batch), flush=True)
    rows: list[tuple[str, ...]] = [("provider", "s", "/ eager", "MiB", "/ eager")]
    steps = {name: partial(step, name, kind, batch) for name in LOSSES}
    times = measure.interleaved(steps, args.repeats, 1, measure.clock_of("cpu"))
    del steps, batch
    memory: dict[str, int] = {}
    for name, taken in times.items():
        report.add(case, name, mode, "seconds", taken, note=note)
        cells = ["", ""]
        if measure.memory_is_measurable():
            given = (args.threads, case, args.teacher_hidden, name, kind)
            memory[name] = measure.in_fresh_process(peak_bytes, *given)
            report.add(case, name, mode, "peak_extra_bytes", memory[name], note=note)
            cells = [f"{memory[name] / 2**20:.0f}", f"{memory[name] / memory[EAGER]:.3f}"]
        ratio = f"{taken.median / times[EAGER].median:.3f}"
        rows.append((name, spread(taken, 1.0), ratio, *cells))
    report.print_table(rows)


def main(arguments: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(arguments)
    with options.reporting(args.threads, args.csv) as report:
        others = measure.OtherProcesses()
        try:
            for dtype in args.dtype:
                for kind in args.kind:
                    run(args, report, dtype, kind)
        except ValueError as error:
            print(f"WRONG  {error}")
            return 1
        print(f"\n{others}")
    return 0


def _parser() -> Any:
    parser = options.parser_of("distillation", __doc__)
    options.add_sizes(
        parser, tokens=2048, hidden=768, teacher_hidden=1024, vocab=50257, threads=2, repeats=5
    )
    add = parser.add_argument
    add("--kind", nargs="+", choices=KINDS, default=KINDS, help="default: all")
    add("--dtype", nargs="+", choices=DTYPES, default=["float32"], help="default: float32")
    options.add_csv(parser)
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
