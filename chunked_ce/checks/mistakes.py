"""What can be computed but is probably not meant: a warning, once; and what a loss says."""

from __future__ import annotations

import math
import sys
import warnings
from types import FrameType

import torch
from torch import Tensor

from ..core.reduction import is_scored
from .values import integer, may_be_read, shape, target_indices

_said: set[str] = set()
_ROWS = 8  # to look at
_MOST = 4096
_VALUES = 16  # so many logits of a random model are all from 0 to 1 once in 3e7 times


def _say_once(which: str, message: str) -> None:
    """A warning that points at the user's line."""
    _said.add(which)
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and _package(frame) in ("chunked_ce", "torch"):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, UserWarning, stacklevel=level)


def _package(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__", "")).partition(".")[0]


def _may_look(which: str, values: Tensor) -> bool:
    """Whether looking at `values` makes nothing wait, and there is something left to say."""
    if which in _said or torch.compiler.is_compiling() or not may_be_read(values):
        return False
    # A tensor of another type may have no values to look at.
    is_plain = type(values) in (Tensor, torch.nn.Parameter)
    return is_plain and not values.is_meta and values.numel() > 0


def _some_rows(values: Tensor) -> Tensor:
    """A few rows of `values` [..., V]."""
    while values.dim() > 2:
        values = values[0]
    return values.detach()[:_ROWS] if values.dim() == 2 else values.detach()[None]


def no_probabilities(input: Tensor) -> None:
    """Warn where rows of `input` [..., V] are probabilities: not negative, their sum 1."""
    if not _may_look("probabilities", input):
        return
    rows = _some_rows(input).float()
    near = 1e-2 if input.dtype.itemsize < 4 else 1e-3
    if bool((rows >= 0).all()) and bool(((rows.sum(1) - 1).abs() < near).all()):
        _say_once(
            "probabilities",
            f"input of shape {shape(input)} looks like probabilities (no row has a negative "
            "number, and all sum to 1), but logits are expected: pass what the last layer gives, "
            "without softmax",
        )


def no_sigmoid(input: Tensor) -> None:
    """Warn where binary logits are probabilities: all from 0 to 1, and most of them between."""
    if not _may_look("sigmoid", input):
        return
    values = _some_rows(input)[:, :_MOST].float().flatten()
    inside = (values > 0) & (values < 1)
    if len(values) < _VALUES or not bool(((values >= 0) & (values <= 1)).all()):
        return
    if 2 * int(inside.sum()) > len(values) and bool((values != values[0]).any()):
        _say_once(
            "sigmoid",
            f"input of shape {shape(input)} looks like probabilities (all its numbers are from 0 "
            "to 1), but logits are expected: pass what the last layer gives, without sigmoid",
        )


def sums_to_one(prob: Tensor) -> None:
    """Warns where rows of class probabilities [..., V] have sums far from 1."""
    if not _may_look("sums", prob):
        return
    sums = _some_rows(prob).float().sum(1)
    farthest = float(sums[(sums - 1).abs().argmax()])
    if abs(farthest - 1) > 0.5:
        _say_once(
            "sums",
            f"target of shape {shape(prob)} has rows that sum to {farthest:.3g}, but "
            "class probabilities sum to 1: for several labels a row use "
            "binary_cross_entropy_with_logits; where the classes are in another dimension, pass "
            "dim",
        )


def explain_loss(
    loss: float | Tensor,
    vocab_size: int,
    target: Tensor | None = None,
    *,
    ignore_index: int = -100,
) -> str:
    """Return what a mean cross-entropy says, in a sentence or two, at the start of a training run.

    Args:
        loss: mean cross-entropy in nats per token; a number or a tensor of one element.
        vocab_size: V, at least 2; a model that knows nothing has a loss of ln V.
        target: class indices of the batch, any integer dtype and shape, or None. A label that most
            of them share is named, because padding that is counted makes a loss look small.
        ignore_index: target value of tokens that are not scored.

    Returns:
        The sentences, without a line break.

    Raises:
        TypeError, ValueError: a loss that is no number, a `vocab_size` that is no int or below 2, a
            target that is no Tensor of class indices.

    Example:
        >>> import chunked_ce
        >>> chunked_ce.explain_loss(10.9, 50257)
        'A loss of 10.9 is near ln 50257 = 10.82: the model knows nothing yet.'
    """
    if isinstance(loss, Tensor) and loss.numel() != 1:
        raise ValueError(f"loss has shape {shape(loss)}, expected one number: take its mean first")
    if target is not None:
        target_indices(target)
    value, classes = float(loss), integer("vocab_size", vocab_size, "an int")
    if classes < 2:
        raise ValueError(f"vocab_size is {classes}, expected at least 2")
    said = [_explanation(value, math.log(classes), classes)]
    if target is not None:
        said += _common_label(target, ignore_index)
    return " ".join(said)


def _explanation(loss: float, start: float, classes: int) -> str:
    expected = f"ln {classes} = {start:.2f}"
    if math.isnan(loss):
        return (
            "The loss is NaN: no target is scored (all are ignore_index), or a logit is inf or "
            "NaN. See (target != ignore_index).sum() and logits.isfinite().all()."
        )
    if loss == math.inf:
        return "The loss is inf: the logit of a target is -inf, as of a class that is masked out."
    if loss < 0:
        return f"A loss of {loss:.3g} is below 0, which no cross-entropy of class indices is."
    as_many = f"as if it chose among {math.exp(min(loss, 700.0)):.3g} classes alike"
    if loss > 1.3 * start:
        return (
            f"A loss of {loss:.3g} is above {expected}, worse than a guess: logits too large at "
            "the start, or targets that are not what the logits predict (shifted twice?)."
        )
    if loss > 0.9 * start:
        return f"A loss of {loss:.3g} is near {expected}: the model knows nothing yet."
    if loss < 0.1 * start:
        return (
            f"A loss of {loss:.3g} is far below {expected}, {as_many}: early in training that "
            "means labels the model can see (not shifted), or padding counted as labels."
        )
    return f"A loss of {loss:.3g} is below {expected}, a guess among all classes: {as_many}."


def _common_label(target: Tensor, ignore_index: int) -> list[str]:
    scored = target[is_scored(target, ignore_index)]
    if scored.numel() < 2:
        return []
    labels, counts = scored.unique(return_counts=True)
    most = int(counts.argmax())
    share = int(counts[most]) / scored.numel()
    if share < 0.3:
        return []
    return [
        f"Label {int(labels[most])} is {share:.0%} of the targets: if it is the padding, make it "
        f"ignore_index={ignore_index} there."
    ]
