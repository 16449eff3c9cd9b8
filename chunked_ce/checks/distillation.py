"""The arguments of divergences between a student and a teacher."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..core.divergence import KINDS
from .linear import (
    NAMES,
    HeadNames,
    hidden_states,
    linear_bias,
    linear_weight,
    no_module,
)
from .loss import logit_scale, logits, softcap
from .stats import one_target_per_row
from .values import brief, floating, integer, names, number, same_device, shape, target_indices


def divergence(kind: object, beta: Any, temperature: Any) -> tuple[str, float, float]:
    """Return (kind, beta, temperature). GKD's "jsd" is one of the others where beta is 0 or 1."""
    if not isinstance(kind, str) or kind not in KINDS:
        raise ValueError(f"kind is {brief(kind)}, expected one of {names(KINDS)}")
    share, degree = number("beta", beta), number("temperature", temperature)
    if not 0 <= share <= 1:
        raise ValueError(
            f"beta is {share}, expected a number from 0 to 1: the teacher's share of the mixture"
        )
    if degree < 1e-6:
        raise ValueError(f"temperature is {degree}, expected a number above 0 (1 changes nothing)")
    if kind == "jsd" and share in (0.0, 1.0):
        kind = "reverse" if share else "forward"
    return kind, share, degree


def teacher_logits(input: Tensor, teacher: Any, target: Tensor | None) -> None:
    logits(input)
    floating("teacher", teacher, " of logits")
    if input.shape[-1] == 0:
        raise ValueError(f"input of shape {shape(input)} has no classes in its last dimension")
    if teacher.dim() == 0 or teacher.shape[:-1] != input.shape[:-1]:
        raise ValueError(
            f"teacher has shape {shape(teacher)}, but input has shape {shape(input)}: give one row "
            "of the teacher's logits per row of the student's, vocabulary last"
        )
    same_device("teacher", teacher, input)
    no_teacher_gradient("teacher", teacher)
    if target is not None:
        target_indices(target)
        one_target_per_row(input, target)


def no_teacher_gradient(name: str, tensor: Tensor) -> None:
    if tensor.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            f"{name} requires a gradient, but a teacher gets none: pass {name}.detach(), or run "
            "the teacher under torch.no_grad()"
        )


def shared_vocab_size(value: Any, columns: int, teacher_columns: int) -> int:
    """Return how many classes both models have."""
    if value is None:
        if columns != teacher_columns:
            raise ValueError(
                f"input has {columns} columns, but teacher has {teacher_columns}: if one of them "
                "is padded, pass vocab_size, the number of tokens in the tokenizer that both share"
            )
        return columns
    size, fewest = integer("vocab_size", value, "an int or None"), min(columns, teacher_columns)
    if not 1 <= size <= fewest:
        raise ValueError(
            f"vocab_size is {size}, expected a number from 1 to {fewest}: input has {columns} "
            f"columns, teacher has {teacher_columns}"
        )
    return size


TEACHER_NAMES = HeadNames("teacher_input", "teacher_weight", "teacher_bias")


def two_heads(student: tuple[Any, Any, Any], teacher: tuple[Any, Any, Any]) -> None:
    """Check hidden states, weight and bias of each. The teacher gets no gradient."""
    for given, called in ((student, NAMES), (teacher, TEACHER_NAMES)):
        input, weight, bias = given
        no_module(weight, called)
        hidden_states(input, called.input)
        linear_weight(weight, input, dims=False, names=called)
        linear_bias(bias, weight, called.bias)
    for name, tensor in zip(TEACHER_NAMES, teacher, strict=True):
        if tensor is not None:
            no_teacher_gradient(name, tensor)


def two_transforms(
    cap: Any, scale: Any, teacher_cap: Any, teacher_scale: Any
) -> tuple[float | None, float, float | None, float]:
    """Return (softcap, logit_scale) of the student and of the teacher."""
    student = softcap(cap), logit_scale(scale)
    teacher = softcap(teacher_cap, "teacher_softcap"), number("teacher_logit_scale", teacher_scale)
    return *student, *teacher


def cross_entropy_weight(value: Any) -> float:
    return number("cross_entropy_weight", value)


def distilled_tokens(input: Tensor, teacher: Tensor, target: Any, weight_of_labels: Any) -> float:
    """Return the weight of the cross-entropy."""
    if teacher.shape[:-1] != input.shape[:-1]:
        raise ValueError(
            f"teacher_input has shape {shape(teacher)}, but input has shape {shape(input)}: give "
            "one hidden state of the teacher per hidden state of the student"
        )
    same_device("teacher_input", teacher, input)
    weight = cross_entropy_weight(weight_of_labels)
    if weight and target is None:
        raise ValueError(
            f"cross_entropy_weight is {weight}, but there is no target whose cross-entropy could "
            "be added: pass target, or leave it 0"
        )
    if target is not None:
        target_indices(target)
        one_target_per_row(input, target)
    return weight
