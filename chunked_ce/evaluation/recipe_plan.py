"""Documents and windows as the tool of a recipe has them."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

from . import checks
from .documents import Document, Prepared, Source, bos_id, special_id
from .recipes import EACH_WINDOW, PREFIX, RECIPES, TOKENIZER, Recipe
from .windows import Window, discount_overlapped, sliding_windows, whole_windows


def plan_recipe(
    name: str,
    source: Source,
    context_length: int | None,
    stride: int | None,
    full_last_window: bool,
    bos: bool | int | None,
    eos: bool | int,
) -> Prepared:
    """Return documents and windows as the tool of that name has them.

    Raises:
        TypeError, ValueError: a recipe that is none, an argument that contradicts it, a model
            whose context is too short for it, or too little text for it.
    """
    recipe = checks.recipe(name, RECIPES)
    model, tokenizer = source.model, source.tokenizer
    rolling = recipe.bos == PREFIX
    checks.recipe_agrees(recipe, stride, full_last_window and not rolling, eos)
    size = checks.recipe_window(recipe, context_length, model, tokenizer)
    step = size if recipe.stride is None else recipe.stride
    before = _prefix(recipe, bos, source) if rolling else bos_id(bos, model, tokenizer)
    documents = _documents(recipe, source, bos, before)
    if rolling:
        lengths = [len(document.ids) for document in documents]
        windows = sliding_windows(lengths, size, step, full_last_window=True)
    else:
        windows = _windows(recipe, documents[0].ids, size, step, before)
    begins = before is not None and int(documents[0].ids[0]) == before
    settings: dict[str, Any] = dict(context_length=size, stride=step, full_last_window=rolling)
    settings |= dict(bos=before if begins else None, eos=None, recipe=name)
    return Prepared(documents, windows, settings, None if recipe.joined_by is None else name)


def _windows(recipe: Recipe, ids: Tensor, size: int, step: int, bos: int | None) -> list[Window]:
    """Return the windows over the joined documents."""
    windows = whole_windows(
        len(ids), size, step, context=recipe.context, drop_remainder=recipe.drop_remainder
    )
    checks.recipe_length(recipe, len(windows), len(ids), size)
    if recipe.discounts_overlap:
        windows = [w for w in discount_overlapped(windows) if w.counted_as != 0]
    if recipe.bos == EACH_WINDOW:
        windows = [window._replace(first_id=bos) for window in windows]
    return windows


def _prefix(recipe: Recipe, bos: bool | int | None, source: Source) -> int:
    """Return the id before each document: the one given, or BOS, or EOS where there is no BOS."""
    checks.recipe_takes_bos(recipe, bos)
    if bos is None or bos is True:
        ends = ("bos_token_id", "eos_token_id")
        own = [special_id(name, source.model, source.tokenizer) for name in ends]
        return checks.known_special("bos", own[1] if own[0] is None else own[0])
    return checks.known_special("bos", bos_id(bos, source.model, source.tokenizer))


def _documents(
    recipe: Recipe, source: Source, bos: bool | int | None, before: int | None
) -> list[Document]:
    if source.text is None:
        rows = checks.documents_of_ids(source.input_ids, source.attention_mask)
        documents = _from_ids(recipe, [row.long() for row in rows], before)
    else:
        texts = checks.texts(source.text, empty=recipe.joined_by is not None)
        checks.vocabularies(source.model, source.tokenizer)
        documents = _from_texts(recipe, texts, source.tokenizer, bos, before)
    for i, document in enumerate(documents):
        tokens = len(document.ids)
        checks.enough_tokens(i, tokens - (recipe.bos == PREFIX), tokens)
    return documents


def _from_texts(
    recipe: Recipe, texts: list[str], tokenizer: Any, bos: bool | int | None, before: int | None
) -> list[Document]:
    if recipe.joined_by is None:
        return [_rolling_document(text, tokenizer, before) for text in texts]
    text = recipe.joined_by.join(texts)
    if recipe.drops_last_newline:
        text = text.removesuffix("\n")
    if recipe.bos == TOKENIZER and bos is None:
        ids = _tokenized(text, tokenizer, add_special_tokens=True)
    else:
        literal = {} if recipe.reads_special_text else {"split_special_tokens": True}
        own = _tokenized(text, tokenizer, add_special_tokens=False, **literal)
        ids = own if before is None or own[:1] == [before] else [before, *own]
    return [Document(torch.tensor(ids, dtype=torch.int64), None, None)]


def _from_ids(recipe: Recipe, rows: list[Tensor], before: int | None) -> list[Document]:
    """Return documents of token ids; no separator stands between those that are joined."""
    joined = recipe.joined_by is not None
    if joined:
        rows = [torch.cat(rows)]
    begun = joined and rows[0][:1].tolist() == [before]
    prefix = torch.tensor([] if before is None or begun else [before], dtype=torch.int64)
    return [Document(torch.cat([prefix, row]), None, None) for row in rows]


def _rolling_document(text: str, tokenizer: Any, prefix: int | None) -> Document:
    """Return a document of lm-evaluation-harness: all of the text counts as scored.

    The tokenizer's own BOS comes after the prefix and is scored, unless the text begins with the
    prefix's characters. Words are the pieces between white space, also empty ones at the ends.
    """
    own = not text.startswith(tokenizer.decode([prefix]))
    ids = [prefix, *_tokenized(text, tokenizer, add_special_tokens=own)]
    return Document(torch.tensor(ids), len(text.encode()), len(re.split(r"\s+", text)))


def _tokenized(text: str, tokenizer: Any, **options: bool) -> list[int]:
    return list(tokenizer(text, verbose=False, **options)["input_ids"])
