"""Stage `tune`: candidates for the launch tables, each kernel by itself, and the rows to paste.

A candidate changes the order of sums, and so rounding, alone.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from typing import Any, NamedTuple
from unittest import mock

import torch

import chunked_ce
from chunked_ce.backends import gpu
from chunked_ce.kernels import launch

from .. import measure
from ..cases import dtype_name
from ..providers import BACKEND
from ..records import Table, one_line
from .stage import Context

COLUMNS = ("kernel", "V", "dtype", "candidate", "ms", "GB_per_s", "in_table", "note")
ROUNDS = 9
SIZES = (
    (128256, torch.bfloat16), (50257, torch.bfloat16), (32000, torch.bfloat16),
    (50257, torch.float32),
)  # fmt: skip
SLEEP = 1_000_000  # GPU cycles, some 0.5 ms: the host is ahead of the clock when that ends


class Candidate(NamedTuple):
    text: str
    in_table: bool
    patches: Callable[[], list[AbstractContextManager[Any]]]


def run(context: Context) -> int:
    """Write tune.csv and print the fastest candidates."""
    table = Table(context.out / "tune.csv", COLUMNS)
    for vocab, dtype in ((300, torch.float32),) if context.dry else SIZES:
        for kernel, step, passes in _kernels(context, vocab, dtype):
            if context.late:
                print(f"{kernel} V={vocab}: out of time", flush=True)
                continue
            _tune(context, table, kernel, vocab, dtype, step, passes)
        context.release()
    return 0


def _kernels(
    context: Context, vocab: int, dtype: torch.dtype
) -> Iterator[tuple[str, Callable[[], object], int]]:
    """Yield name, call, and how often it moves the logits."""
    n = 4 if context.dry else 8192
    x = torch.randn(n, vocab, device=context.device, dtype=dtype)
    target = torch.randint(vocab, (n,), device=context.device)
    yield "statistics", lambda: chunked_ce.token_stats(x, target, backend=BACKEND), 1
    leaf = x.detach().requires_grad_()
    loss = chunked_ce.cross_entropy(leaf, target, backend=BACKEND)
    yield "gradient", lambda: torch.autograd.grad(loss, leaf, retain_graph=True), 2

    def one_pass() -> None:
        chunked_ce.cross_entropy(leaf, target, grad_in_forward=True, backend=BACKEND)

    yield "one pass", one_pass, 2


def candidates(kernel: str, device: torch.device, dry: bool = False) -> list[Candidate]:
    architecture = gpu.architecture(device)
    sizes = ((256, 512), (4,)) if dry else ((256, 512, 1024, 2048, 4096), (2, 4, 8, 16, 32))
    rows = [
        launch.Row(groups, warps)
        for groups, warps in itertools.product(*sizes)
        if 32 <= groups // warps <= 256  # 1 to 8 groups a thread
    ]
    if kernel == "one pass":
        return [_streamed(architecture, device, r, s) for r in rows for s in (1, 2, 4)]
    spans = (1, 4, 16) if kernel == "gradient" else (launch.SPAN_TILES,)
    return [_tiled(architecture, row, span) for row in rows for span in spans]


def _tiled(architecture: str, row: launch.Row, span: int) -> Candidate:
    now = launch.TABLE.get(architecture, launch.GENERIC), launch.SPAN_TILES
    return Candidate(
        f"Row({row.groups}, {row.num_warps}) SPAN_TILES {span}", (row, span) == now,
        lambda: [
            mock.patch.dict(launch.TABLE, {architecture: row}),
            mock.patch.object(launch, "SPAN_TILES", span),
        ],
    )  # fmt: skip


def _streamed(architecture: str, device: torch.device, row: launch.Row, share: int) -> Candidate:
    """Return a candidate that gives 1/share of the L2 to the rows in progress (table: 1/2)."""
    now = launch.STREAMED_TABLE.get(architecture, launch.STREAMED)
    size = gpu.l2_bytes(device) * 2 // share
    return Candidate(
        f"Row({row.groups}, {row.num_warps}) L2 / {share}", (row, share) == (now, 2),
        lambda: [
            mock.patch.dict(launch.STREAMED_TABLE, {architecture: row}),
            mock.patch.object(gpu, "l2_bytes", lambda device: size),
        ],
    )  # fmt: skip


def _tune(
    context: Context, table: Table, kernel: str, vocab: int, dtype: torch.dtype,
    step: Callable[[], object], passes: int,
) -> None:  # fmt: skip
    shared = dict(kernel=kernel, V=vocab, dtype=dtype_name(dtype))
    device = torch.device(context.device, 0) if not context.dry else torch.device("cpu")
    steps: dict[Candidate, measure.Step] = {}
    for candidate in candidates(kernel, device, context.dry):
        attempt = _patched(candidate, step)
        try:
            attempt()  # compiles
            steps[candidate] = attempt
        except Exception as error:  # more registers or warps than the GPU has
            table.add(**shared, candidate=candidate.text, note=one_line(error, 120))
        if context.late:
            break
    clock = measure.wall_clock if context.dry else ahead
    times = measure.interleaved(steps, 1 if context.dry else ROUNDS, clock=clock)
    logits = (4 if context.dry else 8192) * vocab * dtype.itemsize
    ranked = sorted(times.items(), key=lambda item: item[1].median)
    for place, (candidate, taken) in enumerate(ranked):
        rate = passes * logits / taken.median / 1e9
        now = "yes" if candidate.in_table else ""
        numbers = dict(ms=taken.median * 1e3, GB_per_s=rate, in_table=now)
        table.add(**shared, candidate=candidate.text, **numbers)
        if place < 4 or candidate.in_table:
            note = "(in the table)" if candidate.in_table else ""
            head = f"{kernel:10} V={vocab} {dtype_name(dtype)}"
            print(f"{head} {taken.median * 1e3:8.3f} ms {rate:6.0f} GB/s {candidate.text} {note}")


def _patched(candidate: Candidate, step: Callable[[], object]) -> Callable[[], object]:
    def call() -> object:
        with ExitStack() as stack:
            for patch in candidate.patches():
                stack.enter_context(patch)
            return step()

    return call


def ahead(run: Callable[[], object]) -> float:
    """Return the seconds of the GPU alone: it sleeps until the host has launched the call."""
    torch.cuda._sleep(SLEEP)  # type: ignore[no-untyped-call]
    return measure.cuda_events(run)
