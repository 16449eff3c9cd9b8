"""The lm_head and its loss in one: only the logits of one chunk of tokens exist at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NoReturn, overload

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from .. import checks
from ..core.row_stats import TokenStats
from ..ops import transforms
from . import sharded_heads
from .head_loss import LinearHead, as_weight, linear_loss, operands_and_options
from .heads import is_called_apart
from .shift import next_tokens
from .targets import AnyTarget


@overload
def linear_cross_entropy(
    input: Tensor,
    linear_weight: LinearHead,
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
    logits_dtype: torch.dtype | None = None,
    chunk_bytes: int | None = None,
    token_chunk_size: int | None = None,
    drop_ignored: bool | None = None,
    backend: str = "auto",
    group: ProcessGroup | None = None,
    return_stats: Literal[False] = False,
) -> Tensor: ...


@overload
def linear_cross_entropy(
    input: Tensor,
    linear_weight: LinearHead,
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
    logits_dtype: torch.dtype | None = None,
    chunk_bytes: int | None = None,
    token_chunk_size: int | None = None,
    drop_ignored: bool | None = None,
    backend: str = "auto",
    group: ProcessGroup | None = None,
    return_stats: Literal[True] | Sequence[str],
) -> tuple[Tensor, TokenStats]: ...


@checks.hides_unknown
def linear_cross_entropy(
    input: Tensor,
    linear_weight: LinearHead,
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
    logits_dtype: torch.dtype | None = None,
    chunk_bytes: int | None = None,
    token_chunk_size: int | None = None,
    drop_ignored: bool | None = None,
    backend: str = "auto",
    group: ProcessGroup | None = None,
    return_stats: bool | Sequence[str] = False,
    **unknown: NoReturn,
) -> Tensor | tuple[Tensor, TokenStats]:
    """Return the cross-entropy of `input @ linear_weight.T + linear_bias`, without logits.

    Drop-in for `torch.nn.functional.linear_cross_entropy`. Loss and gradients come from one walk
    over chunks of tokens: 6 N D V FLOPs, as many as without chunks; 2 N D V without gradients. Some
    calls compute the logits a second time in backward, 8 N D V: `reduction="none"`, a
    `token_weight` or `num_items` that requires a gradient, and float16, whose small gradients need
    the loss scale. In the other calls an upstream gradient other than 1 multiplies gradients that
    are rounded already.

    Safe in a CUDA graph, unless `drop_ignored=True` or `CHUNKED_CE_CHECK_TARGETS=1` ask for values:
    the host reads no value on the device, and no size depends on one. A target out of range makes
    NaN.

    Args:
        input: hidden states [..., D]; float16, bfloat16, float32 or float64.
        linear_weight: weight of the head [V, D], as `torch.nn.Linear` keeps it, of `input`'s dtype
            unless autocast is on; or [V, d1, ..., D] with `input` [N, D] and `target` [N, d1, ...].
            Or a head: a module or function of hidden states [N, D] that returns logits [N, V].
        target: class indices [...], any integer dtype; class probabilities [..., V]; or a teacher's
            K likeliest classes as a pair (indices [..., K], probabilities [..., K]).
        linear_bias: bias of the head, [V] (or [V, d1, ...]), or None.
        weight: weight of each class [V], any floating dtype. With class indices the mean is then
            the weighted mean.
        ignore_index: class index of rows to leave out. None: -100; only None with class
            probabilities.
        shift: True where `target` [..., T] holds the tokens themselves: position i predicts the
            token at i + 1, and the last position is ignored. Only the target moves; nothing is
            copied. The classes of `input` must come last, and `target` must hold class indices.
        position_ids: position of each token in its document, of `target`'s shape, any integer
            dtype. A 0 begins a document, whose first token no position predicts. Only with
            `shift=True`.
        cu_seqlens: the same as offsets [num_docs + 1] into the flattened tokens, int32 or int64,
            from 0 to their number. Only with `shift=True`, and not beside `position_ids`.
        reduction: "mean" over the tokens that are not ignored, "sum", or "none" for each token's
            loss.
        label_smoothing: share of the target that is spread evenly over all classes, from 0 to 1.
        z_loss_weight: factor of the z-loss lse²; 1e-4 is usual. Class weights do not change it:
            "mean" averages it over the tokens that count.
        vocab_size: number of classes that exist; rows of the head at or past it are not read. None:
            all exist.
        softcap: logits are capped to ±softcap as `softcap * tanh(z / softcap)` (Gemma 2); None: no
            cap.
        logit_scale: factor of the logits before the cap, 1 / temperature.
        token_weight: weight of the loss at each position, of the shape of class indices, any
            floating dtype. It is not shifted. "mean" is then the weighted mean.
        num_items: divisor of the mean, an int or a 0-d tensor on any device. Pass the number of
            target tokens in the whole batch when accumulating gradients. None: the tokens that
            count here.
        group: process group of ranks that hold other tokens of the batch. "mean" then divides by
            the tokens of all its ranks, after one all-reduce of one number. Add the gradients up
            over the ranks; where DDP or FSDP averages them, multiply the loss by the number of
            ranks.
        return_stats: True returns (loss, :class:`TokenStats`): each target's `lse` and `logprob` of
            the same pass, detached. ("entropy", "rank", "argmax"), or some of them, adds these. Of
            class probabilities and top-k targets they are those of the likeliest class.
        spread_rest: True spreads what a teacher's top-k probabilities lack of 1 evenly over the
            other classes; False drops it. With True a logit of -inf makes the loss +inf, unless the
            probabilities lack no more than their rounding.
        acc_dtype: dtype in which the chunks' gradients of `linear_weight` are added; they are
            rounded once, at the end.
        logits_dtype: torch.float32 keeps the logits of half-precision operands in float32, and on a
            CPU their gradient too. None: the operands' dtype.
        chunk_bytes: bytes of logits held at a time.
        token_chunk_size: the same as a number of tokens; give one of the two. By default 4096
            tokens, or all if their logits take at most 1 GiB; on a CPU 128 MiB of logits, or all if
            they take at most 256 MiB.
        drop_ignored: True leaves ignored tokens out of the matrix products. Finding them makes a
            GPU wait. None: True on a CPU, False elsewhere.
        backend: "auto" chooses; "cpu" (kernels in C), "torch" (any device) or "triton" (GPU) are
            used or raise.

    Returns:
        The loss, a 0-d tensor, or one loss per target for "none"; float32 (float64 for float64
        input). With `return_stats` a pair of the loss and the TokenStats, of the targets' shape.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape, device or range.
            Arguments are checked before anything is computed.
        IndexError: a target out of range, on the CPU. Elsewhere that row's result and gradient are
            NaN; `CHUNKED_CE_CHECK_TARGETS=1` in the environment raises there too, and makes the GPU
            wait.

    Example:
        >>> import torch, chunked_ce
        >>> hidden = torch.randn(2, 3, 8, requires_grad=True)  # [B, T, D]
        >>> lm_head = torch.nn.Linear(8, 10, bias=False)
        >>> _ = torch.nn.init.zeros_(lm_head.weight)
        >>> tokens = torch.tensor([[1, 2, 3], [4, 5, 6]])
        >>> loss = chunked_ce.linear_cross_entropy(hidden, lm_head.weight, tokens, shift=True)
        >>> loss.backward()
        >>> print(f"{loss.item():.4f}")  # ln 10
        2.3026
    """
    if unknown:
        checks.unknown_keywords(linear_cross_entropy, unknown)
    if callable(linear_weight) and is_called_apart(linear_weight):
        return sharded_heads.call(linear_cross_entropy, locals())
    head, linear_weight, linear_bias = as_weight(linear_weight, linear_bias, input, logits_dtype)
    if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        return transforms.call(linear_cross_entropy, locals())
    checks.linear_input(input, linear_weight, linear_bias, target, dims=True)
    ignore_index = checks.linear_ignore_index(ignore_index, target)
    if shift is not False or position_ids is not None or cu_seqlens is not None:
        target = next_tokens(target, ignore_index, shift, position_ids, cu_seqlens, input)
    options = checks.loss_options(
        input, target, input.shape[:-1] + linear_weight.shape[1:-1], reduction, label_smoothing,
        z_loss_weight, spread_rest, token_weight, num_items, return_stats, group,
    )  # fmt: skip
    input, linear_weight, linear_bias, shared = operands_and_options(
        input, linear_weight, linear_bias, head, ignore_index, vocab_size, softcap, logit_scale,
        backend, chunk_bytes, token_chunk_size, drop_ignored, acc_dtype, logits_dtype,
    )  # fmt: skip
    return linear_loss(head, input, target, linear_weight, linear_bias, weight, options, shared)
