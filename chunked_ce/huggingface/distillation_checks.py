"""Check that two models of transformers can be student and teacher."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..checks.values import integer
from . import checks

OF_THE_STUDENT = frozenset(
    ("labels", "shift_labels", "num_items_in_batch", "return_dict", "use_cache")
    + ("output_attentions", "output_hidden_states", "output_router_logits")
)
"""Arguments of a student's forward that its teacher is not given."""


def teacher_model(teacher: Any) -> Any:
    """Return the teacher itself, without PEFT's wrapper."""
    if isinstance(getattr(teacher, "_orig_mod", None), nn.Module):
        raise TypeError("teacher is compiled: pass the model itself, teacher._orig_mod")
    if type(teacher).__name__ in ("DistributedDataParallel", "DataParallel"):
        raise TypeError(
            f"teacher is wrapped in {type(teacher).__name__}, but it is not trained: pass the "
            "model itself, teacher.module"
        )
    of_peft = getattr(teacher, "get_base_model", None)
    base: Any = of_peft() if callable(of_peft) else teacher
    head = getattr(base, "get_output_embeddings", None)
    if not isinstance(teacher, nn.Module) or not callable(head) or head() is None:
        raise TypeError(
            "teacher must be a causal language model of transformers (AutoModelForCausalLM), got "
            f"{type(teacher).__name__}"
        )
    return base


def two_models(student: nn.Module, teacher: nn.Module) -> None:
    """Refuse a model that would be its own teacher."""
    if student is teacher:
        raise ValueError(
            "student and teacher are one model, whose divergence from itself is 0: pass "
            "copy.deepcopy(model) as teacher, or load it a second time"
        )


def shared_tokens(student: Any, teacher: Any, vocab_size: Any, tokenizers: Any) -> int:
    """Return how many tokens both models know."""
    columns, of_teacher = _columns(student), _columns(teacher)
    if tokenizers is not None:
        known = _common_vocabulary(tokenizers)
        vocab_size = known if vocab_size is None else vocab_size
    if vocab_size is None:
        if columns != of_teacher:
            raise ValueError(
                f"student has {columns} tokens, but teacher has {of_teacher}: if they share a "
                "tokenizer and pad their vocabularies differently, pass vocab_size=len(tokenizer); "
                "models with other tokenizers cannot be compared"
            )
        return columns
    size, fewest = integer("vocab_size", vocab_size, "an int or None"), min(columns, of_teacher)
    if not 1 <= size <= fewest:
        raise ValueError(
            f"vocab_size is {size}, expected a number from 1 to {fewest}: student has {columns} "
            f"tokens, teacher has {of_teacher}"
        )
    return size


def _columns(model: Any) -> int:
    """Return the number of a model's logits that belong to tokens."""
    head = model.get_output_embeddings()
    columns = getattr(head, "out_features", None)
    columns = columns if isinstance(columns, int) else int(head.weight.shape[0])
    size = getattr(model.config.get_text_config(), "vocab_size", None)
    return min(columns, size) if isinstance(size, int) else columns


def _common_vocabulary(tokenizers: Any) -> int:
    """Return the number of tokens of two tokenizers that agree on all of them."""
    is_pair = isinstance(tokenizers, (tuple, list)) and len(tokenizers) == 2
    if not is_pair or not all(callable(getattr(t, "get_vocab", None)) for t in tokenizers):
        raise TypeError(
            "tokenizers must be a pair of tokenizers of transformers, the student's and the "
            f"teacher's, got {type(tokenizers).__name__}"
        )
    ours, theirs = (tokenizer.get_vocab() for tokenizer in tokenizers)
    differ = [
        token for token in ours.keys() | theirs.keys() if ours.get(token) != theirs.get(token)
    ]
    if differ:
        token = min(differ, key=lambda t: (min(v.get(t, len(ours)) for v in (ours, theirs)), t))
        said = [f"is {v[token]}" if token in v else "is missing" for v in (ours, theirs)]
        raise ValueError(
            f"the tokenizers differ in {len(differ)} tokens: {token!r} {said[0]} in the student's "
            f"and {said[1]} in the teacher's, so their logits would be of different tokens"
        )
    return int(max(ours.values())) + 1


def inputs_of_both(given: dict[str, Any], student: Any, teacher: Any) -> None:
    """Refuse inputs that the teacher cannot read, and devices that differ."""
    for name in ("inputs_embeds", "past_key_values"):
        if given.get(name) is not None:
            raise ValueError(
                f"student was called with {name}, which are of its own size: a teacher needs "
                "input_ids"
            )
    device = checks.input_device(given)
    of_teacher = next((p.device for p in teacher.parameters()), None)
    if device is not None and of_teacher is not None and device != of_teacher:
        raise ValueError(
            f"teacher is on {of_teacher}, but the student's inputs are on {device}: call "
            f"teacher.to({str(device)!r})"
        )


def same_tokens(logits: Any, teacher: Any) -> None:
    """Check that both models gave logits for the same positions."""
    if logits.shape[:-1] != teacher.shape[:-1]:
        raise ValueError(
            f"student has logits for {list(logits.shape[:-1])} tokens, but teacher for "
            f"{list(teacher.shape[:-1])}: both must give one row for each input token"
        )
