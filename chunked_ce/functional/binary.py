"""Binary cross-entropy over many labels, streamed; the labels dense, or by index.

chunked_ce::binary_loss  its sum, or the loss of each logit
chunked_ce::binary_grad  the gradient of the logits

Class indices [N, K] stand for multi-hot labels [N, V]. The kernels skip the few positive labels and
take all others as 0; the K positive terms of a row are added to their result.
"""

from __future__ import annotations

from typing import NoReturn

import torch
from torch import Tensor

from .. import checks
from ..backends import choose_backend
from ..ops import transforms


@checks.hides_unknown
def binary_cross_entropy_with_logits(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: None = None,
    reduce: None = None,
    reduction: str = "mean",
    pos_weight: Tensor | None = None,
    *,
    ignore_index: int = -100,
    backend: str = "auto",
    **unknown: NoReturn,
) -> Tensor:
    """Return the binary cross-entropy of logits, one yes-or-no question each, streamed.

    Drop-in for `torch.nn.functional.binary_cross_entropy_with_logits`. With label y, weight w and
    positive weight v the loss of a logit z is `w [(1 - y) softplus(z) + v y softplus(-z)]`. The
    gradient, and the result for "none", are the only tensors of N·V elements.

    Three things differ from torch. The loss is float32 for half-precision logits. The loss and the
    gradient of a confident answer (1e-9) are not rounded to 0. A logit of -inf with label 0, or of
    inf with label 1, costs 0.

    Args:
        input: logits of any shape, [N, V]; float16, bfloat16, float32 or float64, any strides.
        target: labels from 0 to 1, the shape of `input`, any floating dtype. Or, if few of many
            classes are true, their indices [..., K], any integer dtype, padded with `ignore_index`:
            the same as a multi-hot [..., V]. A row of padding has no true class.
        weight: weight of each logit's loss, any floating dtype; broadcast to `input`.
        size_average: None; torch's deprecated name for `reduction`.
        reduce: None; torch's deprecated name for `reduction`.
        reduction: "mean" over all logits, "sum", or "none" for each logit's loss.
        pos_weight: weight of the positive labels, [V] as a rule; broadcast to `input`.
        ignore_index: padding of class indices; -100 beside labels of `input`'s shape.
        backend: "auto" chooses; "cpu" (kernels in C), "torch" (any device) or "triton" (GPU) are
            used or raise.

    Returns:
        The loss, a 0-d tensor, or that of each logit for "none"; float32 (float64 for float64
        logits).

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape, device or range.
            Arguments are checked before anything is computed.
        IndexError: an index out of range, on the CPU. Elsewhere the gradient there is undefined,
            unless `CHUNKED_CE_CHECK_TARGETS=1` in the environment asks for the error.

    Example:
        >>> import torch, chunked_ce
        >>> logits = torch.zeros(2, 4, requires_grad=True)
        >>> classes = torch.tensor([[0, 3], [1, -100]])  # the true classes of each row
        >>> loss = chunked_ce.binary_cross_entropy_with_logits(logits, classes)
        >>> loss.backward()
        >>> print(f"{loss.item():.4f}")  # ln 2
        0.6931
    """
    if unknown:
        checks.unknown_keywords(binary_cross_entropy_with_logits, unknown)
    if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        return transforms.call(binary_cross_entropy_with_logits, locals())
    checks.deprecated(size_average=size_average, reduce=reduce)
    checks.label_logits(input, target)
    checks.labels(input, target)
    checks.reduction(reduction)
    checks.label_weight("weight", weight, input)
    checks.label_weight("pos_weight", pos_weight, input)
    ignore_index = checks.ignore_index(ignore_index)
    checks.no_label_ignored(ignore_index, target)
    backend = choose_backend(backend, input.device)
    checks.looks_like_logits(input, binary=True)
    loss: Tensor = torch.ops.chunked_ce.binary_loss(
        input, target, weight, pos_weight, ignore_index, reduction == "none", backend
    )
    return loss / input.numel() if reduction == "mean" else loss
