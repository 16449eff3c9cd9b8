"""Bytes alive at the peak of each way to compute head and loss, see :mod:`chunked_ce.planner`."""

from __future__ import annotations

from ..ops.chunks import WIDE_BYTES, default_rows, padded_row_bytes
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


def chunks(chunk_bytes: int | None, head: HeadShape, tokens: int, device: str) -> tuple[int, int]:
    """Return how many chunks there are, which are of like size, and the most rows of one."""
    whole, most = most_rows(chunk_bytes, head, tokens, device)
    count = 1 if tokens <= whole else -(-tokens // most)
    return count, -(-tokens // count)


def most_rows(
    chunk_bytes: int | None, head: HeadShape, tokens: int, device: str
) -> tuple[int, int]:
    """Return the most tokens that are one chunk, and the most of a chunk of more."""
    row = padded_row_bytes(head.vocab_size, head.dtype.itemsize)
    if chunk_bytes is not None:
        return (max(1, chunk_bytes // row),) * 2
    return default_rows(0, row, device), default_rows(tokens, row, device)


def linear(
    chunk_bytes: int | None, wide_sums: bool, even: bool, head: HeadShape, tokens: int, device: str
) -> int:
    """Return the peak of `linear_cross_entropy`.

    `wide_sums`: gradients of several chunks are added up in float32. `even`: of chunks of like
    size; else the most that any batch up to `tokens` takes.
    """
    count, rows = chunks(chunk_bytes, head, tokens, device)
    if count == 1:
        return _one_walk(head, tokens, tokens, False, device)
    if even:
        return _one_walk(head, tokens, rows, wide_sums, device)
    whole, most = most_rows(chunk_bytes, head, tokens, device)
    several = _one_walk(head, tokens, most, wide_sums, device)
    return max(several, _one_walk(head, whole, whole, False, device))


def _one_walk(head: HeadShape, tokens: int, rows: int, wide_sums: bool, device: str) -> int:
    """Return the peak of chunks of so many rows, whose sums may be in float32."""
    size = head.dtype.itemsize
    of_input = tokens * head.hidden_size * size
    buffer = rows * padded_row_bytes(head.vocab_size, size)
    if device != "cpu":
        buffer += rows * head.hidden_size * size  # hidden states, those of ignored tokens zeroed
    if size >= 4 or not wide_sums:
        return of_input + buffer + head.weight_bytes
    in_float32 = head.vocab_size * head.hidden_size * 4
    if device == "cpu":  # where products of half-precision tensors come from wider copies
        buffer += rows * head.hidden_size * 4 + min(WIDE_BYTES, rows * head.vocab_size * 4)
    return of_input + in_float32 + max(buffer, head.weight_bytes)
