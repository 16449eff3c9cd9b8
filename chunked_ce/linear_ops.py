"""The lm_head and the loss in one, a chunk of tokens at a time: operators and autograd.

chunked_ce::linear_loss         the weighted loss and its gradients, 6 N D V FLOPs
chunked_ce::linear_stats        statistics of tokens, 2 N D V
chunked_ce::linear_stats_grad   their gradients for any upstream one, computing the logits again

Memory: one chunk of logits, the gradients, and a sum in `acc_dtype` where chunks are added up.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import backends, checks
from .blocks import Head, compute_dtype
from .ops import SHARED_SCHEMA, check_targets_if_asked, library, no_double_backward
from .stats import Coefficients, coefficients, is_scored, token_loss

_HEAD = "Tensor input, Tensor linear_weight, Tensor? linear_bias, Tensor target, "
_CHUNKS = ", int rows_per_chunk, bool drop_ignored, ScalarType acc_dtype"
library.define(
    f"linear_loss({_HEAD}Tensor? token_weight, Tensor? divisor, float label_smoothing, "
    f"float z_loss_weight, {SHARED_SCHEMA}{_CHUNKS}, bool[] wanted, bool reuse) -> "
    "(Tensor loss, Tensor input_grad, Tensor weight_grad, Tensor bias_grad)"
)
library.define(
    f"linear_stats({_HEAD}{SHARED_SCHEMA}{_CHUNKS}, "
    "bool entropy, bool mean_logprob, bool rank, bool argmax) -> "
    "(Tensor lse, Tensor logprob, Tensor lse_low, "
    "Tensor entropy, Tensor mean_logprob, Tensor rank, Tensor argmax)"
)
library.define(
    f"linear_stats_grad({_HEAD}Tensor lse, Tensor logprob, Tensor lse_low, "
    f"Tensor? a, Tensor? b, Tensor? c, Tensor? u, {SHARED_SCHEMA}{_CHUNKS}, bool[] wanted) -> "
    "(Tensor input_grad, Tensor weight_grad, Tensor bias_grad)"
)

Index = slice | Tensor


class _Chunks(NamedTuple):
    """How tokens are walked: so many at a time, those ignored perhaps not at all."""

    rows: int
    drop_ignored: bool

    def of(self, target: Tensor, ignore_index: int) -> list[Index]:
        """Into the tokens [N], a chunk each; the chunks are of like size."""
        kept: Tensor | None = None
        if self.drop_ignored:
            scored = is_scored(target, ignore_index)
            kept = None if scored.all() else scored.nonzero()[:, 0]
        n = target.numel() if kept is None else kept.numel()
        count = -(-n // self.rows)
        size = -(-n // count) if count else 1
        starts = range(0, n, size)
        if kept is None:
            return [slice(start, start + size) for start in starts]
        return [kept[start : start + size] for start in starts]


class _Logits:
    """Logits of one chunk after another, in one buffer whose rows start on 128 bytes.

    An odd vocabulary would slow down the product, and the kernels' accesses.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, rows: int) -> None:
        self.weight, self.bias = weight, bias
        per_line = 128 // weight.element_size()
        padded = -(-weight.shape[0] // per_line) * per_line
        self.buffer = weight.new_empty(rows, padded)

    def of(self, x: Tensor) -> Tensor:
        """[R, V] of hidden states [R, D]."""
        out = self.buffer[: x.shape[0], : self.weight.shape[0]]
        if self.bias is None:
            return torch.mm(x, self.weight.t(), out=out)
        return torch.addmm(self.bias, x, self.weight.t(), out=out)


class _Gradients:
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
        self.weight, self.vocab_size, self.chunks = weight[:vocab_size], vocab_size, len(chunks)
        whole = bool(chunks) and isinstance(chunks[0], slice)
        self.input = _like(input, for_input)
        if for_input and not whole:
            self.input.zero_()
        self.of_weight, self.of_bias = _like(weight, for_weight), _like(bias, for_bias)
        self.sum: Tensor | None = None
        if for_weight and self.chunks > 1 and weight.dtype.itemsize < acc_dtype.itemsize:
            self.sum = weight.new_zeros(vocab_size, weight.shape[1], dtype=acc_dtype)
        self.bias_sum = self.of_bias.new_zeros(
            vocab_size if for_bias else 0, dtype=compute_dtype(weight.dtype)
        )
        self.wanted, self.seen = wanted, 0
        # Where the product itself can stay in fp32, so does each chunk's.
        self.products_in_full = (
            weight.device.type == "cuda"
            and acc_dtype == torch.float32
            and "dtype" in torch.ops.aten.mm.overloads()
        )

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
                self.sum.add_(torch.mm(grad.t(), x, out_dtype=self.sum.dtype))
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
            if self.sum is not None:
                self.of_weight[: self.vocab_size].copy_(self.sum)
            self.of_weight[self.vocab_size if self.seen else 0 :].zero_()
        if for_bias:
            self.of_bias[: self.vocab_size].copy_(self.bias_sum)
            self.of_bias[self.vocab_size :].zero_()
        return self.input, self.of_weight, self.of_bias


def _like(t: Tensor | None, wanted: bool) -> Tensor:
    """Memory for a gradient of `t`; an empty tensor where none is wanted."""
    if t is None or not wanted:
        return torch.empty(0) if t is None else t.new_empty(0)
    return torch.empty_like(t, memory_format=torch.contiguous_format)


def _walk(
    input: Tensor, weight: Tensor, bias: Tensor | None, vocab_size: int, chunks: list[Index]
) -> Iterator[tuple[Index, Tensor, Tensor]]:
    """(index, hidden states, logits) of each chunk."""
    if not chunks:
        return
    first = input[chunks[0]]
    bias = None if bias is None else bias[:vocab_size]
    logits = _Logits(weight[:vocab_size], bias, first.shape[0])
    for index in chunks:
        x = first if index is chunks[0] else input[index]
        yield index, x, logits.of(x)


def _linear_loss(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    token_weight: Tensor | None,
    divisor: Tensor | None,
    label_smoothing: float,
    z_loss_weight: float,
    ignore_index: int,
    vocab_size: int,
    softcap: float | None,
    logit_scale: float,
    backend: str,
    rows_per_chunk: int,
    drop_ignored: bool,
    acc_dtype: torch.dtype,
    wanted: list[bool],
    reuse: bool,
) -> tuple[Tensor, ...]:
    check_targets_if_asked(target, vocab_size, ignore_index)
    if target.device.type == "cpu":
        checks.targets_in_range(target, vocab_size, ignore_index)
    input, weight = input.detach(), weight.detach()
    chunks = _Chunks(rows_per_chunk, drop_ignored).of(target, ignore_index)
    head = Head(softcap, logit_scale)
    total = input.new_zeros((), dtype=compute_dtype(input.dtype))
    gradients = _Gradients(input, weight, bias, vocab_size, wanted, acc_dtype, chunks)
    for index, x, logits in _walk(input, weight, bias, vocab_size, chunks):
        of_tokens = None if token_weight is None else token_weight[index]
        if any(wanted):
            loss, grad = backends.loss_and_gradient(
                backend, logits, target[index], of_tokens, divisor, label_smoothing, z_loss_weight,
                ignore_index, vocab_size, head, inplace=True,
            )  # fmt: skip
            gradients.add(index, x, grad)
        else:
            stats, _ = backends.row_statistics(
                backend, logits, target[index], ignore_index, vocab_size, head,
                entropy=False, mean_logprob=label_smoothing > 0, rank=False, argmax=False,
            )  # fmt: skip
            loss = token_loss(stats, label_smoothing, z_loss_weight)
        total += (loss if of_tokens is None else loss * of_tokens).sum()
    value = total if divisor is None else total / divisor
    return value, *gradients.finish()


def _linear_stats(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    ignore_index: int,
    vocab_size: int,
    softcap: float | None,
    logit_scale: float,
    backend: str,
    rows_per_chunk: int,
    drop_ignored: bool,
    acc_dtype: torch.dtype,
    *flags: bool,
) -> tuple[Tensor, ...]:
    check_targets_if_asked(target, vocab_size, ignore_index)
    if target.device.type == "cpu":
        checks.targets_in_range(target, vocab_size, ignore_index)
    wanted = dict(zip(("entropy", "mean_logprob", "rank", "argmax"), flags, strict=True))
    outputs = _new_stats(input, target, flags)
    for out in outputs:
        out.fill_(0 if out.is_floating_point() else -1)  # those ignored
    chunks = _Chunks(rows_per_chunk, drop_ignored).of(target, ignore_index)
    head = Head(softcap, logit_scale)
    input, weight = input.detach(), weight.detach()
    for index, _, logits in _walk(input, weight, bias, vocab_size, chunks):
        stats, lse_low = backends.row_statistics(
            backend, logits, target[index], ignore_index, vocab_size, head, **wanted
        )
        values = (stats.lse, stats.logprob, lse_low, *stats[2:])
        for out, value in zip(outputs, values, strict=True):
            if value is not None:
                out[index] = value
    return outputs


def _linear_stats_grad(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    lse: Tensor,
    logprob: Tensor,
    lse_low: Tensor,
    a: Tensor | None,
    b: Tensor | None,
    c: Tensor | None,
    u: Tensor | None,
    ignore_index: int,
    vocab_size: int,
    softcap: float | None,
    logit_scale: float,
    backend: str,
    rows_per_chunk: int,
    drop_ignored: bool,
    acc_dtype: torch.dtype,
    wanted: list[bool],
) -> tuple[Tensor, ...]:
    chunks = _Chunks(rows_per_chunk, drop_ignored).of(target, ignore_index)
    gradients = _Gradients(input, weight, bias, vocab_size, wanted, acc_dtype, chunks)
    head = Head(softcap, logit_scale)
    for index, x, logits in _walk(input, weight, bias, vocab_size, chunks):
        numbers = Coefficients(
            *(None if n is None else n[index].contiguous() for n in (a, b, c, u))
        )
        grad = backends.logits_gradient(
            backend, logits, target[index], lse[index], logprob[index], lse_low[index], numbers,
            ignore_index, vocab_size, head, inplace=True,
        )  # fmt: skip
        gradients.add(index, x, grad)
    return gradients.finish()


def _new_stats(input: Tensor, target: Tensor, flags: tuple[bool, ...]) -> tuple[Tensor, ...]:
    floats, n = compute_dtype(input.dtype), target.shape
    return tuple(
        input.new_empty(n if wanted else 0, dtype=floats if i < 5 else torch.int64)
        for i, wanted in enumerate((True, True, True, *flags))
    )


def _fake_linear_loss(
    input: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any
) -> tuple[Tensor, ...]:
    *_, wanted, _ = rest
    loss = input.new_empty((), dtype=compute_dtype(input.dtype))
    given = zip((input, weight, bias), wanted, strict=True)
    return loss, *(_like(t, w) for t, w in given)


def _fake_linear_stats(
    input: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    return _new_stats(input, target, rest[-4:])


def _fake_linear_stats_grad(
    input: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any
) -> tuple[Tensor, ...]:
    given = zip((input, weight, bias), rest[-1], strict=True)
    return tuple(_like(t, w) for t, w in given)


class _LinearLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        *given, _, reuse = arguments
        wanted = list(ctx.needs_input_grad[:3])
        with torch._C._AutoDispatchBelowAutograd():
            loss, *grads = torch.ops.chunked_ce.linear_loss(*given, wanted, reuse)
        ctx.options, ctx.wanted, ctx.reuse = given[6:], wanted, reuse
        ctx.grads = grads  # not saved: backward gives them away
        ctx.save_for_backward(*given[:6])
        result: Tensor = loss
        return result

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            checks.double_backward()
        given, grads = ctx.saved_tensors, ctx.grads
        if ctx.reuse:
            ctx.grads = None
        if grads is None:  # handed over, and scaled: a second backward computes them again
            with torch._C._AutoDispatchBelowAutograd():
                _, *grads = torch.ops.chunked_ce.linear_loss(
                    *given, *ctx.options, ctx.wanted, ctx.reuse
                )
        backend = ctx.options[6]
        scaled: list[Tensor | None] = [None, None, None]
        for i, wanted in enumerate(ctx.wanted):
            if wanted and ctx.reuse:
                scaled[i] = grads[i]
                torch.ops.chunked_ce.scale_(_rows(grads[i]), upstream, backend)
            elif wanted:
                scaled[i] = (grads[i] * upstream).to(grads[i].dtype)
        return *scaled, *(None,) * 15


def _rows(grad: Tensor) -> Tensor:
    return grad if grad.dim() > 1 else grad[None].detach()


class _LinearStats(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, ...]:
        input, weight, bias, target, *options, entropy, mean_logprob, _, _ = arguments
        ctx.options = options
        with torch._C._AutoDispatchBelowAutograd():
            outputs: tuple[Tensor, ...] = torch.ops.chunked_ce.linear_stats(*arguments)
        ctx.wanted = (True, True, False, entropy, mean_logprob, False, False)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*outputs[5:])
        ctx.save_for_backward(input, weight, bias, target, *outputs[:4])
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            checks.double_backward()
        *given, lse, logprob, lse_low, entropy = ctx.saved_tensors
        lse_grad, logprob_grad, _, entropy_grad, mean_logprob_grad, *_ = (
            grad if wanted else None for grad, wanted in zip(grads, ctx.wanted, strict=True)
        )
        _, vocab_size, *_ = ctx.options
        numbers = coefficients(
            lse_grad, logprob_grad, entropy_grad, mean_logprob_grad, entropy, vocab_size
        )
        wanted = list(ctx.needs_input_grad[:3])
        found = torch.ops.chunked_ce.linear_stats_grad(
            *given, lse, logprob, lse_low, *numbers, *ctx.options, wanted
        )
        return *(g if w else None for g, w in zip(found, wanted, strict=True)), *(None,) * 13


def _needs_gradient(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _differentiable_linear_loss(*arguments: Any) -> Any:
    if _needs_gradient(*arguments[:3]):
        loss = _LinearLoss.apply(*arguments)  # type: ignore[no-untyped-call]
        return loss, *(loss.new_empty(0) for _ in range(3))
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.chunked_ce.linear_loss(*arguments)


def _differentiable_linear_stats(*arguments: Any) -> Any:
    if _needs_gradient(*arguments[:3]):
        return _LinearStats.apply(*arguments)  # type: ignore[no-untyped-call]
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.chunked_ce.linear_stats(*arguments)


library.impl("linear_loss", _linear_loss, "CompositeExplicitAutograd")
library.impl("linear_loss", _differentiable_linear_loss, "Autograd")
library.impl("linear_stats", _linear_stats, "CompositeExplicitAutograd")
library.impl("linear_stats", _differentiable_linear_stats, "Autograd")
library.impl("linear_stats_grad", _linear_stats_grad, "CompositeExplicitAutograd")
torch.library.register_fake("chunked_ce::linear_loss", _fake_linear_loss, lib=library)
torch.library.register_fake("chunked_ce::linear_stats", _fake_linear_stats, lib=library)
torch.library.register_fake("chunked_ce::linear_stats_grad", _fake_linear_stats_grad, lib=library)
torch.library.register_autograd("chunked_ce::linear_stats_grad", no_double_backward, lib=library)
