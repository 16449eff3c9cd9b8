"""The ways to compute head and loss: a name, the lines of code, memory and traffic of each."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

from . import memory, traffic
from .head import HeadShape

CHUNKS = (None, 64 << 20)
"""Bytes of logits at a time; None is the default."""


class Way(NamedTuple):
    """One way; `peak` and `bound` are functions of (head, tokens, device)."""

    name: str
    peak: Callable[[HeadShape, int, str], int]
    bound: Callable[[HeadShape, int, str], int]  # of the peaks of all batches up to that
    product_flops: Callable[[HeadShape, int], int]
    traffic_bytes: Callable[[HeadShape, int, str], int]
    code: str = ""
    huggingface: str = ""
    default: bool = False


def ways(head: HeadShape) -> Iterator[Way]:
    """Yield eager, compiled and this library's ways, in that order."""
    yield _of_logits("eager", memory.eager, traffic.eager_traffic)
    if head.dtype.itemsize < 4:
        yield _of_logits(
            "eager, float32 loss (transformers)",
            memory.eager_in_float32,
            traffic.eager_in_float32_traffic,
        )
    yield _of_logits("torch.compile", memory.one_logits_buffer)
    options = _head_options(head)
    logits = "cross_entropy(lm_head(hidden), labels, dim=-1, shift=True"
    yield _of_logits("cross_entropy", memory.two_logits_buffers)._replace(
        code=f"{logits}{options})",
        huggingface="model.loss_function = chunked_ce.huggingface.causal_lm_loss",
        default=True,
    )
    yield _of_logits("cross_entropy, in place", memory.one_logits_buffer)._replace(
        code=f"{logits}, inplace_backward=True{options})", default=True
    )
    for size in CHUNKS:
        yield _linear(size, options)
    if head.dtype.itemsize < 4:
        for size in CHUNKS:
            yield _linear(size, options, sums_in=str(head.dtype))


def _of_logits(
    name: str,
    peak: Callable[[HeadShape, int, str], int],
    traffic_bytes: Callable[[HeadShape, int], int] = traffic.three_passes,
) -> Way:
    return Way(
        name, peak, peak, traffic.product_flops,
        lambda head, tokens, device: traffic_bytes(head, tokens),
    )  # fmt: skip


def _linear(chunk_bytes: int | None, options: str, sums_in: str | None = None) -> Way:
    name, chosen = "linear_cross_entropy", ""
    if chunk_bytes is not None:
        name = f"{name}, {chunk_bytes >> 20} MiB"
        chosen = f", chunk_bytes={chunk_bytes >> 20} << 20"
    if sums_in is not None:
        name = f"{name}, sums in {sums_in.removeprefix('torch.')}"
        chosen += f", acc_dtype={sums_in}"
    wide_sums, default = sums_in is None, chosen == ""
    return Way(
        name,
        partial(memory.linear, chunk_bytes, wide_sums, True),
        partial(memory.linear, chunk_bytes, wide_sums, False),
        lambda head, tokens: traffic.product_flops(head, tokens, traffic.linear_products(head)),
        partial(traffic.linear_traffic, chunk_bytes, wide_sums),
        f"linear_cross_entropy(hidden, lm_head.weight, labels, shift=True{chosen}{options})",
        "chunked_ce.huggingface.enable(model)" if default else "",
        default,
    )


def _head_options(head: HeadShape) -> str:
    softcap = "" if head.softcap is None else f", softcap={head.softcap}"
    return softcap + ("" if head.logit_scale == 1.0 else f", logit_scale={head.logit_scale}")
