"""Documents, tokenizers, windows, and the model that scores them."""

from __future__ import annotations

import importlib.util
import os
import warnings
from collections.abc import Sequence
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from ...checks.values import TARGET_DTYPES, brief, integer, shape


def model(value: Any) -> None:
    if not callable(value):
        mend = ": load it first, as with AutoModelForCausalLM.from_pretrained()"
        raise TypeError(
            f"model must be a module or another callable of ids [B, T], got "
            f"{type(value).__name__}{mend if isinstance(value, str) else ''}"
        )


def no_more_positional(
    arguments: tuple[Any, ...], function: str = "evaluate_perplexity", models: str = "model"
) -> None:
    if arguments:
        raise TypeError(
            f"{function} takes {models} and input_ids by position, and got "
            f"{type(arguments[0]).__name__} as well: text and its tokenizer are passed by name, "
            f"{function}({models}, text=..., tokenizer=...)"
        )


def one_source(input_ids: Any, text: Any, attention_mask: Any, tokenizer: Any) -> None:
    if (input_ids is None) == (text is None):
        given = "neither" if text is None else "both"
        raise TypeError(f"expected input_ids, or text and its tokenizer, got {given}")
    if text is not None and attention_mask is not None:
        raise TypeError("attention_mask goes with input_ids: text is tokenized without padding")
    if text is None and tokenizer is not None:
        raise TypeError(
            "tokenizer goes with text, but input_ids were given: they are tokens already"
        )
    if text is not None:
        check_tokenizer(tokenizer)


def documents_of_ids(input_ids: Any, attention_mask: Any) -> list[Tensor]:
    """Each document's ids, without padding."""
    if not isinstance(input_ids, Tensor) and hasattr(input_ids, "__array__"):
        input_ids = token_array("input_ids", input_ids)
    if isinstance(input_ids, Tensor):
        _integers("input_ids", input_ids)
        if input_ids.dim() not in (1, 2):
            raise ValueError(f"input_ids has shape {shape(input_ids)}, expected [T] or [N, T]")
        rows = list(input_ids.cpu()[None] if input_ids.dim() == 1 else input_ids.cpu())
    else:
        rows = _rows(input_ids)
    if not rows:
        raise ValueError("input_ids holds no document: give at least one, of two tokens or more")
    if attention_mask is None:
        return rows
    return [row[:n] for row, n in zip(rows, _unpadded(input_ids, attention_mask), strict=True)]


def _rows(input_ids: Any) -> list[Tensor]:
    if not isinstance(input_ids, Sequence) or isinstance(input_ids, (str, bytes)):
        mend = ": pass it as text=, with its tokenizer" if isinstance(input_ids, str) else ""
        raise TypeError(
            f"input_ids must be a Tensor or a sequence of documents, got "
            f"{type(input_ids).__name__}{mend}"
        )
    if input_ids and isinstance(input_ids[0], Integral):
        input_ids = [input_ids]
    return [token_ids(f"document {i} of input_ids", row) for i, row in enumerate(input_ids)]


def token_ids(name: str, value: Any) -> Tensor:
    """[T] int64 on the CPU."""
    row = token_array(name, value)
    if row.numel():
        _integers(name, row)
    if row.dim() != 1:
        raise ValueError(f"{name} has shape {shape(row)}, expected [T]")
    return row.cpu().long()


def token_array(name: str, value: Any) -> Tensor:
    try:
        return torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        mend = ': tokenizer(text)["input_ids"]' if isinstance(value, str) else ""
        raise TypeError(
            f"{name} is {brief(value)}, expected a sequence of token ids{mend}"
        ) from error


def _integers(name: str, ids: Tensor) -> None:
    if ids.is_meta:
        raise ValueError(f"{name} is on meta, where it holds no token ids: load them first")
    if ids.dtype not in TARGET_DTYPES:
        raise TypeError(f"{name} has dtype {ids.dtype}, expected an integer dtype of token ids")


def _unpadded(input_ids: Any, mask: Any) -> list[int]:
    """Tokens of each row before its padding."""
    if not isinstance(mask, Tensor) or not isinstance(input_ids, Tensor):
        raise TypeError(
            f"attention_mask must be a Tensor beside input_ids [N, T], got {type(mask).__name__} "
            f"beside {type(input_ids).__name__}"
        )
    if mask.shape != input_ids.shape:
        raise ValueError(
            f"attention_mask has shape {shape(mask)}, expected that of input_ids, "
            f"{shape(input_ids)}"
        )
    mask = (mask[None] if mask.dim() == 1 else mask).cpu().bool()
    counts: list[int] = mask.sum(1).tolist()
    for i, (row, count) in enumerate(zip(mask, counts, strict=True)):
        if not row[:count].all():
            where = "begins with" if not row[0] else "has gaps of"
            raise ValueError(
                f"attention_mask of row {i} {where} padding, and a model without position ids "
                "counts positions from the first column: pad on the right, or pass a list of "
                "documents without padding"
            )
    return counts


def texts(text: Any, *, empty: bool = False) -> list[str]:
    """Return the documents; one may be empty where `empty` says so."""
    documents = [text] if isinstance(text, str) else text
    if not isinstance(documents, Sequence):
        raise TypeError(f"text must be a str or a sequence of them, got {type(text).__name__}")
    if not documents:
        raise ValueError("text holds no document: give at least one, of two tokens or more")
    for i, document in enumerate(documents):
        if not isinstance(document, str):
            mend = ": pass path.read_text()" if isinstance(document, os.PathLike) else ""
            raise TypeError(
                f"document {i} of text must be a str, got {type(document).__name__}{mend}"
            )
        if not document and not empty:
            raise ValueError(f"document {i} of text is empty: leave it out")
        if _names_a_file(document):
            warnings.warn(
                f"document {i} of text is {brief(document)}, which names a file: the name is "
                "scored, not what the file holds; pass Path(name).read_text()",
                stacklevel=7,
            )
    return list(documents)


def _names_a_file(document: str) -> bool:
    return len(document) < 1000 and "\0" not in document and os.path.isfile(document)


def check_tokenizer(value: Any) -> None:
    if value is None:
        raise TypeError("text needs its tokenizer: pass tokenizer=, or token ids as input_ids")
    if not callable(value) or not hasattr(value, "decode"):
        raise TypeError(f"tokenizer must be a transformers tokenizer, got {type(value).__name__}")


def enough_tokens(document: int, own: int, tokens: int) -> None:
    """Its own, and with BOS and EOS."""
    if tokens < 2 and own == 0:
        raise ValueError(f"document {document} has no tokens: leave it out")
    if tokens < 2:
        raise ValueError(
            f"document {document} has 1 token, and the first is context: expected at least "
            "2; leave it out, or pass bos=True"
        )


def special_token(name: str, value: Any) -> bool | int | None:
    if value is None or isinstance(value, bool):
        return value
    token = integer(name, value, "True, False or a token id")
    if token < 0:
        raise ValueError(f"{name} is {token}, expected a token id of at least 0")
    return token


def known_special(name: str, token: int | None) -> int:
    if token is None:
        raise ValueError(
            f"{name} is True, but neither tokenizer nor model has a {name}_token_id: pass the id"
        )
    return token


def stride(value: Any, context_length: int) -> int:
    if value is None:
        return context_length
    step = integer("stride", value, "an int or None")
    if not 1 <= step <= context_length:
        raise ValueError(f"stride is {step}, expected 1 to context_length, {context_length}")
    return step


def at_least_one(name: str, value: Any) -> int:
    number = integer(name, value, "an int")
    if number < 1:
        raise ValueError(f"{name} is {number}, expected at least 1")
    return number


def device(value: Any) -> torch.device:
    try:
        found = torch.device(value)
        torch.zeros((), dtype=torch.float64, device=found).item()  # sums are float64
    except (AssertionError, NotImplementedError, RuntimeError, TypeError) as error:
        shown = brief(str(value) if isinstance(value, torch.device) else value)
        raise ValueError(
            f"device is {shown}, which cannot be used here; expected 'cpu', or 'cuda' with a GPU"
        ) from error
    return found


def likelihood_pairs(pairs: Any, context_length: int) -> list[tuple[Tensor, Tensor]]:
    if not isinstance(pairs, Sequence) or isinstance(pairs, (str, bytes)):
        raise TypeError(
            f"pairs must be a sequence of (context, continuation), got {type(pairs).__name__}"
        )
    return [_pair(i, pair, context_length) for i, pair in enumerate(pairs)]


def _pair(i: int, pair: Any, context_length: int) -> tuple[Tensor, Tensor]:
    if not isinstance(pair, Sequence) or isinstance(pair, str) or len(pair) != 2:
        raise TypeError(f"pair {i} is {brief(pair)}, expected (context, continuation) of token ids")
    context = token_ids(f"context of pair {i}", pair[0])
    continuation = token_ids(f"continuation of pair {i}", pair[1])
    if not len(context):
        raise ValueError(f"context of pair {i} is empty: give the BOS id, or the EOS id")
    if not 1 <= len(continuation) <= context_length:
        raise ValueError(
            f"continuation of pair {i} has {len(continuation)} tokens, expected 1 to "
            f"context_length, {context_length}"
        )
    return context, continuation


def progress_bar(wanted: bool) -> None:
    if wanted and importlib.util.find_spec("tqdm") is None:
        raise ModuleNotFoundError(
            "progress=True needs the tqdm package, which is not installed: "
            "pip install 'chunked-ce[cli]'"
        )
