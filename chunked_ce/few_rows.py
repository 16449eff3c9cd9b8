"""The loss of few rows on a CPU, where calls take longer than the arithmetic.

Of class indices without options, averaged or added up. The same functions of the same blocks as in
`backend_torch`, and so the same bits, with no operator around them. Whatever is out of the
ordinary is left to the operators.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from . import backend_torch, checks
from .blocks import Head, block_gradient, block_statistics, compute_dtype, lowest_exponent
from .from_zero import all_in_range, relative_to_zero, sample
from .ops import Classes
from .row_blocks import Block, Scratch, blocks, longest_row
from .stats import Coefficients, RowGradient, loss_from_zero, lse_from_zero, row_gradient

# Of more logits what the calls take hardly shows, but what is left to the operators is done twice.
_ELEMENTS = 1 << 22
_HEAD = Head(None, 1.0)


def loss_of_few_rows(
    input: Tensor, target: Tensor, ignore_index: int, reduction: str
) -> Tensor | None:
    """The losses of `input` [N, V], averaged ("mean") or added up; None: ask the operators."""
    if reduction == "none" or not _is_ordinary(input, target):
        return None
    low, high = map(int, target.aminmax())
    if low < 0 or high >= input.shape[1] or low <= ignore_index <= high:
        return None
    x, column = input.detach(), target[:, None]
    lowest, highest = sample(x, None, x.shape[1], _HEAD)
    if not lowest < 0:
        checks.looks_like_logits(input)
    if max(-lowest, highest) > -lowest_exponent(compute_dtype(x.dtype)):
        return None
    z_target = x.gather(1, column).to(compute_dtype(x.dtype))
    e_target = z_target.view(-1).exp()
    if not all_in_range(e_target):
        return None
    s = _sums(x, column, z_target)
    if not all_in_range(s):
        return None
    loss, divisor = loss_from_zero(s, e_target), input.shape[0] if reduction == "mean" else 1
    if not (torch.is_grad_enabled() and input.requires_grad):
        return loss.sum() / divisor
    lse, lse_low = lse_from_zero(s, e_target)
    reduced: Tensor = _Loss.apply(input, target, lse, lse_low, loss, divisor, ignore_index)  # type: ignore[no-untyped-call]
    return reduced


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        *tensors, ctx.divisor, ctx.ignore_index = arguments
        ctx.save_for_backward(*tensors)
        reduced: Tensor = tensors[-1].sum() / ctx.divisor
        return reduced

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        input, target, lse, lse_low, loss = ctx.saved_tensors
        logprob, c = -loss, -(upstream / ctx.divisor)
        grad = None
        batched = torch._C._functorch.is_legacy_batchedtensor(upstream)  # is_grads_batched=True
        if not (torch.is_grad_enabled() or batched or _is_traced()):
            rows = row_gradient(logprob, lse_low, Coefficients(None, None, c, None))
            grad = _gradient(input.detach(), target[:, None], lse, rows)
        if grad is None:
            grad = torch.ops.chunked_ce.token_grad(
                input, target, *Classes(), lse, logprob, lse_low,
                None, None, c.expand_as(lse), None, None,
                ctx.ignore_index, input.shape[1], None, 1.0, "torch",
            )  # fmt: skip
        return grad, *(None,) * 6


def _sums(x: Tensor, column: Tensor, z_target: Tensor) -> Tensor:
    """[N] sum of exp z over the classes but the target."""
    scratch, sums = _scratch(x), []
    for block in _blocks(x):
        x_block = block.of(x)
        part = block_statistics(
            x_block, block.of_rows(column), None, block.of_rows(z_target), _HEAD,
            scratch.like(x_block), False, False, None,
            entropy=False, mean_logprob=False, rank=False, argmax=False,
        )  # fmt: skip
        sums.append(part.s)
    return sums[0] if len(sums) == 1 else torch.cat(sums)


def _gradient(x: Tensor, column: Tensor, lse: Tensor, rows: RowGradient) -> Tensor | None:
    """None where exp z leaves the range of normal numbers."""
    reference, rows = relative_to_zero(lse, rows)
    if reference is not None:
        return None
    out, scale, at_target = torch.empty_like(x), rows.scale[:, None], rows.at_target[:, None]
    in_place = out.dtype == lse.dtype and out.stride(1) == 1
    scratch = None if in_place else _scratch(x)
    for block in _blocks(x):
        x_block, out_block = block.of(x), block.of(out)
        of_rows = RowGradient(block.of_rows(scale), None, None, block.of_rows(at_target))
        buffer = out_block if scratch is None else scratch.like(x_block)
        grad = block_gradient(
            x_block, block.of_rows(column), None, None, of_rows, _HEAD, buffer, False, None
        )
        if grad is not out_block:
            out_block.copy_(grad)
    return out


def _blocks(x: Tensor) -> Iterator[Block]:
    return blocks(x.shape[:1], x.shape[1], backend_torch.CACHED_ELEMENTS)


def _scratch(x: Tensor) -> Scratch:
    return Scratch.of_blocks(x, x.shape[1], backend_torch.CACHED_ELEMENTS)


def _is_ordinary(input: Tensor, target: Tensor) -> bool:
    return (
        type(input) in (Tensor, torch.nn.Parameter)
        and type(target) is Tensor
        and input.is_cpu
        and input.dim() == 2
        and input.stride(1) == 1
        and 0 < input.numel() <= _ELEMENTS
        and input.shape[1] <= longest_row(backend_torch.CACHED_ELEMENTS)
        and target.dtype == torch.int64
        and not _is_traced()
    )


def _is_traced() -> bool:
    """Whether someone looks for operators."""
    return (
        torch.compiler.is_compiling()
        or is_in_torch_dispatch_mode()
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state() is not None
    )
