"""Stage `speed`: time, error and memory of each loss, beside its peers and the memory's own rate.

Each answer is compared with eager's in fp64 first. Who is wrong gets a row, and is not timed.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import measure
from ..providers import COMPILED
from . import machine, peers
from .cases import own
from .context import Context, Table, dtype_name, one_line, read_table
from .peers import Peer

COLUMNS = (
    "form", "provider", "mode", "N", "D", "V", "dtype", "ms", "q20", "q80", "GB_per_s",
    "of_copy_bandwidth", "TFLOP_per_s", "peak_extra_MiB", "loss_error", "grad_error", "note",
)  # fmt: skip
ROUNDS = 15
CHECKED_ROWS = 256  # whose gradient is compared with fp64's
# Of a gradient in its norm. Peers round their losses and sums to bf16.
GRAD_LIMIT = {torch.bfloat16: 2e-2, torch.float32: 1e-3}
LOSS_LIMIT = {torch.bfloat16: 2e-2, torch.float32: 1e-4}
BOTH, FORWARD = "forward+backward", "forward"


class Size(NamedTuple):
    N: int
    D: int  # 0: from logits
    V: int
    dtype: torch.dtype


TINY = (Size(4, 0, 300, torch.float32), Size(4, 8, 300, torch.float32))
SIZES = (
    *(Size(8192, 0, v, torch.bfloat16) for v in (128256, 50257, 32000)),
    Size(8192, 4096, 128256, torch.bfloat16), Size(8192, 2048, 50257, torch.bfloat16),
    Size(4096, 0, 262144, torch.bfloat16), Size(8192, 0, 50257, torch.float32),
    *(Size(n, 0, 128256, torch.bfloat16) for n in (1, 8, 64, 512)),
    Size(8192, 4096, 262144, torch.bfloat16),
)  # fmt: skip
NOT_COMPILED = [s for s in SIZES if s.N < 8192 or s.dtype == torch.float32]


class Batch(NamedTuple):
    leaves: tuple[Tensor, ...]  # logits, or hidden states and weight
    target: Tensor
    loss: Tensor  # eager's, in fp64
    grad: Tensor  # of the first CHECKED_ROWS rows of the first leaf


class Entry(NamedTuple):
    """A peer whose answer is right."""

    peer: Peer
    loss: Callable[..., Tensor]
    leaves: tuple[Tensor, ...]
    errors: tuple[float, float]


def run(context: Context) -> int:
    """Write speed.csv. Peers that cannot run are rows too: only a fault of this program is 1."""
    table = Table(context.out / "speed.csv", COLUMNS)
    rows = read_table(context.out / "check.csv")
    wrong = {(row["kernel"], row["dtype"]) for row in rows if row["result"] == "wrong"}
    copied = machine.measured(context, "copy bandwidth")
    for size in TINY if context.dry else SIZES:
        if context.late:
            _say(table, size, "all", "out of time")
            continue
        try:
            _measure(context, table, size, wrong, copied)
        except torch.OutOfMemoryError as error:
            _say(table, size, "all", one_line(error, 100))
        context.release()
    return 0


def _say(table: Table, size: Size, provider: str, note: str, **cells: Any) -> None:
    form = "linear" if size.D else "logits"
    sizes = dict(N=size.N, D=size.D or "", V=size.V, dtype=dtype_name(size.dtype))
    table.add(form=form, provider=provider, note=note, **sizes, **cells)
    number = f"{cells['ms']:9.4f} ms" if "ms" in cells else "not timed"
    share = cells.get("of_copy_bandwidth", "")
    share = f"{share:.2f} of copy" if isinstance(share, float) else ""
    mode = cells.get("mode", "")
    where = f"{form} N={size.N} V={size.V} {dtype_name(size.dtype)}"
    print(f"{where} {provider:44} {mode:16} {number} {share} {note}", flush=True)


def batch_of(context: Context, size: Size) -> Batch:
    """Random logits of variance 1, or what gives them, made where they are used."""
    generator = torch.Generator(context.device).manual_seed(0)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        values = torch.randn(shape, generator=generator, device=context.device, dtype=size.dtype)
        return values.mul_(scale)

    target = torch.randint(size.V, (size.N,), generator=generator, device=context.device)
    leaves: tuple[Tensor, ...] = (normal(size.N, size.V),) if not size.D else (
        normal(size.N, size.D), normal(size.V, size.D, scale=size.D**-0.5)
    )  # fmt: skip
    few = leaves[0][:CHECKED_ROWS].double().requires_grad_()
    weight = leaves[1].double() if size.D else None
    logits = few if weight is None else few @ weight.t()
    loss = F.cross_entropy(logits, target[:CHECKED_ROWS], reduction="sum") / size.N
    (grad,) = torch.autograd.grad(loss, few)
    return Batch(leaves, target, _mean_loss(leaves, target), grad)


def _mean_loss(leaves: tuple[Tensor, ...], target: Tensor) -> Tensor:
    """In fp32 from the logits on, a block of rows at a time: the whole may not fit."""
    total = torch.zeros((), dtype=torch.float64, device=target.device)
    for rows, labels in zip(
        leaves[0].split(CHECKED_ROWS), target.split(CHECKED_ROWS), strict=True
    ):  # fmt: skip
        logits = rows.float() if len(leaves) == 1 else rows.float() @ leaves[1].float().t()
        total += F.cross_entropy(logits, labels, reduction="sum")
    return total / target.numel()


def _measure(
    context: Context, table: Table, size: Size, wrong: set[tuple[str, str]], copied: float | None
) -> None:
    batch = batch_of(context, size)
    group = peers.from_hidden_states if size.D else peers.from_logits
    torch.compiler.reset()  # every size gets code of its own
    entries = {}
    for peer in group(context):
        if peer.name == COMPILED and size in NOT_COMPILED:
            _say(table, size, peer.name, "left out: to compile it takes longer than all the rest")
            continue
        if faulty := [k for k in peer.rests_on if (k, dtype_name(size.dtype)) in wrong]:
            _say(table, size, peer.name, f"check found {faulty[0]} wrong")
            continue
        try:
            entries[peer.name] = _checked(peer, batch)
        except Exception as error:
            _say(table, size, peer.name, one_line(error, 150))
            context.release()
        if context.late:
            break
    del batch
    for mode in (BOTH, FORWARD):
        _time(context, table, size, mode, dict(entries), copied)


def _checked(peer: Peer, batch: Batch) -> Entry:
    """Run once, compare with fp64. Raise ValueError where the answer is wrong."""
    loss = peer.load()
    leaves = tuple(x.clone() for x in batch.leaves) if peer.overwrites else batch.leaves
    grads = _gradient(peer, loss, leaves, batch.target)
    dtype = batch.leaves[0].dtype
    loss_error = abs(float(grads[0].double() / batch.loss) - 1)
    difference = grads[1][:CHECKED_ROWS].double() - batch.grad
    grad_error = float(difference.norm() / batch.grad.norm())
    if not (loss_error <= LOSS_LIMIT[dtype] and grad_error <= GRAD_LIMIT[dtype]):  # nor NaN
        raise ValueError(
            f"wrong, so not timed: loss off by {loss_error:.2g}, gradient by {grad_error:.2g}"
        )
    return Entry(peer, loss, (*leaves, batch.target), (loss_error, grad_error))


def _gradient(
    peer: Peer, loss: Callable[..., Tensor], leaves: tuple[Tensor, ...], target: Tensor
) -> tuple[Tensor, Tensor]:
    """The loss, and the gradient of the first leaf."""
    if peer.overwrites:
        given, sink = own(leaves[0])
        value = loss(given, target)
        value.backward()
        return value.detach(), sink[0]
    wanted = [leaf.detach().requires_grad_() for leaf in leaves]
    value = loss(*wanted, target)
    return value.detach(), torch.autograd.grad(value, wanted)[0]


def _step(entry: Entry, mode: str) -> measure.Step:
    *leaves, target = entry.leaves
    if mode == FORWARD:
        return measure.forward(entry.loss, *entry.leaves)
    return measure.Step(lambda: _gradient(entry.peer, entry.loss, tuple(leaves), target))


def _time(
    context: Context, table: Table, size: Size, mode: str, entries: dict[str, Entry],
    copied: float | None,
) -> None:  # fmt: skip
    """All take turns. Who fails gets a row, and the others start again."""
    if mode == FORWARD:  # what computes or overwrites a gradient there is measured with it
        entries = {k: e for k, e in entries.items() if not e.peer.overwrites and e.peer.passes > 2}
    at_work = ""

    def watched(name: str, step: measure.Step) -> measure.Step:
        def call() -> None:
            nonlocal at_work
            at_work = name
            step.run()

        return measure.Step(call, step.reset)

    while entries and not context.late:
        steps = {name: watched(name, _step(entry, mode)) for name, entry in entries.items()}
        try:
            start = time.perf_counter()
            for step in steps.values():  # the first call of a mode may compile
                measure.seconds(step)
            rounds = 2 if context.dry or time.perf_counter() - start > 5 else ROUNDS
            clock = measure.clock_of(context.device)
            times = measure.interleaved(steps, rounds, clock=clock)
        except Exception as error:
            _say(table, size, at_work, one_line(error, 150), mode=mode)
            del entries[at_work]
            context.release()
            continue
        for name, taken in times.items():
            _write(context, table, size, mode, entries[name], steps[name], taken, copied)
        return


def _write(
    context: Context, table: Table, size: Size, mode: str, entry: Entry, step: measure.Step,
    taken: measure.Quantiles, copied: float | None,
) -> None:  # fmt: skip
    cells: dict[str, Any] = dict(mode=mode, ms=taken.median * 1e3, q20=taken.q20 * 1e3)
    cells |= dict(q80=taken.q80 * 1e3, loss_error=entry.errors[0], grad_error=entry.errors[1])
    if not size.D:
        passes = 1 if mode == FORWARD else entry.peer.passes
        moved = passes * size.N * size.V * size.dtype.itemsize / 1e9 / taken.median
        cells |= dict(GB_per_s=moved, of_copy_bandwidth=moved / copied if copied else "")
    elif mode == BOTH:
        cells |= dict(TFLOP_per_s=6 * size.N * size.D * size.V / taken.median / 1e12)
    if not context.dry:
        extra, _ = measure.extra_peak_cuda_memory(step.run)
        cells |= dict(peak_extra_MiB=extra / 2**20)
    _say(table, size, entry.peer.name, "", **cells)
