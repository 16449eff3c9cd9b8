"""Where each token of a text starts, in UTF-8 bytes.

The tokens' own bytes tell, also for tokenizers without offsets: joined, they are the text, but for
a prefix space. Where the tokenizer rewrites the text (lower case, dropped white space), the offsets
of a fast tokenizer are used.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from . import checks
from .first_token import READINGS, pieces_of


def token_starts(text: str, ids: Sequence[int], tokenizer: Any) -> list[int]:
    """Return the byte of `text` at which each of its tokens `ids` starts, in order.

    Raises:
        ValueError: the tokenizer rewrites the text and has no offsets.
    """
    data, pieces = text.encode(), pieces_of(ids, tokenizer)
    for read in READINGS:
        parts = [piece if isinstance(piece, bytes) else read(piece) for piece in pieces]
        joined = b"".join(parts)
        for prefix in (b"", b" "):
            if joined == prefix + data:
                ends = itertools.accumulate(map(len, parts))
                return [
                    max(0, end - len(part) - len(prefix))
                    for end, part in zip(ends, parts, strict=True)
                ]
    return _from_offsets(text, ids, tokenizer)


def _from_offsets(text: str, ids: Sequence[int], tokenizer: Any) -> list[int]:
    checks.has_offsets(tokenizer)
    options = dict(add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    offsets = tokenizer(text, **options)["offset_mapping"]
    assert len(offsets) == len(ids)
    byte_at = [0, *itertools.accumulate(len(character.encode()) for character in text)]
    # A token without text starts where the one before does.
    return list(itertools.accumulate((byte_at[start] for start, _ in offsets), max))
