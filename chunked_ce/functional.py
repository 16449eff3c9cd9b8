"""The public functions.

Check the arguments, choose a backend, compose the loss from token statistics, reduce.
"""

from __future__ import annotations

import importlib.util
import os

import torch
from torch import Tensor

from . import checks, ops
from .blocks import compute_dtype
from .one_pass import one_pass_loss
from .reduction import reduction_of
from .stats import TokenStats, token_loss

_TRITON_INSTALLED = importlib.util.find_spec("triton") is not None
# As Triton reads it, and when it does: a change after the import comes too late for both.
_INTERPRETED = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")


def token_stats(
    input: Tensor,
    target: Tensor,
    *,
    ignore_index: int = -100,
    vocab_size: int | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    entropy: bool = False,
    mean_logprob: bool = False,
    rank: bool = False,
    argmax: bool = False,
    weight: Tensor | None = None,
    inplace_backward: bool = False,
    backend: str = "auto",
) -> TokenStats:
    """Statistics of each row of logits in one pass over the vocabulary.

    The softmax is not stored. With `z_j = softcap * tanh(logit_scale * x_j / softcap)` and target
    `t`:

    ============  ===============================================================  ==========
    lse           log Σ exp z_j                                                    always
    logprob       z_t - lse                                                        always
    entropy       -Σ p_j log p_j, in nats                                          on request
    mean_logprob  (1/V) Σ (z_j - lse)                                              on request
    rank          how many classes beat the target; on a tie the lower index wins  on request
    argmax        the winning class                                                on request
    ============  ===============================================================  ==========

    The floating statistics are differentiable in `input`, with any upstream gradient. Rows whose
    target is `ignore_index` have statistics 0 (-1 for rank and argmax) and gradient exactly 0,
    whatever their logits hold.

    Args:
        input: logits [..., V]; float16, bfloat16, float32 or float64, any strides.
        target: class indices [...], any integer dtype.
        ignore_index: target value of rows to leave out.
        vocab_size: number of classes that exist; columns at or past it (a padded head) are not
            read.
        softcap: logits are capped to ±softcap (Gemma 2); None for none.
        logit_scale: factor on the logits before the cap.
        entropy, mean_logprob, rank, argmax: what to compute besides lse and logprob.
        weight: class weights; not supported yet.
        inplace_backward: backward writes the gradient over `input`. Saves N·V elements; the logits
            are gone afterwards, and autograd raises if another backward still needs them. Under
            torch.compile, which cannot tell, the gradient gets memory of its own.
        backend: "auto", "torch", "inductor" (the torch backend compiled) or "triton".

    Returns:
        TokenStats of shape [...]: float32 (float64 for float64 logits), int64 for rank and argmax;
        None for what was not asked for.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape, device or range.
        IndexError: a target out of range, on the CPU. On a GPU, and from the kernels in Triton's
            interpreter, that row's statistics and gradient are NaN, with no access outside the row;
            `CHUNKED_CE_CHECK_TARGETS=1` in the environment raises there too, at the price of a
            synchronisation.
        NotImplementedError: class weights.
    """
    checks.logits(input)
    checks.target_indices(target)
    checks.one_target_per_row(input, target)
    checks.class_weight(weight)
    checks.flags(entropy=entropy, mean_logprob=mean_logprob, rank=rank, argmax=argmax)
    ignore_index, vocab_size, softcap, logit_scale, inplace_backward, backend = _common(
        input, ignore_index, vocab_size, softcap, logit_scale, inplace_backward, backend
    )
    return _token_stats(
        input, target, ignore_index, vocab_size, softcap, logit_scale, backend,
        entropy, mean_logprob, rank, argmax, inplace_backward,
    )  # fmt: skip


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    dim: int = 1,
    z_loss_weight: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    vocab_size: int | None = None,
    token_weight: Tensor | None = None,
    num_items: int | Tensor | None = None,
    inplace_backward: bool = False,
    grad_in_forward: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Cross-entropy between logits and class indices, streamed over the vocabulary.

    As `torch.nn.functional.cross_entropy`. A token's loss is
    `-(1 - label_smoothing) logprob - label_smoothing mean_logprob + z_loss_weight lse²`, times its
    `token_weight`; see :func:`token_stats` for the statistics. z-loss: PaLM, arXiv:2204.02311,
    section 5. Label smoothing: Szegedy et al., arXiv:1512.00567.

    Unlike torch's, the loss is float32 for half-precision logits, a confident token's loss of 1e-8
    is 1e-8 and not 0, and an ignored row's gradient is exactly 0 whatever its logits hold.

    Safe in a CUDA graph: on a GPU nothing waits for a value, and no size depends on one, unless
    `CHUNKED_CE_CHECK_TARGETS=1` asks for it.

    Args:
        input: logits [N, V], [V], or [..., V] with `dim=-1`; float16, bfloat16, float32 or float64,
            any strides.
        target: class indices, the shape of `input` without its class dimension; any integer dtype.
        weight: class weights; not supported yet.
        ignore_index: target value of rows that count for nothing.
        reduction: "mean" over the tokens that are not ignored, "sum" or "none".
        label_smoothing: from 0 to 1.
        dim: the class dimension, 1 as in torch; for [B, T, V] logits pass -1.
        z_loss_weight: factor of lse².
        softcap, logit_scale, vocab_size: see :func:`token_stats`.
        token_weight: weight of each token's whole loss, the shape of `target`; "mean" is then the
            weighted mean.
        num_items: what "mean" divides by instead (gradient accumulation); an int or a 0-d tensor on
            any device.
        inplace_backward: see :func:`token_stats`.
        grad_in_forward: computes the gradient in forward, reading the logits once: 4 bytes moved
            per bf16 logit instead of 6. The gradient, N·V elements, is held until backward, which
            hands it over: a second backward raises. With `inplace_backward=True` it is written
            over `input` at once, the least memory and traffic: after the call `input` holds its
            gradient, and autograd raises if another backward needs its values. The gradient of
            `token_weight` is not computed. Under torch.compile it changes nothing.
        backend: see :func:`token_stats`.

    Returns:
        The loss, a 0-d tensor, or one loss per target for "none"; float32 (float64 for float64
        logits). The mean over no token is NaN, as in torch, with a gradient of zeros.

    Raises:
        TypeError, ValueError, IndexError: as :func:`token_stats`, before anything is computed.
        NotImplementedError: class weights, a class dimension that is not last.
    """
    checks.logits(input)
    checks.target_indices(target)
    checks.class_dimension(input, target, dim)
    checks.one_target_per_row(input, target)
    checks.class_weight(weight)
    checks.reduction(reduction)
    label_smoothing = checks.label_smoothing(label_smoothing)
    z_loss_weight = checks.z_loss_weight(z_loss_weight)
    checks.token_weight(token_weight, input, target)
    checks.grad_in_forward(grad_in_forward, token_weight, num_items)
    num_items = checks.num_items(num_items, reduction)
    ignore_index, vocab_size, softcap, logit_scale, inplace_backward, backend = _common(
        input, ignore_index, vocab_size, softcap, logit_scale, inplace_backward, backend
    )
    how = reduction_of(
        reduction, target, ignore_index, token_weight, num_items, compute_dtype(input.dtype)
    )
    # A tracer plans reads and writes itself.
    one_pass = grad_in_forward and _wants_gradient(input) and not torch.compiler.is_compiling()
    if one_pass and how.known_before_backward(input.dtype):
        return one_pass_loss(
            input, target, how, label_smoothing, z_loss_weight,
            ignore_index, vocab_size, softcap, logit_scale, backend, inplace_backward,
        )  # fmt: skip
    stats = _token_stats(
        input, target, ignore_index, vocab_size, softcap, logit_scale, backend,
        False, label_smoothing > 0, False, False, inplace_backward,
    )  # fmt: skip
    return how.of(token_loss(stats, label_smoothing, z_loss_weight))


def _wants_gradient(input: Tensor) -> bool:
    return torch.is_grad_enabled() and input.requires_grad


def _common(
    input: Tensor,
    ignore_index: int,
    vocab_size: int | None,
    softcap: float | None,
    logit_scale: float,
    inplace_backward: bool,
    backend: str,
) -> tuple[int, int, float | None, float, bool, str]:
    """The arguments that all functions share, checked."""
    ignore_index = checks.ignore_index(ignore_index)
    vocab_size = checks.vocab_size(vocab_size, input)
    softcap = checks.softcap(softcap)
    logit_scale = checks.logit_scale(logit_scale)
    checks.inplace_backward(inplace_backward, input)
    # A tracer cannot tell who else needs the logits, and plans the memory itself.
    inplace_backward = inplace_backward and not torch.compiler.is_compiling()
    backend = choose_backend(backend, input.device)
    return ignore_index, vocab_size, softcap, logit_scale, inplace_backward, backend


def _token_stats(
    input: Tensor,
    target: Tensor,
    ignore_index: int,
    vocab_size: int,
    softcap: float | None,
    logit_scale: float,
    backend: str,
    entropy: bool,
    mean_logprob: bool,
    rank: bool,
    argmax: bool,
    inplace_backward: bool,
) -> TokenStats:
    outputs = torch.ops.chunked_ce.token_stats(
        input, target, ignore_index, vocab_size, softcap, logit_scale, backend,
        entropy, mean_logprob, rank, argmax, inplace_backward,
    )  # fmt: skip
    return ops.as_stats(outputs, (entropy, mean_logprob, rank, argmax))


def choose_backend(backend: str, device: torch.device) -> str:
    checks.backend_name(backend)
    if backend == "triton":
        checks.triton_can_run(
            device,
            installed=_TRITON_INSTALLED,
            interpreted=_INTERPRETED,
        )
    if backend == "auto":
        return "triton" if device.type in ("cuda", "xpu") and _TRITON_INSTALLED else "torch"
    return backend
