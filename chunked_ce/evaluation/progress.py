"""A bar with the running perplexity."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor

from .report import PerplexityReport


@contextmanager
def perplexity_bar(tokens: int, shown: bool) -> Iterator[Callable[[int, Tensor], None]]:
    """Yields a function of the tokens just scored and of (sum of NLL, number of tokens) so far.

    The sums are read only when the bar is drawn: reading makes a GPU's host wait.
    """
    if not shown:
        yield lambda scored, sums: None
        return
    from tqdm.auto import tqdm  # the caller has looked whether it is there

    with tqdm(total=tokens, unit="token", unit_scale=True) as bar:
        so_far: list[Tensor] = []

        def show() -> None:
            nll_sum, count = so_far[0].tolist()
            perplexity = PerplexityReport(nll_sum, int(count)).perplexity
            bar.set_postfix(perplexity=f"{perplexity:.4g}")

        def advance(scored: int, sums: Tensor) -> None:
            so_far[:] = [sums]
            if bar.update(scored):
                show()

        yield advance
        if so_far:
            show()
