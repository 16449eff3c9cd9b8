"""Which tokens of a document are scored: those of a mask, of spans of its text, or after a marker.

A token is scored if it starts at or after a boundary: one that spans the boundary is context. All
tokens are shown to the model.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from . import checks
from .documents import Document, Source
from .token_starts import token_starts
from .windows import Window

Spans = Sequence[tuple[int, int]]  # of characters, start and stop


class Parts(NamedTuple):
    """What a caller marks as scored; at most one of them."""

    mask: Any = None
    spans: Any = None
    after: str | None = None


def restrict(
    documents: list[Document], parts: Parts, source: Source, eos: int | None
) -> list[Document]:
    """Return the documents with the tokens that are scored marked, and their bytes counted."""
    if parts == Parts():
        return documents
    if parts.mask is not None:
        own = [len(d.ids) - sum(d.added) for d in documents]
        masks = checks.token_masks(parts.mask, source.input_ids, own)
        return [
            _masked(i, document, mask)
            for i, (document, mask) in enumerate(zip(documents, masks, strict=True))
        ]
    texts = [source.text] if isinstance(source.text, str) else list(source.text or ())
    if parts.after is not None:
        spans = [checks.span_after(i, text, parts.after) for i, text in enumerate(texts)]
    else:
        spans = checks.spans(parts.spans, texts)
    return [
        _within(i, document, texts[i], spans[i], source.tokenizer, eos)
        for i, document in enumerate(documents)
    ]


def scoring_windows(windows: list[Window], documents: list[Document]) -> list[Window]:
    """Return those of the windows in which a token is scored."""

    def scores(window: Window) -> bool:
        scored = documents[window.document].scored
        end = window.stop + 1
        return scored is None or bool(scored[end - window.scored : end].any())

    return [window for window in windows if scores(window)]


def _masked(index: int, document: Document, own: Sequence[bool]) -> Document:
    """Return the document with its own tokens' mask; an added EOS goes with the last of them."""
    before, after = document.added
    mask = [*[False] * before, *own, *[own[-1]] * after]
    mask[0] = False  # of the first token there is no prediction
    checks.scores_a_token(index, any(mask))
    return document._replace(scored=torch.tensor(mask))


def _within(
    index: int, document: Document, text: str, spans: Spans, tokenizer: Any, eos: int | None
) -> Document:
    """Return the document with the tokens marked that start within one of the spans."""
    before, after = document.added
    ids = document.ids[before : len(document.ids) - after].tolist()
    starts = token_starts(text, ids, tokenizer)
    bounds = [[len(text[:place].encode()) for place in span] for span in spans]
    own = [any(first <= start < last for first, last in bounds) for start in starts]
    at_end = any(last == len(text) for _, last in spans)
    mask = [*[False] * before, *own, *[at_end] * after]
    mask[0] = False
    checks.scores_a_token(index, any(mask))
    kept = mask[before : before + len(own)]
    if ids[-1] == eos:  # it has no bytes, also where the document brought it
        kept[-1] = False
    n_bytes, words = _counts(text.encode(), starts, kept)
    return document._replace(scored=torch.tensor(mask), n_bytes=n_bytes, words=words)


def _counts(data: bytes, starts: list[int], kept: list[bool]) -> tuple[int, int]:
    """Return the bytes and words of the tokens that are kept; a word that is cut counts."""
    n_bytes, words = 0, 0
    ends = [*starts[1:], len(data)]
    tokens = zip(kept, starts, ends, strict=True)
    for is_kept, run in itertools.groupby(tokens, key=lambda token: token[0]):
        if is_kept:
            places = list(run)
            part = data[places[0][1] : places[-1][2]]
            n_bytes += len(part)
            words += len(part.decode(errors="ignore").split())
    return n_bytes, words
