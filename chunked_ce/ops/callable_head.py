"""Any head and the loss in one: called on a chunk of hidden states at a time.

A head that is no plain linear layer (with an adapter, quantised, dequantised by autograd's rules of
its own) says itself what its logits are. Per chunk of hidden states x and parameters w

    z = head(x)    dL/dz written over z    dL/dx, dL/dw from torch.autograd.grad(z, (x, w), dL/dz)

and dL/dw of the chunks is added up in `acc_dtype`, to be rounded once. One chunk of logits is alive
at a time. The parameters are the leaves of the first chunk's graph.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import backends, checks
from ..core.reduction import apply_weight
from ..core.row_stats import TokenStats
from .chunks import Index, scale_gradients
from .head_calls import HeadCalls, HeadGradients, RandomState
from .library import (
    NUM_FLOATING,
    Classes,
    keep_stats,
    new_outputs,
    new_stats,
    select_stats,
    stats_list,
)
from .logits import rows_gradient, upstream_coefficients
from .statistics import fill_outputs


def head_loss(
    calls: HeadCalls,
    token_weight: Tensor | None,
    divisor: Tensor | None,
    stats: Sequence[bool],  # [], or which of LOGGED to return
    *options: float,  # label_smoothing, z_loss_weight
) -> tuple[Tensor, list[Tensor]]:
    """Return the weighted sum of the tokens' losses, and the statistics asked for."""
    given = (calls, token_weight, divisor, stats, options, calls.input, *calls.parameters)
    loss, *found = _HeadLoss.apply(*given)  # type: ignore[no-untyped-call]
    return loss, found


def head_stats(calls: HeadCalls, classes: Classes, flags: tuple[bool, ...]) -> tuple[Tensor, ...]:
    """The statistics of tokens, as the operator `linear_stats` returns them."""
    outputs: tuple[Tensor, ...] = _HeadStats.apply(  # type: ignore[no-untyped-call]
        calls, classes, flags, calls.input, *calls.parameters
    )
    return outputs


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, calls: HeadCalls, *given: Any) -> tuple[Tensor, ...]:
        token_weight, divisor, stats, options, *tensors = given
        # Under no_grad a leaf still says that it needs one.
        ctx.wanted = [calls.with_grad and needed for needed in ctx.needs_input_grad[5:]]
        ctx.calls, ctx.options = calls, options
        ctx.save_for_backward(token_weight, divisor, *tensors)
        of_rows = new_stats(
            calls.input.new_empty(0, dtype=calls.dtype), calls.target.numel(), stats
        )
        loss, ctx.grads = _loss(calls, token_weight, divisor, options, ctx.wanted, of_rows)
        found = stats_list(of_rows)
        ctx.mark_non_differentiable(*found)
        return loss, *found

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, *of_stats: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            checks.double_backward()
        token_weight, divisor, *_ = ctx.saved_tensors
        grads, ctx.grads = ctx.grads, None
        if grads is None:  # handed over, and scaled: a second backward computes them again
            with _replayed(ctx.calls):
                _, grads = _loss(ctx.calls, token_weight, divisor, ctx.options, ctx.wanted)
        scaled = scale_gradients(grads, ctx.wanted, upstream, ctx.calls.backend, reuse=True)
        return None, None, None, None, None, *scaled


class _HeadStats(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, calls: HeadCalls, classes: Classes, flags: tuple[bool, ...], *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        outputs = new_outputs(
            calls.input.new_empty(0, dtype=calls.dtype), calls.target, classes, *flags
        )
        fill_outputs(
            outputs, _values(calls), calls.target, classes, flags,
            (calls.ignore_index, calls.vocab_size, calls.transforms, calls.backend),
        )  # fmt: skip
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*outputs[NUM_FLOATING:])
        weight, prob, *_, at = classes
        ctx.calls, ctx.flags, ctx.n = calls, flags, len(tensors)
        ctx.classes = classes._replace(weight=None, prob=None, indices=None)
        ctx.save_for_backward(*tensors, weight, prob, at, *outputs[:4], outputs[5])
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            checks.double_backward()
        weight, prob, at, lse, logprob, low, entropy, mass = ctx.saved_tensors[ctx.n :]
        calls, classes = ctx.calls, ctx.classes._replace(weight=weight, prob=prob, indices=at)
        upstream = upstream_coefficients(
            grads, entropy, mass, calls.target, classes, calls.vocab_size, *ctx.flags[:2]
        )
        rows = (lse, logprob, low, *upstream)
        shared = (calls.ignore_index, calls.vocab_size, *calls.transforms, calls.backend)
        sums = HeadGradients(calls, list(ctx.needs_input_grad[3:]))
        with _replayed(calls):
            for chunk in calls:
                values, inplace = chunk.values()
                of_chunk: list[Any] = [None if n is None else n[chunk.index] for n in rows]
                grad = rows_gradient(
                    values, calls.target[chunk.index], classes.select_rows(chunk.index), *of_chunk,
                    *shared, inplace=inplace,
                )  # fmt: skip
                sums.add(chunk, grad)
                del chunk, values, grad
        return None, None, None, *sums.finish()


def _values(calls: HeadCalls) -> Iterator[tuple[Index, Tensor]]:
    """(index, logits) of each chunk, which nothing keeps while the next is made."""
    for chunk in calls:
        index, values = chunk.index, chunk.values()[0]
        del chunk
        yield index, values
        del values


def _loss(
    calls: HeadCalls,
    token_weight: Tensor | None,
    divisor: Tensor | None,
    options: tuple[float, ...],
    wanted: list[bool],
    of_rows: TokenStats | None = None,  # memory, written
) -> tuple[Tensor, list[Tensor | None]]:
    shared = (calls.ignore_index, calls.vocab_size, calls.transforms)
    total = torch.zeros((), dtype=_wide(calls.dtype), device=calls.input.device)
    sums = HeadGradients(calls, wanted)
    for chunk in calls:
        values, inplace = chunk.values()
        labels = calls.target[chunk.index]
        weight = None if token_weight is None else token_weight[chunk.index]
        of_chunk = None if of_rows is None else select_stats(of_rows, chunk.index)
        if any(wanted):
            loss, grad = backends.loss_and_gradient(
                calls.backend, values, labels, weight, divisor, *options, *shared,
                inplace=inplace, stats=of_chunk,
            )  # fmt: skip
            sums.add(chunk, grad)
            del grad
        else:
            loss = backends.row_losses(
                calls.backend, values, labels, options[0], options[1], *shared, stats=of_chunk
            )
        if of_rows is not None:
            keep_stats(of_rows, chunk.index, of_chunk)
        total += (loss if weight is None else apply_weight(loss, weight)).sum()
        del chunk, values  # before the next chunk of logits is made
    return total if divisor is None else total / divisor, sums.finish()


class _replayed:
    """The head's random numbers again, and those of others as if nothing had happened."""

    def __init__(self, calls: HeadCalls) -> None:
        self.device = calls.input.device

    def __enter__(self) -> None:
        self.now = RandomState(self.device)

    def __exit__(self, *exception: object) -> None:
        self.now.restore()


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
