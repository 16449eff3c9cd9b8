"""Scores windows, batch by batch, into a table of sums, and adds the table up."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..distributed.collectives import all_reduce, rank_and_size
from .documents import Document
from .language_model import LanguageModel
from .nll_sums import document_stderr, reciprocal_rank
from .progress import running_perplexity, token_bar
from .report import EvaluationReport, PerplexityReport
from .windows import Window

IGNORE = -100
# Columns of sums, all float64, in which counts up to 2^53 are exact.
NLL, SQUARES, TOKENS, TOP1, RECIPROCAL = range(5)


class Wanted(NamedTuple):
    """What a caller asks for: ranks, parts with a report of their own, and a progress bar."""

    rank: bool
    per_document: bool
    per_position: bool
    per_window: bool
    groups: Sequence[str] | None  # of the documents
    progress: bool


class Scoring:
    """Scores windows into tables on the device, and adds the tables up."""

    def __init__(
        self,
        model: LanguageModel,
        documents: list[Document],
        windows: list[Window],
        device: torch.device,
        rank: bool,
        backend: str,
    ) -> None:
        self.model, self.documents, self.windows = model, documents, windows
        self.device, self.rank, self.backend = device, rank, backend
        longest = max(window.length for window in windows)
        # Of windows and, below them, of positions: one tensor, for an interruption to find both
        # with a batch or both without.
        self.sums = torch.zeros(len(windows) + longest, 5, dtype=torch.float64, device=device)
        self.table, self.positions = self.sums.split([len(windows), longest])

    def run(self, plan: list[list[int]], group: Any, progress: bool) -> bool:
        """Return whether it was interrupted. All ranks run as many batches: sharded models wait."""
        this_rank, size = (0, 1) if group is None else rank_and_size(group)
        turns = range(this_rank, -(-len(plan) // size) * size, size)
        tokens = sum(self.windows[i].scored for chosen in plan[this_rank::size] for i in chosen)
        try:
            with token_bar(tokens, progress and this_rank == 0, running_perplexity) as advance:
                for turn in turns:
                    sums = self._batch(plan[turn % len(plan)])
                    if turn < len(plan):
                        advance(self._keep(plan[turn], *sums), self.table[:, [NLL, TOKENS]].sum(0))
        except KeyboardInterrupt:
            if size > 1 or not self.table[:, TOKENS].any():
                raise  # the others wait for this rank, or there is nothing to report
            return True
        if size > 1:
            self.sums.copy_(all_reduce(self.sums, group))
        return False

    def _batch(self, chosen: list[int]) -> tuple[Tensor, Tensor]:
        """Return sums of each window [B, 5] and of each position [T, 5].

        A window's sums are scaled where it counts as another number of tokens than it scores.
        """
        windows = [self.windows[i] for i in chosen]
        inputs, target = padded(self.documents, windows)
        inputs, target = inputs.to(self.device), target.to(self.device)
        stats = self.model.token_stats(inputs, target, rank=self.rank, backend=self.backend)
        nll = -stats.logprob.to(self.device, torch.float64)
        scored = (target != IGNORE).double()
        columns = [nll, nll.square(), scored]
        if stats.rank is not None:
            ranks = stats.rank.to(self.device)
            columns += [(ranks == 0).double(), reciprocal_rank(ranks)]
        sums = torch.stack(columns, -1)
        sums = F.pad(sums, (0, 5 - sums.shape[-1]))  # [B, T, 5]
        shares = [(w.counted_as or w.scored) / w.scored for w in windows]
        rows = sums.sum(1) * sums.new_tensor(shares)[:, None]
        rows[:, TOKENS].round_()
        return rows, sums.sum(0)

    def _keep(self, chosen: list[int], rows: Tensor, positions: Tensor) -> int:
        """Add a batch's sums, and return how many tokens it scored."""
        below = range(len(self.windows), len(self.windows) + len(positions))
        table_rows = torch.tensor([*chosen, *below], device=self.device)
        self.sums.index_add_(0, table_rows, torch.cat([rows, positions]))
        return sum(self.windows[i].scored for i in chosen)

    def report(self, wanted: Wanted, **settings: Any) -> EvaluationReport:
        """Return the report of all that was scored, and of the parts that are wanted."""
        table = self.table.cpu()
        owner = torch.tensor([window.document for window in self.windows])
        by_document = table.new_zeros(len(self.documents), 5).index_add_(0, owner, table)
        whole = not settings["partial"]
        n_bytes = [document.n_bytes if whole else None for document in self.documents]
        words = [document.words if whole else None for document in self.documents]
        of_documents = of_positions = of_windows = None
        if wanted.per_document:
            of_documents = tuple(map(self._measures, by_document, n_bytes, words))
        if wanted.per_position:
            of_positions = tuple(map(self._measures, self.positions.cpu()))
        if wanted.per_window:
            of_windows = tuple(map(self._measures, table))
        total = self._measures(table.sum(0), _sum(n_bytes), _sum(words))
        return EvaluationReport(
            **vars(total),
            **settings,
            mean_nll_document_stderr=document_stderr(*by_document[:, [NLL, SQUARES, TOKENS]].T),
            documents=int((by_document[:, TOKENS] > 0).sum()),
            documents_given=len(self.documents),
            windows=len(self.windows),
            windows_scored=int((table[:, TOKENS] > 0).sum()),
            logits_stored=self.model.logits_stored,
            per_document=of_documents,
            per_position=of_positions,
            per_window=of_windows,
            per_group=self._by_group(wanted.groups, by_document, n_bytes, words),
        )

    def _by_group(
        self,
        groups: Sequence[str] | None,
        by_document: Tensor,
        n_bytes: Sequence[int | None],
        words: Sequence[int | None],
    ) -> dict[str, PerplexityReport] | None:
        """Return the measures of each group, in the order in which they first occur."""
        if groups is None:
            return None
        members: dict[str, list[int]] = {}
        for index, name in enumerate(groups):
            members.setdefault(name, []).append(index)
        return {
            name: self._measures(
                by_document[own].sum(0), *(_sum([n[i] for i in own]) for n in (n_bytes, words))
            )
            for name, own in members.items()
        }

    def _measures(
        self, sums: Tensor, n_bytes: int | None = None, words: int | None = None
    ) -> PerplexityReport:
        nll_sum, squares, tokens, top1, reciprocal = sums.tolist()
        ranks = (round(top1), reciprocal) if self.rank else (None, None)
        return PerplexityReport(nll_sum, int(tokens), n_bytes, words, squares, *ranks)


def padded(documents: Sequence[Document], windows: Sequence[Window]) -> tuple[Tensor, Tensor]:
    """Return inputs and targets [B, T] of windows, padded on the right."""
    inputs = torch.zeros(len(windows), max(w.length for w in windows), dtype=torch.int64)
    target = torch.full_like(inputs, IGNORE)
    for row, window in enumerate(windows):
        ids, scored = documents[window.document].ids, documents[window.document].scored
        inputs[row, : window.length] = ids[window.start : window.stop]
        if window.first_id is not None:
            inputs[row, 0] = window.first_id
        first = window.length - window.scored
        targets = slice(window.start + 1 + first, window.stop + 1)
        labels = ids[targets]
        if scored is not None:
            labels = labels.where(scored[targets], IGNORE)
        target[row, first : window.length] = labels
    return inputs, target


def _sum(counts: Sequence[int | None]) -> int | None:
    known = [count for count in counts if count is not None]
    return sum(known) if len(known) == len(counts) else None
