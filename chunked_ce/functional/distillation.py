"""Distillation: how far a student's distribution over the vocabulary is from a teacher's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import checks
from ..backends import choose_backend
from ..core.head import COMPUTE_DTYPE
from ..core.reduction import Reduction, is_scored, make_reduction
from ..ops import linear_pair, pair, transforms  # noqa: F401 (the first two register operators)
from ..ops.chunks import default_rows, padded_row_bytes
from .head_loss import autocast

FlatHead = tuple[Tensor, Tensor, Tensor | None]  # hidden states [N, D], weight, bias


@checks.names_unknown
def kl_div(
    input: Tensor,
    teacher: Tensor,
    *,
    kind: str = "forward",
    beta: float = 0.5,
    temperature: float = 1.0,
    target: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    token_weight: Tensor | None = None,
    num_items: int | Tensor | None = None,
    vocab_size: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """Return the divergence of a student from a teacher, both given by logits, streamed.

    With p = softmax(input / temperature) and q = softmax(teacher / temperature) a token's loss is

    - "forward": KL(q‖p) = Σ q log(q / p), Hinton et al. (arXiv:1503.02531) without their factor of
      temperature², which you may multiply by;
    - "reverse": KL(p‖q), MiniLLM (arXiv:2306.08543);
    - "jsd": beta KL(q‖m) + (1 - beta) KL(p‖m) with m = beta q + (1 - beta) p, the generalized
      Jensen-Shannon divergence of GKD (arXiv:2306.13649). As there, beta = 0 stands for "forward"
      and beta = 1 for "reverse", which are its limits up to a factor.

    No softmax is stored: forward makes [...] numbers, backward the gradient of `input`.

    Args:
        input: the student's logits [..., V], vocabulary last; float16, bfloat16, float32 or
            float64, any strides.
        teacher: the teacher's logits [..., V], any of these dtypes. It gets no gradient.
        kind: "forward", "reverse" or "jsd".
        beta: the teacher's share of the mixture, from 0 to 1; used by "jsd" alone.
        temperature: what both models' logits are divided by, above 0.
        target: class indices [...], read only to leave out tokens that equal `ignore_index`.
        ignore_index: the target of tokens that count for nothing.
        reduction: "mean" over the tokens that count, "sum" or "none".
        token_weight: weight of each token's loss [...]; "mean" is then the weighted mean.
        num_items: what "mean" divides by instead: the number of tokens in the whole batch when
            gradients are accumulated. An int or a 0-d tensor on any device.
        vocab_size: number of classes; columns at or past it do not exist. Needed where the two
            models pad their vocabulary differently.
        backend: "auto", "cpu", "torch" or "triton"; see :func:`chunked_ce.token_stats`.

    Returns:
        The loss, a 0-d tensor, or one loss per token for "none"; float32 (float64 for float64
        `input`). The mean over no token is NaN, with a gradient of zeros.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape, device or range; a
            teacher that requires a gradient.

    Example:
        >>> import torch, chunked_ce
        >>> student = torch.randn(2, 5, 100, requires_grad=True)
        >>> teacher = torch.randn(2, 5, 100)
        >>> loss = chunked_ce.kl_div(student, teacher, kind="reverse", temperature=2.0)
        >>> loss.backward()
        >>> bool(chunked_ce.kl_div(student, student.detach()) == 0)
        True
    """
    if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        return transforms.call(kl_div, locals())
    kind, beta, temperature = checks.divergence(kind, beta, temperature)
    checks.teacher_logits(input, teacher, target)
    checks.reduction(reduction)
    checks.token_weight(token_weight, input.shape[:-1], input)
    num_items = checks.num_items(num_items, reduction, input)
    ignore_index = checks.ignore_index(ignore_index)
    vocab_size = checks.shared_vocab_size(vocab_size, input.shape[-1], teacher.shape[-1])
    backend = choose_backend(backend, input.device)
    ignored = None if target is None else ~is_scored(target, ignore_index)
    loss, *_ = torch.ops.chunked_ce.pair_stats(
        input, teacher, ignored, kind, beta, temperature, vocab_size, backend
    )
    labels, skipped = targets_or_zeros(input, target, ignore_index)
    dtype = COMPUTE_DTYPE[input.dtype]
    return make_reduction(reduction, labels, skipped, token_weight, num_items, dtype).reduce(loss)


@checks.names_unknown
def linear_kl_div(
    input: Tensor,
    linear_weight: Tensor,
    teacher_input: Tensor,
    teacher_weight: Tensor,
    *,
    linear_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    teacher_softcap: float | None = None,
    teacher_logit_scale: float = 1.0,
    kind: str = "forward",
    beta: float = 0.5,
    temperature: float = 1.0,
    target: Tensor | None = None,
    cross_entropy_weight: float = 0.0,
    ignore_index: int = -100,
    reduction: str = "mean",
    token_weight: Tensor | None = None,
    num_items: int | Tensor | None = None,
    vocab_size: int | None = None,
    acc_dtype: torch.dtype = torch.float32,
    chunk_bytes: int | None = None,
    token_chunk_size: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """Return the divergence of two models given by hidden states and heads, without their logits.

    :func:`kl_div` of `input @ linear_weight.T + linear_bias` and
    `teacher_input @ teacher_weight.T + teacher_bias`, of which one chunk each exists at a time.
    Where the loss's weights are known in forward, the student's gradients come with it; with
    `reduction="none"`, in float16, or where `token_weight` wants a gradient, backward computes the
    logits again.

    Args:
        input: the student's hidden states [..., D]; float16, bfloat16, float32 or float64.
        linear_weight: the student's head [V, D].
        teacher_input: the teacher's hidden states [..., another D].
        teacher_weight: the teacher's head [V, another D]. The teacher gets no gradient.
        linear_bias: the student's bias [V], or None.
        teacher_bias: the teacher's bias [V], or None.
        softcap: the student's logits x become softcap tanh(logit_scale x / softcap); None: no cap.
        logit_scale: factor of the student's logits, before the cap.
        teacher_softcap: the same of the teacher's logits.
        teacher_logit_scale: the same of the teacher's logits.
        kind: "forward", "reverse" or "jsd"; see :func:`kl_div`.
        beta: the teacher's share of the mixture, from 0 to 1; used by "jsd" alone.
        temperature: what both models' logits are divided by, above 0.
        target: class indices [...]; tokens that equal `ignore_index` count for nothing.
        cross_entropy_weight: adds so many times the cross-entropy of `target`, at temperature 1,
            to each token's loss, from the same chunk of logits.
        ignore_index: the target of tokens that count for nothing.
        reduction: "mean" over the tokens that count, "sum" or "none".
        token_weight: weight of each token's loss [...]; "mean" is then the weighted mean.
        num_items: what "mean" divides by instead, an int or a 0-d tensor on any device.
        vocab_size: number of classes; columns at or past it do not exist. Needed where the two
            models pad their vocabulary differently.
        acc_dtype: dtype that the gradient of `linear_weight` is summed in over chunks.
        chunk_bytes: bytes of both models' logits at a time; None: the default of
            :func:`linear_cross_entropy`.
        token_chunk_size: tokens at a time, instead of `chunk_bytes`.
        backend: "auto", "cpu", "torch" or "triton"; see :func:`chunked_ce.token_stats`.

    Returns:
        The loss, a 0-d tensor, or one loss per token for "none"; float32 (float64 for float64
        `input`).

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape, device or range; a
            teacher that requires a gradient. IndexError: a target out of range, on the CPU.

    Example:
        >>> import torch, chunked_ce
        >>> hidden, head = torch.randn(2, 5, 16, requires_grad=True), torch.nn.Linear(16, 100)
        >>> teacher_hidden, teacher_head = torch.randn(2, 5, 32), torch.nn.Linear(32, 100)
        >>> loss = chunked_ce.linear_kl_div(
        ...     hidden, head.weight, teacher_hidden, teacher_head.weight.detach()
        ... )
        >>> loss.backward()
    """
    if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        return transforms.call(linear_kl_div, locals())
    divergence = checks.divergence(kind, beta, temperature)
    heads = checks.two_transforms(softcap, logit_scale, teacher_softcap, teacher_logit_scale)
    student, teacher = _flat_heads(
        (input, linear_weight, linear_bias), (teacher_input, teacher_weight, teacher_bias)
    )
    ce_weight = checks.distilled_tokens(input, teacher_input, target, cross_entropy_weight)
    tokens = _checked_tokens(input, reduction, token_weight, num_items)
    ignore_index = checks.ignore_index(ignore_index)
    classes = checks.shared_vocab_size(vocab_size, len(linear_weight), len(teacher_weight))
    options = (
        *divergence, ce_weight, classes, *heads, choose_backend(backend, input.device),
        rows_of_both(student, teacher, classes, chunk_bytes, token_chunk_size),
        checks.acc_dtype(acc_dtype, student[1]),
    )  # fmt: skip
    return _loss_of_heads(input, student, teacher, target, ignore_index, tokens, options)


def _checked_tokens(
    input: Tensor, reduction: str, token_weight: Tensor | None, num_items: Any
) -> tuple[str, Tensor | None, int | Tensor | None]:
    """Return how the tokens' losses become one, as `make_reduction` takes it."""
    checks.reduction(reduction)
    checks.token_weight(token_weight, input.shape[:-1], input)
    return reduction, token_weight, checks.num_items(num_items, reduction, input)


def _loss_of_heads(
    input: Tensor,
    student: FlatHead,
    teacher: FlatHead,
    target: Tensor | None,
    ignore_index: int,
    tokens: tuple[str, Tensor | None, int | Tensor | None],
    options: tuple[Any, ...],
) -> Tensor:
    """Call the operator, in one pass where the weights of the losses are known; reduce."""
    labels, skipped = targets_or_zeros(input, target, ignore_index)
    reduction, token_weight, num_items = tokens
    dtype = COMPUTE_DTYPE[input.dtype]
    reduction_spec = make_reduction(reduction, labels, skipped, token_weight, num_items, dtype)
    fused = _is_sum(reduction_spec, student[0])
    weights = _token_weights(labels, skipped, reduction_spec, dtype) if fused else None
    losses: Tensor
    total: Tensor
    losses, total, *_ = torch.ops.chunked_ce.linear_pair(
        *student, *teacher, None if target is None else target.reshape(-1), weights, ignore_index,
        *options, [False] * 3, not torch.compiler.is_compiling(),
    )  # fmt: skip
    return total if fused else reduction_spec.reduce(losses.view(input.shape[:-1]))


def _is_sum(reduction_spec: Reduction, hidden: Tensor) -> bool:
    """Return whether the loss is a sum of weights known in forward; the mean of nothing is NaN."""
    known = reduction_spec.allows_grad_in_forward(hidden.dtype)
    return known and reduction_spec.name != "none" and len(hidden) > 0


def rows_of_both(
    student: FlatHead,
    teacher: FlatHead,
    classes: int,
    chunk_bytes: int | None,
    token_chunk_size: int | None,
) -> int:
    """Return tokens at a time, so that both models' logits take `chunk_bytes`."""
    row_bytes = sum(padded_row_bytes(classes, w.element_size()) for _, w, _ in (student, teacher))
    default = default_rows(len(student[0]), row_bytes, student[0].device.type)
    return checks.rows_per_chunk(chunk_bytes, token_chunk_size, row_bytes, default)


def targets_or_zeros(input: Tensor, target: Tensor | None, ignore_index: int) -> tuple[Tensor, int]:
    """Return targets and their `ignore_index`; without any, such that no token is ignored."""
    if target is not None:
        return target, ignore_index
    return torch.zeros(input.shape[:-1], dtype=torch.int64, device=input.device), -1


def _token_weights(
    target: Tensor, ignore_index: int, reduction_spec: Reduction, dtype: torch.dtype
) -> Tensor:
    """Return what each token's loss is multiplied by, [N]."""
    weight = reduction_spec.weight
    if weight is None:
        weight = is_scored(target, ignore_index).to(dtype)
    weight = weight if reduction_spec.divisor is None else weight / reduction_spec.divisor
    return weight.reshape(-1).to(dtype)


def _flat_heads(student: FlatHead, teacher: FlatHead) -> tuple[FlatHead, FlatHead]:
    """Check hidden states [..., D], weight and bias of each; return them as `flat_head` does."""
    checks.two_heads(student, teacher)
    return flat_head(*student), flat_head(*teacher)


def flat_head(input: Tensor, weight: Tensor, bias: Tensor | None) -> FlatHead:
    """Return hidden states [N, D], weight and bias in the dtype that autocast wants."""
    hidden, weight, bias = autocast(input, weight, bias)
    return hidden.reshape(-1, hidden.shape[-1]), weight, bias
