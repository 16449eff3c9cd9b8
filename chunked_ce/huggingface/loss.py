"""The loss of a causal language model, as transformers calls it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, overload

import torch.nn.functional as F
from torch import Tensor

from ..checks.loss import vocab_size as class_count
from ..core.row_stats import TokenStats
from ..functional.linear import linear_cross_entropy
from ..functional.logits import cross_entropy
from . import checks
from .deferred import DeferredLogits


@overload
def causal_lm_loss(
    logits: Tensor | DeferredLogits,
    labels: Tensor | None,
    vocab_size: int | None = None,
    num_items_in_batch: int | Tensor | None = None,
    ignore_index: int = -100,
    shift_labels: Tensor | None = None,
    label_smoothing: float = 0.0,
    return_stats: Literal[False] = False,
    **kwargs: Any,
) -> Tensor: ...


@overload
def causal_lm_loss(
    logits: Tensor | DeferredLogits,
    labels: Tensor | None,
    vocab_size: int | None = None,
    num_items_in_batch: int | Tensor | None = None,
    ignore_index: int = -100,
    shift_labels: Tensor | None = None,
    label_smoothing: float = 0.0,
    *,
    return_stats: Literal[True] | Sequence[str],
    **kwargs: Any,
) -> tuple[Tensor, TokenStats]: ...


def causal_lm_loss(
    logits: Tensor | DeferredLogits,
    labels: Tensor | None,
    vocab_size: int | None = None,
    num_items_in_batch: int | Tensor | None = None,
    ignore_index: int = -100,
    shift_labels: Tensor | None = None,
    label_smoothing: float = 0.0,
    return_stats: bool | Sequence[str] = False,
    **kwargs: Any,
) -> Tensor | tuple[Tensor, TokenStats]:
    """Compute the cross-entropy of each position's logits and the next position's label.

    Takes the place of transformers' `ForCausalLMLoss`: `model.loss_function = causal_lm_loss`. The
    logits are read as they are: no copy in float32, and none for the shift, which the labels make.

    Args:
        logits: [..., T, V], or :class:`DeferredLogits`, whose loss is then that of
            :func:`chunked_ce.linear_cross_entropy`.
        labels: [..., T], not shifted: row by row, position i is scored against label i + 1.
        vocab_size: columns of `logits` that exist; None for all.
        num_items_in_batch: tokens of the whole batch, by which the sum of the losses is divided
            (gradient accumulation); None: by the labels that count here.
        ignore_index: label of positions that are not scored.
        shift_labels: labels that are shifted already, one for each row of `logits`; `labels` are
            then not looked at.
        label_smoothing: see :func:`chunked_ce.cross_entropy`.
        return_stats: True returns (loss, TokenStats): `lse` and `logprob` of each position, of
            `logits`' shape without its classes, as :func:`chunked_ce.cross_entropy` returns them. A
            position that predicts nothing is ignored: 0, or -1 in `rank` and `argmax`.
        kwargs: what else the model's forward was given. Not used.

    Returns:
        The loss, a 0-d tensor; float32, float64 for float64 logits. NaN where nothing is scored, as
        transformers' is, with gradients of zeros. With `return_stats` a pair (loss, TokenStats).

    Raises:
        ValueError: no labels, or labels and logits that disagree; `num_items_in_batch` of 0.
        TypeError, IndexError: as :func:`chunked_ce.cross_entropy`.

    Example:
        >>> import torch, transformers, chunked_ce.huggingface
        >>> sizes = dict(vocab_size=64, hidden_size=16, intermediate_size=16)
        >>> heads = dict(num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2)
        >>> config = transformers.LlamaConfig(**sizes, **heads)
        >>> model = transformers.LlamaForCausalLM(config)
        >>> model.loss_function = chunked_ce.huggingface.causal_lm_loss
        >>> ids = torch.arange(12).view(2, 6)
        >>> loss = model(input_ids=ids, labels=ids).loss
        >>> logits = model(input_ids=ids).logits
        >>> torch.allclose(loss, chunked_ce.huggingface.causal_lm_loss(logits, ids))
        True
    """
    shift_labels, num_items = labels_and_items(
        logits, labels, num_items_in_batch, ignore_index, shift_labels
    )
    product = logits.linear() if isinstance(logits, DeferredLogits) else None
    device = logits.device if product is None else product[0].device
    target = shift_labels.to(device, non_blocking=True).reshape(logits.shape[:-1])
    options: dict[str, Any] = dict(
        ignore_index=ignore_index, num_items=num_items, label_smoothing=label_smoothing,
        return_stats=return_stats,
    )  # fmt: skip
    found: Any
    if product is None:
        rows = logits.tensor() if isinstance(logits, DeferredLogits) else logits
        found = cross_entropy(rows, target, dim=-1, vocab_size=vocab_size, **options)
        return found  # type: ignore[no-any-return]
    hidden, head, transforms = product
    if vocab_size is not None:
        transforms["vocab_size"] = class_count(vocab_size, logits)  # type: ignore[arg-type]
    with head.original_autocast():
        found = linear_cross_entropy(hidden, head.weight, target, **options, **transforms)
    if return_stats is False:
        return found.to(logits.device)  # type: ignore[no-any-return]
    loss, stats = found
    moved = (None if s is None else s.to(logits.device) for s in stats)
    return loss.to(logits.device), TokenStats(*moved)  # type: ignore[arg-type]


def labels_and_items(
    logits: Tensor | DeferredLogits,
    labels: Tensor | None,
    num_items_in_batch: int | Tensor | None,
    ignore_index: int,
    shift_labels: Tensor | None,
) -> tuple[Tensor, int | Tensor | None]:
    """Check a model's labels; return one for each row of logits, and what "mean" divides by."""
    checks.causal_lm_labels(logits, labels, shift_labels)
    num_items = checks.num_items_in_batch(num_items_in_batch)
    if shift_labels is None:
        assert labels is not None
        shift_labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    return shift_labels, num_items
