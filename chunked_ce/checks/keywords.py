"""Keywords that a function does not have: which of its own was meant.

The losses that a step calls take `**unknown: NoReturn`, which costs nothing, and refuse what they
find there. Other functions are wrapped by `names_unknown`.
"""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn, TypeVar

F = TypeVar("F", bound=Callable[..., Any])

_ELSEWHERE = {
    "input": ("logits", "hidden", "hidden_states", "inputs", "x", "e"),
    "target": ("labels", "targets", "label", "y"),
    "linear_weight": ("lm_head", "head", "weight", "lm_head_weight", "classifier", "c"),
    "linear_bias": ("bias", "lm_head_bias"),
    "bias": ("linear_bias",),
    "weight": ("class_weight", "class_weights", "ce_weight", "weights"),
    "token_weight": ("sample_weight", "loss_mask", "mask", "token_weights"),
    "label_smoothing": ("smoothing", "label_smoothing_factor", "epsilon"),
    "ignore_index": ("pad_token_id", "padding_idx", "pad_id", "ignore_idx", "ignored_index"),
    "z_loss_weight": ("z_loss", "lse_square_scale", "z_loss_multiplier"),
    "softcap": ("softcapping", "logit_softcapping", "final_logit_softcapping", "logits_soft_cap"),
    "logit_scale": ("scale", "temperature", "logit_scaling"),
    "cross_entropy_weight": ("weight_hard_loss", "ce_weight", "hard_loss_weight"),
    "num_items": ("num_items_in_batch", "total_items", "normalizer"),
    "teacher": ("teacher_logits", "target_logits"),
    "teacher_input": ("teacher_hidden", "teacher_hidden_states"),
    "teacher_weight": ("teacher_head", "teacher_lm_head"),
    "kind": ("divergence", "loss_type"),
    "return_stats": ("return_lse", "lse_return", "return_token_accuracy", "return_z_loss"),
    "group": ("cp_group", "dp_group", "process_group", "tp_group"),
    "dim": ("axis", "class_dim"),
    "inplace_backward": ("inplace", "inplace_backwards"),
    "chunk_bytes": ("chunk_size",),
    "token_chunk_size": ("num_chunks", "batch_chunk_size"),
    "vocab_start": ("vocab_start_index", "vocab_offset"),
    "context_length": ("max_length", "max_seq_len", "block_size"),
    "cu_seqlens": ("cu_seq_lens", "cu_seqlens_q", "seqlens"),
}
"""Names that other libraries have for an argument of ours."""

_MENDS = {
    "shift": "it does not shift: pass target of position i as the token at i + 1",
    "temperature": "did you mean logit_scale, which is 1 / temperature?",
}


def hides_unknown(function: F) -> F:
    """Return `function` itself; the signature that tools show leaves `**unknown` out."""
    signature = inspect.signature(function)
    known = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    function.__signature__ = signature.replace(parameters=known)  # type: ignore[attr-defined]
    return function


def names_unknown(function: F) -> F:
    """Return `function` with a sentence about keywords that it does not have."""
    known = list(inspect.signature(function).parameters)

    @functools.wraps(function)
    def call(*positional: Any, **keywords: Any) -> Any:
        for name in keywords:
            if name not in known:
                raise TypeError(unexpected(function.__name__, name, known))
        return function(*positional, **keywords)

    return call  # type: ignore[return-value]


def unknown_keywords(function: Callable[..., Any], unknown: Mapping[str, object]) -> NoReturn:
    known = [name for name in inspect.signature(function).parameters if name not in unknown]
    raise TypeError(unexpected(function.__name__, next(iter(unknown)), known))


def known_options(
    loss: str, options: Mapping[str, object], known: Sequence[str], others: Sequence[str] = ()
) -> None:
    """Refuse options that are not `known`; `others` are arguments that the loss names itself."""
    for name in options:
        if name not in known:
            raise TypeError(unexpected(loss, name, (*others, *known)))


def unexpected(function: str, name: str, known: Sequence[str]) -> str:
    """Return the sentence about a keyword `name` that `function` does not have."""
    names = [k for k in known if k not in ("self", "size_average", "reduce")]
    meant = [ours for ours, theirs in _ELSEWHERE.items() if name in theirs and ours in names]
    near = meant or difflib.get_close_matches(name, names, n=1)
    if name in _MENDS and (name == "shift" or near):
        mend = _MENDS[name]
    else:
        mend = f"did you mean {near[0]}?" if near else f"expected of {', '.join(names)}"
    return f"{function} has no argument {name}: {mend}"
