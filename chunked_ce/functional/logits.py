"""Cross-entropy of logits: check, describe the target, call one operator, reduce."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, NoReturn, overload

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from .. import checks
from ..backends import choose_backend
from ..checks.loss import LossOptions
from ..core.reduction import Reduction
from ..core.row_stats import TokenStats
from ..ops import transforms
from ..ops.library import Outputs
from ..ops.logits import token_stats as token_stats_operator
from ..ops.one_pass import one_pass_loss
from .shift import next_tokens
from .targets import AnyTarget, Target, describe_target, loss_and_stats


@overload
def cross_entropy(
    input: Tensor,
    target: AnyTarget,
    weight: Tensor | None = None,
    size_average: None = None,
    ignore_index: int = -100,
    reduce: None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    dim: int = 1,
    shift: bool = False,
    position_ids: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    z_loss_weight: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    vocab_size: int | None = None,
    token_weight: Tensor | None = None,
    num_items: int | Tensor | None = None,
    spread_rest: bool = False,
    inplace_backward: bool = False,
    grad_in_forward: bool = False,
    backend: str = "auto",
    group: ProcessGroup | None = None,
    return_stats: Literal[False] = False,
) -> Tensor: ...


@overload
def cross_entropy(
    input: Tensor,
    target: AnyTarget,
    weight: Tensor | None = None,
    size_average: None = None,
    ignore_index: int = -100,
    reduce: None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    dim: int = 1,
    shift: bool = False,
    position_ids: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    z_loss_weight: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    vocab_size: int | None = None,
    token_weight: Tensor | None = None,
    num_items: int | Tensor | None = None,
    spread_rest: bool = False,
    inplace_backward: bool = False,
    grad_in_forward: bool = False,
    backend: str = "auto",
    group: ProcessGroup | None = None,
    return_stats: Literal[True] | Sequence[str],
) -> tuple[Tensor, TokenStats]: ...


@checks.hides_unknown
def cross_entropy(
    input: Tensor,
    target: AnyTarget,
    weight: Tensor | None = None,
    size_average: None = None,
    ignore_index: int = -100,
    reduce: None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    dim: int = 1,
    shift: bool = False,
    position_ids: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    z_loss_weight: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    vocab_size: int | None = None,
    token_weight: Tensor | None = None,
    num_items: int | Tensor | None = None,
    spread_rest: bool = False,
    inplace_backward: bool = False,
    grad_in_forward: bool = False,
    backend: str = "auto",
    group: ProcessGroup | None = None,
    return_stats: bool | Sequence[str] = False,
    **unknown: NoReturn,
) -> Tensor | tuple[Tensor, TokenStats]:
    """Return the cross-entropy of logits and targets, streamed over the vocabulary.

    Drop-in for `torch.nn.functional.cross_entropy`. A token's loss is `-(1 - label_smoothing)
    logprob - label_smoothing mean_logprob + z_loss_weight lse²`, times its `token_weight`;
    :func:`chunked_ce.token_stats` defines the statistics. Label smoothing: Szegedy et al.,
    arXiv:1512.00567. z-loss: PaLM, arXiv:2204.02311, section 5.

    Four things differ from torch. The loss is float32 for half-precision logits. A confident
    token's loss of 1e-8 is 1e-8 and not 0. An ignored row's gradient is exactly 0 whatever its
    logits hold. A class of probability 0, or of weight 0 in label smoothing, adds nothing, even at
    a logit of -inf.

    Safe in a CUDA graph: on a GPU nothing waits for a value, and no size depends on one, unless
    `CHUNKED_CE_CHECK_TARGETS=1` asks for it.

    Args:
        input: logits [N, V], [V], [N, V, d1, ...], or [..., V] with `dim=-1`; float16, bfloat16,
            float32 or float64, any strides.
        target: class indices, the shape of `input` without its class dimension, any integer dtype.
            Or class probabilities, the shape of `input`, any floating dtype and sum. Or a teacher's
            K likeliest classes as a pair (indices [..., K], probabilities [..., K]), padded with
            `ignore_index`; the other classes have probability 0, and a row of padding is ignored.
        weight: weight of each class [V], any floating dtype. With class indices the mean is then
            the weighted mean.
        size_average: None; torch's deprecated name for `reduction`.
        ignore_index: class index of rows to leave out. It must be no class beside class
            probabilities.
        reduce: None; torch's deprecated name for `reduction`.
        reduction: "mean" over the tokens that are not ignored, "sum", or "none" for each token's
            loss.
        label_smoothing: share of the target that is spread evenly over all classes, from 0 to 1.
        z_loss_weight: factor of the z-loss lse²; 1e-4 is usual. Class weights do not change it:
            "mean" averages it over the tokens that count.
        dim: the class dimension; 1 as in torch, -1 for logits [B, T, V].
        shift: True where `target` [..., T] holds the tokens themselves: position i predicts the
            token at i + 1, and the last position is ignored. Only the target moves; nothing is
            copied. The classes of `input` must come last, and `target` must hold class indices.
        position_ids: position of each token in its document, of `target`'s shape, any integer
            dtype. A 0 begins a document, whose first token no position predicts. Only with
            `shift=True`.
        cu_seqlens: the same as offsets [num_docs + 1] into the flattened tokens, int32 or int64,
            from 0 to their number. Only with `shift=True`, and not beside `position_ids`.
        vocab_size: number of classes that exist; columns at or past it (padding) are not read.
            None: all exist.
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
        inplace_backward: backward writes the gradient over `input`, which saves N·V elements. The
            logits are gone afterwards, and autograd raises if another backward still needs them.
            Under torch.compile and torch.func it changes nothing.
        grad_in_forward: compute the gradient in forward, from one read of the logits: 4 bytes of
            traffic per bf16 logit in place of 6. The gradient, N·V elements, is held until
            backward; a second backward raises. With `inplace_backward=True` it is written over
            `input` at once, which takes the least memory. `token_weight` and `num_items` must not
            require a gradient. Under torch.compile or torch.func, in float16, with probabilities or
            with class weights beside label smoothing or z-loss, the gradient is computed in
            backward all the same.
        backend: "auto" chooses; "cpu" (kernels in C), "torch" (any device) or "triton" (GPU) are
            used or raise.

    Returns:
        The loss, a 0-d tensor, or one loss per target for "none"; float32 (float64 for float64
        logits). The mean over no token is NaN, as in torch, with a gradient of zeros. With
        `return_stats` a pair of the loss and the TokenStats, of the targets' shape.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape, device or range.
            Arguments are checked before anything is computed.
        IndexError: a target out of range, on the CPU. Elsewhere that row's result and gradient are
            NaN; `CHUNKED_CE_CHECK_TARGETS=1` in the environment raises there too, and makes the GPU
            wait.

    Example:
        >>> import torch, chunked_ce
        >>> logits = torch.zeros(2, 3, 10, requires_grad=True)  # [B, T, V]
        >>> tokens = torch.tensor([[1, 2, 3], [4, 5, -100]])
        >>> loss = chunked_ce.cross_entropy(logits, tokens, dim=-1, shift=True)
        >>> loss.backward()
        >>> print(f"{loss.item():.4f}")  # ln 10
        2.3026
    """
    if unknown:
        checks.unknown_keywords(cross_entropy, unknown)
    if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        return transforms.call(cross_entropy, locals())
    checks.deprecated(size_average=size_average, reduce=reduce)
    dim, ignore_index = checks.input_and_target(input, target, dim, ignore_index)
    if shift is not False or position_ids is not None or cu_seqlens is not None:
        target = next_tokens(target, ignore_index, shift, position_ids, cu_seqlens, input, dim)
    input = input.movedim(dim, -1) if dim != input.dim() - 1 else input
    options = checks.loss_options(
        input, target, input.shape[:-1], reduction, label_smoothing, z_loss_weight, spread_rest,
        token_weight, num_items, return_stats, group,
    )  # fmt: skip
    checks.grad_in_forward(grad_in_forward, token_weight, options.num_items)
    shared = shared_arguments(input, vocab_size, softcap, logit_scale, inplace_backward, backend)
    weight = None if weight is None else checks.class_weight(weight, input, shared.vocab_size)
    checks.looks_like_logits(input)
    labels, reducer = describe_target(
        input, target, dim, weight, ignore_index, shared.vocab_size, options
    )
    loss, stats = _loss(input, labels, reducer, options, shared, grad_in_forward=grad_in_forward)
    return loss if stats is None else (loss, stats)


class SharedArguments(NamedTuple):
    """The arguments that all functions share."""

    vocab_size: int
    softcap: float | None
    logit_scale: float
    backend: str
    inplace_backward: bool


def shared_arguments(
    input: Tensor,
    vocab_size: int | None,
    softcap: float | None,
    logit_scale: float,
    inplace_backward: bool,
    backend: str,
) -> SharedArguments:
    """Check the arguments that all functions share."""
    checks.inplace_backward(inplace_backward, input)
    return SharedArguments(
        checks.vocab_size(vocab_size, input),
        checks.softcap(softcap),
        checks.logit_scale(logit_scale),
        choose_backend(backend, input.device),
        # A tracer cannot tell who else needs the logits, and plans the memory itself.
        inplace_backward and not torch.compiler.is_compiling(),
    )


def _loss(
    input: Tensor,
    labels: Target,
    reducer: Reduction,
    options: LossOptions,
    shared: SharedArguments,
    *,
    grad_in_forward: bool,
) -> tuple[Tensor, TokenStats | None]:
    """Return the loss of logits [..., V]: call one operator, and reduce."""
    *operator_options, inplace_backward = (labels.ignore_index, *shared)
    if grad_in_forward and _is_possible_in_forward(input, labels, reducer):
        return one_pass_loss(
            input, labels.index, reducer, options.stats, options.label_smoothing,
            options.z_loss_weight, *operator_options, inplace_backward,
        )  # fmt: skip

    def statistics(wanted: tuple[bool, ...]) -> Outputs:
        return token_stats_operator(
            input, labels.index, *labels.classes, *operator_options, *wanted, inplace_backward
        )

    return loss_and_stats(statistics, labels, reducer, options, shared.backend)


def _is_possible_in_forward(input: Tensor, labels: Target, reducer: Reduction) -> bool:
    if not (torch.is_grad_enabled() and input.requires_grad) or torch.compiler.is_compiling():
        return False  # a tracer plans reads and writes itself
    return labels.is_plain and reducer.allows_grad_in_forward(input.dtype)
