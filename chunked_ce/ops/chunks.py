"""A chunk of tokens at a time: which tokens, their logits, and the sums their gradients go into."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..checks.values import is_dtensor
from ..core.head import COMPUTE_DTYPE
from ..core.reduction import is_scored

Index = slice | Tensor

PRODUCT_BYTES = 256 << 20
"""Of a product for the weight's gradient where no product can add to its sum."""

WIDE_BYTES = 16 << 20
"""Of a copy in a wider dtype, for a product on a CPU: it stays in the cache."""

CHUNK_ROWS = 4096
"""Tokens at a time on an accelerator. The traffic of the weight gradient's sum takes about
355 / rows of the products' time on an H100, whatever the vocabulary."""

WHOLE_BYTES = 1 << 30
"""Of logits that an accelerator takes in one chunk, whatever the number of tokens."""

CHUNK_BYTES, _CPU_CHUNK_BYTES = 256 << 20, 128 << 20
"""Of logits that a CPU takes in one chunk, and of a chunk of more: products need workspace."""


def padded_row_bytes(vocab_size: int, itemsize: int) -> int:
    """Of a token's logits in a chunk, whose rows start on 128 bytes."""
    return -(-vocab_size * itemsize // 128) * 128


def default_rows(tokens: int, row_bytes: int, device_type: str) -> int:
    """Return the most tokens in a chunk; never fewer than all that fit one chunk."""
    whole = CHUNK_BYTES if device_type == "cpu" else WHOLE_BYTES
    if tokens * row_bytes <= whole:
        return max(1, whole // row_bytes)  # no function of `tokens`, which may be symbolic
    return max(1, _CPU_CHUNK_BYTES // row_bytes) if device_type == "cpu" else CHUNK_ROWS


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


def chunks_of(
    target: Tensor,
    ignore_index: int,
    rows: int,
    drop_ignored: bool,
    vocab_size: int,
    dtype: torch.dtype,
) -> list[Index]:
    """Return `chunk_indices`; 0 `rows` are the default, which a tracer cannot know."""
    if not rows:
        row_bytes = padded_row_bytes(vocab_size, dtype.itemsize)
        rows = default_rows(target.numel(), row_bytes, target.device.type)
    return chunk_indices(target, ignore_index, rows, drop_ignored)


class Logits:
    """Logits of one chunk after another, in one buffer whose rows start on 128 bytes.

    An odd vocabulary would slow down the product, and the kernels' accesses.
    """

    def __init__(
        self, weight: Tensor, bias: Tensor | None, rows: int, dtype: torch.dtype | None = None
    ) -> None:
        self.weight, self.bias = weight, bias
        dtype = weight.dtype if dtype is None else dtype
        padded = padded_row_bytes(weight.shape[0], dtype.itemsize) // dtype.itemsize
        self.buffer = weight.new_empty(rows, padded, dtype=dtype)
        # No result depends on the padding, unless it is NaN: some bf16 products on a CPU read it.
        self.buffer[:, weight.shape[0] :].zero_()

    def of(self, x: Tensor) -> Tensor:
        """[R, V] of hidden states [R, D]."""
        out = self.buffer[: x.shape[0], : self.weight.shape[0]]
        if out.dtype == x.dtype:
            if self.bias is None:
                return torch.mm(x, self.weight.t(), out=out)
            return torch.addmm(self.bias, x, self.weight.t(), out=out)
        if has_wide_products(x, out.dtype):
            torch.mm(x, self.weight.t(), out_dtype=out.dtype, out=out)
        else:
            x = x.to(out.dtype)
            for w, part in _class_slices(self.weight, out):
                torch.mm(x, w.to(out.dtype).t(), out=part)
        return out if self.bias is None else out.add_(self.bias)


def _class_slices(weight: Tensor, logits: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """(rows of the weight, columns of the logits), so few that a wider copy of either is small."""
    classes = max(1, WIDE_BYTES // (max(weight.shape[1], logits.shape[0]) * 4))
    return zip(weight.split(classes), logits.split(classes, 1), strict=True)


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
        self.whole_weight, self.of_bias = weight, gradient_like(bias, for_bias)
        self.sum: Tensor | None = None  # [V, D], made by the first chunk
        added_up = len(chunks) > 1 and weight.dtype.itemsize < acc_dtype.itemsize
        self.sum_dtype = acc_dtype if added_up else weight.dtype
        self.bias_sum = self.of_bias.new_zeros(
            vocab_size if for_bias else 0, dtype=COMPUTE_DTYPE[weight.dtype]
        )
        self.wanted = wanted

    def add(self, index: Index, x: Tensor, grad: Tensor) -> None:
        for_input, for_weight, for_bias = self.wanted
        if for_bias:
            self.bias_sum += grad.sum(0, dtype=self.bias_sum.dtype)
        if grad.dtype != x.dtype and has_wide_products(x, grad.dtype):
            grad = grad.to(x.dtype)  # as products want it, which then sum in fp32
        if for_input:
            if isinstance(index, slice) and grad.dtype == x.dtype:
                torch.mm(grad, self.weight, out=self.input[index])
            elif isinstance(index, slice):
                self.input[index].copy_(input_gradient(grad, self.weight))
            else:
                self.input.index_copy_(0, index, input_gradient(grad, self.weight))
        if for_weight:
            first = self.sum is None
            if self.sum is None:
                shape = self.whole_weight.shape
                rows = self.vocab_size if self.sum_dtype != self.weight.dtype else shape[0]
                self.sum = grad.new_empty(rows, shape[1], dtype=self.sum_dtype)
            add_product(self.sum[: self.vocab_size], grad, x, first=first)

    def finish(self) -> tuple[Tensor, Tensor, Tensor]:
        """Each rounded once to its dtype; columns that do not exist have gradient 0."""
        _, for_weight, for_bias = self.wanted
        of_weight = gradient_like(self.whole_weight, False)
        if for_weight and self.sum is not None and self.sum.dtype == self.whole_weight.dtype:
            of_weight = self.sum
        elif for_weight:
            of_weight = gradient_like(self.whole_weight, True)
            if self.sum is not None:
                of_weight[: self.vocab_size].copy_(self.sum)
        if for_weight:
            of_weight[0 if self.sum is None else self.vocab_size :].zero_()
        if for_bias:
            self.of_bias[: self.vocab_size].copy_(self.bias_sum)
            self.of_bias[self.vocab_size :].zero_()
        return self.input, of_weight, self.of_bias


def input_gradient(grad: Tensor, weight: Tensor) -> Tensor:
    """Return grad [R, V] times weight [V, D], in the weight's dtype."""
    if grad.dtype == weight.dtype:
        return grad @ weight
    sum = grad.new_zeros(grad.shape[0], weight.shape[1])
    for w, part in _class_slices(weight, grad):
        sum.addmm_(part, w.to(sum.dtype))
    return sum.to(weight.dtype)


def add_product(sum: Tensor, grad: Tensor, x: Tensor, *, first: bool) -> None:
    """Write grad [R, V]^T x [R, D] to `sum` [V, D], or add it; rounded to the sum's dtype only."""
    in_full = grad.dtype == x.dtype and has_wide_products(x, sum.dtype)
    if sum.dtype == x.dtype == grad.dtype:
        torch.mm(grad.t(), x, out=sum) if first else sum.addmm_(grad.t(), x)
    elif in_full and first:
        torch.mm(grad.t(), x, out_dtype=sum.dtype, out=sum)
    elif in_full and adds_in_products(x):
        torch.addmm(sum, grad.t(), x, out_dtype=sum.dtype, out=sum)
    elif grad.dtype != x.dtype or (x.device.type == "cpu" and not in_full):
        x = x.to(torch.promote_types(sum.dtype, grad.dtype))
        for of_classes, part in _class_slices(sum, grad):
            part = part.to(x.dtype).t()
            if of_classes.dtype != x.dtype:
                of_classes.copy_(part @ x) if first else of_classes.add_(part @ x)
            else:
                torch.mm(part, x, out=of_classes) if first else of_classes.addmm_(part, x)
    else:
        classes = max(1, PRODUCT_BYTES // (x.shape[1] * sum.element_size()))
        for part, of_classes in zip(grad.split(classes, 1), sum.split(classes), strict=True):
            if in_full:
                product = torch.mm(part.t(), x, out_dtype=sum.dtype)
            else:
                product = torch.mm(part.t(), x)
            of_classes.copy_(product) if first else of_classes.add_(product)


def gradient_like(t: Tensor | None, wanted: bool) -> Tensor:
    """Memory for a gradient of `t`; an empty tensor where none is wanted."""
    if t is None or not wanted:
        return torch.empty(0) if t is None else t.new_empty(0)
    return torch.empty_like(t, memory_format=torch.contiguous_format)


def scale_gradients(
    grads: Sequence[Tensor | None],
    wanted: Sequence[bool],
    upstream: Tensor | None,  # []; None: 1
    backend: str,
    *,
    reuse: bool,
) -> list[Tensor | None]:
    """Return the gradients times `upstream`, in their own memory if `reuse`; None if not wanted."""
    scaled: list[Tensor | None] = []
    for grad, want in zip(grads, wanted, strict=True):
        if grad is None or not want:
            scaled.append(None)
        elif upstream is None:
            scaled.append(grad)
        elif reuse:
            piece = grad.to_local() if is_dtensor(grad) else grad  # type: ignore[attr-defined]
            rows = piece.detach() if piece.dim() > 1 else piece.detach().view(1, -1)
            torch.ops.chunked_ce.scale_(rows, upstream.to(grad.device), backend)
            scaled.append(grad)
        else:
            scaled.append((grad * upstream).to(grad.dtype))
    return scaled


def has_wide_products(x: Tensor, dtype: torch.dtype) -> bool:
    """Whether a product of half-precision tensors like `x` can stay in `dtype`."""
    return (
        x.device.type == "cuda"
        and dtype == torch.float32
        and "dtype_out" in torch.ops.aten.mm.overloads()
    )


def adds_in_products(x: Tensor) -> bool:
    """Whether such a product can be added to a sum in fp32 as it is made."""
    return _adds_in_products(x.device, x.dtype)


@functools.cache
def _adds_in_products(device: torch.device, dtype: torch.dtype) -> bool:
    """Try it: the first releases of torch with `out_dtype` want a sum of the operands' dtype."""
    if "dtype_out" not in torch.ops.aten.addmm.overloads():
        return False
    a, sum = (torch.zeros(16, 16, dtype=d, device=device) for d in (dtype, torch.float32))
    try:
        torch.addmm(sum, a, a, out_dtype=torch.float32, out=sum)
    except (RuntimeError, TypeError):
        return False
    return True


def walk(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    vocab_size: int,
    chunks: list[Index],
    ignored: Tensor | None,  # [N]; None: no chunk holds any
    dtype: torch.dtype | None = None,  # of the logits; None: the weight's
) -> Iterator[tuple[Index, Tensor, Tensor]]:
    """(index, hidden states, logits) of each chunk."""
    if not chunks:
        return
    rows = input[chunks[0]].shape[0]
    bias = None if bias is None else bias[:vocab_size]
    logits = Logits(weight[:vocab_size], bias, rows, dtype)
    for index in chunks:
        x = input[index]
        if ignored is not None:  # 0 times a NaN of theirs would be one in the weight's gradient
            x = x.masked_fill(ignored[index][:, None], 0.0)
        yield index, x, logits.of(x)
