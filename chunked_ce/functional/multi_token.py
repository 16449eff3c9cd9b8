"""Multi-token prediction: stream k of hidden states predicts the token at i + k + 1.

The labels of stream k are those of stream k - 1, shifted once more. So a label that shift=True
leaves out at a document's end stays left out for all streams behind it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from .. import checks
from ..core.head import COMPUTE_DTYPE
from ..core.reduction import is_scored
from .head_loss import LinearHead
from .linear import linear_cross_entropy
from .shift import next_tokens


@checks.hides_unknown
def multi_token_cross_entropy(
    input: Tensor | Sequence[Tensor],
    linear_weight: LinearHead | Sequence[LinearHead],
    target: Tensor,
    *,
    linear_bias: Tensor | Sequence[Tensor | None] | None = None,
    depth_weight: Tensor | Sequence[float] | None = None,
    ignore_index: int = -100,
    position_ids: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    label_smoothing: float = 0.0,
    z_loss_weight: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    vocab_size: int | None = None,
    num_items: int | Tensor | None = None,
    acc_dtype: torch.dtype = torch.float32,
    logits_dtype: torch.dtype | None = None,
    chunk_bytes: int | None = None,
    token_chunk_size: int | None = None,
    drop_ignored: bool | None = None,
    backend: str = "auto",
    **unknown: NoReturn,
) -> Tensor:
    """Return the cross-entropies of K streams of hidden states that predict 1 to K tokens ahead.

    Position i of stream k, counted from 0, predicts the token at i + k + 1 of the same document.
    One chunk of logits of one stream exists at a time. The heads are those of Gloeckle et al.,
    "Better & Faster Large Language Models via Multi-token Prediction" (arXiv:2404.19737), or one
    head for all, as in section 2.2 of the DeepSeek-V3 report (arXiv:2412.19437).

    With one head for all and `depth_weight` the streams are one call: 6 N D V FLOPs for each of
    them, and one gradient [V, D]. Without `depth_weight` a gradient [V, D] of each stream is kept
    until backward, which knows the streams' weights and adds them up.

    Args:
        input: hidden states of the streams [K, ..., T, D], or a sequence of K tensors [..., T, D];
            float16, bfloat16, float32 or float64. In a sequence stream k may have fewer positions
            than `target`, the first of them, as DeepSeek-V3's T - k.
        linear_weight: weight of the head [V, D] for all streams, or a head for each: [K, V, D], a
            sequence of K weights, or a ModuleList. A head may be a module or a function, as for
            :func:`linear_cross_entropy`.
        target: the tokens themselves [..., T], any integer dtype.
        linear_bias: bias of the head, [V]; [K, V] or a sequence of K for a head for each stream; or
            None.
        depth_weight: weight of each stream's loss, K numbers or a Tensor [K]; then their weighted
            sum is returned. DeepSeek-V3's is 1 for the next token, and λ / (K - 1) for each other.
        ignore_index: token that no position predicts.
        position_ids: position of each token in its document, of `target`'s shape, any integer
            dtype. A 0 begins a document. No prediction crosses a document's end.
        cu_seqlens: the same as offsets [num_docs + 1] into the flattened tokens, int32 or int64,
            from 0 to their number. Not beside `position_ids`.
        label_smoothing: share of the target that is spread evenly over all classes, from 0 to 1.
        z_loss_weight: factor of the z-loss lse²; 1e-4 is usual.
        softcap: logits are capped to ±softcap as `softcap * tanh(z / softcap)`; None: no cap.
        logit_scale: factor of the logits before the cap, 1 / temperature.
        vocab_size: number of classes that exist; rows of a head at or past it are not read. None:
            all exist.
        num_items: divisor of each stream's mean, an int or a 0-d tensor on any device. None: the
            tokens that the stream predicts here.
        acc_dtype: dtype in which the chunks' gradients of a head are added; they are rounded once,
            at the end.
        logits_dtype: torch.float32 keeps the logits of half-precision operands in float32. None:
            the operands' dtype.
        chunk_bytes: bytes of logits held at a time.
        token_chunk_size: the same as a number of tokens; give one of the two. None: as for
            :func:`linear_cross_entropy`.
        drop_ignored: True leaves ignored tokens out of the matrix products. Finding them makes a
            GPU wait. None: True on a CPU, False elsewhere.
        backend: "auto" chooses; "cpu" (kernels in C), "torch" (any device) or "triton" (GPU) are
            used or raise.

    Returns:
        The mean loss of each stream [K], or with `depth_weight` their weighted sum, a 0-d tensor;
        float32 (float64 for float64 input). NaN for a stream that predicts no token, as where T <=
        k.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape, device or range.
        IndexError: a target out of range, on the CPU.

    Example:
        >>> import torch, chunked_ce
        >>> hidden = torch.randn(2, 3, 5, 8, requires_grad=True)  # 2 streams [B, T, D]
        >>> head, tokens = torch.zeros(10, 8), torch.arange(15).view(3, 5) % 10
        >>> losses = chunked_ce.multi_token_cross_entropy(hidden, head, tokens)
        >>> [round(loss, 4) for loss in losses.tolist()]  # ln 10, of the tokens at i + 1 and i + 2
        [2.3026, 2.3026]
        >>> weighted = chunked_ce.multi_token_cross_entropy(
        ...     hidden, head, tokens, depth_weight=[1.0, 0.3]
        ... )
        >>> print(f"{weighted.item():.4f}")
        2.9934
    """
    if unknown:
        checks.unknown_keywords(multi_token_cross_entropy, unknown)
    streams = checks.streams(input, target)
    heads, shared = checks.heads_of_streams(linear_weight, linear_bias, len(streams))
    ignore_index = checks.ignore_index(ignore_index)
    labels = _labels_of_streams(streams, target, ignore_index, position_ids, cu_seqlens)
    options: dict[str, Any] = dict(
        ignore_index=ignore_index, label_smoothing=label_smoothing, z_loss_weight=z_loss_weight,
        softcap=softcap, logit_scale=logit_scale, vocab_size=vocab_size, acc_dtype=acc_dtype,
        logits_dtype=logits_dtype, chunk_bytes=chunk_bytes, token_chunk_size=token_chunk_size,
        drop_ignored=drop_ignored, backend=backend,
    )  # fmt: skip
    weights = checks.depth_weight(depth_weight, streams)
    if weights is not None and shared:
        return _weighted_sum(streams, *heads[0], labels, weights, num_items, options)
    losses = torch.stack([
        linear_cross_entropy(x, head, of_x, linear_bias=bias, num_items=num_items, **options)
        for x, (head, bias), of_x in zip(streams, heads, labels, strict=True)
    ])  # fmt: skip
    return losses if weights is None else (losses * weights.to(losses.dtype)).sum()


def _labels_of_streams(
    streams: Sequence[Tensor],
    target: Tensor,
    ignore_index: int,
    position_ids: Tensor | None,
    cu_seqlens: Tensor | None,
) -> list[Tensor]:
    """Return the label of each position of each stream."""
    labels, rows = [target], target[..., None]
    for _ in streams:
        labels.append(next_tokens(labels[-1], ignore_index, True, position_ids, cu_seqlens, rows))
    return [of_x[..., : x.shape[-2]] for x, of_x in zip(streams, labels[1:], strict=True)]


def _weighted_sum(
    streams: Sequence[Tensor],
    head: LinearHead,
    bias: Tensor | None,
    labels: Sequence[Tensor],
    weights: Tensor,  # [K]
    num_items: int | Tensor | None,
    options: dict[str, Any],
) -> Tensor:
    """Return the weighted sum of the streams' means, as one sum over their weighted tokens."""
    x = torch.cat([x.reshape(-1, x.shape[-1]) for x in streams])
    dtype = COMPUTE_DTYPE[x.dtype]
    if num_items is None:
        scored = [is_scored(of_x, options["ignore_index"]).sum() for of_x in labels]
        counts = torch.stack(scored).to(x.device, dtype)
    else:
        items = checks.num_items(num_items, "mean", x)
        counts = torch.as_tensor(items, dtype=dtype, device=x.device)
    shares = weights.to(dtype) / counts.clamp(min=1)
    of_tokens = [s.expand(of_x.numel()) for s, of_x in zip(shares, labels, strict=True)]
    loss: Tensor = linear_cross_entropy(
        x, head, torch.cat([of_x.flatten() for of_x in labels]),
        linear_bias=bias, reduction="sum", token_weight=torch.cat(of_tokens), **options,
    )  # fmt: skip
    return loss + (0.0 / counts).sum()  # NaN where a stream predicts no token, as its mean is
