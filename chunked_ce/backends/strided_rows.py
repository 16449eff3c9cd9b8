"""Addresses of rows: a pointer aligned to 16 bytes, an offset and three strides."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any, NamedTuple

from torch import Tensor

from ..core.row_stats import ClassWeights
from ..kernels.arguments import Address, Weights, encode


class Rows(NamedTuple):
    """Rows [outer, inner, V]. Element (i, j, v) is at offset + i stride[0] + j stride[1] + ..."""

    data: Tensor  # starts at the 16-byte boundary at or before the first element
    offset: int
    shape: tuple[int, int, int]
    stride: tuple[int, int, int]

    def alignment(self) -> tuple[int, int, int]:
        """Return where rows start within 16 bytes. Equal results mean that all rows align."""
        width = 16 // self.data.element_size()
        outer, inner = (
            0 if size == 1 else stride % width
            for size, stride in zip(self.shape, self.stride[:2], strict=False)
        )
        return self.offset % width, outer, inner

    def is_aligned_as(self, other: Rows) -> bool:
        """Return whether the same classes of both are aligned to 16 bytes."""
        return (
            self.stride[2] == other.stride[2] == 1
            and self.data.element_size() == other.data.element_size()
            and self.alignment() == other.alignment()
        )

    def address(self) -> Address:
        """Return the Address that the kernels take."""
        return Address(self.data, *encode(self.offset, *self.stride))


def strided_rows(*tensors: Tensor) -> Iterator[tuple[slice, list[Rows]]]:
    """Yield (slice of flat rows, one `Rows` per tensor) for tensors of one shape [..., V].

    It almost always yields once, because leading dimensions are merged if their strides allow.
    """
    sizes: list[int] = []
    strides: list[list[int]] = []
    for dim, size in enumerate(tensors[0].shape[:-1]):
        dim_strides = [t.stride(dim) for t in tensors]
        if size == 1:
            continue
        if sizes and all(
            above == size * stride for above, stride in zip(strides[-1], dim_strides, strict=True)
        ):
            sizes[-1] *= size
            strides[-1] = dim_strides
        else:
            sizes.append(size)
            strides.append(dim_strides)
    while len(sizes) < 2:
        sizes.insert(0, 1)
        strides.insert(0, [0] * len(tensors))
    rows = sizes[-2] * sizes[-1]
    for piece, index in enumerate(product(*(range(size) for size in sizes[:-2]))):
        views = []
        for i, t in enumerate(tensors):
            start = sum(k * s[i] for k, s in zip(index, strides, strict=False))
            shape = (sizes[-2], sizes[-1], t.shape[-1])
            views.append(_rows(t, start, shape, (strides[-2][i], strides[-1][i], t.stride(-1))))
        yield slice(piece * rows, (piece + 1) * rows), views


def _rows(t: Tensor, start: int, shape: tuple[int, int, int], stride: tuple[int, int, int]) -> Rows:
    past_boundary = (t.data_ptr() + start * t.element_size()) % 16 // t.element_size()
    first = int(t.storage_offset()) + start
    offset = min(past_boundary, first)
    extent = offset + 1 + sum((n - 1) * s for n, s in zip(shape, stride, strict=True))
    return Rows(t.as_strided((extent,), (1,), first - offset), offset, shape, stride)


def rows_with_prob(weights: ClassWeights, *tensors: Tensor) -> Iterator[tuple[slice, list[Rows]]]:
    """Yield `strided_rows` of the tensors, followed by the probabilities if there are any."""
    return strided_rows(*tensors, *(() if weights.prob is None else (weights.prob,)))


def gradient_addresses(x: Rows, grad: Rows) -> dict[str, Any]:
    """Return the arguments that tell a kernel where logits and gradient are."""
    return dict(
        x=x.address(),
        grad=grad.address(),
        inner_rows=x.shape[1],
        columns_in_memory=x.shape[2],
    )


def gradient_options(x: Rows, grad: Rows, vocab_size: int) -> dict[str, bool]:
    """Return the options of the layout of logits and gradient."""
    return dict(
        CONTIGUOUS=x.stride[2] == 1,
        GRAD_CONTIGUOUS=grad.stride[2] == 1,
        GRAD_ALIGNED=grad.is_aligned_as(x),
        PADDED=vocab_size < x.shape[2],
    )


def kernel_weights(weights: ClassWeights, x: Address, prob: list[Rows]) -> Weights:
    """Return the Weights that the kernels take. The logits stand in for absent tensors."""
    w = x.ptr if weights.weight is None else weights.weight.contiguous()
    return Weights(w, *(prob[0].address() if prob else x))


def weight_options(weights: ClassWeights, x: Rows, prob: list[Rows]) -> dict[str, bool]:
    """Return the options of the class weights and of the layout of probabilities."""
    return dict(
        **weight_presence(weights),
        PROB_CONTIGUOUS=bool(prob) and prob[0].stride[2] == 1,
        PROB_ALIGNED=bool(prob) and prob[0].is_aligned_as(x),
    )


def weight_presence(weights: ClassWeights) -> dict[str, bool]:
    """Return the options that say which factors of the class weights are present."""
    return dict(HAS_WEIGHT=weights.weight is not None, HAS_PROB=weights.prob is not None)
