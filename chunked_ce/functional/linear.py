"""The lm_head and the loss in one: the logits never exist but for a chunk of tokens."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from .. import checks
from ..backends import choose_backend
from ..core.reduction import Reduction
from ..core.row_stats import TokenStats
from ..ops import transforms
from ..ops.chunks import default_rows, padded_row_bytes
from ..ops.library import Classes, Outputs
from .several_heads import loss_of_heads
from .targets import AnyTarget, Target, describe_target, wanted_of

Result = TypeVar("Result")
Head = Tensor | Callable[[Tensor], Tensor]


def linear_token_stats(
    input: Tensor,
    linear_weight: Head,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    ignore_index: int = -100,
    vocab_size: int | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    entropy: bool = False,
    mean_logprob: bool = False,
    rank: bool = False,
    argmax: bool = False,
    weight: Tensor | None = None,
    acc_dtype: torch.dtype = torch.float32,
    logits_dtype: torch.dtype | None = None,
    chunk_bytes: int | None = None,
    token_chunk_size: int | None = None,
    drop_ignored: bool | None = None,
    backend: str = "auto",
) -> TokenStats:
    """:func:`chunked_ce.token_stats` of `input @ linear_weight.T + linear_bias`, less the logits.

    Differentiable in `input`, `linear_weight` and `linear_bias` with any upstream gradient:
    backward computes each chunk's logits again (8 N D V FLOPs in all). For log-probabilities of
    long sequences and for policy-gradient losses.

    Args:
        input: hidden states [..., D]; float16, bfloat16, float32 or float64.
        linear_weight: [V, D], as `torch.nn.Linear` keeps it; of `input`'s dtype but under autocast.
        target: class indices [...], any integer dtype.
        linear_bias: [V] or None.
        acc_dtype: in which the chunks' gradients of `linear_weight` are added, to be rounded once.
        logits_dtype: torch.float32 keeps the logits of half-precision operands in float32, and on a
            CPU their gradient too; None: as the operands.
        chunk_bytes: of logits held at a time; or
        token_chunk_size: as a number of tokens. By default 4096 tokens, or all of them where their
            logits take 1 GiB at most; on a CPU 128 MiB, or all where they take 256 MiB at most.
        drop_ignored: whether ignored tokens are left out of the products. Finding them makes a GPU
            wait, so by default that is done on the CPU alone.
        others: see :func:`chunked_ce.token_stats`.

    Returns:
        TokenStats of shape [...].

    Raises:
        TypeError, ValueError, IndexError: as :func:`chunked_ce.token_stats`, before anything is
            computed.
    """
    if callable(linear_weight):
        return _with_head(linear_token_stats, locals())
    if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        return transforms.call(linear_token_stats, locals(), rows=("input", "target"))
    checks.target_indices(target)
    checks.linear_input(input, linear_weight, linear_bias, target, dims=False)
    checks.flags(entropy=entropy, mean_logprob=mean_logprob, rank=rank, argmax=argmax)
    input, linear_weight, linear_bias = autocast(input, linear_weight, linear_bias)
    shared = shared_arguments(
        input, linear_weight, ignore_index, vocab_size, softcap, logit_scale, backend,
        chunk_bytes, token_chunk_size, drop_ignored, acc_dtype, logits_dtype,
    )  # fmt: skip
    weight = checks.class_weight(weight, linear_weight[..., 0], shared[1])
    wanted = (entropy, mean_logprob, rank, argmax)
    classes = Classes(weight if mean_logprob else None)
    outputs = _outputs(input, linear_weight, linear_bias, target, classes, shared, wanted)
    return outputs.to_token_stats(wanted)


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Head,
    target: AnyTarget,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    ignore_index: int | None = None,
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
    logits_dtype: torch.dtype | None = None,
    chunk_bytes: int | None = None,
    token_chunk_size: int | None = None,
    drop_ignored: bool | None = None,
    backend: str = "auto",
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
        linear_weight: [V, D]; or [V, d1, ..., D] with `input` [N, D] and `target` [N, d1, ...]; or
            a head: a module or function of hidden states [N, D] that returns logits [N, V].
        target: class indices [...], class probabilities [..., V], or the pair (indices [..., K],
            probabilities [..., K]) of a teacher's K likeliest classes, which is never made dense.
        linear_bias: [V] (or [V, d1, ...]) or None.
        ignore_index: None is -100, as in torch; with class probabilities only None.
        others: see :func:`linear_token_stats` and :func:`chunked_ce.cross_entropy`.

    Returns:
        The loss, a 0-d tensor, or one loss per target for "none"; float32 (float64 for float64
        input).

    Raises:
        TypeError, ValueError, IndexError: as :func:`chunked_ce.cross_entropy`, before anything is
            computed.
    """
    if callable(linear_weight):
        return _with_head(linear_cross_entropy, locals())
    if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        return transforms.call(linear_cross_entropy, locals())
    checks.linear_input(input, linear_weight, linear_bias, target, dims=True)
    ignore_index = checks.linear_ignore_index(ignore_index, target)
    label_smoothing, z_loss_weight, num_items = checks.loss_options(
        input, target, input.shape[:-1] + linear_weight.shape[1:-1], reduction, label_smoothing,
        z_loss_weight, spread_rest, token_weight, num_items,
    )  # fmt: skip
    input, linear_weight, linear_bias = autocast(input, linear_weight, linear_bias)
    shared = shared_arguments(
        input, linear_weight, ignore_index, vocab_size, softcap, logit_scale, backend,
        chunk_bytes, token_chunk_size, drop_ignored, acc_dtype, logits_dtype,
    )  # fmt: skip
    ignore_index, classes, *_ = shared
    weight = weight if weight is None else checks.head_class_weight(weight, linear_weight, classes)
    spec, how = describe_target(
        input, target, -1, weight, label_smoothing, z_loss_weight, ignore_index, classes,
        spread_rest, reduction, token_weight, num_items,
    )  # fmt: skip
    fused = reduction != "none" and spec.is_plain and how.allows_grad_in_forward(input.dtype)
    loss_of = partial(_loss_of_head, input, shared, label_smoothing, z_loss_weight, fused=fused)
    if linear_weight.dim() == 2:
        return loss_of(linear_weight, linear_bias, how, spec)
    return loss_of_heads(loss_of, linear_weight, linear_bias, how, spec)


def _with_head(function: Callable[..., Result], arguments: dict[str, Any]) -> Result:
    from .heads import call_with_head

    result: Result = call_with_head(function, arguments)
    return result


Shared = tuple[int, int, float | None, float, str, int, bool, torch.dtype, torch.dtype]


def _loss_of_head(
    input: Tensor,
    shared: Shared,
    label_smoothing: float,
    z_loss_weight: float,
    weight: Tensor,
    bias: Tensor | None,
    how: Reduction,
    spec: Target,
    *,
    fused: bool,
) -> Tensor:
    """The loss of one [V, D] head: a sum, or that of each token."""
    shared = (spec.ignore_index, *shared[1:])
    if not fused:
        outputs = _outputs(input, weight, bias, spec.index, spec.classes, shared, wanted_of(spec))
        return how.reduce_with_z_loss(spec.cross_entropy(outputs), outputs.lse, z_loss_weight)
    of_tokens = None if how.weight is None else how.weight.reshape(-1)
    reuse = not torch.compiler.is_compiling()
    loss: Tensor  # autograd fills in which gradients are wanted
    loss, *_ = torch.ops.chunked_ce.linear_loss(
        input.reshape(-1, input.shape[-1]), weight, bias, spec.index.reshape(-1), of_tokens,
        how.divisor, label_smoothing, z_loss_weight, *shared, [False, False, False], reuse,
    )  # fmt: skip
    return loss


def shared_arguments(
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
    logits_dtype: torch.dtype | None,
) -> Shared:
    """The arguments that both operators share, checked."""
    logits_dtype = checks.logits_dtype(logits_dtype, weight)
    classes = checks.linear_vocab_size(vocab_size, weight)
    row_bytes = padded_row_bytes(classes, logits_dtype.itemsize)
    tokens = input.numel() // input.shape[-1]
    default = default_rows(tokens, row_bytes, input.device.type)
    return (
        checks.ignore_index(ignore_index),
        classes,
        checks.softcap(softcap),
        checks.logit_scale(logit_scale),
        choose_backend(backend, input.device),
        checks.rows_per_chunk(chunk_bytes, token_chunk_size, row_bytes, default),
        checks.drop_ignored(drop_ignored, input.device),
        checks.acc_dtype(acc_dtype, weight),
        logits_dtype,
    )


def _outputs(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    classes: Classes,
    shared: Shared,
    wanted: tuple[bool, bool, bool, bool],  # entropy, mean_logprob, rank, argmax
) -> Outputs:
    outputs = torch.ops.chunked_ce.linear_stats(
        input.reshape(-1, input.shape[-1]), weight, bias, target.reshape(-1), *rows_of(classes),
        *shared, *wanted,
    )  # fmt: skip
    return in_target_shape(outputs, target)


def rows_of(classes: Classes) -> Classes:
    """Those of [...] tokens for tokens [N]."""
    of_class, prob, scale, shift, at = classes
    return Classes(  # torch.compile of torch 2.6 cannot trace _replace
        of_class,
        None if prob is None else prob.reshape(-1, prob.shape[-1]),
        scale,
        shift,
        None if at is None else at.reshape(-1, at.shape[-1]),
    )


def in_target_shape(outputs: tuple[Tensor, ...], target: Tensor) -> Outputs:
    """An operator's outputs [N] in target's shape."""
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
