"""The CPU backend: allocate outputs, collect addresses, and call the kernels in C."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .. import checks
from ..core.gradient import Coefficients
from ..core.head import COMPUTE_DTYPE, Head
from ..core.row_stats import UNIFORM, ClassWeights, Part, RowStatistics, TokenStats
from . import cpu_library
from .cpu_library import DTYPES, JOB, POINTERS
from .strided_rows import strided_rows

_STATISTICS, _PARTS, _GRADIENT, _LOSS_AND_GRADIENT = range(4)
_NO_ROWS = (0, 0, 0, 0, 0)


def row_statistics(
    input: Tensor,
    target: Tensor,
    ignore_index: int,
    vocab_size: int,
    head: Head,
    weights: ClassWeights = UNIFORM,
    *,
    entropy: bool,
    mean_logprob: bool,
    rank: bool,
    argmax: bool,
) -> RowStatistics:
    """Return the statistics of every row, [rows]."""
    dtype, integers = COMPUTE_DTYPE[input.dtype], torch.int64
    rows = target.numel()

    def new(wanted: bool, dtype: torch.dtype) -> Tensor | None:
        return torch.empty(rows, dtype=dtype, device=input.device) if wanted else None

    lse, logprob, lse_low = (torch.empty(rows, dtype=dtype, device=input.device) for _ in range(3))
    weights = weights if mean_logprob else UNIFORM
    stats = TokenStats(
        lse, logprob, new(entropy, dtype), new(mean_logprob, dtype),
        new(rank, integers), new(argmax, integers),
    )  # fmt: skip
    weight_sum = new(weights is not UNIFORM, dtype)
    numbers = dict(stats._asdict(), lse_low=lse_low, weight_sum=weight_sum)
    _run(_STATISTICS, input, None, target, ignore_index, vocab_size, head, weights, numbers)
    return RowStatistics(stats, lse_low, weight_sum)


def row_part(
    input: Tensor,
    target: Tensor,
    ignore_index: int,
    vocab_size: int,
    head: Head,
    *,
    entropy: bool,
    mean_logprob: bool,
    argmax: bool,
) -> tuple[Part, Tensor]:
    """Return the sums of every row over a shard, and the target's logit (-inf if elsewhere)."""
    dtype, rows = COMPUTE_DTYPE[input.dtype], target.numel()

    def new(dtype: torch.dtype) -> Tensor:
        return torch.empty(rows, dtype=dtype, device=input.device)

    m, s, weight_sum, target_logit = (new(dtype) for _ in range(4))
    ez_sum = new(dtype) if entropy else None
    logit_sum = new(dtype) if mean_logprob else None
    best_class = new(torch.int64) if argmax else None
    part = Part(m, s, ez_sum, logit_sum, weight_sum if mean_logprob else None, None, best_class)
    numbers = dict(
        m=m, s=s, ez_sum=ez_sum, logit_sum=logit_sum, weight_sum=weight_sum, argmax=best_class,
        target_logit=target_logit,
    )  # fmt: skip
    _run(_PARTS, input, None, target, ignore_index, vocab_size, head, UNIFORM, numbers, shard=True)
    return part, target_logit


def logits_gradient(
    input: Tensor,
    target: Tensor,
    lse: Tensor,
    logprob: Tensor,
    lse_low: Tensor,
    coefficients: Coefficients,
    ignore_index: int,
    vocab_size: int,
    head: Head,
    weights: ClassWeights = UNIFORM,
    *,
    inplace: bool,
    shard: bool = False,
) -> Tensor:
    """Return dL/dinput, in a new tensor or written over `input`."""
    grad = input if inplace else torch.empty_like(input)
    weights = UNIFORM if coefficients.u is None else weights
    numbers = dict(coefficients._asdict(), lse=lse, logprob=logprob, lse_low=lse_low)
    _run(
        _GRADIENT, input, grad, target, ignore_index, vocab_size, head, weights, numbers,
        shard=shard,
    )  # fmt: skip
    return grad


def loss_and_gradient(
    input: Tensor,
    target: Tensor,
    token_weight: Tensor | None,
    divisor: Tensor | None,
    label_smoothing: float,
    z_loss_weight: float,
    ignore_index: int,
    vocab_size: int,
    head: Head,
    *,
    inplace: bool,
    stats: TokenStats | None = None,  # memory [rows] each, written
) -> tuple[Tensor, Tensor]:
    """Return each token's loss [rows], and the gradient of loss * token_weight / divisor.

    The losses are not weighted. The gradient is in a new tensor or written over `input`. Each row
    is visited once.
    """
    grad = input if inplace else torch.empty_like(input)
    dtype = COMPUTE_DTYPE[input.dtype]
    loss, *rows = (torch.empty(target.numel(), dtype=dtype, device=input.device) for _ in range(4))
    names = ("lse", "logprob", "lse_low", "loss", "token_weight")
    numbers = dict(zip(names, (*rows, loss, token_weight), strict=True))
    if stats is not None:
        numbers |= stats._asdict()
    _run(
        _LOSS_AND_GRADIENT, input, grad, target, ignore_index, vocab_size, head, UNIFORM, numbers,
        divisor=1.0 if divisor is None else float(divisor),
        label_smoothing=label_smoothing, z_loss_weight=z_loss_weight,
    )  # fmt: skip
    return loss, grad


def _run(
    kind: int,
    input: Tensor,
    grad: Tensor | None,
    target: Tensor,
    ignore_index: int,
    vocab_size: int,
    head: Head,
    weights: ClassWeights,
    numbers: dict[str, Tensor | None],  # [rows] each; keys are fields of `Job`
    *,
    shard: bool = False,
    divisor: float = 1.0,
    label_smoothing: float = 0.0,
    z_loss_weight: float = 0.0,
) -> None:
    """Pack the arguments into a `Job` and run it."""
    library = cpu_library.LIBRARY
    assert library is not None
    dtype = COMPUTE_DTYPE[input.dtype]
    if grad is not input:
        input = input.resolve_neg()
    if target.dtype != torch.int64 or not target.is_contiguous():
        target = target.long().contiguous()
    # Keep the converted tensors alive until the call has ended.
    operands = {name: _as_stored(t, dtype) for name, t in numbers.items() if t is not None}
    operands["target"] = target
    class_weight = None if weights.weight is None else _as_stored(weights.weight, dtype)
    class_weight_address = 0 if class_weight is None else class_weight.data_ptr()
    doubles = (
        divisor, label_smoothing, z_loss_weight,
        head.softcap or 0.0, head.logit_scale, weights.scale, weights.shift,
    )  # fmt: skip
    integers = (
        vocab_size, input.shape[-1], ignore_index, kind, shard, torch.get_num_threads(),
    )  # fmt: skip
    for first, shape, rows in _addresses(input, grad, weights.prob):
        pointers = [
            t.data_ptr() + first * t.element_size() if (t := operands.get(name)) is not None else 0
            for name in POINTERS
        ]
        job = JOB.pack(*rows, class_weight_address, *pointers, *doubles, *shape, *integers)
        if library.chunked_ce_run(job):
            checks.targets_in_range(target.view(-1), vocab_size, ignore_index)
            raise AssertionError("a target was changed during the call")


def _as_stored(t: Tensor, dtype: torch.dtype) -> Tensor:
    """Return `t` contiguous. Integers keep their dtype, other numbers become `dtype`."""
    if t.dtype in (dtype, torch.int64) and t.is_contiguous() and not t.is_neg():
        return t
    return t.detach().to(dtype).resolve_neg().contiguous()


def _addresses(*tensors: Tensor | None) -> Iterator[tuple[int, tuple[int, int], list[int]]]:
    """Yield (first row, (outer, inner), fields of a `Rows` per tensor), once if strides allow."""
    present = [t for t in tensors if t is not None]
    if not all(t.data_ptr() or t.numel() == 0 for t in present):
        raise ValueError("logits without memory, as fake tensors are: pass backend='torch'")
    if all(t.is_contiguous() for t in present):
        columns = present[0].shape[-1]
        rows: list[int] = []
        for t in tensors:
            rows += _NO_ROWS if t is None else (t.data_ptr(), 0, t.shape[-1], 1, DTYPES[t.dtype])
        yield 0, (1, present[0].numel() // columns), rows
        return
    for flat, views in strided_rows(*present):
        remaining, rows = iter(views), []
        for t in tensors:
            if t is None:
                rows += _NO_ROWS
                continue
            view = next(remaining)
            start = view.data.data_ptr() + view.offset * view.data.element_size()
            rows += (start, *view.stride, DTYPES[t.dtype])
        yield flat.start, views[0].shape[:2], rows
