"""The public functions.

Check the arguments, choose a backend, compose the loss from token statistics, reduce.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import checks
from ..backends import choose_backend
from ..core.reduction import Reduction
from ..core.row_stats import TokenStats
from ..ops import transforms
from ..ops.library import Classes
from ..ops.logits import token_stats as token_stats_operator
from ..ops.one_pass import one_pass_loss
from .targets import AnyTarget, Target, describe_target, wanted_of


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

        lse           log Σ exp z_j                                                    always
        logprob       z_t - lse                                                        always
        entropy       -Σ p_j log p_j, in nats                                          on request
        mean_logprob  (1/V) Σ (z_j - lse)                                              on request
        rank          how many classes beat the target; on a tie the lower index wins  on request
        argmax        the winning class                                                on request

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
        weight: class weights w [V] of `mean_logprob`, which then is (1/V) Σ w_j (z_j - lse).
        inplace_backward: backward writes the gradient over `input`. Saves N·V elements; the logits
            are gone afterwards, and autograd raises if another backward still needs them. Under
            torch.compile and torch.func, which cannot tell, the gradient gets memory of its own.
        backend: "auto", "cpu" (kernels in C), "torch" (any device) or "triton".

    Returns:
        TokenStats of shape [...]: float32 (float64 for float64 logits), int64 for rank and argmax;
        None for what was not asked for.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape, device or range.
        IndexError: a target out of range, on the CPU. On a GPU, and from the kernels in Triton's
            interpreter, that row's statistics and gradient are NaN, with no access outside the row;
            `CHUNKED_CE_CHECK_TARGETS=1` in the environment raises there too, at the price of a
            synchronisation.
    """
    if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        return transforms.call(token_stats, locals(), rows=("input", "target"))
    checks.logits(input)
    checks.class_dimension(input, -1)
    checks.target_indices(target)
    checks.one_target_per_row(input, target)
    checks.flags(entropy=entropy, mean_logprob=mean_logprob, rank=rank, argmax=argmax)
    ignore_index, vocab_size, softcap, logit_scale, inplace_backward, backend = _common(
        input, ignore_index, vocab_size, softcap, logit_scale, inplace_backward, backend
    )
    weight = checks.class_weight(weight, input, vocab_size)
    wanted = (entropy, mean_logprob, rank, argmax)
    outputs = token_stats_operator(
        input, target, *Classes(weight if mean_logprob else None), ignore_index, vocab_size,
        softcap, logit_scale, backend, *wanted, inplace_backward,
    )  # fmt: skip
    return outputs.to_token_stats(wanted)


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
) -> Tensor:
    """Cross-entropy between logits and targets, streamed over the vocabulary.

    As `torch.nn.functional.cross_entropy`. A token's loss is
    `-(1 - label_smoothing) logprob - label_smoothing mean_logprob + z_loss_weight lse²`, times its
    `token_weight`; see :func:`token_stats` for the statistics. z-loss: PaLM, arXiv:2204.02311,
    section 5. Label smoothing: Szegedy et al., arXiv:1512.00567.

    Unlike torch's, the loss is float32 for half-precision logits, a confident token's loss of 1e-8
    is 1e-8 and not 0, an ignored row's gradient is exactly 0 whatever its logits hold, and a class
    of probability 0, or of weight 0 in label smoothing, adds nothing, even where its logit is -inf.

    Safe in a CUDA graph: on a GPU nothing waits for a value, and no size depends on one, unless
    `CHUNKED_CE_CHECK_TARGETS=1` asks for it.

    Args:
        input: logits [N, V], [V], [N, V, d1, ...], or [..., V] with `dim=-1`; float16, bfloat16,
            float32 or float64, any strides.
        target: class indices, the shape of `input` without its class dimension, any integer dtype;
            or class probabilities, the shape of `input`, any floating dtype and sum; or, of a
            teacher's K likeliest classes, a pair (indices [..., K], probabilities [..., K]), padded
            with `ignore_index`: all other classes have probability 0 (see `spread_rest`), and a row
            of padding alone is ignored.
        weight: class weights [V]. They scale the cross-entropy, not the z-loss; with class indices
            the mean is the weighted mean.
        size_average, reduce: None; torch's deprecated names for `reduction`.
        ignore_index: class index of rows that count for nothing; with class probabilities, which
            name none, a class is an error, as in torch.
        reduction: "mean" over the tokens that are not ignored, "sum" or "none".
        label_smoothing: from 0 to 1.
        dim: the class dimension, 1 as in torch; for [B, T, V] logits pass -1.
        z_loss_weight: factor of lse². With class weights, "mean" averages it over the tokens that
            count, not over their class weights: those do not change it.
        softcap, logit_scale, vocab_size: see :func:`token_stats`.
        token_weight: weight of each token's whole loss, [...] as class indices; "mean" is then the
            weighted mean.
        num_items: what "mean" divides by instead (gradient accumulation); an int or a 0-d tensor on
            any device.
        spread_rest: what a teacher's top-k classes lack of probability 1 is spread evenly over the
            other classes, not dropped. A logit of -inf then makes the loss +inf, whichever class it
            is; but not where they lack no more than their dtype's rounding.
        inplace_backward: see :func:`token_stats`.
        grad_in_forward: computes the gradient in forward, reading the logits once: 4 bytes moved
            per bf16 logit instead of 6. The gradient, N·V elements, is held until backward, which
            hands it over: a second backward raises. With `inplace_backward=True` it is written
            over `input` at once, the least memory and traffic: after the call `input` holds its
            gradient, and autograd raises if another backward needs its values. The gradient of
            `token_weight` is not computed. Under torch.compile or torch.func, with probabilities,
            or with class weights beside label smoothing or z-loss, it changes nothing.
        backend: see :func:`token_stats`.

    Returns:
        The loss, a 0-d tensor, or one loss per target for "none"; float32 (float64 for float64
        logits). The mean over no token is NaN, as in torch, with a gradient of zeros.

    Raises:
        TypeError, ValueError, IndexError: as :func:`token_stats`, before anything is computed.
    """
    if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        return transforms.call(cross_entropy, locals())
    checks.deprecated(size_average=size_average, reduce=reduce)
    dim = checks.input_and_target(input, target, dim, ignore_index)
    input = input.movedim(dim, -1) if dim != input.dim() - 1 else input
    label_smoothing, z_loss_weight, num_items = checks.loss_options(
        input, target, input.shape[:-1], reduction, label_smoothing, z_loss_weight, spread_rest,
        token_weight, num_items,
    )  # fmt: skip
    checks.grad_in_forward(grad_in_forward, token_weight, num_items)
    ignore_index, vocab_size, softcap, logit_scale, inplace_backward, backend = _common(
        input, ignore_index, vocab_size, softcap, logit_scale, inplace_backward, backend
    )
    weight = None if weight is None else checks.class_weight(weight, input, vocab_size)
    checks.looks_like_logits(input)
    spec, how = describe_target(
        input, target, dim, weight, label_smoothing, z_loss_weight, ignore_index, vocab_size,
        spread_rest, reduction, token_weight, num_items,
    )  # fmt: skip
    shared = (spec.ignore_index, vocab_size, softcap, logit_scale, backend)
    if grad_in_forward and _is_possible_in_forward(input, spec, how):
        return one_pass_loss(
            input, spec.index, how, label_smoothing, z_loss_weight, *shared, inplace_backward
        )
    outputs = token_stats_operator(
        input, spec.index, *spec.classes, *shared, *wanted_of(spec), inplace_backward
    )
    return how.reduce_with_z_loss(spec.cross_entropy(outputs), outputs.lse, z_loss_weight)


def _is_possible_in_forward(input: Tensor, spec: Target, how: Reduction) -> bool:
    if not (torch.is_grad_enabled() and input.requires_grad) or torch.compiler.is_compiling():
        return False  # a tracer plans reads and writes itself
    return spec.is_plain and how.allows_grad_in_forward(input.dtype)


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
