"""Divergences of two rows of logits: operators and autograd.

chunked_ce::pair_stats  each row's divergence, and what its gradient needs
chunked_ce::pair_grad   the gradient of the student's logits
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import backends, checks
from ..core.divergence import Divergence, PairStats
from ..core.head import COMPUTE_DTYPE
from .library import library, no_double_backward

_OPTIONS = "str kind, float beta, float temperature, SymInt vocab_size, str backend"
_NORMS = "Tensor max, Tensor log_sum, Tensor teacher_max, Tensor teacher_log_sum, Tensor shift"

library.define(
    f"pair_stats(Tensor input, Tensor teacher, Tensor? ignored, {_OPTIONS}) -> "
    f"(Tensor loss, Tensor student_kl, {_NORMS})"
)
library.define(
    "pair_grad(Tensor input, Tensor teacher, Tensor? ignored, Tensor loss, Tensor student_kl, "
    f"{_NORMS}, Tensor upstream, {_OPTIONS}) -> Tensor"
)


def _pair_stats(
    input: Tensor,  # [..., V]
    teacher: Tensor,
    ignored: Tensor | None,  # [...]
    kind: str,
    beta: float,
    temperature: float,
    vocab_size: int,
    backend: str,
) -> tuple[Tensor, ...]:
    rows = input.shape[:-1]
    if rows.numel() == 0:
        return tuple(input.new_empty(rows, dtype=COMPUTE_DTYPE[input.dtype]) for _ in range(7))
    run = backends.pair_backend(backend)
    x, y, skip = _matrices(input, teacher, ignored)
    stats = run.pair_stats(x, y, skip, Divergence(kind, beta, temperature), vocab_size)
    return tuple(t.view(rows) for t in stats)


def _pair_grad(
    input: Tensor,
    teacher: Tensor,
    ignored: Tensor | None,
    *arguments: Any,  # PairStats, the upstream gradient [...], and the options
) -> Tensor:
    if input.numel() == 0:
        return torch.empty_like(input)
    *stats, upstream, kind, beta, temperature, vocab_size, backend = arguments
    x, y, skip = _matrices(input, teacher, ignored)
    grad: Tensor = backends.pair_backend(backend).pair_gradient(
        x, y, skip, PairStats(*(t.reshape(-1) for t in stats)), upstream.reshape(-1),
        Divergence(kind, beta, temperature), vocab_size,
    )  # fmt: skip
    return grad.view(input.shape)


def _matrices(
    input: Tensor, teacher: Tensor, ignored: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    x, y = (t.detach() if t.dim() > 1 else t.detach()[None] for t in (input, teacher))
    return x, y, None if ignored is None else ignored.reshape(-1)


class _Pair(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, ...]:
        input, teacher, ignored, *ctx.options = arguments
        with torch._C._AutoDispatchBelowAutograd():
            stats: tuple[Tensor, ...] = torch.ops.chunked_ce.pair_stats(*arguments)
        ctx.mark_non_differentiable(*stats[1:])
        ctx.save_for_backward(input, teacher, ignored, *stats)
        return stats

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        grad = torch.ops.chunked_ce.pair_grad(*ctx.saved_tensors, upstream, *ctx.options)
        return grad, *(None,) * 7


def _differentiable_pair_stats(input: Tensor, *arguments: Any) -> Any:
    if torch.is_grad_enabled() and input.requires_grad:
        if torch._C._are_functorch_transforms_active():  # of a compiled program, within it
            checks.compiled_transform()
        return _Pair.apply(input, *arguments)  # type: ignore[no-untyped-call]
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.chunked_ce.pair_stats(input, *arguments)


def _fake_pair_stats(input: Tensor, *_: Any) -> tuple[Tensor, ...]:
    dtype = COMPUTE_DTYPE[input.dtype]
    return tuple(input.new_empty(input.shape[:-1], dtype=dtype) for _ in range(7))


library.impl("pair_stats", _pair_stats, "CompositeExplicitAutograd")
library.impl("pair_stats", _differentiable_pair_stats, "Autograd")
library.impl("pair_grad", _pair_grad, "CompositeExplicitAutograd")
torch.library.register_fake("chunked_ce::pair_stats", _fake_pair_stats, lib=library)
torch.library.register_fake(
    "chunked_ce::pair_grad", lambda input, *_: torch.empty_like(input), lib=library
)
torch.library.register_autograd("chunked_ce::pair_grad", no_double_backward, lib=library)
