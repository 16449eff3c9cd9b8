"""Scores windows with two models at once, into a table with a row for each token.

A chunk of tokens has the logits of both models at a time, and leaves five numbers a token. So no
logits [T, V] of either model are stored where its head can be deferred.

The models may take turns on the device. Then the base's hidden states [T, D] of many batches wait
on the host, and the base's head stays on the device while the other model runs.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ..distributed.collectives import all_reduce, rank_and_size
from ..functional.distillation import kl_div
from ..functional.logits_stats import token_stats
from ..ops.chunks import default_rows
from . import checks
from .documents import Document
from .language_model import LanguageModel
from .logit_rows import LogitChunks, LogitRows
from .progress import token_bar
from .scoring import IGNORE, padded
from .windows import Window

# Columns of the table, all float64.
KL, LOGPROB, BASE_LOGPROB, SAME_TOP, SCORED = range(5)

TURN_BYTES = 1 << 30
"""Of the base's hidden states on the host, after which the other model has its turn."""

Batch = tuple[list[int], Tensor, Tensor]  # indices of windows, inputs [B, T], targets [B, T]


class PairScoring:
    """Scores windows with two models; `table` [tokens, 5] follows the order of the text."""

    def __init__(
        self,
        model: LanguageModel,
        base: LanguageModel,
        documents: list[Document],
        windows: list[Window],
        devices: tuple[torch.device, torch.device],
        classes: int,
        backend: str,
        take_turns: bool,
    ) -> None:
        self.model, self.base, self.documents, self.windows = model, base, documents, windows
        (self.device, self.base_device), self.classes = devices, classes
        self.backend, self.take_turns = backend, take_turns
        self.starts = [0, *itertools.accumulate(window.scored for window in windows)]
        self.table = torch.zeros(self.starts[-1], 5, dtype=torch.float64, device=self.device)

    def run(self, plan: list[list[int]], group: Any, progress: bool) -> bool:
        """Return whether it was interrupted. All ranks run as many batches: sharded models wait."""
        this_rank, size = (0, 1) if group is None else rank_and_size(group)
        plan = [part for chosen in plan for part in self._parts(chosen)]
        turns = deque(range(this_rank, -(-len(plan) // size) * size, size))
        tokens = sum(self.windows[i].scored for chosen in plan[this_rank::size] for i in chosen)
        so_far = self.table.new_zeros(5)
        try:
            with token_bar(tokens, progress and this_rank == 0, running_kl) as advance:
                while turns:
                    kept = self._turn_of_base(turns, plan)
                    with self._present(self.model, self.device):
                        for counts, batch, rows in kept:
                            values = self._compare(batch, rows)
                            if counts:
                                so_far = so_far + values.sum(0)
                                advance(self._keep(batch[0], values), so_far)
        except KeyboardInterrupt:
            if size > 1 or not self.table[:, SCORED].any():
                raise  # the others wait for this rank, or there is nothing to report
            return True
        if size > 1:
            self.table.copy_(all_reduce(self.table, group))
        return False

    def _parts(self, chosen: list[int]) -> list[list[int]]:
        """Return the windows of a batch in parts, where the logits of either must be stored."""
        longest = max(self.windows[i].length for i in chosen)
        most = min(model.windows_at_a_time(longest) for model in (self.model, self.base))
        return [chosen[i : i + most] for i in range(0, len(chosen), most)]

    def _turn_of_base(
        self, turns: deque[int], plan: list[list[int]]
    ) -> list[tuple[bool, Batch, LogitRows]]:
        """Return (whether it counts, batch, the base's rows) of some batches, or of one."""
        kept, size = [], 0
        with self._present(self.base, self.base_device):
            while turns:
                turn = turns.popleft()
                batch = self._batch(plan[turn % len(plan)])
                rows = self._rows(self.base, batch, self.base_device)
                if self.take_turns:
                    checks.head_can_wait(not rows.stored)
                    rows = rows.on_host()
                kept.append((turn < len(plan), batch, rows))
                size += rows.values.nbytes
                if not self.take_turns or size >= TURN_BYTES:
                    break
        return kept

    def _present(self, model: LanguageModel, device: torch.device) -> AbstractContextManager[None]:
        return on_device(model.model, device) if self.take_turns else nullcontext()

    def _batch(self, chosen: list[int]) -> Batch:
        return chosen, *padded(self.documents, [self.windows[i] for i in chosen])

    def _rows(self, model: LanguageModel, batch: Batch, device: torch.device) -> LogitRows:
        """Return the rows of a batch's scored tokens, in the order of windows and tokens."""
        _, inputs, target = batch
        scored = (target != IGNORE).flatten().nonzero()[:, 0]
        rows = LogitRows.of(model.logits(inputs.to(device)), scored)
        model.logits_stored |= rows.stored
        return rows

    def _compare(self, batch: Batch, of_base: LogitRows) -> Tensor:
        """Return the table's columns [n, 5] of a batch's scored tokens."""
        rows = self._rows(self.model, batch, self.device)
        target = batch[2][batch[2] != IGNORE].to(rows.device)
        chunk = default_rows(len(target), rows.row_bytes + of_base.row_bytes or 1, rows.device.type)
        model, base = LogitChunks(rows, chunk), LogitChunks(of_base, chunk)
        parts = []
        for start in range(0, len(target), chunk):
            index = slice(start, start + chunk)
            y, z = base.of(index).to(rows.device), model.of(index)
            parts.append(self._columns(z, y, target[index]))
        return torch.cat(parts).to(self.device)

    def _columns(self, z: Tensor, y: Tensor, target: Tensor) -> Tensor:
        options: dict[str, Any] = dict(vocab_size=self.classes, backend=self.backend)
        of_model = token_stats(z, target, argmax=True, **options)
        of_base = token_stats(y, target, argmax=True, **options)
        assert of_model.argmax is not None and of_base.argmax is not None
        same = of_model.argmax.eq(of_base.argmax)
        kl = kl_div(z, y, reduction="none", **options)
        columns = (kl, of_model.logprob, of_base.logprob, same, torch.ones_like(kl))
        return torch.stack([column.double() for column in columns], -1)

    def _keep(self, chosen: list[int], values: Tensor) -> int:
        """Write a batch's rows, in one step for Ctrl-C, and return how many tokens it scored."""
        places = [torch.arange(self.starts[i], self.starts[i + 1]) for i in chosen]
        self.table.index_copy_(0, torch.cat(places).to(self.device), values)
        return len(values)


def running_kl(sums: Tensor) -> dict[str, str]:
    """Return the mean KL divergence of a sum of the table's rows."""
    kl, tokens = sums[[KL, SCORED]].tolist()
    return {"KL": f"{kl / max(tokens, 1):.4g}"}


@contextmanager
def on_device(model: Any, device: torch.device) -> Iterator[None]:
    """Have a module on `device` for a while; afterwards its tensors are those it had before."""
    modules = list(model.modules()) if isinstance(model, nn.Module) else []
    before = [(m, dict(m._parameters), dict(m._buffers)) for m in modules]
    data = [
        (p, p.data) for _, parameters, _ in before for p in parameters.values() if p is not None
    ]
    try:
        checks.moved(lambda: model.to(device) if modules else None, device)
        yield
    finally:
        for parameter, values in data:  # most devices change the values and keep the parameter
            parameter.data = values
        for module, parameters, buffers in before:
            module._parameters.update(parameters)
            module._buffers.update(buffers)
