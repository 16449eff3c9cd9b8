"""Check what a language model takes and returns: positions, vocabulary, logits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from ...checks.values import LOGIT_DTYPES, integer, names, shape


def context_length(value: Any, model: Any, tokenizer: Any) -> int:
    """Return `value`, or the context length of the model's configuration."""
    longest = longest_context(model, tokenizer)
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
    if exceeds_maximum(length, model) and _has_position_table(model):
        raise too_long(length, model)
    return length


def exceeds_maximum(length: int, model: Any) -> bool:
    """Return whether it may be too long. Rotary positions have no end."""
    config, longest = text_config(model), configured_context(model)
    goes_on = any(getattr(config, n, None) for n in ("rope_parameters", "rope_theta", "alibi"))
    return longest is not None and length > longest and not goes_on


def too_long(length: int, model: Any) -> ValueError:
    longest = configured_context(model)
    return ValueError(
        f"context_length is {length}, but the model has positions for {longest} tokens: pass "
        f"{longest} or fewer, and longer documents are scored through windows of that length"
    )


def longest_context(model: Any, tokenizer: Any) -> int | None:
    """Return the most tokens that the model, or else its tokenizer, claims to take."""
    if (configured := configured_context(model)) is not None:
        return configured
    longest = getattr(tokenizer, "model_max_length", None)
    # a tokenizer that knows none says 1e30
    return longest if isinstance(longest, int) and longest < 2**31 else None


_MAXIMA = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "block_size")


def _maximum(model: Any) -> int | None:
    config = text_config(model)
    values = (getattr(config, name, None) for name in _MAXIMA)
    return next((value for value in values if isinstance(value, int) and value > 0), None)


def configured_context(model: Any) -> int | None:
    """Return the configuration's maximum without the positions that no token can have."""
    longest = _maximum(model)
    if longest is None:
        return None
    return longest - _positions_of_padding(model) - virtual_tokens(model)


def _positions_of_padding(model: Any) -> int:
    """Return the first position: RoBERTa's is the one after the padding index."""
    modules = model.named_modules() if isinstance(model, nn.Module) else ()
    for name, module in modules:
        padding = getattr(module, "padding_idx", None)
        if name.endswith("position_embeddings") and isinstance(padding, int):
            return padding + 1
    return 0


def virtual_tokens(model: Any) -> int:
    """Return the number of embeddings that PEFT's prompt tuning puts before each document."""
    config = getattr(model, "active_peft_config", None)
    learned = getattr(config, "is_prompt_learning", False) is True
    return int(getattr(config, "num_virtual_tokens", 0) or 0) if learned else 0


def _has_position_table(model: Any) -> bool:
    """Return whether the model stores something for each position, and has no more positions.

    Out of range on a GPU, a table's index ends the process's use of it: it must not be tried.
    Other models (ALiBi, state spaces, sinusoids made on demand) are tried.
    """
    longest = _maximum(model)
    modules = model.named_modules() if isinstance(model, nn.Module) else ()
    return any(
        longest is not None and any(size >= longest for size in tensor.shape)
        for name, module in modules
        if not hasattr(module, "make_weights")  # fairseq's sinusoids, as many as are asked for
        for tensor in _position_tensors(name.rpartition(".")[2], module)
    )


def _position_tensors(name: str, module: nn.Module) -> Iterator[Tensor]:
    if isinstance(module, nn.Embedding):
        if _names_positions(name):
            yield module.weight[:, 0]
        return
    for own, parameter in module.named_parameters(recurse=False):
        if _names_positions(own):
            yield parameter
    stored = {**dict(module.named_buffers(recurse=False)), **vars(module)}
    for own, tensor in stored.items():
        if isinstance(tensor, Tensor) and _names_positions(
            own, "mask", "bias", "cos", "sin", "freq"
        ):
            yield tensor


def _names_positions(name: str, *others: str) -> bool:
    return any(word in name.lower() for word in ("pos", "wpe", *others))


def text_config(model: Any) -> Any:
    """Return the configuration of the language model, or None."""
    config: Any = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def vocabularies(model: Any, tokenizer: Any) -> None:
    """Either may have some more: padding of the head, or tokens that no text here has.

    The ids of the documents are checked one by one, so this is for tokenizers of other models.
    """
    classes = _embeddings(model)
    if classes is None or not hasattr(tokenizer, "__len__"):
        return
    tokens = len(tokenizer)
    size = getattr(tokenizer, "vocab_size", None)  # without tokens that were added later
    trained = min(size, tokens) if isinstance(size, int) else tokens
    if trained > classes + max(64, classes // 100) or classes > 1.25 * tokens + 1024:
        raise ValueError(
            f"tokenizer has {tokens} tokens, but the model has embeddings for {classes}: "
            "pass the tokenizer that the model was trained with"
        )


def input_embeddings(model: Any) -> Any:
    """Return the module, or None: some models have none, and some raise."""
    find = getattr(model, "get_input_embeddings", None)
    try:
        return None if find is None else find()
    except (AttributeError, NotImplementedError):
        return None


def _embeddings(model: Any) -> int | None:
    weight = getattr(input_embeddings(model), "weight", None)
    return weight.shape[0] if isinstance(weight, Tensor) and weight.dim() == 2 else None


def ids_known(name: str, documents: Sequence[Tensor], model: Any, classes: int | None) -> None:
    """Check that ids are from 0 to `classes`, or to the number of the model's embeddings."""
    classes = _embeddings(model) if classes is None else classes
    for i, ids in enumerate(documents):
        lowest, highest = int(ids.min()), int(ids.max())
        if lowest < 0:
            raise ValueError(
                f"{name} {i} has token id {lowest}, expected at least 0: take padding off, or say "
                "with attention_mask where it is"
            )
        if classes is not None and highest >= classes:
            raise ValueError(
                f"{name} {i} has token id {highest}, but the model's are 0 to {classes - 1}: "
                "use the tokenizer that the model was trained with, or resize_token_embeddings() "
                "where tokens were added to it"
            )


def not_of_ids_alone(error: TypeError) -> TypeError:
    reason = " ".join(str(error).split())
    return TypeError(
        f"model cannot be called with token ids alone ({reason}): pass the language model within "
        "it, often model.language_model, or a function of ids [B, T] that gives it the rest"
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
            f"model returned {shape(logits)} for ids {shape(ids)}, expected logits [B, T, V]: "
            f"{_mend_of_logits(tuple(logits.shape), *ids.shape)}"
        )


def _mend_of_logits(found: tuple[int, ...], B: int, T: int) -> str:
    if len(found) == 3 and found[:2] == (B, 1):
        return (
            "these are of the last position alone, and each token needs those before it: have "
            "forward return all positions (logits_to_keep=0 in transformers), or wrap the model"
        )
    if len(found) == 3 and found[:2] == (T, B):
        return "time comes first here: wrap the model to return logits.transpose(0, 1)"
    if len(found) == 3 and (found[0], found[2]) == (B, T):
        return "classes come second here: wrap the model to return logits.transpose(1, 2)"
    if len(found) == 2 and found[0] == B * T:
        return "positions are flattened here: wrap the model to return logits.view(*ids.shape, -1)"
    if len(found) == 2 and found[0] == B:
        return (
            "this is one row for each document; if it is of the last position, have forward return "
            "all positions, else pass a causal language model with its head"
        )
    return "pass a causal language model with its head, or wrap it to return one row for each token"


def causal(is_causal: bool) -> None:
    if not is_causal:
        raise ValueError(
            "model is not causal: its logits change with a token to their right, so that they are "
            "no predictions of the next token; pass a causal language model (of BERT's kind, one "
            "whose configuration says is_decoder=True)"
        )
