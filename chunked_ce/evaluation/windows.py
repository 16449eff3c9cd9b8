"""Sliding windows over documents that are longer than the context: every token scored once.

A document of T tokens has T - 1 targets, tokens 1 to T - 1; target i is predicted from inputs up
to i - 1. A window shows the model at most `context_length` inputs. The first scores all of its
targets, and each further one starts `stride` tokens later and scores those of its targets, the last
ones, that no window before it scored: a target has at least min(i, context_length - stride + 1)
tokens of context. With stride = context_length windows are disjoint, with stride = 1 each token has
all the context that there is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple


class Window(NamedTuple):
    """Tokens start to stop - 1 of a document are inputs, start + 1 to stop their targets."""

    document: int
    start: int
    stop: int
    scored: int  # how many targets, the last ones
    first_id: int | None = None  # shown to the model in place of its first token
    counted_as: int | None = None  # number of tokens that the mean loss counts as, if another

    @property
    def length(self) -> int:
        return self.stop - self.start


def sliding_windows(
    lengths: Sequence[int],
    context_length: int,
    stride: int,
    *,
    full_last_window: bool = False,
) -> list[Window]:
    """Return the windows over documents of `lengths` tokens, in the order of the text.

    By default a token's context depends on its position alone, so that cutting a document short
    changes no score. With `full_last_window` the last window of a document reaches as far back as
    the context allows, as in lm-evaluation-harness.
    """
    return [
        window
        for document, length in enumerate(lengths)
        for window in _of_document(document, length, context_length, stride, full_last_window)
    ]


def _of_document(
    document: int, length: int, context_length: int, stride: int, full_last_window: bool
) -> Iterator[Window]:
    start, done, last = 0, 0, length - 1  # `done`: the last target scored
    while done < last:
        stop = min(start + context_length, last)
        if full_last_window:
            start = max(0, stop - context_length)
        yield Window(document, start, stop, stop - done)
        start, done = start + stride, stop


def whole_windows(
    length: int, size: int, stride: int, *, context: int = 1, drop_remainder: bool = False
) -> list[Window]:
    """Return windows of `size` tokens over one document, the last token of each only a target.

    They start `stride` tokens apart. A window scores its tokens that no window before it had, but
    never the first `context` of its own. A shorter last window is left out if `drop_remainder`.
    """
    windows, end = [], 0  # `end`: of the window before
    for start in range(0, length, stride):
        before, end = end, min(start + size, length)
        scored = min(end - before, end - start - context)
        if scored > 0 and not (drop_remainder and end - start < size):
            windows.append(Window(0, start, end - 1, scored))
        if end == length:
            break
    return windows


def discount_overlapped(windows: Sequence[Window]) -> list[Window]:
    """Count the mean loss of each window but the first as one token less than it scores.

    Windows that follow without an overlap have lost their first token already.
    """
    ends = [0, *(window.stop + 1 for window in windows)]
    return [
        window._replace(counted_as=window.stop - end)
        if window.stop + 1 - window.scored == end
        else window
        for window, end in zip(windows, ends, strict=False)
    ]


def batches(
    windows: Sequence[Window], batch_size: int, *, sorted_batches: int = 32
) -> list[list[int]]:
    """Yield the indices of windows, `batch_size` at a time.

    Within each `sorted_batches` batches the longest come first, so that little of a batch is
    padding while the batches still follow the text.
    """
    block = batch_size * sorted_batches
    plan = []
    for begin in range(0, len(windows), block):
        indices = range(begin, min(begin + block, len(windows)))
        by_length = sorted(indices, key=lambda i: -windows[i].length)
        plan += [by_length[i : i + batch_size] for i in range(0, len(by_length), batch_size)]
    return plan
