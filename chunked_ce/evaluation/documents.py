"""Documents to score: from token ids, or from text and its tokenizer.

The beginning-of-sequence token is context and is not scored. Without it a document's first token
is context, and only the text after it counts as scored. The end-of-sequence token is scored and has
no bytes. A document that has one of them already is given no second one.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import checks
from .first_token import after_bytes, first_token_bytes, token_text
from .windows import Window


class Document(NamedTuple):
    ids: Tensor  # int64 [T] on the CPU, BOS and EOS included
    n_bytes: int | None  # UTF-8 bytes and words of the scored text
    words: int | None
    added: tuple[int, int] = (0, 0)  # how many of its ids were put before and after its own
    scored: Tensor | None = None  # bool [T], where not all tokens are


class Source(NamedTuple):
    """What a caller gives: a model, and text with its tokenizer or token ids."""

    model: Any
    tokenizer: Any
    text: str | Sequence[str] | None
    input_ids: Any
    attention_mask: Tensor | None


class Prepared(NamedTuple):
    """What is to be scored, and what the report says of it."""

    documents: list[Document]
    windows: list[Window]
    settings: dict[str, Any]
    joins: str | None = None  # the recipe that made one document of all


def from_ids(
    input_ids: Tensor | Sequence[Any],
    attention_mask: Tensor | None,
    bos: int | None,
    eos: int | None,
) -> list[Document]:
    """Return the documents of ids [T], [N, T], or a sequence of unequal lengths."""
    rows = checks.documents_of_ids(input_ids, attention_mask)
    documents = []
    for i, row in enumerate(rows):
        before, after = _ends_to_add(row.tolist(), bos, eos)
        ids = torch.cat([torch.tensor(before), row, torch.tensor(after)]).long()
        checks.enough_tokens(i, len(row), len(ids))
        documents.append(Document(ids, None, None, (len(before), len(after))))
    _warn_of_ends([row.tolist() for row in rows], bos, eos)
    return documents


def from_text(
    text: str | Sequence[str], tokenizer: Any, bos: int | None, eos: int | None
) -> list[Document]:
    """Tokenize strings, a document each, with no special tokens but `bos` and `eos`."""
    texts = checks.texts(text)
    checks.check_tokenizer(tokenizer)
    # verbose=False: longer than the model's context is what windows are for
    rows = [
        list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        for text in texts
    ]
    documents = [
        _from_text(i, text, row, tokenizer, bos, eos)
        for i, (text, row) in enumerate(zip(texts, rows, strict=True))
    ]
    _warn_of_ends(rows, bos, eos)
    return documents


def _from_text(
    index: int, text: str, own: list[int], tokenizer: Any, bos: int | None, eos: int | None
) -> Document:
    before, after = _ends_to_add(own, bos, eos)
    ids = before + own + after
    checks.enough_tokens(index, len(own), len(ids))
    n_bytes, scored = len(text.encode()), text
    if not before:
        context = first_token_bytes(text, own, tokenizer)
        n_bytes, scored = n_bytes - context, after_bytes(text, context)
    if eos is not None and not after:
        end = token_text(eos, tokenizer)
        if scored.endswith(end):
            n_bytes, scored = n_bytes - len(end.encode()), scored.removesuffix(end)
    added = len(before), len(after)
    return Document(torch.tensor(ids), n_bytes, len(scored.split()), added)


def _ends_to_add(own: list[int], bos: int | None, eos: int | None) -> tuple[list[int], list[int]]:
    """Return those of BOS and EOS that a document lacks. One token alone is not both."""
    begins, ends = own[:1] == [bos], own[-1:] == [eos] and (len(own) > 1 or bos != eos)
    before = [] if bos is None or begins else [bos]
    after = [] if eos is None or ends else [eos]
    return before, after


def _warn_of_ends(rows: Sequence[list[int]], bos: int | None, eos: int | None) -> None:
    for name, verb, token, at in (("bos", "begins", bos, 0), ("eos", "ends", eos, 1)):
        put = [len(_ends_to_add(row, bos, eos)[at]) for row in rows]
        having = [i for i, count in enumerate(put) if not count]
        if token is not None and having:
            more = f" (and {len(having) - 1} more)" if len(having) > 1 else ""
            warnings.warn(
                f"document {having[0]}{more} {verb} with the {name.upper()} token, id {token}, "
                f"already: it is counted once; leave it out of the documents, or pass {name}=False",
                stacklevel=7,
            )


def bos_id(bos: bool | int | None, model: Any, tokenizer: Any) -> int | None:
    """Return the id to put before each document.

    True: the tokenizer's or the model's. None: what the tokenizer puts there by itself, if it does.
    """
    bos = checks.special_token("bos", bos)
    if bos is None and tokenizer is not None:
        own = special_id("bos_token_id", model, tokenizer)
        added = tokenizer("a", verbose=False)["input_ids"]
        return own if own is not None and added and added[0] == own else None
    if bos is True:
        return checks.known_special("bos", special_id("bos_token_id", model, tokenizer))
    return None if bos is None or bos is False else bos


def eos_id(eos: bool | int, model: Any, tokenizer: Any) -> int | None:
    """Return the id to put after each document. True: the tokenizer's or the model's."""
    checked = checks.special_token("eos", eos)
    if checked is True:
        return checks.known_special("eos", special_id("eos_token_id", model, tokenizer))
    return None if checked is None or checked is False else checked


def special_id(name: str, model: Any, tokenizer: Any) -> int | None:
    """Return the id of that name, the tokenizer's or else the model's."""
    for owner in (tokenizer, getattr(model, "config", None)):
        value = getattr(owner, name, None)
        if isinstance(value, (list, tuple)):  # some configs end on any of several
            value = value[0] if value else None
        if value is not None:
            return int(value)
    return None
