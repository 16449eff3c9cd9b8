"""The registered operators: schemas, shapes for tracing, autograd.

torch.compile sees these and looks no further.

chunked_ce::token_stats  statistics of rows of logits, differentiable in the logits
chunked_ce::token_grad   their gradient, in a new tensor
chunked_ce::token_grad_  the same over the logits, whose version counter says so
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import backends, checks
from .blocks import Head, compute_dtype
from .stats import Coefficients, TokenStats, coefficients

library = torch.library.Library("chunked_ce", "DEF")

SHARED_SCHEMA = (
    "int ignore_index, SymInt vocab_size, float? softcap, float logit_scale, str backend"
)
_GRADIENT = (
    "Tensor target, Tensor lse, Tensor logprob, Tensor lse_low, "
    "Tensor? a, Tensor? b, Tensor? c, Tensor? u, " + SHARED_SCHEMA
)

library.define(
    f"token_stats(Tensor input, Tensor target, {SHARED_SCHEMA}, "
    "bool entropy, bool mean_logprob, bool rank, bool argmax, bool inplace_backward) -> "
    "(Tensor lse, Tensor logprob, Tensor lse_low, "
    "Tensor entropy, Tensor mean_logprob, Tensor rank, Tensor argmax)",
)
library.define(f"token_grad(Tensor input, {_GRADIENT}) -> Tensor")
library.define(f"token_grad_(Tensor(a!) input, {_GRADIENT}) -> ()")


def _token_stats(
    input: Tensor,
    target: Tensor,
    ignore_index: int,
    vocab_size: int,
    softcap: float | None,
    logit_scale: float,
    backend: str,
    entropy: bool,
    mean_logprob: bool,
    rank: bool,
    argmax: bool,
    inplace_backward: bool,
) -> tuple[Tensor, ...]:
    check_targets(target, vocab_size, ignore_index)
    wanted = dict(entropy=entropy, mean_logprob=mean_logprob, rank=rank, argmax=argmax)
    if target.numel() == 0:
        return new_outputs(input, target, **wanted)
    stats, lse_low = backends.row_statistics(
        backend, input.detach(), target, ignore_index, vocab_size, Head(softcap, logit_scale),
        **wanted,
    )  # fmt: skip
    return _outputs(stats, lse_low, target.shape)


def check_targets(
    target: Tensor, vocab_size: int, ignore_index: int, *, free: bool = False
) -> None:
    """Where looking at targets is not free, but means waiting for a GPU, the user says when to."""
    if free or os.environ.get("CHUNKED_CE_CHECK_TARGETS") == "1":
        checks.targets_in_range(target, vocab_size, ignore_index)


def _outputs(stats: TokenStats, lse_low: Tensor, shape: torch.Size) -> tuple[Tensor, ...]:
    """An operator's outputs are tensors always: empty ones stand for what was not asked for."""
    outputs: list[Tensor] = []
    for i, out in enumerate((stats.lse, stats.logprob, lse_low, *stats[2:])):
        if out is None:
            outputs.append(stats.lse.new_empty(0, dtype=None if i < 5 else torch.int64))
        else:
            outputs.append(out if len(shape) == 1 else out.view(shape))
    return tuple(outputs)


def new_outputs(
    input: Tensor,
    target: Tensor,
    *,
    entropy: bool,
    mean_logprob: bool,
    rank: bool,
    argmax: bool,
) -> tuple[Tensor, ...]:
    floats, integers = compute_dtype(input.dtype), torch.int64

    def new(dtype: torch.dtype, wanted: bool = True) -> Tensor:
        return input.new_empty(target.shape if wanted else 0, dtype=dtype)

    return (
        *(new(floats), new(floats), new(floats), new(floats, entropy), new(floats, mean_logprob)),
        *(new(integers, rank), new(integers, argmax)),
    )


def as_stats(outputs: Sequence[Tensor], wanted: tuple[bool, ...]) -> TokenStats:
    """An operator's outputs as users get them; `wanted`: entropy, mean_logprob, rank, argmax."""
    lse, logprob, _, *others = outputs
    asked = (out if want else None for out, want in zip(others, wanted, strict=True))
    return TokenStats(lse, logprob, *asked)


def upstream_coefficients(
    grads: Sequence[Tensor | None],
    entropy: Tensor,
    vocab_size: int,
    wants_entropy: bool,
    wants_mean_logprob: bool,
) -> Coefficients:
    """Of the upstream gradients of an operator's outputs.

    An output that was not asked for is empty, and a tracer may give it an empty gradient.
    """
    lse, logprob, _, of_entropy, of_mean_logprob, *_ = grads
    return coefficients(
        lse,
        logprob,
        of_entropy if wants_entropy else None,
        of_mean_logprob if wants_mean_logprob else None,
        entropy,
        vocab_size,
    )


def _fake_token_stats(input: Tensor, target: Tensor, *options: Any) -> tuple[Tensor, ...]:
    entropy, mean_logprob, rank, argmax, _ = options[-5:]
    return new_outputs(
        input, target, entropy=entropy, mean_logprob=mean_logprob, rank=rank, argmax=argmax
    )


def _gradient(inplace: bool, input: Tensor, target: Tensor, *arguments: Any) -> Tensor:
    (
        lse,
        logprob,
        lse_low,
        a,
        b,
        c,
        u,
        ignore_index,
        vocab_size,
        softcap,
        logit_scale,
        backend,
    ) = arguments
    if target.numel() == 0:
        return torch.empty_like(input)
    numbers = Coefficients(
        *(None if n is None else n.reshape(-1).contiguous() for n in (a, b, c, u))
    )
    return backends.logits_gradient(
        backend, input.detach(), target, lse.reshape(-1), logprob.reshape(-1), lse_low.reshape(-1),
        numbers, ignore_index, vocab_size, Head(softcap, logit_scale), inplace=inplace,
    )  # fmt: skip


def _token_grad(*arguments: Any) -> Tensor:
    return _gradient(False, *arguments)


def _token_grad_(input: Tensor, *arguments: Any) -> None:
    _gradient(True, input, *arguments)
    torch.autograd.graph.increment_version(input)  # a kernel's write is not seen by autograd


class _TokenStats(torch.autograd.Function):
    """torch.library.register_autograd would do the same at 60 microseconds more a call."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, ...]:
        input, target, *ctx.options, entropy, mean_logprob, _, _, ctx.inplace_backward = arguments
        with torch._C._AutoDispatchBelowAutograd():
            outputs: tuple[Tensor, ...] = torch.ops.chunked_ce.token_stats(*arguments)
        ctx.wanted = (entropy, mean_logprob)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*outputs[5:])
        ctx.save_for_backward(input, target, *outputs[:4])
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        input, target, lse, logprob, lse_low, entropy = ctx.saved_tensors
        _, vocab_size, *_ = ctx.options
        numbers = upstream_coefficients(grads, entropy, vocab_size, *ctx.wanted)
        arguments = (input, target, lse, logprob, lse_low, *numbers, *ctx.options)
        no_gradient = (None,) * 11
        if ctx.inplace_backward:
            if torch.is_grad_enabled():  # create_graph: a gradient over the logits has no history
                checks.double_backward()
            torch.ops.chunked_ce.token_grad_(*arguments)
            return input.detach(), *no_gradient
        if torch.is_grad_enabled():
            return torch.ops.chunked_ce.token_grad(*arguments), *no_gradient
        with torch._C._AutoDispatchBelowAutograd():
            return torch.ops.chunked_ce.token_grad(*arguments), *no_gradient


def _differentiable_token_stats(input: Tensor, *arguments: Any) -> Any:
    if torch.is_grad_enabled() and input.requires_grad:
        return _TokenStats.apply(input, *arguments)  # type: ignore[no-untyped-call]
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.chunked_ce.token_stats(input, *arguments)


def no_double_backward(ctx: Any, *grads: Tensor) -> None:
    checks.double_backward()


library.impl("token_stats", _token_stats, "CompositeExplicitAutograd")
library.impl("token_stats", _differentiable_token_stats, "Autograd")
library.impl("token_grad", _token_grad, "CompositeExplicitAutograd")
library.impl("token_grad_", _token_grad_, "CompositeExplicitAutograd")
torch.library.register_fake("chunked_ce::token_stats", _fake_token_stats, lib=library)
torch.library.register_fake(
    "chunked_ce::token_grad", lambda input, *_: torch.empty_like(input), lib=library
)
torch.library.register_fake("chunked_ce::token_grad_", lambda input, *_: None, lib=library)
torch.library.register_autograd("chunked_ce::token_grad", no_double_backward, lib=library)
