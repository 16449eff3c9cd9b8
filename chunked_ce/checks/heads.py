"""Heads that are called for their logits."""

from __future__ import annotations

from typing import Any, NoReturn

from torch import Tensor

from .values import LOGIT_DTYPES, same_device, shape


def head_arguments(head: Any, bias: object, logits_dtype: object, *, plain: bool) -> None:
    """What belongs to a weight and says nothing about a head."""
    name = type(head).__name__
    if bias is not None:
        raise ValueError(
            f"linear_bias is given beside a head ({name}), which has its own: leave it out"
        )
    if logits_dtype is not None and not plain:
        raise ValueError(
            f"logits_dtype is {logits_dtype}, but the head ({name}) computes its logits itself: "
            "let it return float32, or pass its weight"
        )


def head_transform() -> NoReturn:
    raise TypeError(
        "linear_weight is a head that is called, which torch.func's transforms cannot see into: "
        "pass its weight as a Tensor, or use cross_entropy(head(hidden), ...)"
    )


def head_logits(logits: Any, x: Tensor, width: int | None = None) -> None:
    """What a head made of hidden states [R, D]."""
    if not isinstance(logits, Tensor):
        raise TypeError(
            f"the head returned {type(logits).__name__}, expected its logits as one Tensor: pass "
            "a function that returns them, such as lambda hidden: head(hidden)[0]"
        )
    if logits.dtype not in LOGIT_DTYPES:
        raise TypeError(f"the head's logits have dtype {logits.dtype}, expected a floating one")
    same_device("the head's output", logits, x)
    if logits.dim() != 2 or logits.shape[0] != x.shape[0] or logits.shape[1] == 0:
        raise ValueError(
            f"the head made logits of shape {shape(logits)} of hidden states of shape {shape(x)}, "
            f"expected [{x.shape[0]}, V]: it is called on some tokens at a time, without a batch"
        )
    if width is not None and logits.shape[1] != width:
        raise ValueError(
            f"the head made logits of shape {shape(logits)}, but of other hidden states "
            f"{width} logits, or that is its out_features: expected the same for every token"
        )


def head_without_gradient() -> NoReturn:
    raise RuntimeError(
        "input requires a gradient, but the head's logits do not depend on it differentiably: "
        "let the head run with gradients, or call this under torch.no_grad()"
    )
