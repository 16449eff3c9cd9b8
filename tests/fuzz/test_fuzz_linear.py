"""linear_cross_entropy and linear_token_stats: any target, options and chunks, against the truth.

Hidden states, weights and biases are multiples of 1/8: logits are exact before they are rounded to the dtype.
"""

from dataclasses import dataclass
from typing import Any

import cases
import pytest
import torch
import truth
from hypothesis import strategies as st
from torch import Tensor

from chunked_ce import linear_cross_entropy, linear_token_stats, token_stats

pytestmark = pytest.mark.filterwarnings("ignore:target of shape")


SOMETIMES = st.integers(0, 3).map(lambda i: i == 0)


class _Rounded(torch.autograd.Function):
    """As logits are, in the dtype of the product; not their gradient."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, dtype: torch.dtype) -> Tensor:
        return z.to(dtype).double()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


@dataclass
class Call:
    x: Tensor  # [..., D]
    weight: Tensor  # [V, D]
    bias: Tensor | None
    view: str  # of weight
    target_spec: cases.TargetSpec
    options: dict[str, Any]
    head: dict[str, Any]
    chunks: dict[str, Any]
    vocab: int
    upstream: Tensor
    wanted: list[bool]
    statistics: bool  # the loss from linear_token_stats
    block: int


@st.composite
def calls(draw, shapes=cases.SHAPES, vocabs=cases.VOCABS, statistics=SOMETIMES):
    g, shape, vocab = cases.generator(draw), draw(shapes), draw(vocabs)
    dtype, hidden = draw(st.sampled_from(cases.DTYPES)), draw(st.sampled_from([1, 3, 8, 17]))
    size = draw(st.sampled_from([4, 8, 30, 800]))  # in eighths; of 800, products leave fp16

    def grid(*shape: int) -> Tensor:
        return (torch.randint(-size, size + 1, shape, generator=g) / 8).to(dtype)

    padding = draw(st.sampled_from([0, 0, 3]))
    x, weight = grid(*shape, hidden), grid(vocab + padding, hidden)
    bias = grid(vocab + padding) if draw(st.booleans()) else None
    if bias is not None and draw(st.booleans()):
        bias = bias.masked_fill(
            torch.rand(bias.shape, generator=g) < 0.1, -torch.inf
        )  # masked classes
    statistics = draw(statistics)
    target_spec = (cases.index_spec if statistics else cases.target_specs)(draw, g, shape, vocab)
    options = cases.loss_options(draw, g, shape, vocab)
    if statistics:
        options = dict(reduction="none")
    if padding:
        options["vocab_size"] = vocab
        if target_spec.kind == "probabilities":
            target_spec.target = torch.nn.functional.pad(target_spec.target, (0, padding))
    if draw(st.integers(0, 3)) == 0:
        special = torch.rand(x.shape, generator=g) < 0.05
        x = x.masked_fill(special, draw(st.sampled_from([torch.nan, torch.inf, -0.0])))
    if not target_spec.counted.all() and draw(st.booleans()):  # what is ignored is not read
        x = torch.where(target_spec.counted[..., None], x, torch.nan)
    if dtype == torch.bfloat16 and hidden % 2:  # torch.mm on a CPU lets NaN into the row before
        x = x.nan_to_num(0.0, 0.0, 0.0)
    chunks = dict(
        token_chunk_size=draw(st.sampled_from([None, 1, 2, 5])),
        drop_ignored=draw(st.sampled_from([None, True, False])),
        acc_dtype=draw(st.sampled_from([torch.float32, torch.float64])),
    )
    view = draw(st.sampled_from(["whole", "offset", "classes outermost", "every other row"]))
    upstream = cases.upstreams(draw, g, shape if options["reduction"] == "none" else ())
    wanted = draw(st.lists(st.booleans(), min_size=3, max_size=3))
    return Call(
        x, weight, bias, view, target_spec, options, cases.heads(draw), chunks, vocab, upstream, wanted, statistics,
        draw(cases.BLOCKS),
    )  # fmt: skip


def ours(call: Call, backend: str) -> tuple[Tensor, list[Tensor | None]]:
    given = (call.x, call.weight, call.bias)
    leaves = [
        None if t is None else t.clone().requires_grad_(w)
        for t, w in zip(given, call.wanted, strict=True)
    ]
    x, weight, bias = leaves
    weight = cases.seen(weight, call.view)
    shared = call.target_spec.options | call.options | call.head | call.chunks
    with cases.block_size(call.block):
        if call.statistics:
            shared.pop("reduction")
            loss = -linear_token_stats(
                x, weight, call.target_spec.target, linear_bias=bias, backend=backend, **shared
            ).logprob
        else:
            loss = linear_cross_entropy(
                x, weight, call.target_spec.target, linear_bias=bias, backend=backend, **shared
            )
        if loss.requires_grad:
            loss.backward(call.upstream.to(loss))
    return loss.detach(), [None if t is None else t.grad for t in leaves]


def check(call: Call, backend: str = "torch") -> None:
    loss, grads = ours(call, backend)
    dtype, counted = call.x.dtype, call.target_spec.counted
    x = torch.where(counted[..., None], call.x, 0.0).double().requires_grad_()
    weight = call.weight.double().requires_grad_()
    bias = (
        (torch.zeros(weight.shape[0]) if call.bias is None else call.bias).double().requires_grad_()
    )
    logits = x @ weight.t() + torch.where(bias == -torch.inf, -torch.inf, bias)
    rounded = _Rounded.apply(logits, dtype)
    rounded.retain_grad()
    z = truth.head_of(rounded, call.head, call.vocab)
    indices = call.target_spec.kind == "indices"
    exact = truth.cross_entropy(
        z,
        call.target_spec.prob,
        counted,
        indices=indices,
        unspread=call.target_spec.unspread,
        **call.options,
    )
    exact.value.backward(call.upstream.to(exact.value))
    moved = truth.rounding(call.x, z, call.head)
    slack = truth.slack(exact, moved, call.options["reduction"], dtype)
    truth.assert_values(loss, exact.value, dtype, slack)
    fine = x.isfinite().all() and exact.of_rows.isfinite().all() and not exact.broken.any()
    if not fine or (exact.divisor == 0 and counted.any()):
        return
    steepest = exact.steepest * abs(call.head.get("logit_scale", 1.0))
    bound = (call.upstream.abs() / exact.divisor.abs() * steepest).nan_to_num(0.0)
    of_logits = rounded.grad.nan_to_num(0.0)
    tolerance = truth.gradient_tolerance(of_logits, dtype, bound, moved)
    if (of_logits.abs() > 0.99 * torch.finfo(dtype).max).any():  # inf in the chunk
        return
    # What of rounding reaches the products, and their own: a sum's in fp32, their dtype's, the chunks'.
    sizes = products(of_logits.abs(), x.abs(), weight.abs())
    noise = products(of_logits.abs() * 1e-6 + tolerance, x.abs(), weight.abs())
    floor = 2.0**-24 if dtype == torch.float16 else 0.0
    each_rounded = [0.0, 2.0 * truth.ULP[dtype] if dtype.itemsize == 2 else 0.0, 0.0]
    for leaf, got, near, size, of_chunk in zip(
        (x, weight, bias), grads, noise, sizes, each_rounded, strict=True
    ):
        if got is not None:
            expected = leaf.grad.nan_to_num(0.0)
            of_sum = 2 * near + 4 * truth.ULP[dtype] * expected.abs() + of_chunk * size + floor
            partial_overflows = size > 0.99 * torch.finfo(dtype).max
            truth.assert_gradient(got, expected, of_sum, dtype, partial_overflows)


@torch.no_grad()
def products(rows: Tensor, x: Tensor, weight: Tensor) -> list[Tensor]:
    """What a gradient of logits [..., V] gives the hidden states, the weight and the bias."""
    rows = rows.reshape(-1, len(weight))
    return [
        (rows @ weight).view(x.shape),
        rows.t() @ x.reshape(-1, x.shape[-1]),
        rows.sum(0),
    ]


def check_statistics(call: Call, backend: str = "torch") -> None:
    """All of them, and their gradients, as :func:`token_stats` has them of the same logits."""
    call.options.pop("reduction")
    dtype, counted = call.x.dtype, call.target_spec.counted
    shared = call.target_spec.options | call.options | call.head
    shared |= dict.fromkeys(("entropy", "mean_logprob", "rank", "argmax"), True)
    leaves = [None if t is None else t.clone().requires_grad_() for t in (call.x, call.weight, call.bias)]  # fmt: skip
    x, weight, bias = leaves
    flat = torch.where(counted[..., None], call.x, 0.0).double()
    logits = flat @ call.weight.double().t() + (0.0 if bias is None else call.bias.double())
    logits = logits.to(dtype).requires_grad_()
    with cases.block_size(call.block):
        of_logits = token_stats(logits, call.target_spec.target, backend=backend, **shared)
        stats = linear_token_stats(
            x,
            weight,
            call.target_spec.target,
            linear_bias=bias,
            backend=backend,
            **shared,
            **call.chunks,
        )
        assert torch.equal(stats.rank, of_logits.rank)
        assert torch.equal(stats.argmax, of_logits.argmax)
        g = torch.Generator().manual_seed(call.x.numel())
        size = torch.zeros_like(of_logits.lse, dtype=torch.float64)
        total, total_of_logits = 0.0, 0.0
        for a, b in zip(stats[:4], of_logits[:4], strict=True):
            torch.testing.assert_close(a, b, rtol=2e-6, atol=2e-6, equal_nan=True)
            up = torch.randn(a.shape, generator=g).to(a).where(b.isfinite(), 0.0)
            size = size + up.abs() * (20.0 + b.detach().abs().nan_to_num(0.0, 0.0, 0.0))
            total = total + (a.where(b.isfinite(), 0.0) * up).sum()
            total_of_logits = total_of_logits + (b.where(b.isfinite(), 0.0) * up).sum()
        if of_logits.lse.isnan().any() or not flat.isfinite().all():  # 0 * inf reaches the weight
            return
        total.backward()
        total_of_logits.backward()
    size = size * abs(call.head.get("logit_scale", 1.0))
    # Of the chunk's gradient, rounded to the dtype once more, and of the products of that.
    dz, wide = logits.grad.double(), call.weight.double()
    floor = 2.0**-24 if dtype == torch.float16 else 1e-36
    eps = truth.EPSILON[truth.compute_dtype(dtype)]
    near = 3 * truth.ULP[dtype] * dz.abs() + 8 * eps * size[..., None] + floor
    exact, noise = products(dz, flat, wide), products(near, flat.abs(), wide.abs())
    nothing = torch.zeros((), dtype=torch.bool)
    for leaf, expected, tolerance in zip(leaves, exact, noise, strict=True):
        if leaf is not None:
            tolerance = tolerance + truth.ULP[dtype] * expected.abs() + floor
            truth.assert_gradient(leaf.grad, expected, tolerance, dtype, nothing)


def check_heads(call: Call) -> None:
    """[V, d1, D]: as many heads side by side."""
    x, target = call.x.reshape(-1, call.x.shape[-1]), call.target_spec.target.reshape(-1)
    weight = torch.stack([call.weight, call.weight.flip(0)], 1)
    bias = None if call.bias is None else torch.stack([call.bias, call.bias.flip(0)], 1)
    labels = torch.stack([target, target], 1)
    options = call.target_spec.options | call.head | call.chunks
    for reduction in ("none", "sum"):
        both = linear_cross_entropy(
            x, weight, labels, linear_bias=bias, reduction=reduction, **options
        )
        each = [
            linear_cross_entropy(
                x,
                weight[:, i],
                target,
                linear_bias=None if bias is None else bias[:, i],
                reduction=reduction,
                **options,
            )
            for i in range(2)
        ]
        expected = torch.stack(each, 1) if reduction == "none" else sum(each)
        torch.testing.assert_close(both, expected, rtol=1e-6, atol=1e-6, equal_nan=True)


@cases.backends(torch=40, triton=2, long=30)
def test_linear(explore, backend):
    explore(calls(**cases.sizes(backend)), check)


@cases.backends(torch=12, triton=1, long=20)
def test_statistics(explore, backend):
    explore(calls(**cases.sizes(backend), statistics=st.just(True)), check_statistics)


@pytest.mark.cases(20)
def test_heads(explore):
    explore(
        calls().filter(
            lambda call: call.target_spec.kind == "indices" and "vocab_size" not in call.options
        ),
        check_heads,
    )
