"""Documents to score: from token ids, or from text and its tokenizer.

The beginning-of-sequence token is context and is not scored; without one a document's first token
is context, and only the text after it counts as scored. The end-of-sequence token is scored and has
no bytes.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import checks


class Document(NamedTuple):
    ids: Tensor  # int64 [T] on the CPU, BOS and EOS included
    n_bytes: int | None  # UTF-8 bytes and words of the scored text
    words: int | None


def from_ids(
    input_ids: Tensor | Sequence[Any],
    attention_mask: Tensor | None,
    bos: int | None,
    eos: int | None,
) -> list[Document]:
    """[T], [N, T], or a sequence of documents of unequal lengths."""
    before = [] if bos is None else [bos]
    after = [] if eos is None else [eos]
    rows = checks.documents_of_ids(input_ids, attention_mask)
    documents = []
    for i, row in enumerate(rows):
        ids = torch.cat([torch.tensor(before), row, torch.tensor(after)]).long()
        checks.enough_tokens(i, len(row), len(ids))
        documents.append(Document(ids, None, None))
    return documents


def from_text(
    text: str | Sequence[str], tokenizer: Any, bos: int | None, eos: int | None
) -> list[Document]:
    """Each string is a document, tokenized with no special tokens but those asked for here."""
    texts = checks.texts(text)
    checks.tokenizer(tokenizer)
    return [_from_text(i, text, tokenizer, bos, eos) for i, text in enumerate(texts)]


def _from_text(index: int, text: str, tokenizer: Any, bos: int | None, eos: int | None) -> Document:
    before = [] if bos is None else [bos]
    after = [] if eos is None else [eos]
    fast = bool(getattr(tokenizer, "is_fast", False))
    options = {"return_offsets_mapping": True} if fast else {}
    # verbose=False: longer than the model's context is what windows are for
    encoded = tokenizer(text, add_special_tokens=False, verbose=False, **options)
    own = list(encoded["input_ids"])
    ids = before + own + after
    checks.enough_tokens(index, len(own), len(ids))
    scored, n_bytes = text, None
    if not before and fast:
        offsets = encoded["offset_mapping"]
        scored = text[offsets[1][0] :] if len(offsets) > 1 else ""
        if len(offsets) > 1 and offsets[1][0] < offsets[0][1]:  # both of one character
            n_bytes = len(text.encode()) - _bytes_of(tokenizer.convert_ids_to_tokens(ids[0]), text)
    elif not before:
        scored = text[len(tokenizer.decode(ids[:1])) :]
    n_bytes = len(scored.encode()) if n_bytes is None else n_bytes
    return Document(torch.tensor(ids), n_bytes, len(scored.split()))


def _bytes_of(token: str, text: str) -> int:
    """Of a token that ends within a character, the first of `text`.

    Byte-level tokenizers write a byte as a character, those with a byte fallback as <0xF0>; a
    space that the tokenizer put before the text is none of its bytes.
    """
    if re.fullmatch("<0x[0-9A-F]{2}>", token):
        return 1
    return len(token) - (token[0] in "Ġ▁" and not text[0].isspace())


def bos_id(bos: bool | int | None, model: Any, tokenizer: Any) -> int | None:
    """The id to put before each document.

    True: the tokenizer's or the model's. None: what the tokenizer puts there by itself, if it does.
    """
    bos = checks.special_token("bos", bos)
    if bos is None and tokenizer is not None:
        own = _special("bos_token_id", model, tokenizer)
        added = tokenizer("a", verbose=False)["input_ids"]
        return own if own is not None and added and added[0] == own else None
    if bos is True:
        return checks.known_special("bos", _special("bos_token_id", model, tokenizer))
    return None if bos is None or bos is False else bos


def eos_id(eos: bool | int, model: Any, tokenizer: Any) -> int | None:
    """The id to put after each document. True: the tokenizer's or the model's."""
    checked = checks.special_token("eos", eos)
    if checked is True:
        return checks.known_special("eos", _special("eos_token_id", model, tokenizer))
    return None if checked is None or checked is False else checked


def _special(name: str, model: Any, tokenizer: Any) -> int | None:
    for owner in (tokenizer, getattr(model, "config", None)):
        value = getattr(owner, name, None)
        if isinstance(value, (list, tuple)):  # some configs end on any of several
            value = value[0] if value else None
        if value is not None:
            return int(value)
    return None
