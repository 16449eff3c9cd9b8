"""The lm_head and the loss in one: the logits never exist but for a chunk of tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from . import checks, linear_ops  # noqa: F401  (importing linear_ops registers the operators)
from .blocks import compute_dtype
from .functional import choose_backend
from .stats import TokenStats, is_scored, token_loss

_CHUNK_BYTES = 256 << 20
"""Of logits at a time: large enough for the products' full speed, and to add dW up seldom."""

_CPU_CHUNK_BYTES = 128 << 20
"""On a CPU, where that is not enough for all: products need workspace of their own."""


def linear_token_stats(
    input: Tensor,
    linear_weight: Tensor,
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
        chunk_bytes: of logits held at a time; by default 256 MiB, on a CPU 128 MiB where that
            does not hold all; or
        token_chunk_size: as a number of tokens.
        drop_ignored: whether ignored tokens are left out of the products. Finding them makes a GPU
            wait, so by default that is done on the CPU alone.
        others: see :func:`chunked_ce.token_stats`.

    Returns:
        TokenStats of shape [...].

    Raises:
        TypeError, ValueError, IndexError, NotImplementedError: as :func:`chunked_ce.token_stats`,
            before anything is computed.
    """
    checks.hidden_states(input)
    checks.linear_weight(linear_weight, input, dims=False)
    checks.linear_bias(linear_bias, linear_weight)
    checks.target_indices(target)
    checks.linear_target(input, linear_weight, target)
    checks.class_weight(weight)
    for name, value in (
        ("entropy", entropy),
        ("mean_logprob", mean_logprob),
        ("rank", rank),
        ("argmax", argmax),
    ):
        checks.flag(name, value)
    input, linear_weight, linear_bias = _autocast(input, linear_weight, linear_bias)
    shared = _shared(
        input, linear_weight, ignore_index, vocab_size, softcap, logit_scale, backend,
        chunk_bytes, token_chunk_size, drop_ignored, acc_dtype,
    )  # fmt: skip
    return _stats(
        input, linear_weight, linear_bias, target, shared, entropy, mean_logprob, rank, argmax
    )


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
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
    acc_dtype: torch.dtype = torch.float32,
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

    Args:
        input: hidden states [..., D]; float16, bfloat16, float32 or float64.
        linear_weight: [V, D]; or [V, d1, ..., D] with `input` [N, D] and `target` [N, d1, ...].
        target: class indices [...].
        linear_bias: [V] (or [V, d1, ...]) or None.
        ignore_index: None is -100, as in torch.
        others: see :func:`linear_token_stats` and :func:`chunked_ce.cross_entropy`.

    Returns:
        The loss, a 0-d tensor, or one loss per target for "none"; float32 (float64 for float64
        input).

    Raises:
        TypeError, ValueError, IndexError, NotImplementedError: as
            :func:`chunked_ce.cross_entropy`, before anything is computed.
    """
    checks.hidden_states(input)
    checks.linear_weight(linear_weight, input, dims=True)
    checks.linear_bias(linear_bias, linear_weight)
    checks.target_indices(target)
    checks.linear_target(input, linear_weight, target)
    checks.class_weight(weight)
    checks.reduction(reduction)
    label_smoothing = checks.label_smoothing(label_smoothing)
    z_loss_weight = checks.z_loss_weight(z_loss_weight)
    checks.token_weight(token_weight, input, target)
    num_items = checks.num_items(num_items, reduction)
    ignore_index = -100 if ignore_index is None else ignore_index
    input, linear_weight, linear_bias = _autocast(input, linear_weight, linear_bias)
    shared = _shared(
        input, linear_weight, ignore_index, vocab_size, softcap, logit_scale, backend,
        chunk_bytes, token_chunk_size, drop_ignored, acc_dtype,
    )  # fmt: skip
    dtype = compute_dtype(input.dtype)
    tokens = is_scored(target, shared[0])
    if token_weight is not None:
        tokens = torch.where(tokens, token_weight.to(dtype), 0.0)
    divisor: Tensor | None = None
    if reduction == "mean" and num_items is None:
        divisor = tokens.sum().to(dtype)
    elif isinstance(num_items, Tensor):
        divisor = num_items.to(input.device, dtype, non_blocking=True)
    elif num_items is not None:
        divisor = torch.full((), num_items, dtype=dtype, device=input.device)

    def of_head(head: Tensor, bias: Tensor | None, labels: Tensor, scored: Tensor) -> Tensor:
        """The loss of one [V, D] head: a sum, or that of each token."""
        weights = None if token_weight is None else scored
        known = input.dtype != torch.float16 and not any(
            t is not None and t.requires_grad for t in (weights, divisor)
        )
        if reduction != "none" and known:
            reuse = not torch.compiler.is_compiling()
            flat = None if weights is None else weights.reshape(-1)
            loss: Tensor
            loss, *_ = torch.ops.chunked_ce.linear_loss(
                input.reshape(-1, input.shape[-1]), head, bias, labels.reshape(-1), flat, divisor,
                label_smoothing, z_loss_weight, *shared, [False, False, False], reuse,
            )  # fmt: skip
            return loss
        stats = _stats(input, head, bias, labels, shared, False, label_smoothing > 0, False, False)
        loss = token_loss(stats, label_smoothing, z_loss_weight)
        loss = loss if weights is None else loss * weights
        if reduction == "none":
            return loss + 0.0  # an ignored token's -0 becomes 0
        return loss.sum() if divisor is None else loss.sum() / divisor

    if linear_weight.dim() == 2:
        return of_head(linear_weight, linear_bias, target, tokens)
    heads = linear_weight.flatten(1, -2).unbind(1)
    biases = [None] * len(heads) if linear_bias is None else linear_bias.flatten(1).unbind(1)
    losses = [
        of_head(head, bias, labels, scored)
        for head, bias, labels, scored in zip(
            heads, biases, target.flatten(1).unbind(1), tokens.flatten(1).unbind(1), strict=True
        )
    ]
    if reduction == "none":
        return torch.stack(losses, 1).view(target.shape)
    return torch.stack(losses).sum()


Shared = tuple[int, int, float | None, float, str, int, bool, torch.dtype]


def _shared(
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
    row_bytes = -(-classes * weight.element_size() // 128) * 128
    whole = input.numel() // input.shape[-1] * row_bytes <= _CHUNK_BYTES if input.numel() else True
    default = _CHUNK_BYTES if whole or input.device.type != "cpu" else _CPU_CHUNK_BYTES
    return (
        checks.ignore_index(ignore_index),
        classes,
        checks.softcap(softcap),
        checks.logit_scale(logit_scale),
        choose_backend(backend, input.device),
        checks.rows_per_chunk(chunk_bytes, token_chunk_size, row_bytes, default),
        checks.drop_ignored(drop_ignored, input.device),
        checks.acc_dtype(acc_dtype, weight),
    )


def _stats(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    shared: Shared,
    entropy: bool,
    mean_logprob: bool,
    rank: bool,
    argmax: bool,
) -> TokenStats:
    found = torch.ops.chunked_ce.linear_stats(
        input.reshape(-1, input.shape[-1]), weight, bias, target.reshape(-1), *shared,
        entropy, mean_logprob, rank, argmax,
    )  # fmt: skip
    lse, logprob, _, *others = found
    wanted = (entropy, mean_logprob, rank, argmax)
    shaped = (o.view(target.shape) if w else None for o, w in zip(others, wanted, strict=True))
    return TokenStats(lse.view(target.shape), logprob.view(target.shape), *shaped)


def _autocast(
    input: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """As `F.linear` has them under autocast."""
    device = input.device.type
    if torch.is_autocast_enabled(device) and input.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
        bias = None if bias is None else bias.to(dtype)
        return input.to(dtype), weight.to(dtype), bias
    checks.same_dtype(input, weight, bias)
    return input, weight, bias
