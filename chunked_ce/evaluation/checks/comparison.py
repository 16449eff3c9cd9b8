"""Check that two models can be compared: on the same tokens, over the same classes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from ...checks.values import integer
from .inputs import check_tokenizer
from .language_model import context_length, longest_context


@contextmanager
def naming(what: str) -> Iterator[None]:
    """Say which of the two models a mistake is about."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise type(error)(f"{what}: {error}") from error


def shared_context(value: Any, model: Any, base: Any, tokenizer: Any) -> int:
    """Return `value`, or the most tokens that both models take."""
    if value is None:
        known = [longest_context(m, tokenizer) for m in (model, base)]
        value = min((length for length in known if length is not None), default=None)
    length = context_length(value, model, tokenizer)
    with naming("base"):
        return context_length(length, base, tokenizer)


def same_tokenizer(tokenizer: Any, base_tokenizer: Any, texts: Sequence[str] | None) -> None:
    """Check that the two give the same ids; either may have tokens that the other lacks."""
    if texts is None:
        raise TypeError(
            "base_tokenizer goes with text, but input_ids were given: they are tokens already"
        )
    with naming("base_tokenizer"):
        check_tokenizer(base_tokenizer)
    own, others = (dict(t.get_vocab()) for t in (tokenizer, base_tokenizer))
    moved = sorted(token for token, i in own.items() if others.get(token, i) != i)
    if moved:
        raise ValueError(
            f"tokenizers differ: {moved[0]!r} is {own[moved[0]]} in the model's and "
            f"{others[moved[0]]} in the base's ({len(moved)} such tokens): ids of one mean other "
            "text to the other, so compare models with one tokenizer"
        )
    for i, text in enumerate(texts):
        ids, of_base = (
            t(text, add_special_tokens=False, verbose=False)["input_ids"]
            for t in (tokenizer, base_tokenizer)
        )
        if ids != of_base:
            raise ValueError(
                f"document {i} has other token ids in the base's tokenizer: {len(ids)} tokens in "
                f"the model's and {len(of_base)} in the base's; compare models with one tokenizer"
            )


def shared_classes(
    value: Any, of_model: int, of_base: int, tokens: int | None, highest_id: int
) -> int:
    """Return how many classes are compared; further ones of one model must be padding."""
    most = min(of_model, of_base)
    if value is not None:
        size = integer("vocab_size", value, "an int or None")
        if not highest_id < size <= most:
            raise ValueError(
                f"vocab_size is {size}, expected more than the highest token id, {highest_id}, "
                f"and at most the classes that both models have, {most}"
            )
        return size
    if of_model != of_base and (tokens is None or tokens > most):
        known = "" if tokens is None else f", and the tokenizer has {tokens} tokens"
        raise ValueError(
            f"vocabularies differ: the model has {of_model} classes and the base {of_base}{known}; "
            f"pass vocab_size={most} to compare the classes that both have"
        )
    return most


def seed(value: Any) -> int:
    number = integer("seed", value, "an int")
    if not 0 <= number < 2**63:
        raise ValueError(f"seed is {number}, expected at least 0 and less than 2^63")
    return number


def resamples(value: Any) -> int:
    number = integer("resamples", value, "an int")
    if number < 2:
        raise ValueError(f"resamples is {number}, expected at least 2: 1000 are usual")
    return number


def on_host(there: bool, device: torch.device) -> None:
    if not there:
        raise ValueError(
            f"take_turns moves models from the host, but model is on {device}: pass "
            "model.to('cpu'), and device= to say where they take turns"
        )


def head_can_wait(deferred: bool) -> None:
    if not deferred:
        raise ValueError(
            "take_turns needs the base's hidden states and head, but its head cannot be deferred: "
            "compare without take_turns, or swap the two models"
        )


def moved(move: Callable[[], Any], device: torch.device) -> None:
    """Move a model."""
    try:
        move()
    except torch.OutOfMemoryError:
        raise
    except (NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"take_turns cannot move a model to {device}: {reason}") from error
