"""kl_div and linear_kl_div: any pair of rows, kind, temperature and options, against the truth in closed form."""

from dataclasses import dataclass
from typing import Any

import cases
import oracle
import torch
import truth
from hypothesis import strategies as st
from pair_truth import Exact, exactly
from test_fuzz_linear import products
from torch import Tensor

from chunked_ce import kl_div, linear_kl_div

KINDS = ["forward", "reverse", "jsd"]


@dataclass
class Call:
    x: Tensor  # [..., columns]
    y: Tensor
    views: tuple[str, str]
    counted: Tensor
    options: dict[str, Any]
    vocab: int
    upstream: Tensor
    block: int


def drawn_options(draw, g: torch.Generator, rows: tuple[int, ...]) -> tuple[dict, Tensor]:
    options: dict[str, Any] = dict(
        kind=draw(st.sampled_from(KINDS)),
        reduction=draw(st.sampled_from(["mean", "sum", "none"])),
        temperature=draw(st.sampled_from([1.0, 1.0, 2.0, 0.5, 1.7, 30.0])),
        beta=draw(st.sampled_from([0.5, 0.1, 0.93, 0.0, 1.0, 1e-3])),
    )
    counted = torch.ones(rows, dtype=torch.bool)
    if draw(st.booleans()):
        spec = cases.index_spec(draw, g, rows, 7)
        options |= dict(target=spec.target) | spec.options
        counted = spec.counted
    if draw(st.integers(0, 2)) == 0:
        weight = torch.rand(rows, generator=g, dtype=torch.float64)
        weight = weight.where(weight > 0.2, 0.0) if draw(st.booleans()) else weight
        options["token_weight"] = cases.strided(
            draw, weight.to(draw(st.sampled_from(cases.DTYPES)))
        )
    if options["reduction"] == "mean" and draw(st.integers(0, 3)) == 0:
        options["num_items"] = draw(st.sampled_from([1, 7, torch.tensor(7), torch.tensor(3.5)]))
    return options, counted


def padded(draw, t: Tensor) -> Tensor:
    return torch.nn.functional.pad(t, (0, draw(st.sampled_from([0, 1, 3]))), value=cases.NAN)


@st.composite
def calls(draw, shapes=cases.SHAPES, vocabs=cases.VOCABS, largest=cases.LARGEST["torch"]):
    g, shape, vocab = cases.generator(draw), draw(shapes), draw(vocabs)
    x = cases.values(draw, g, (*shape, vocab), draw(st.sampled_from(cases.DTYPES)), largest)
    distance = draw(st.sampled_from([None, None, 1.0, 1e-2, 0.0]))
    dtype = draw(st.sampled_from([x.dtype, *cases.DTYPES]))
    if distance is None:
        y = cases.values(draw, g, x.shape, dtype, largest)
    else:
        noise = torch.randn(x.shape, generator=g, dtype=torch.float64)
        y = (x.double() + distance * noise).to(dtype)
    x, y = padded(draw, x), padded(draw, y)
    options, counted = drawn_options(draw, g, shape)
    if not x.shape[-1] == y.shape[-1] == vocab:
        options["vocab_size"] = vocab
    upstream = cases.upstreams(draw, g, shape if options["reduction"] == "none" else ())
    views = draw(st.sampled_from(cases.VIEWS)), draw(st.sampled_from(cases.VIEWS))
    return Call(x, y, views, counted, options, vocab, upstream, draw(cases.BLOCKS))


def reduced(
    call: Any, exact: Exact, counted: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """(the loss, its slack, what each row's gradient is multiplied by)."""
    given = call.options.get("token_weight")
    weight = counted.double() if given is None else given.double() * counted
    left_out = ~counted | ((weight == 0) & exact.loss.isinf())
    terms = torch.where(left_out, 0.0, exact.loss * weight)
    slack, name = exact.slack * weight.abs(), call.options["reduction"]
    if name == "none":
        return terms, slack, weight * call.upstream
    divisor = torch.ones(()).double()
    if name == "mean":
        items = call.options.get("num_items")
        divisor = weight.sum() if items is None else torch.as_tensor(items).double()
    eps = truth.EPSILON[truth.compute_dtype(dtype)]
    of_sum = 4 * eps * terms.abs().nan_to_num(0.0, 0.0).sum()
    scale = weight * call.upstream / divisor
    return terms.sum() / divisor, (slack.sum() + of_sum) / divisor.abs(), scale.nan_to_num(0.0)


def check(call: Call, backend: str = "torch") -> None:
    leaf = call.x.clone().requires_grad_()
    x, y = cases.seen(leaf, call.views[0]), cases.seen(call.y, call.views[1])
    before, beside = (x.detach().clone(), y.clone()), cases.outside(x)
    with cases.block_size(call.block):
        loss = kl_div(x, y, backend=backend, **call.options)
        loss.backward(call.upstream.to(loss))
    for a, b in zip((x.detach(), y), before, strict=True):
        assert torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0))
    torch.testing.assert_close(cases.outside(x), beside, rtol=0, atol=0, equal_nan=True)
    dtype, wide = call.x.dtype, truth.compute_dtype(call.x.dtype)
    z = cases.seen(call.x, call.views[0])[..., : call.vocab].double()
    teacher = y[..., : call.vocab].to(wide).double()
    exact = exactly(z, teacher, call.options, dtype)
    if (exact.beyond & call.counted).any():
        return
    value, slack, scale = reduced(call, exact, call.counted, dtype)
    truth.assert_values(loss, value, dtype, slack)
    if value.isnan().any() and call.counted.any() and call.options["reduction"] == "mean":
        return  # weights that add up to 0, or a row that is NaN
    grad = torch.nn.functional.pad(
        torch.where(scale[..., None] == 0, 0.0, exact.grad * scale[..., None]),
        (0, call.x.shape[-1] - call.vocab),
    )
    tolerance = torch.nn.functional.pad(
        exact.tolerance * scale.abs()[..., None], (0, call.x.shape[-1] - call.vocab)
    )
    floor = 2.0**-24 if dtype == torch.float16 else 1e-36
    tolerance = tolerance + truth.ULP[dtype] * grad.abs() + floor
    skip = (exact.vague & call.counted).expand(z.shape[:-1])
    if (
        call.views[0] == "expanded" and grad.dim() > 1 and len(grad)
    ):  # autograd adds rounded ones up
        whole = grad
        grad, tolerance, skip = torch.zeros_like(whole), tolerance.sum(0, True), skip.any(0, True)
        grad[0] = whole.sum(0)
        tolerance = tolerance + 2 * truth.ULP[dtype] * whole.abs().sum(0, True)
    truth.assert_gradient(leaf.grad, grad, tolerance, dtype, skip[..., None])


@dataclass
class HeadCall:
    tensors: list[Tensor | None]  # hidden states, weight and bias of the student, of the teacher
    counted: Tensor
    options: dict[str, Any]
    chunk: int | None
    hard: float  # cross_entropy_weight
    heads: tuple[dict[str, Any], dict[str, Any]]  # softcap and scale of each model
    vocab: int
    upstream: Tensor
    wanted: list[bool]
    block: int


@st.composite
def head_calls(draw, shapes=cases.SHAPES, vocabs=cases.VOCABS):
    g, shape, vocab = cases.generator(draw), draw(shapes), draw(vocabs)
    size, pads = (
        draw(st.sampled_from([4, 8, 30])),
        (draw(st.integers(0, 2)), draw(st.integers(0, 2))),
    )
    tensors: list[Tensor | None] = []
    transforms = draw(st.integers(0, 2)) == 0  # in float64, where they round to nothing
    for pad in pads:
        dtype = torch.float64 if transforms else draw(st.sampled_from(cases.DTYPES))
        hidden = draw(st.sampled_from([1, 4, 17]))
        grid = lambda *s, t=dtype: (torch.randint(-size, size + 1, s, generator=g) / 8).to(t)  # noqa: E731
        bias = grid(vocab + pad) if draw(st.booleans()) else None
        tensors += [grid(*shape, hidden), grid(vocab + pad, hidden), bias]
    options, counted = drawn_options(draw, g, shape)
    if any(pads):
        options["vocab_size"] = vocab
    hard = (
        draw(st.sampled_from([0.0, 0.0, 0.7, -1.0])) if "target" in options and vocab > 7 else 0.0
    )
    if not counted.all() and draw(st.booleans()):  # what is ignored is not read
        tensors[0] = torch.where(counted[..., None], tensors[0], torch.nan)
        tensors[3] = torch.where(counted[..., None], tensors[3], torch.nan)
    upstream = cases.upstreams(draw, g, shape if options["reduction"] == "none" else ())
    wanted = draw(st.lists(st.booleans(), min_size=3, max_size=3))
    heads = (cases.heads(draw), cases.heads(draw)) if transforms else ({}, {})
    return HeadCall(
        tensors, counted, options, draw(st.sampled_from([None, 1, 2, 5])), hard, heads, vocab, upstream, wanted,
        draw(cases.BLOCKS),
    )  # fmt: skip


def logits_of(x: Tensor, weight: Tensor, bias: Tensor | None, call: HeadCall) -> Tensor:
    """In fp64, of numbers that the dtype holds; ignored rows are 0."""
    x = torch.where(call.counted[..., None], x, 0.0).double()
    logits = x @ weight.double().t() + (0.0 if bias is None else bias.double())
    return logits.to(weight.dtype).double()[..., : call.vocab]


def transformed(logits: Tensor, head: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """(logits after the head's transforms, the derivative)."""
    leaf = logits.clone().requires_grad_()
    z = oracle.logits(leaf, **head)
    (slope,) = torch.autograd.grad(z.sum(), leaf)
    return z.detach(), slope


def check_heads(call: HeadCall, backend: str = "torch") -> None:
    student = [
        None if t is None else t.clone().requires_grad_(w)
        for t, w in zip(call.tensors[:3], call.wanted, strict=True)
    ]
    x, weight, bias, y, teacher_weight, teacher_bias = (*student, *call.tensors[3:])
    with cases.block_size(call.block):
        loss = linear_kl_div(
            x, weight, y, teacher_weight, linear_bias=bias, teacher_bias=teacher_bias,
            token_chunk_size=call.chunk, **call.heads[0],
            **{f"teacher_{name}": value for name, value in call.heads[1].items()},
            cross_entropy_weight=call.hard, backend=backend, **call.options,
        )  # fmt: skip
        if loss.requires_grad:
            loss.backward(call.upstream.to(loss))
    dtype = call.tensors[0].dtype
    raw, teacher = logits_of(*call.tensors[:3], call), logits_of(*call.tensors[3:], call)
    z, slope = transformed(raw, call.heads[0])
    teacher, _ = transformed(teacher, call.heads[1])
    exact = exactly(z, teacher.to(truth.compute_dtype(dtype)).double(), call.options, dtype)
    if call.hard:
        exact = with_cross_entropy(exact, z, call, dtype)
    exact = exact._replace(grad=exact.grad * slope, tolerance=exact.tolerance * slope.abs())
    value, slack, scale = reduced(call, exact, call.counted, dtype)
    truth.assert_values(loss, value, dtype, slack)
    if value.isnan().any() and call.counted.any() and call.options["reduction"] == "mean":
        return  # weights that add up to 0, or a row that is NaN
    scale, columns = scale[..., None], (0, len(call.tensors[1]) - call.vocab)
    of_logits, near = (
        torch.nn.functional.pad(t, columns)
        for t in (exact.grad * scale, exact.tolerance * scale.abs())
    )
    flat = torch.where(call.counted[..., None], call.tensors[0], 0.0).double()
    wide = call.tensors[1].double()
    floor = 2.0**-24 if dtype == torch.float16 else 1e-36
    near = near + (4 * truth.ULP[dtype] + 1e-6) * of_logits.abs() + floor
    if call.hard:  # two rounded gradients are added
        hard = torch.nn.functional.pad(abs(call.hard) * scale.abs().expand_as(z), columns)
        near = near + 4 * truth.ULP[dtype] * (of_logits.abs() + hard)
    noise = products(near, flat.abs(), wide.abs())
    for leaf, expected, of_sum in zip(student, products(of_logits, flat, wide), noise, strict=True):
        if leaf is not None and leaf.requires_grad:
            tolerance = 2 * of_sum + 4 * truth.ULP[dtype] * expected.abs() + floor
            truth.assert_gradient(leaf.grad, expected, tolerance, dtype, torch.tensor(False))


def with_cross_entropy(exact: Exact, z: Tensor, call: HeadCall, dtype: torch.dtype) -> Exact:
    target = torch.where(call.counted, call.options["target"].long(), 0)[..., None]
    log_p = z.log_softmax(-1)
    nll = -log_p.gather(-1, target)[..., 0]
    slope = log_p.exp().scatter_add(-1, target, -torch.ones_like(nll)[..., None])
    eps = truth.EPSILON[truth.compute_dtype(dtype)]
    return exact._replace(
        loss=exact.loss + call.hard * nll,
        slack=exact.slack + 4 * eps * (nll.abs() + exact.loss.abs() + 1.0),
        grad=exact.grad + call.hard * slope,
        tolerance=exact.tolerance + 8 * eps * slope.abs() * (2 + log_p.abs()),
    )


@cases.backends(torch=40, triton=1, long=25)
def test_kl_div(explore, backend):
    explore(calls(**cases.sizes(backend), largest=cases.LARGEST[backend]), check)


@cases.backends(torch=25, triton=1, long=20)
def test_linear_kl_div(explore, backend):
    explore(head_calls(**cases.sizes(backend)), check_heads)
