"""Peak memory of a language model's head and loss in training, predicted from shapes alone.

From hidden states [N, D] and the head's weight [V, D] to the loss and both gradients. With L bytes
of logits, X of hidden states, W of the weight, the tensors alive at the peak are

    eager                 log-softmax, its gradient, the logits' gradient    3 L
    eager, float32 loss   these in float32, and the logits                   3 L32 + L
    torch.compile         the logits, which become their gradient            L + X + W
    cross_entropy         the logits, their gradient                         2 L
      inplace_backward    the gradient over the logits                       L + X + W
    linear_cross_entropy  a chunk of logits, the gradients                   C + X + W
      in several chunks   those, the weight's added up in float32            X + W32 + max(C, W)

(where that is more, a logits path's peak is the product for the weight's gradient: L + X + W).
Hidden states and weight themselves are not counted in a peak: any way of computing needs them. What
an allocator rounds up and a matrix product's workspace come on top.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from . import checks
from .ops.chunks import WIDE_BYTES, default_rows, padded_row_bytes

CHUNKS = (None, 64 << 20, 1 << 30)  # bytes of logits at a time; None: the default
_MOST_TOKENS = 1 << 40


class HeadShape(NamedTuple):
    """A head: its sizes, its dtype, and what it does to logits."""

    vocab_size: int
    hidden_size: int
    dtype: torch.dtype = torch.bfloat16
    softcap: float | None = None
    logit_scale: float = 1.0

    @property
    def weight_bytes(self) -> int:
        return self.vocab_size * self.hidden_size * self.dtype.itemsize


class Estimate(NamedTuple):
    """One way to compute head and loss, and what it takes."""

    name: str
    peak_bytes: int  # of the batch asked for, beside hidden states and weight
    largest_batch: int | None  # tokens that fit the memory; None: none was given
    code: str


class _Way(NamedTuple):
    name: str
    code: str
    peak: Callable[[HeadShape, int, str], int]
    bound: Callable[[HeadShape, int, str], int]  # of the peaks of all batches up to that


def plan(
    head: HeadShape,
    tokens: int,
    *,
    memory: int | None = None,
    device: str = "cuda",
) -> list[Estimate]:
    """What each way to compute head and loss takes at its peak, in training.

    Args:
        head: the head's sizes, see :func:`head_of_config`.
        tokens: N, of a batch.
        memory: bytes for hidden states, weight and all that the loss adds; by it `largest_batch`.
        device: "cuda" or "cpu", whose defaults differ.

    Returns:
        An estimate for eager, compiled and this library's ways, in that order.

    Raises:
        TypeError, ValueError: a size that is not a positive int, an unknown device,
            a softcap or logit scale that is none.
    """
    checks.plan_sizes(vocab_size=head.vocab_size, hidden_size=head.hidden_size, tokens=tokens)
    checks.plan_device(device)
    checks.plan_dtype(head.dtype)
    checks.softcap(head.softcap)
    checks.logit_scale(head.logit_scale)
    if memory is not None:
        checks.plan_sizes(memory=memory)
    return [
        Estimate(
            way.name,
            way.peak(head, tokens, device),
            None if memory is None else _largest_batch(way, head, device, memory),
            way.code,
        )
        for way in _ways(head)
    ]


def best(estimates: list[Estimate]) -> Estimate:
    """The one of this library's that takes least, as exact as any, in chunks of the default size.

    Where the memory is known, the one that fits most tokens. Plain `linear_cross_entropy` where
    another takes at most a tenth less: it grows least with the batch. Smaller chunks take less,
    and more time.
    """
    chosen = ("acc_dtype", "chunk_bytes")
    ours = [e for e in estimates if e.code and not any(c in e.code for c in chosen)]
    if any(e.largest_batch for e in ours):
        return max(ours, key=lambda e: e.largest_batch or 0)
    least = min(e.peak_bytes for e in ours)
    close = [e for e in ours if e.peak_bytes <= 1.1 * least]
    return next((e for e in close if e.name == "linear_cross_entropy"), close[0])


def head_of_config(
    config: Mapping[str, Any] | str | Path,
    *,
    vocab_size: int | None = None,
    hidden_size: int | None = None,
    dtype: torch.dtype | None = None,
) -> HeadShape:
    """The head of a Hugging Face config: its dict, its JSON file, or the folder that holds one.

    Args:
        config: read for the softcap and the logit scale, and for what is not given:
        vocab_size, hidden_size, dtype: stand for the config's, which then need not be right.

    Raises:
        TypeError, ValueError: no such file, no JSON; no vocabulary or hidden size in it, or
            a value that is none.
    """
    if not isinstance(config, Mapping):
        config = _read(Path(config))
    nested = config.get("text_config")
    text = {**config, **nested} if isinstance(nested, Mapping) else config
    if vocab_size is None:
        vocab_size = checks.config_size(text, "vocabulary size", ("vocab_size",))
    if hidden_size is None:
        keys = ("hidden_size", "n_embd", "d_model", "dim")
        hidden_size = checks.config_size(text, "hidden size", keys)
    if dtype is None:
        dtype = checks.config_dtype(text.get("dtype") or text.get("torch_dtype"))
    softcap = checks.config_factor(text, "final_logit_softcapping")
    scale = checks.config_factor(text, "logit_scale") or 1.0
    divisor = checks.config_factor(text, "logits_scaling") or 1.0  # Granite's
    return HeadShape(vocab_size, hidden_size, dtype, softcap, scale / divisor)


def _read(path: Path) -> Mapping[str, Any]:
    if path.is_dir():
        path = path / "config.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise checks.unreadable_config(path, error.strerror or str(error)) from error
    except ValueError as error:
        raise checks.unreadable_config(path, "it holds no JSON") from error
    if not isinstance(content, Mapping):
        raise checks.unreadable_config(path, "it holds no JSON object")
    return content


# Peaks


def _ways(head: HeadShape) -> Iterator[_Way]:
    yield _Way("eager", "", _eager, _eager)
    if head.dtype.itemsize < 4:
        yield _Way("eager, float32 loss (transformers)", "", _eager_in_float32, _eager_in_float32)
    yield _Way("torch.compile", "", _compiled, _compiled)
    options = _head_options(head)
    logits = "cross_entropy(lm_head(hidden), labels, dim=-1"
    yield _Way("cross_entropy", f"{logits}{options})", _logits, _logits)
    yield _Way(
        "cross_entropy, in place", f"{logits}, inplace_backward=True{options})",
        _logits_in_place, _logits_in_place,
    )  # fmt: skip
    linear = "linear_cross_entropy(hidden, lm_head.weight, labels"
    for size in CHUNKS:
        name = "linear_cross_entropy"
        chunk = ""
        if size is not None:
            name, chunk = f"{name}, {size >> 20} MiB", f", chunk_bytes={size >> 20} << 20"
        yield _Way(
            name, f"{linear}{chunk}{options})",
            partial(_linear, size, True, True), partial(_linear, size, True, False),
        )  # fmt: skip
    if head.dtype.itemsize < 4:
        dtype = str(head.dtype)
        yield _Way(
            f"linear_cross_entropy, sums in {dtype.removeprefix('torch.')}",
            f"{linear}, acc_dtype={dtype}{options})",
            partial(_linear, None, False, True), partial(_linear, None, False, False),
        )  # fmt: skip


def _head_options(head: HeadShape) -> str:
    softcap = "" if head.softcap is None else f", softcap={head.softcap}"
    return softcap + ("" if head.logit_scale == 1.0 else f", logit_scale={head.logit_scale}")


def _sizes(head: HeadShape, tokens: int) -> tuple[int, int]:
    """Bytes of the logits, and of the gradients of hidden states and weight."""
    size = head.dtype.itemsize
    return (
        tokens * head.vocab_size * size,
        tokens * head.hidden_size * size + head.weight_bytes,
    )


def _eager(head: HeadShape, tokens: int, device: str) -> int:
    logits, gradients = _sizes(head, tokens)
    return max(3 * logits, logits + gradients) + _kept_for_tanh(head, logits)


def _eager_in_float32(head: HeadShape, tokens: int, device: str) -> int:
    logits, gradients = _sizes(head, tokens)
    wide = logits * 4 // head.dtype.itemsize
    peak = max(3 * wide + logits, 2 * logits + gradients)  # the model's output holds the logits
    return peak + _kept_for_tanh(head, logits)


def _kept_for_tanh(head: HeadShape, logits: int) -> int:
    """Eager saves tanh's result for backward."""
    return 0 if head.softcap is None else logits


def _compiled(head: HeadShape, tokens: int, device: str) -> int:
    logits, gradients = _sizes(head, tokens)
    return logits + gradients


def _logits(head: HeadShape, tokens: int, device: str) -> int:
    logits, gradients = _sizes(head, tokens)
    return max(2 * logits, logits + gradients)


def _logits_in_place(head: HeadShape, tokens: int, device: str) -> int:
    logits, gradients = _sizes(head, tokens)
    return logits + gradients


def _linear(
    chunk_bytes: int | None, wide_sums: bool, even: bool, head: HeadShape, tokens: int, device: str
) -> int:
    """`even`: in chunks of like size; else the most that any batch up to `tokens` may hold."""
    row = padded_row_bytes(head.vocab_size, head.dtype.itemsize)
    if chunk_bytes is not None:
        whole = most = max(1, chunk_bytes // row)
    else:
        whole, most = (default_rows(n, row, device) for n in (0, tokens))
    if tokens <= whole:
        return _one_walk(head, tokens, tokens, False, device)
    rows = -(-tokens // -(-tokens // most)) if even else most
    peak = _one_walk(head, tokens, rows, wide_sums, device)
    return peak if even else max(peak, _one_walk(head, whole, whole, False, device))


def _one_walk(head: HeadShape, tokens: int, rows: int, wide_sums: bool, device: str) -> int:
    """The peak where chunks of so many rows are walked, and what they add to one sum."""
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


def _largest_batch(way: _Way, head: HeadShape, device: str, memory: int) -> int:
    """The most tokens such that they, and all fewer ones, fit."""
    of_token = head.hidden_size * head.dtype.itemsize

    def fits(tokens: int) -> bool:
        return head.weight_bytes + tokens * of_token + way.bound(head, tokens, device) <= memory

    low, high = 0, _MOST_TOKENS
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low
