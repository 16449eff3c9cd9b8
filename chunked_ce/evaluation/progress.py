"""What is said on stderr while an evaluation goes on, and a bar with the running perplexity."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor

from .report import PerplexityReport, counted

_SECONDS_BETWEEN_LINES = 30  # of a bar in a log file, where each takes a line


def describe_text(text: str | Sequence[str] | None, *, shown: bool) -> None:
    """Say how much text is about to be tokenized, which may take minutes."""
    if shown and text is not None:
        documents = [text] if isinstance(text, str) else text
        characters = sum(map(len, documents))
        what = counted(len(documents), "document")
        _say(f"tokenizing {what}, {characters / 1e6:.1f} M characters")


def describe_windows(ids: Sequence[Tensor], windows: int, *, shown: bool) -> None:
    """Say how many tokens there are, and in how many windows they are scored."""
    if shown:
        tokens = counted(sum(map(len, ids)), "token")
        _say(f"scoring {tokens} in {counted(windows, 'window')}")


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


@contextmanager
def token_bar(
    tokens: int, shown: bool, measure: Callable[[Tensor], dict[str, str]]
) -> Iterator[Callable[[int, Tensor], None]]:
    """Yields a function of the tokens just scored and of the sums so far, which `measure` shows.

    The sums are read only when the bar is drawn: reading makes a GPU's host wait.
    """
    if not shown:
        yield lambda scored, sums: None
        return
    from tqdm.auto import tqdm  # the caller has looked whether it is there

    in_a_log = not sys.stderr.isatty() and "ipykernel" not in sys.modules
    options = {"mininterval": _SECONDS_BETWEEN_LINES} if in_a_log else {}
    with tqdm(total=tokens, unit="token", unit_scale=True, **options) as bar:
        so_far: list[Tensor] = []

        def show() -> None:
            bar.set_postfix(**measure(so_far[0]))

        def advance(scored: int, sums: Tensor) -> None:
            so_far[:] = [sums]
            if bar.update(scored):
                show()

        yield advance
        if so_far:
            show()


def running_perplexity(sums: Tensor) -> dict[str, str]:
    """Return the perplexity of (sum of NLL, number of tokens)."""
    nll_sum, count = sums.tolist()
    return {"perplexity": f"{PerplexityReport(nll_sum, int(count)).perplexity:.4g}"}
