"""Check which tokens are to be scored, and which documents form a group."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...checks.values import brief, shape


def one_part(mask: Any, spans: Any, after: Any, text: Any, recipe: str | None) -> None:
    """Check that at most one of them says what is scored, and of what it can."""
    given = [n for n, v in dict(mask=mask, spans=spans, after=after).items() if v is not None]
    if len(given) > 1:
        raise TypeError(f"expected one of mask, spans and after, got {' and '.join(given)}")
    if given and recipe is not None:
        raise ValueError(
            f"recipe {recipe} decides what is scored, and so would {given[0]}: leave out one"
        )
    if mask is not None and text is not None:
        raise TypeError("mask marks tokens of input_ids: for text pass spans or after")
    if mask is None and given and text is None:
        raise TypeError(f"{given[0]} marks characters of text: for input_ids pass mask")
    if after is not None and not (isinstance(after, str) and after):
        raise TypeError(f"after must be a str that is not empty, got {brief(after)}")


def token_masks(mask: Any, input_ids: Any, tokens: list[int]) -> list[list[bool]]:
    """Return which of each document's own tokens are scored."""
    if isinstance(input_ids, Tensor) and isinstance(mask, Tensor):
        if mask.shape != input_ids.shape:
            raise ValueError(
                f"mask has shape {shape(mask)}, expected that of input_ids, {shape(input_ids)}"
            )
        rows = list(mask[None] if mask.dim() == 1 else mask)
        rows = [row[:count] for row, count in zip(rows, tokens, strict=True)]
    else:
        rows = _mask_rows(mask, tokens)
    masks = [_booleans(i, row) for i, row in enumerate(rows)]
    for i, (row, count) in enumerate(zip(masks, tokens, strict=True)):
        if len(row) != count:
            raise ValueError(
                f"mask of document {i} has {len(row)} values, but the document has {count} tokens"
            )
    return masks


def _mask_rows(mask: Any, tokens: list[int]) -> list[Any]:
    if not isinstance(mask, (Sequence, Tensor)) or isinstance(mask, (str, bytes)):
        raise TypeError(
            f"mask must be a Tensor or a sequence of documents' masks, got {type(mask).__name__}"
        )
    flat = len(mask) > 0 and not isinstance(mask[0], (Sequence, Tensor))
    rows = [mask] if flat else list(mask)
    if len(rows) != len(tokens):
        raise ValueError(f"mask is of {len(rows)} documents, but there are {len(tokens)}")
    return rows


def _booleans(index: int, row: Any) -> list[bool]:
    try:
        values = torch.as_tensor(row)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"mask of document {index} is {brief(row)}, expected booleans") from error
    if values.dim() != 1 or not bool(((values == 0) | (values == 1)).all()):
        raise ValueError(
            f"mask of document {index} is {brief(row)}, expected True or False for each token"
        )
    marked: list[bool] = values.bool().tolist()
    return marked


def span_after(index: int, text: str, marker: str) -> list[tuple[int, int]]:
    """Return the span after the first occurrence of the marker."""
    found = text.find(marker)
    if found < 0:
        raise ValueError(f"document {index} does not contain the marker {marker!r}")
    start = found + len(marker)
    if start == len(text):
        raise ValueError(f"document {index} ends with the marker {marker!r}: nothing is after it")
    return [(start, len(text))]


def spans(value: Any, texts: list[str]) -> list[list[tuple[int, int]]]:
    """Return each document's spans of characters."""
    if not isinstance(value, Sequence) or isinstance(value, (str, bytes)):
        raise TypeError(
            "spans must be a sequence of lists of (start, stop), one list for each document, got "
            f"{type(value).__name__}"
        )
    if len(value) != len(texts):
        raise ValueError(f"spans is of {len(value)} documents, but there are {len(texts)}")
    return [_spans_of(i, row, len(texts[i])) for i, row in enumerate(value)]


def _spans_of(index: int, row: Any, length: int) -> list[tuple[int, int]]:
    expected = f"expected a list of (start, stop) with 0 <= start < stop <= {length} characters"
    try:
        pairs = [(start, stop) for start, stop in row]
        right = all(0 <= start < stop <= length for start, stop in pairs)
    except (TypeError, ValueError) as error:
        raise TypeError(f"spans of document {index} are {brief(row)}, {expected}") from error
    if not right:
        raise ValueError(f"spans of document {index} are {brief(row)}, {expected}")
    return pairs


def scores_a_token(index: int, any_scored: bool) -> None:
    if not any_scored:
        raise ValueError(
            f"document {index} has no token that is scored: none starts in the part that was "
            "marked, or only the first, which is context; mark more of it, or leave it out"
        )


def has_offsets(tokenizer: Any) -> None:
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(
            f"tokenizer {type(tokenizer).__name__} changes the text and has no offsets, so that "
            "its tokens cannot be found in the text: pass the fast tokenizer, or input_ids and mask"
        )


def document_groups(value: Any, documents: int, joins: str | None) -> list[str] | None:
    """Return the group of each document."""
    if value is None:
        return None
    if joins is not None:
        raise ValueError(f"recipe {joins} joins the documents, so they form no groups")
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise TypeError(
            f"groups must be a sequence of names, one for each document, got {type(value).__name__}"
        )
    if len(value) != documents:
        raise ValueError(
            f"groups has {len(value)} names, expected one for each of {documents} documents"
        )
    for i, name in enumerate(value):
        if not isinstance(name, str) or not name:
            raise TypeError(f"groups[{i}] is {brief(name)}, expected a name that is not empty")
    return list(value)
