"""A chunk of tokens at a time: which tokens, their logits, and the sums their gradients go into."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..core.head import compute_dtype
from ..core.reduction import is_scored

Index = slice | Tensor

PRODUCT_BYTES = 256 << 20
"""Of a product for the weight's gradient that is added up: enough for its full speed."""


CHUNK_BYTES = 256 << 20
"""Of logits at a time: large enough for the products' full speed, and to add dW up seldom."""

_CPU_CHUNK_BYTES = 128 << 20
"""On a CPU, where that is not enough for all: products need workspace of their own."""


def padded_row_bytes(vocab_size: int, itemsize: int) -> int:
    """Of a token's logits in a chunk, whose rows start on 128 bytes."""
    return -(-vocab_size * itemsize // 128) * 128


def default_chunk_bytes(logits_bytes: int, device_type: str) -> int:
    """Of logits at a time, where all of them take `logits_bytes`."""
    whole = logits_bytes <= CHUNK_BYTES
    return CHUNK_BYTES if whole or device_type != "cpu" else _CPU_CHUNK_BYTES


def chunk_indices(target: Tensor, ignore_index: int, rows: int, drop_ignored: bool) -> list[Index]:
    """Into the tokens [N], so many `rows` a chunk; the chunks are of like size."""
    kept: Tensor | None = None
    if drop_ignored:
        scored = is_scored(target, ignore_index)
        kept = None if scored.all() else scored.nonzero()[:, 0]
    n = target.numel() if kept is None else kept.numel()
    count = -(-n // rows)
    size = -(-n // count) if count else 1
    starts = range(0, n, size)
    if kept is None:
        return [slice(start, start + size) for start in starts]
    return [kept[start : start + size] for start in starts]


class Logits:
    """Logits of one chunk after another, in one buffer whose rows start on 128 bytes.

    An odd vocabulary would slow down the product, and the kernels' accesses.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, rows: int) -> None:
        self.weight, self.bias = weight, bias
        per_line = 128 // weight.element_size()
        padded = -(-weight.shape[0] // per_line) * per_line
        self.buffer = weight.new_empty(rows, padded)
        # No result depends on the padding, unless it is NaN: some bf16 products on a CPU read it.
        self.buffer[:, weight.shape[0] :].zero_()

    def of(self, x: Tensor) -> Tensor:
        """[R, V] of hidden states [R, D]."""
        out = self.buffer[: x.shape[0], : self.weight.shape[0]]
        if self.bias is None:
            return torch.mm(x, self.weight.t(), out=out)
        return torch.addmm(self.bias, x, self.weight.t(), out=out)


class Gradients:
    """Sums over chunks of what logits' gradients say about input, weight and bias."""

    def __init__(
        self,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        vocab_size: int,
        wanted: list[bool],
        acc_dtype: torch.dtype,
        chunks: list[Index],
    ) -> None:
        for_input, for_weight, for_bias = wanted
        self.weight, self.vocab_size = weight[:vocab_size], vocab_size
        whole = bool(chunks) and isinstance(chunks[0], slice)
        self.input = gradient_like(input, for_input)
        if for_input and not whole:
            self.input.zero_()
        self.whole_weight, self.of_weight = weight, gradient_like(weight, False)
        self.of_bias = gradient_like(bias, for_bias)
        self.sum: Tensor | None = None
        if for_weight and len(chunks) > 1 and weight.dtype.itemsize < acc_dtype.itemsize:
            self.sum = weight.new_zeros(vocab_size, weight.shape[1], dtype=acc_dtype)
        self.bias_sum = self.of_bias.new_zeros(
            vocab_size if for_bias else 0, dtype=compute_dtype(weight.dtype)
        )
        self.wanted, self.seen = wanted, 0
        self.products_in_full = self.sum is not None and products_in_full(weight, acc_dtype)
        if not self.products_in_full:  # else nothing is written to it before the end
            self.of_weight = gradient_like(weight, for_weight)

    def add(self, index: Index, x: Tensor, grad: Tensor) -> None:
        for_input, for_weight, for_bias = self.wanted
        if for_input:
            if isinstance(index, slice):
                torch.mm(grad, self.weight, out=self.input[index])
            else:
                self.input.index_copy_(0, index, grad @ self.weight)
        if for_weight:
            out = self.of_weight[: self.vocab_size]
            if self.sum is not None and self.products_in_full:
                # A product in fp32 is twice the weight: so much of it at a time.
                classes = max(1, PRODUCT_BYTES // (x.shape[1] * self.sum.element_size()))
                for part in zip(grad.split(classes, dim=1), self.sum.split(classes), strict=True):
                    of_classes, sum = part
                    sum.add_(torch.mm(of_classes.t(), x, out_dtype=sum.dtype))
            elif self.sum is not None:
                self.sum.add_(torch.mm(grad.t(), x, out=out))
            elif self.seen == 0:
                torch.mm(grad.t(), x, out=out)
            else:
                out.addmm_(grad.t(), x)
        if for_bias:
            self.bias_sum += grad.sum(0, dtype=self.bias_sum.dtype)
        self.seen += 1

    def finish(self) -> tuple[Tensor, Tensor, Tensor]:
        """Each rounded once to its dtype; columns that do not exist have gradient 0."""
        _, for_weight, for_bias = self.wanted
        if for_weight:
            if self.products_in_full:
                self.of_weight = gradient_like(self.whole_weight, True)
            if self.sum is not None:
                self.of_weight[: self.vocab_size].copy_(self.sum)
            self.of_weight[self.vocab_size if self.seen else 0 :].zero_()
        if for_bias:
            self.of_bias[: self.vocab_size].copy_(self.bias_sum)
            self.of_bias[self.vocab_size :].zero_()
        return self.input, self.of_weight, self.of_bias


def gradient_like(t: Tensor | None, wanted: bool) -> Tensor:
    """Memory for a gradient of `t`; an empty tensor where none is wanted."""
    if t is None or not wanted:
        return torch.empty(0) if t is None else t.new_empty(0)
    return torch.empty_like(t, memory_format=torch.contiguous_format)


def products_in_full(weight: Tensor, acc_dtype: torch.dtype) -> bool:
    """Whether a product of half-precision tensors can stay in fp32, as their sum then does."""
    return (
        weight.device.type == "cuda"
        and acc_dtype == torch.float32
        and "dtype" in torch.ops.aten.mm.overloads()
    )


def walk(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    vocab_size: int,
    chunks: list[Index],
    ignored: Tensor | None,  # [N]; None: no chunk holds any
) -> Iterator[tuple[Index, Tensor, Tensor]]:
    """(index, hidden states, logits) of each chunk."""
    if not chunks:
        return
    rows = input[chunks[0]].shape[0]
    bias = None if bias is None else bias[:vocab_size]
    logits = Logits(weight[:vocab_size], bias, rows)
    for index in chunks:
        x = input[index]
        if ignored is not None:  # 0 times a NaN of theirs would be one in the weight's gradient
            x = x.masked_fill(ignored[index][:, None], 0.0)
        yield index, x, logits.of(x)
