"""Documents, tokenizers, windows, and the model that scores them."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from .values import LOGIT_DTYPES, TARGET_DTYPES, brief, integer, names, shape


def model(value: Any) -> None:
    if not callable(value):
        mend = ": load it first, as with AutoModelForCausalLM.from_pretrained()"
        raise TypeError(
            f"model must be a module or another callable of ids [B, T], got "
            f"{type(value).__name__}{mend if isinstance(value, str) else ''}"
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
        raise TypeError(f"{name} is {brief(value)}, expected a sequence of token ids") from error


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


def texts(text: Any) -> list[str]:
    documents = [text] if isinstance(text, str) else text
    if not isinstance(documents, Sequence):
        raise TypeError(f"text must be a str or a sequence of them, got {type(text).__name__}")
    if not documents:
        raise ValueError("text holds no document: give at least one, of two tokens or more")
    for i, document in enumerate(documents):
        if not isinstance(document, str):
            raise TypeError(f"document {i} of text must be a str, got {type(document).__name__}")
        if not document:
            raise ValueError(f"document {i} of text is empty: leave it out")
    return list(documents)


def tokenizer(value: Any) -> None:
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


def context_length(value: Any, model: Any, tokenizer: Any) -> int:
    """`value`, or what the model's configuration says."""
    longest, bounded = _longest(model, tokenizer)
    if value is None:
        if longest is None:
            raise ValueError(
                "context_length is None, and the model's configuration has no maximum length: "
                "pass the number of tokens to show it at once"
            )
        value = longest
    length = integer("context_length", value, "an int or None")
    if length < 2:
        raise ValueError(f"context_length is {length}, expected at least 2")
    if bounded and longest is not None and length > longest:
        raise ValueError(
            f"context_length is {length}, but the model has positions for {longest} tokens"
        )
    return length


def _longest(model: Any, tokenizer: Any) -> tuple[int | None, bool]:
    """The most tokens that the model knows of, and whether it can do no more than that."""
    config = text_config(model)
    for name in _MAXIMA:
        if isinstance(longest := getattr(config, name, None), int) and longest > 0:
            rotary = any(
                getattr(config, n, None) for n in ("rope_parameters", "rope_theta", "alibi")
            )
            return longest - _positions_of_padding(model), not rotary
    longest = getattr(tokenizer, "model_max_length", None)
    # a tokenizer that knows none says 1e30
    return (longest if isinstance(longest, int) and longest < 2**31 else None), False


_MAXIMA = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "block_size")


def _positions_of_padding(model: Any) -> int:
    """RoBERTa counts positions from the one after padding's, and its maximum from 0."""
    modules = model.named_modules() if isinstance(model, torch.nn.Module) else ()
    for name, module in modules:
        padding = getattr(module, "padding_idx", None)
        if name.endswith("position_embeddings") and isinstance(padding, int):
            return padding + 1
    return 0


def text_config(model: Any) -> Any:
    """Its configuration, of a model of several kinds that of the language model; or None."""
    config: Any = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


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


def vocabularies(model: Any, tokenizer: Any) -> None:
    """The model may have some more: padding of its head."""
    classes, tokens = _embeddings(model), _length(tokenizer)
    if classes is None or tokens is None:
        return
    if tokens > classes or classes > 1.25 * tokens + 1024:
        raise ValueError(
            f"tokenizer has {tokens} tokens, but the model has embeddings for {classes}: "
            "pass the tokenizer that the model was trained with"
        )


def _length(tokenizer: Any) -> int | None:
    return len(tokenizer) if hasattr(tokenizer, "__len__") else None


def _embeddings(model: Any) -> int | None:
    find = getattr(model, "get_input_embeddings", None)
    weight = getattr(find(), "weight", None) if find is not None else None
    return weight.shape[0] if isinstance(weight, Tensor) and weight.dim() == 2 else None


def ids_known(name: str, documents: Sequence[Tensor], model: Any, classes: int | None) -> None:
    """From 0 to `classes`, or to what the model has embeddings for."""
    classes = _embeddings(model) if classes is None else classes
    for i, ids in enumerate(documents):
        lowest, highest = int(ids.min()), int(ids.max())
        if lowest < 0:
            raise ValueError(f"{name} {i} has token id {lowest}, expected at least 0")
        if classes is not None and highest >= classes:
            raise ValueError(
                f"{name} {i} has token id {highest}, but the model's are 0 to {classes - 1}: "
                "use the tokenizer that the model was trained with"
            )


def model_logits(logits: Any, ids: Tensor) -> None:
    if not isinstance(logits, Tensor):
        raise TypeError(
            f"model returned {type(logits).__name__}, expected logits [B, T, V]: pass a causal "
            "language model with its head"
        )
    if logits.dtype not in LOGIT_DTYPES:
        raise TypeError(
            f"model returned {logits.dtype}, expected logits [B, T, V] of one of "
            f"{names(LOGIT_DTYPES)}: pass a causal language model with its head"
        )
    if logits.dim() != 3 or logits.shape[:2] != ids.shape:
        raise ValueError(
            f"model returned {shape(logits)} for ids {shape(ids)}, expected logits [B, T, V]: pass "
            "a causal language model with its head"
        )


def causal(is_causal: bool) -> None:
    if not is_causal:
        raise ValueError(
            "model is not causal: its logits change with a token to their right, so that they are "
            "no predictions of the next token"
        )


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


def importable(package: str, what: str, extra: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise ModuleNotFoundError(
            f"{what} needs the {package} package, which is not installed: "
            f"pip install 'chunked-ce[{extra}]'"
        )
