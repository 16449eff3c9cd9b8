"""The lm_head and the loss in one: the logits never exist but for a chunk of tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import NoReturn

import torch
from torch import Tensor

from .. import checks
from ..backends import choose_backend
from ..checks.loss import LossOptions
from ..core.reduction import Reduction
from ..ops import transforms
from ..ops.chunks import default_chunk_bytes, padded_row_bytes
from ..ops.library import Classes, Outputs
from .shift import next_tokens
from .targets import AnyTarget, ClassIndices, Target, describe_target, wanted_of


@checks.hides_unknown
def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: AnyTarget,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    ignore_index: int | None = None,
    shift: bool = False,
    position_ids: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss_weight: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    vocab_size: int | None = None,
    token_weight: Tensor | None = None,
    num_items: int | Tensor | None = None,
    spread_rest: bool = False,
    acc_dtype: torch.dtype = torch.float32,
    chunk_bytes: int | None = None,
    token_chunk_size: int | None = None,
    drop_ignored: bool | None = None,
    backend: str = "auto",
    **unknown: NoReturn,
) -> Tensor:
    """Cross-entropy of `input @ linear_weight.T + linear_bias`, without the logits.

    As `torch.nn.functional.linear_cross_entropy`. Loss and gradients come from one walk over chunks
    of tokens, 6 N D V FLOPs as without chunks; without gradients 2 N D V. With `reduction="none"`,
    a `token_weight` or `num_items` that wants a gradient, or float16, whose small gradients only a
    loss scale saves that backward knows, through :func:`linear_token_stats`: 8 N D V. Else an
    upstream gradient other than 1 multiplies the rounded gradients.

    Safe in a CUDA graph: unless `drop_ignored=True` or `CHUNKED_CE_CHECK_TARGETS=1` ask for it, no
    value on the device is read by the host and no size depends on one. The number of chunks follows
    from shapes, divisor and upstream gradient stay on the device, and a target out of range makes
    NaN, not an exception.

    Args:
        input: hidden states [..., D]; float16, bfloat16, float32 or float64.
        linear_weight: [V, D]; or [V, d1, ..., D] with `input` [N, D] and `target` [N, d1, ...].
        target: class indices [...], class probabilities [..., V], or the pair (indices [..., K],
            probabilities [..., K]) of a teacher's K likeliest classes, which is never made dense.
        linear_bias: [V] (or [V, d1, ...]) or None.
        ignore_index: None is -100, as in torch; with class probabilities only None.
        shift: `target` holds the tokens themselves, [..., T]: position i predicts the token at
            i + 1, and the last position is ignored. No copy of `input` is made.
        position_ids: [..., T], with `shift` and packed documents: each 0 begins a document, and no
            position predicts the first token of the next document.
        cu_seqlens: the same as offsets [num_docs + 1] into the flattened tokens, int32 or int64.
        others: see :func:`linear_token_stats` and :func:`chunked_ce.cross_entropy`.

    Returns:
        The loss, a 0-d tensor, or one loss per target for "none"; float32 (float64 for float64
        input).

    Raises:
        TypeError, ValueError, IndexError: as :func:`chunked_ce.cross_entropy`, before anything is
            computed.
    """
    if unknown:
        checks.unknown_keywords(linear_cross_entropy, unknown)
    if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        return transforms.call(linear_cross_entropy, locals())
    checks.linear_input(input, linear_weight, linear_bias, target, dims=True)
    ignore_index = checks.linear_ignore_index(ignore_index, target)
    if shift is not False or position_ids is not None or cu_seqlens is not None:
        target = next_tokens(target, ignore_index, shift, position_ids, cu_seqlens, input)
    options = checks.loss_options(
        input, target, input.shape[:-1] + linear_weight.shape[1:-1], reduction, label_smoothing,
        z_loss_weight, spread_rest, token_weight, num_items,
    )  # fmt: skip
    input, linear_weight, linear_bias = autocast(input, linear_weight, linear_bias)
    shared = options_of_head(
        input, linear_weight, ignore_index, vocab_size, softcap, logit_scale, backend,
        chunk_bytes, token_chunk_size, drop_ignored, acc_dtype,
    )  # fmt: skip
    classes = shared[1]
    weight = weight if weight is None else checks.head_class_weight(weight, linear_weight, classes)
    labels, reducer = describe_target(input, target, -1, weight, ignore_index, classes, options)
    loss_of = partial(_loss_of_head, input, shared, options)
    return _loss_of_heads(loss_of, linear_weight, linear_bias, reducer, labels)


def _loss_of_heads(
    loss_of: Callable[[Tensor, Tensor | None, Reduction, Target], Tensor],
    weight: Tensor,
    bias: Tensor | None,
    reducer: Reduction,
    labels: Target,
) -> Tensor:
    """Return the loss of a head [V, D], or of all heads in a weight [V, d1, ..., D]."""
    if weight.dim() == 2:
        return loss_of(weight, bias, reducer, labels)
    losses = torch.stack([loss_of(*head) for head in _heads(weight, bias, reducer, labels)], -1)
    return losses.view(labels.index.shape) if reducer.name == "none" else losses.sum()


Shared = tuple[int, int, float | None, float, str, int, bool, torch.dtype]


def _loss_of_head(
    input: Tensor,
    shared: Shared,
    options: LossOptions,
    weight: Tensor,
    bias: Tensor | None,
    reducer: Reduction,
    labels: Target,
) -> Tensor:
    """Return the loss of one [V, D] head: a sum, or that of each token."""
    smoothing, z_loss_weight = options.label_smoothing, options.z_loss_weight
    shared = (labels.ignore_index, *shared[1:])
    fused = labels.is_plain and reducer.known_before_backward(input.dtype)
    if reducer.name == "none" or not fused:
        outputs = outputs_of_head(
            input, weight, bias, labels.index, labels.classes, shared, wanted_of(labels)
        )
        return reducer.with_z_loss(labels.cross_entropy(outputs), outputs.lse, z_loss_weight)
    token_weight = None if reducer.weight is None else reducer.weight.reshape(-1)
    reuse = not torch.compiler.is_compiling()
    loss: Tensor  # autograd fills in which gradients are wanted
    loss, *_ = torch.ops.chunked_ce.linear_loss(
        input.reshape(-1, input.shape[-1]), weight, bias, labels.index.reshape(-1), token_weight,
        reducer.divisor, smoothing, z_loss_weight, *shared, [False, False, False], reuse,
    )  # fmt: skip
    return loss


def _heads(
    weight: Tensor, bias: Tensor | None, reducer: Reduction, labels: Target
) -> list[tuple[Tensor, Tensor | None, Reduction, Target]]:
    """Return each head [V, D] of a weight [V, d1, ..., D], with its bias and its targets."""
    heads = weight.flatten(1, -2).unbind(1)

    def split(t: Tensor | None) -> Sequence[Tensor | None]:
        return [None] * len(heads) if t is None else t.flatten(1).unbind(1)

    assert isinstance(labels, ClassIndices)
    indices = labels.index.flatten(1).unbind(1)
    return [
        (head, head_bias, reducer._replace(weight=token_weight), replace(labels, index=index))
        for head, head_bias, index, token_weight in zip(
            heads, split(bias), indices, split(reducer.weight), strict=True
        )
    ]


def options_of_head(
    input: Tensor,
    weight: Tensor,
    ignore_index: int,
    vocab_size: int | None,
    softcap: float | None,
    logit_scale: float,
    backend: str,
    chunk_bytes: int | None,
    token_chunk_size: int | None,
    drop_ignored: bool | None,
    acc_dtype: torch.dtype,
) -> Shared:
    """The arguments that both operators share, checked."""
    classes = checks.linear_vocab_size(vocab_size, weight)
    row_bytes = padded_row_bytes(classes, weight.element_size())
    tokens = input.numel() // input.shape[-1]
    default = default_chunk_bytes(tokens * row_bytes, input.device.type)
    return (
        ignore_index,
        classes,
        checks.softcap(softcap),
        checks.logit_scale(logit_scale),
        choose_backend(backend, input.device),
        checks.rows_per_chunk(chunk_bytes, token_chunk_size, row_bytes, default),
        checks.drop_ignored(drop_ignored, input.device),
        checks.acc_dtype(acc_dtype, weight),
    )


def outputs_of_head(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    classes: Classes,
    shared: Shared,
    wanted: tuple[bool, bool, bool, bool],  # entropy, mean_logprob, rank, argmax
) -> Outputs:
    """An operator's outputs in target's shape."""
    of_class, prob, scale, shift, at = classes
    rows = Classes(  # torch.compile of torch 2.6 cannot trace _replace
        of_class,
        None if prob is None else prob.reshape(-1, prob.shape[-1]),
        scale,
        shift,
        None if at is None else at.reshape(-1, at.shape[-1]),
    )
    outputs = torch.ops.chunked_ce.linear_stats(
        input.reshape(-1, input.shape[-1]), weight, bias, target.reshape(-1), *rows, *shared,
        *wanted,
    )  # fmt: skip
    n = target.numel()
    return Outputs(*(o.view(target.shape + o.shape[1:]) if o.shape[0] == n else o for o in outputs))


def autocast(
    input: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """As `F.linear` has them under autocast."""
    device = input.device.type
    # Which devices have it is no question for torch.compile: that of torch 2.6 cannot trace it.
    available = device in ("cpu", "cuda", "xpu") or torch.amp.is_autocast_available(device)
    enabled = available and torch.is_autocast_enabled(device)
    if enabled and input.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
        bias = None if bias is None else bias.to(dtype)
        return input.to(dtype), weight.to(dtype), bias
    checks.same_dtype(input, weight, bias)
    return input, weight, bias
