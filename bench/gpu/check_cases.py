"""Stage `check`, the kernels: dtypes, vocabularies, layouts, schedules, options."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import chunked_ce

from ..cases import dtype_name, own
from ..providers import BACKEND
from .cases import (
    STEP,
    Case,
    demand,
    logits,
    near,
    near_gradient,
    near_norm,
    oracle,
)
from .stage import Context

DTYPES = tuple(STEP)
HALF_AND_SINGLE = (torch.bfloat16, torch.float16, torch.float32)
LAYOUTS = ("plain", "shifted", "strided", "transposed")
# One logit, less than a tile, one CTA, 50257 of GPT-2 (rows start between 16 bytes), several CTAs.
VOCABULARIES = (1, 31, 12000, 50257, 128256, 262144)
TINY_VOCABULARIES = (1, 31, 300)
HEAD = dict(softcap=30.0, logit_scale=0.5)
SUMS = dict(label_smoothing=0.1, z_loss_weight=1e-3)
SCHEDULES: tuple[dict[str, Any], ...] = (
    {}, dict(inplace_backward=True), dict(grad_in_forward=True),
    dict(grad_in_forward=True, inplace_backward=True),
)  # fmt: skip
FLOATS = ("lse", "logprob", "entropy", "mean_logprob")
# Of a product's gradient. fp32: sums of 512 products in another order.
PRODUCT_LIMIT = {torch.float32: 2e-3, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def cases(context: Context) -> Iterator[Case]:
    vocabularies = TINY_VOCABULARIES if context.dry else VOCABULARIES
    for dtype, vocab, layout in itertools.product(DTYPES, vocabularies, LAYOUTS):
        if layout != "plain" and vocab not in (vocabularies[-1], 50257):
            continue
        for head in ({}, HEAD) if vocab in (300, 50257) else ({},):
            if context.dry and (head or layout != "plain") and dtype != torch.bfloat16:
                continue  # the CPU's time
            yield from _of_logits(context, dtype, vocab, layout, head)
    for dtype in HALF_AND_SINGLE:
        name = dtype_name(dtype)
        for vocab in vocabularies[1:]:
            run = partial(binary, context, dtype, vocab)
            yield Case("binary_cross_entropy_with_logits", name, f"{name} V={vocab}", run)
        for vocab in vocabularies[1:4]:
            run = partial(weighted, context, dtype, vocab)
            inputs = f"{name} V={vocab} class weights, smoothing, probabilities, top-k"
            yield Case("cross_entropy", name, inputs, run)
        for options in ({}, dict(token_chunk_size=0.2), dict(reduction="none")):
            run = partial(linear, context, dtype, options)
            yield Case("linear_cross_entropy", name, f"{name} {_text(options)}", run)
    dtype = torch.bfloat16
    run = partial(special_values, context, dtype, vocabularies[-1])
    yield Case("cross_entropy", "bfloat16", "-inf, inf, NaN, targets out of range, ignored", run)
    for schedule in SCHEDULES[::2]:
        run = partial(same_bits, context, dtype, vocabularies[-1], schedule)
        yield Case(_name(schedule), "bfloat16", "the same bits from run to run", run)
    for dtype in (torch.bfloat16, torch.float32):
        run = partial(rows_alone, context, dtype, vocabularies[-1])
        yield Case("token_stats", dtype_name(dtype), "a row alone and among others", run)


def _of_logits(
    context: Context, dtype: torch.dtype, vocab: int, layout: str, head: dict[str, float]
) -> Iterator[Case]:
    name = dtype_name(dtype)
    label = f"{name} V={vocab} {layout} {_text(head)}".strip()
    run = partial(statistics, context, dtype, vocab, layout, head)
    yield Case("token_stats", name, label, run)
    for sums, schedule in itertools.product(({}, SUMS), SCHEDULES):
        if (sums or schedule.get("inplace_backward")) and layout not in ("plain", "strided"):
            continue
        run = partial(loss, context, dtype, vocab, layout, head | sums, schedule)
        yield Case(_name(schedule), name, f"{label} {_text(sums)}".strip(), run)


def _text(options: dict[str, Any]) -> str:
    return " ".join(f"{name}={value}" for name, value in options.items())


def _name(schedule: dict[str, bool]) -> str:
    return " ".join(["cross_entropy", *schedule])


def _rows(context: Context) -> int:
    return 4 if context.dry else 64


def statistics(
    context: Context, dtype: torch.dtype, vocab: int, layout: str, head: dict[str, float]
) -> float:
    """Check every statistic of `token_stats`, and the gradient of the sum of all."""
    x, target = logits(context, _rows(context), vocab, dtype, layout)
    wanted = dict.fromkeys(("entropy", "mean_logprob", "rank", "argmax"), True)
    leaf, wide = x.detach().requires_grad_(), x.detach().double().requires_grad_()
    ours = chunked_ce.token_stats(leaf, target, backend=BACKEND, **wanted, **head)  # type: ignore[arg-type]
    truth = oracle().token_stats(wide, target, **head)
    rtol = 1e-11 if dtype == torch.float64 else 3e-6
    errors = [near(name, getattr(ours, name), truth[name], rtol, rtol) for name in FLOATS]
    if not head:  # tanh in fp32 makes ties of its own
        for name in ("rank", "argmax"):
            demand(torch.equal(getattr(ours, name), truth[name]), f"{name} is not the truth's")
    g = torch.randn(ours.lse.shape, device=x.device).double()
    torch.stack([(getattr(ours, n).double() * g).sum() for n in FLOATS]).sum().backward()
    torch.stack([(truth[n] * g).sum() for n in FLOATS]).sum().backward()
    assert leaf.grad is not None and wide.grad is not None
    return max(*errors, near_gradient(leaf.grad, wide.grad, dtype))


def loss(
    context: Context, dtype: torch.dtype, vocab: int, layout: str,
    options: dict[str, Any], schedule: dict[str, Any],
) -> float:  # fmt: skip
    """Check `cross_entropy` and its gradient, which in place lies where the logits were."""
    x, target = logits(context, _rows(context), vocab, dtype, layout)
    wide = x.detach().double().requires_grad_()
    truth = oracle().cross_entropy(wide, target, **options)
    truth.backward()
    leaf, grads = own(x)
    ours = chunked_ce.cross_entropy(
        leaf, target, dim=-1, backend=BACKEND, **options, **schedule
    )  # fmt: skip
    ours.backward()
    error = near("loss", ours, truth, 1e-11 if dtype == torch.float64 else 2e-6, 1e-9)
    assert wide.grad is not None
    if schedule.get("inplace_backward"):
        demand(grads[0].data_ptr() == x.data_ptr(), "the gradient is not in place")
    return max(error, near_gradient(grads[0], wide.grad, dtype))


def weighted(context: Context, dtype: torch.dtype, vocab: int) -> float:
    """Check class weights with smoothing, class probabilities, a teacher's top-k classes."""
    rows = 2 if context.dry else 16
    x, target = logits(context, rows, vocab, dtype)
    weight = torch.rand(vocab, device=x.device) + 0.5
    prob = torch.rand(x.shape, device=x.device).softmax(-1).to(dtype)
    top, classes = prob.float().topk(3)
    dense = torch.zeros(x.shape, device=x.device).scatter(1, classes, top)
    smooth: dict[str, Any] = dict(weight=weight, label_smoothing=0.1)
    calls: tuple[tuple[Any, Any, dict[str, Any]], ...] = (
        (target, target, smooth), (prob, prob, smooth), ((classes, top), dense, {})
    )  # fmt: skip
    errors = []
    for label, exact_label, options in calls:
        exact = {k: v.double() if k == "weight" else v for k, v in options.items()}
        if exact_label.is_floating_point():
            exact_label = exact_label.double()
        ours = partial(chunked_ce.cross_entropy, target=label, backend=BACKEND, **options)
        truth = partial(F.cross_entropy, target=exact_label, **exact)
        errors.append(agree(x, ours, truth, 4e-6))
    return max(errors)


def agree(
    x: Tensor, ours: Callable[[Tensor], Tensor], truth: Callable[[Tensor], Tensor], rtol: float
) -> float:
    """Compare a loss of `x` and its gradient with those in fp64."""
    leaf, wide = x.detach().requires_grad_(), x.detach().double().requires_grad_()
    loss, exact = ours(leaf), truth(wide)
    loss.backward()
    exact.backward()
    assert leaf.grad is not None and wide.grad is not None
    return max(near("loss", loss, exact, rtol), near_gradient(leaf.grad, wide.grad, x.dtype))


def binary(context: Context, dtype: torch.dtype, vocab: int) -> float:
    """Check multi-hot labels, then labels by index."""
    rows = 2 if context.dry else 8
    x, _ = logits(context, rows, vocab, dtype)
    dense = torch.rand(x.shape, device=x.device)
    index = torch.randint(vocab, (rows, 3), device=x.device)
    hot = torch.zeros(x.shape, device=x.device, dtype=torch.float64).scatter(1, index, 1.0)
    errors = []
    for label, exact_label in ((dense, dense.double()), (index, hot)):
        ours = partial(chunked_ce.binary_cross_entropy_with_logits, target=label, backend=BACKEND)
        truth = partial(F.binary_cross_entropy_with_logits, target=exact_label)
        errors.append(agree(x, ours, truth, 2e-6))
    return max(errors)


def linear(context: Context, dtype: torch.dtype, options: dict[str, Any]) -> float:
    """Check the gradients of both matrices of `linear_cross_entropy`."""
    n, d, v = (6, 8, 50) if context.dry else (2048, 512, 50257)
    generator = torch.Generator(context.device).manual_seed(0)
    h, w = (
        (torch.randn(size, generator=generator, device=context.device) * scale).to(dtype)
        for size, scale in (((n, d), 1.0), ((v, d), d**-0.5))
    )
    target = torch.randint(v, (n,), generator=generator, device=context.device)
    target[::7] = -100
    wide = [tensor.double().requires_grad_() for tensor in (h, w)]
    F.cross_entropy(wide[0] @ wide[1].t(), target).backward()
    leaves = h.detach().requires_grad_(), w.detach().requires_grad_()
    if "token_chunk_size" in options:  # given as a share of the tokens
        options = dict(token_chunk_size=max(1, int(options["token_chunk_size"] * n)))
    value = chunked_ce.linear_cross_entropy(*leaves, target, backend=BACKEND, **options)
    (value if value.dim() == 0 else value.sum() / (target != -100).sum()).backward()
    errors = []
    for name, ours, truth in zip(("input", "weight"), leaves, wide, strict=True):
        assert ours.grad is not None and truth.grad is not None
        errors.append(near_norm(f"{name}'s gradient", ours.grad, truth.grad, PRODUCT_LIMIT[dtype]))
    return max(errors)


def special_values(context: Context, dtype: torch.dtype, vocab: int) -> float:
    x, target = logits(context, 10, vocab, dtype)
    target[:] = torch.arange(10, device=x.device) % vocab
    x[0, ::2], target[0] = -torch.inf, 1
    x[1, 3], x[2, 3] = torch.nan, torch.inf
    target[3] = vocab
    target[4], x[4, 0] = -100, torch.nan
    leaf = x.detach().requires_grad_()
    value = chunked_ce.cross_entropy(leaf, target, reduction="none", backend=BACKEND)
    value.sum().backward()
    assert leaf.grad is not None
    broken = value.isnan().tolist()
    demand(broken == [False, True, True, True] + [False] * 6, f"NaN in rows {broken}")
    demand(float(value.detach()[4]) == 0 and not leaf.grad[4].any(), "an ignored row is not 0")
    demand(leaf.grad[5:].isfinite().all(), "a broken row spoils others")
    demand(leaf.grad[0].isfinite().all(), "a gradient beside logits of -inf is not finite")
    return 0.0


def same_bits(
    context: Context, dtype: torch.dtype, vocab: int, schedule: dict[str, Any]
) -> float:  # fmt: skip
    x, target = logits(context, _rows(context), vocab, dtype)
    runs = []
    for _ in range(2 if context.dry else 5):
        leaf = x.detach().requires_grad_()
        value = chunked_ce.cross_entropy(leaf, target, backend=BACKEND, **schedule)
        value.backward()
        runs.append((value.detach(), leaf.grad))
    for value, grad in runs[1:]:
        assert grad is not None and runs[0][1] is not None
        demand(torch.equal(value, runs[0][0]), "another loss from run to run")
        demand(torch.equal(grad, runs[0][1]), "another gradient from run to run")
    return 0.0


def rows_alone(context: Context, dtype: torch.dtype, vocab: int) -> float:
    """Check that few rows, which are divided among programs, keep every bit."""
    x, target = logits(context, _rows(context), vocab, dtype)
    together = chunked_ce.token_stats(x, target, entropy=True, backend=BACKEND)
    for row in (1, x.shape[0] - 1):
        alone = chunked_ce.token_stats(
            x[row : row + 1], target[row : row + 1], entropy=True, backend=BACKEND
        )
        for name in ("lse", "logprob", "entropy"):
            both = getattr(together, name)[row], getattr(alone, name)[0]
            demand(torch.equal(*both), f"row {row}: {name} {both[1]} alone, {both[0]} among others")
    return 0.0
