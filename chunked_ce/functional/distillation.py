"""Distillation: divergences between a student's and a teacher's distribution over the vocabulary."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import checks
from ..backends import choose_backend
from ..core.head import compute_dtype
from ..core.reduction import is_scored, reduction_of
from ..ops import pair, transforms  # noqa: F401 (pair registers its operators)


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
    beta, temperature = checks.divergence(kind, beta, temperature)
    checks.teacher_logits(input, teacher, target)
    checks.reduction(reduction)
    checks.token_weight(token_weight, input.shape[:-1], input)
    num_items = checks.num_items(num_items, reduction, input)
    ignore_index = checks.ignore_index(ignore_index)
    vocab_size = checks.shared_vocab_size(vocab_size, input.shape[-1], teacher.shape[-1])
    backend = choose_backend(backend, input.device)
    if kind == "jsd" and beta in (0.0, 1.0):
        kind = "reverse" if beta else "forward"
    ignored = None if target is None else ~is_scored(target, ignore_index)
    if target is None:
        target = torch.zeros(input.shape[:-1], dtype=torch.int64, device=input.device)
        ignore_index = -1
    loss, *_ = torch.ops.chunked_ce.pair_stats(
        input, teacher, ignored, kind, beta, temperature, vocab_size, backend
    )
    dtype = compute_dtype(input.dtype)
    reduce = reduction_of(reduction, target, ignore_index, token_weight, num_items, dtype)
    return reduce.of(loss)
