"""Bytes alive at the peak of each way to compute head and loss, see :mod:`chunked_ce.planner`."""

from __future__ import annotations

from ..ops.chunks import PRODUCT_BYTES, default_chunk_bytes, padded_row_bytes
from .head import HeadShape


def eager(head: HeadShape, tokens: int, device: str) -> int:
    logits, gradients = logits_and_gradients(head, tokens)
    return max(3 * logits, logits + gradients) + _kept_for_tanh(head, logits)


def eager_in_float32(head: HeadShape, tokens: int, device: str) -> int:
    logits, gradients = logits_and_gradients(head, tokens)
    wide = logits * 4 // head.dtype.itemsize
    peak = max(3 * wide + logits, 2 * logits + gradients)  # the model's output holds the logits
    return peak + _kept_for_tanh(head, logits)


def _kept_for_tanh(head: HeadShape, logits: int) -> int:
    """Return the bytes of tanh's result, which eager saves for backward."""
    return 0 if head.softcap is None else logits


def one_logits_buffer(head: HeadShape, tokens: int, device: str) -> int:
    """Return the peak of torch.compile, and of `inplace_backward`."""
    logits, gradients = logits_and_gradients(head, tokens)
    return logits + gradients


def two_logits_buffers(head: HeadShape, tokens: int, device: str) -> int:
    logits, gradients = logits_and_gradients(head, tokens)
    return max(2 * logits, logits + gradients)


def logits_and_gradients(head: HeadShape, tokens: int) -> tuple[int, int]:
    """Return bytes of the logits, and of the gradients of hidden states and weight."""
    size = head.dtype.itemsize
    return (
        tokens * head.vocab_size * size,
        tokens * head.hidden_size * size + head.weight_bytes,
    )


def chunks(
    chunk_bytes: int | None, head: HeadShape, tokens: int, device: str, *, even: bool = True
) -> tuple[int, int]:
    """Return how many chunks there are, and the most rows of one.

    `even`: the chunks are of like size; else the most rows that one may have with fewer tokens.
    """
    row = padded_row_bytes(head.vocab_size, head.dtype.itemsize)
    if chunk_bytes is None:
        chunk_bytes = default_chunk_bytes(tokens * row if even else 0, device)
    most = max(1, chunk_bytes // row)
    count = -(-tokens // most)
    return count, -(-tokens // count) if even else min(tokens, most)


def linear(
    chunk_bytes: int | None, wide_sums: bool, even: bool, head: HeadShape, tokens: int, device: str
) -> int:
    """Return the peak of `linear_cross_entropy`.

    `wide_sums`: gradients of several chunks are added up in float32. `even`: see :func:`chunks`.
    """
    size = head.dtype.itemsize
    count, rows = chunks(chunk_bytes, head, tokens, device, even=even)
    buffer = rows * padded_row_bytes(head.vocab_size, size)
    of_input = tokens * head.hidden_size * size
    added_up = count > 1 and size < 4 and wide_sums
    in_float32 = head.vocab_size * head.hidden_size * 4 if added_up else 0
    if device == "cpu":
        return buffer + of_input + head.weight_bytes + in_float32
    buffer += rows * head.hidden_size * size  # hidden states, those of ignored tokens zeroed
    if not in_float32:
        return buffer + of_input + head.weight_bytes
    product = min(in_float32, PRODUCT_BYTES)
    return of_input + in_float32 + buffer + max(product, head.weight_bytes)
