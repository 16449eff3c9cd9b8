"""The loss of few rows on a CPU, where calls take longer than the arithmetic.

Of class indices without options, averaged or added up: one look at the arguments, no operator, and
the fewest of torch's calls. The bits are those of `backend_torch`. Whatever is out of the ordinary
is left to the checks and the operators.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeGuard

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from . import backend_torch, checks
from .blocks import compute_dtype, lowest_exponent, row_sum
from .checks.values import LOGIT_DTYPES
from .from_zero import LARGEST_SUM, SMALLEST_SUM, all_in_range, extremes
from .ops import Classes
from .row_blocks import Block, Scratch, blocks, longest_row
from .stats import loss_from_zero, lse_from_zero

# Of more logits what the calls take hardly shows, but what is left to the operators is done twice.
_ELEMENTS = 1 << 22
_SMALLEST_TOTAL = 0.5  # in a gradient; log 0.5 is in the operators' range for it, by far


def loss_of_few_rows(
    input: object, target: object, ignore_index: object, reduction: object, dim: object
) -> Tensor | None:
    """The losses of `input` [N, V], averaged ("mean") or added up; None: ask the operators.

    Nothing is known of the arguments yet.
    """
    if not (
        _is_tensor(input)
        and _is_tensor(target)
        and _are_ordinary(input, target)
        and type(ignore_index) is type(dim) is int
        and ignore_index.bit_length() < 64
        and dim in (1, -1)
        and type(reduction) is str
        and reduction in ("mean", "sum")
        and not _is_traced()
    ):
        return None
    lowest_target, highest_target = map(int, target.aminmax())
    if lowest_target < 0 or highest_target >= input.shape[1]:
        return None
    if lowest_target <= ignore_index <= highest_target:
        return None
    x = input.detach()
    lowest, highest = _sample(x)
    if not lowest < 0:
        checks.looks_like_logits(input)
    if max(-lowest, highest) > -lowest_exponent(compute_dtype(x.dtype)):
        return None
    column = target.unsqueeze(1)
    s, e_target, left = _exp_sums(x, column)
    smallest, largest = extremes(s)
    if not (SMALLEST_SUM < smallest and largest < LARGEST_SUM and all_in_range(e_target)):
        return None
    loss, divisor = loss_from_zero(s, e_target), len(s) if reduction == "mean" else 1
    if not (torch.is_grad_enabled() and input.requires_grad):
        return _reduced(loss, divisor)
    total = s + e_target
    in_range = smallest > _SMALLEST_TOTAL or float(total.min()) > _SMALLEST_TOTAL
    reduced: Tensor = _Loss.apply(input, column, loss, total, divisor, in_range, left)  # type: ignore[no-untyped-call]
    return reduced


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        *tensors, ctx.divisor, ctx.in_range, ctx.left = arguments
        ctx.save_for_backward(*tensors)  # total and not lse, for 1 / total is exact
        _, _, loss, _ = tensors
        return _reduced(loss, ctx.divisor)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        input, column, loss, total = ctx.saved_tensors
        of_each = upstream / ctx.divisor
        traced = torch.is_grad_enabled() or _is_traced() or _is_batched(upstream)
        if ctx.in_range and not traced:
            scale = total.reciprocal().mul_(of_each)
            at_target = loss.neg().expm1_().mul_(of_each)
            grad = _gradient(input.detach(), column, scale, at_target, ctx.left)
        else:
            lse, lse_low = lse_from_zero(total[:, 0])
            grad = torch.ops.chunked_ce.token_grad(
                input, column[:, 0], *Classes(), lse, -loss[:, 0], lse_low,
                None, None, (-of_each).expand_as(lse), None, None,
                -100, input.shape[1], None, 1.0, "torch",
            )  # fmt: skip
        return grad, *(None,) * 6


def _reduced(loss: Tensor, divisor: int) -> Tensor:
    return loss.sum() if divisor == 1 else loss.mean()


def _exp_sums(x: Tensor, column: Tensor) -> tuple[Tensor, Tensor, object]:
    """Of each row sum exp z over the classes but the target, and exp z of that, [N, 1].

    And by what to know the memory that holds all exp z, where it can.
    """
    scratch, sums, targets = _scratch(x), [], []
    for block in _blocks(x):
        x_block, column_block = block.of(x), block.of_rows(column)
        e = _exp(x_block, scratch.like(x_block))
        targets.append(e.gather(1, column_block))
        sums.append(row_sum(e.scatter_(1, column_block, 0.0), keepdim=True))
    left = scratch.leave()
    if len(sums) == 1:
        return sums[0], targets[0], left
    return torch.cat(sums), torch.cat(targets), None


def _gradient(x: Tensor, column: Tensor, scale: Tensor, at_target: Tensor, left: object) -> Tensor:
    """exp(x) scale, and `at_target` at the targets, whose [N, 1] columns are given."""
    out, scratch = torch.empty_like(x), _scratch(x)
    # A hook of autograd may have laid out the logits anew.
    held = x.stride(1) == 1 and scratch.holds(left)
    direct = out.dtype == scale.dtype and out.stride(1) == 1
    for block in _blocks(x):
        x_block, out_block = block.of(x), block.of(out)
        # exp(x) is in the memory already, or is converted there, or computed in its place.
        e = scratch.like(x_block) if held or not direct else out_block
        if not held:
            _exp(x_block, e)
        grad = torch.mul(e, block.of_rows(scale), out=out_block if direct else e)
        grad.scatter_(1, block.of_rows(column), block.of_rows(at_target))
        if not direct:
            out_block.copy_(grad)
    scratch.leave()
    return out


def _exp(x: Tensor, out: Tensor) -> Tensor:
    return torch.exp(x if x.dtype == out.dtype else out.copy_(x), out=out)


def _blocks(x: Tensor) -> Iterator[Block]:
    return blocks(x.shape[:1], x.shape[1], backend_torch.CACHED_ELEMENTS)


def _scratch(x: Tensor) -> Scratch:
    return Scratch.of_blocks(x, x.shape[1], backend_torch.CACHED_ELEMENTS)


def _sample(x: Tensor) -> tuple[float, float]:
    """Least and largest of a few logits, four neighbours in each of eight places on a diagonal.

    Every place is a cache miss; and in floats, for aminmax by itself takes longer.
    """
    step = x.shape[0] // 8 * x.stride(0) + x.shape[1] // 8
    some = x.as_strided((8, max(1, min(4, x.shape[1] // 8))), (step, 1)).tolist()
    return min(map(min, some)), max(map(max, some))


def _is_tensor(t: object) -> TypeGuard[Tensor]:
    return type(t) in (Tensor, torch.nn.Parameter)


def _are_ordinary(input: Tensor, target: Tensor) -> bool:
    return (
        input.is_cpu
        and target.is_cpu
        and input.layout == target.layout == torch.strided
        and not (input.is_nested or target.is_nested)
        and input.dtype in LOGIT_DTYPES
        and target.dtype == torch.int64
        and input.dim() == 2
        and target.shape == input.shape[:1]
        and input.stride(1) == 1
        and 0 < input.numel() <= _ELEMENTS
        and input.shape[1] <= longest_row(backend_torch.CACHED_ELEMENTS)
    )


def _is_traced() -> bool:
    """Whether someone looks for operators, or for more than a gradient."""
    return (
        torch.compiler.is_compiling()
        or is_in_torch_dispatch_mode()
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state() is not None
        or forward_ad._current_level >= 0
    )


def _is_batched(upstream: Tensor) -> bool:
    """By `torch.autograd.grad(is_grads_batched=True)`."""
    batched: bool = torch._C._functorch.is_legacy_batchedtensor(upstream)
    return batched
