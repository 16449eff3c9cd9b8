"""Divergences of two rows of logits, by the kernels in C."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from ..core.divergence import KINDS, Divergence, PairStats
from ..core.head import COMPUTE_DTYPE
from . import cpu_library
from .cpu_library import DTYPES, Pair, Rows
from .strided_rows import strided_rows


def pair_stats(
    input: Tensor,  # [..., V] logits of the student
    teacher: Tensor,  # [..., at least vocab_size]
    ignored: Tensor | None,  # [rows]
    how: Divergence,
    vocab_size: int,
) -> PairStats:
    """Return the statistics of every pair of rows, flat."""
    rows, dtype = input.shape[:-1].numel(), COMPUTE_DTYPE[input.dtype]
    stats = PairStats(*(torch.empty(rows, dtype=dtype) for _ in PairStats._fields))
    _run(input, teacher, None, ignored, stats, None, how, vocab_size)
    return stats


def pair_terms(
    input: Tensor,
    teacher: Tensor,
    ignored: Tensor | None,  # [rows]
    stats: PairStats,
    how: Divergence,
    vocab_size: int,
) -> PairStats:
    """Return the statistics with `loss` and `student_kl` of these classes, flat."""
    stats = PairStats(*(t.clone(memory_format=torch.contiguous_format) for t in stats))
    _run(input, teacher, None, ignored, stats, None, how, vocab_size, has_norms=True)
    return stats


def pair_gradient(
    input: Tensor,
    teacher: Tensor,
    ignored: Tensor | None,  # [rows]
    stats: PairStats,
    upstream: Tensor,  # [rows]
    how: Divergence,
    vocab_size: int,
    *,
    inplace: bool = False,
) -> Tensor:
    """Return dL/dinput, in a new tensor or over `input`."""
    grad = input if inplace else torch.empty_like(input)
    upstream = upstream.to(COMPUTE_DTYPE[input.dtype]).resolve_neg().contiguous()
    stats = PairStats(*(t.contiguous() for t in stats))
    _run(input, teacher, grad, ignored, stats, upstream, how, vocab_size)
    return grad


def _run(
    input: Tensor,
    teacher: Tensor,
    grad: Tensor | None,
    ignored: Tensor | None,
    stats: PairStats,
    upstream: Tensor | None,
    how: Divergence,
    vocab_size: int,
    has_norms: bool = False,
) -> None:
    library = cpu_library.LIBRARY
    assert library is not None
    columns = input.shape[-1]
    given = dict(x=input if grad is input else input.resolve_neg(), teacher=teacher.resolve_neg())
    if grad is not None:
        given["grad"] = grad
    if not all(t.data_ptr() for t in given.values()):
        raise ValueError("logits without memory, as fake tensors are: pass backend='torch'")
    numbers = dict(stats._asdict(), upstream=upstream)
    if ignored is not None:
        numbers["ignored"] = ignored.contiguous().view(torch.uint8)
    for flat, views in strided_rows(*given.values()):
        job = Pair(
            outer=views[0].shape[0], inner=views[0].shape[1], columns=columns,
            vocab_size=vocab_size, kind=KINDS.index(how.kind), beta=how.beta,
            temperature=how.temperature, threads=torch.get_num_threads(), has_norms=has_norms,
        )  # fmt: skip
        for name, view in zip(given, views, strict=True):
            start = view.data.data_ptr() + view.offset * view.data.element_size()
            setattr(job, name, Rows(start, view.stride, DTYPES[view.data.dtype]))
        for name, t in numbers.items():
            if t is not None:
                setattr(job, name, t.data_ptr() + flat.start * t.element_size())
        library.chunked_ce_pair(ctypes.byref(job))
