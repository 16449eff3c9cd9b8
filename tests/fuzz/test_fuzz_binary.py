"""binary_cross_entropy_with_logits: labels dense or by index, weights that broadcast, against the truth."""

from dataclasses import dataclass
from typing import Any

import cases
import torch
import torch.nn.functional as F
import truth
from hypothesis import strategies as st
from torch import Tensor

from chunked_ce import binary_cross_entropy_with_logits


@dataclass
class Call:
    x: Tensor
    view: str
    target: Tensor
    labels: Tensor  # the same, dense, in fp64
    options: dict[str, Any]
    upstream: Tensor


@st.composite
def calls(draw, shapes=cases.SHAPES, vocabs=cases.VOCABS):
    g, shape, vocab = cases.generator(draw), draw(shapes), draw(vocabs)
    shape = (*shape, vocab)
    x = cases.values(draw, g, shape, draw(st.sampled_from(cases.DTYPES)), cases.LARGEST["torch"])
    options: dict[str, Any] = dict(reduction=draw(st.sampled_from(["mean", "sum", "none"])))
    for name in ("weight", "pos_weight"):
        if draw(st.integers(0, 2)) == 0:
            own = shape[draw(st.integers(0, len(shape) - 1)) :]
            own = tuple(1 if draw(st.integers(0, 3)) == 0 else n for n in own)
            options[name] = (0.1 + torch.rand(own, generator=g)).to(
                draw(st.sampled_from(cases.DTYPES))
            )
    k = draw(st.integers(1, 5))
    if draw(st.booleans()) and k != vocab:
        ignore_index = draw(st.sampled_from([-100, -1, 0]))
        target = torch.randint(0, vocab, (*shape[:-1], k), generator=g)
        padding = torch.rand(target.shape, generator=g) < draw(st.sampled_from([0.0, 0.4, 1.0]))
        target = torch.where(padding, ignore_index, target)
        given = target != ignore_index
        labels = torch.zeros(shape, dtype=torch.float64)
        labels = (labels.scatter_add_(-1, target.where(given, 0), given.double()) > 0).double()
        options["ignore_index"] = ignore_index
        target = target.to(draw(st.sampled_from(cases.INTEGERS[:4])))
    else:
        target = torch.rand(shape, generator=g, dtype=torch.float64)
        target = target.round() if draw(st.booleans()) else target
        target = target.to(draw(st.sampled_from(cases.DTYPES)))
        labels = target.double()
    upstream = cases.upstreams(draw, g, shape if options["reduction"] == "none" else ())
    return Call(x, draw(st.sampled_from(cases.VIEWS)), target, labels, options, upstream)


def exactly(call: Call, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(each logit's loss, its derivative, the size of the terms of that), in closed form."""
    y = call.labels
    w, v = (call.options.get(k, torch.ones(())).double() for k in ("weight", "pos_weight"))
    no, yes = -F.logsigmoid(-z), -F.logsigmoid(z)
    loss = w * (((1 - y) * no).masked_fill(y == 1, 0.0) + (v * y * yes).masked_fill(y == 0, 0.0))
    slope = w * ((1 - y) * z.sigmoid() - v * y * (-z).sigmoid())
    return loss, slope, w * ((1 - y) * z.sigmoid() + v * y * (-z).sigmoid())


def check(call: Call, backend: str = "torch") -> None:
    leaf = call.x.clone().requires_grad_()
    x = cases.seen(leaf, call.view)
    before = x.detach().clone()
    loss = binary_cross_entropy_with_logits(x, call.target, backend=backend, **call.options)
    loss.backward(call.upstream.to(loss))
    assert torch.equal(x.nan_to_num(7.0), before.nan_to_num(7.0))
    of_each, slope, size = exactly(call, before.double())
    expected, divisor = of_each, 1.0
    if call.options["reduction"] != "none":
        divisor = float(of_each.numel()) if call.options["reduction"] == "mean" else 1.0
        expected = of_each.sum() / divisor if divisor else torch.tensor(torch.nan)
    slack = 0.0
    if call.options["reduction"] != "none":
        slack = (
            4
            * truth.EPSILON[loss.dtype]
            * of_each.abs().nan_to_num(0.0, 0.0).sum()
            / (divisor or 1.0)
        )
    truth.assert_values(loss, expected.double(), call.x.dtype, slack)
    factor = call.upstream.double() / (divisor or 1.0)
    exact, bound = slope * factor, size * factor.abs()
    if call.view == "expanded" and call.x.dim() > 1 and call.x.shape[0]:
        whole = torch.zeros_like(exact)
        whole[0] = exact.sum(0)
        noise = torch.zeros_like(bound)
        noise[0] = bound.sum(0)
        exact, bound = whole, noise * truth.ULP[call.x.dtype] * (1 + bound.shape[0])
    else:
        bound = bound * 8 * truth.EPSILON[loss.dtype]
    floor = 2.0**-24 * max(1, call.x.shape[0]) if call.x.dtype == torch.float16 else 1e-36
    tolerance = truth.ULP[call.x.dtype] * exact.abs() + bound + floor
    truth.assert_gradient(leaf.grad, exact, tolerance, call.x.dtype, exact.isnan())


@cases.backends(torch=60, triton=2, long=40)
def test_binary(explore, backend):
    small = dict(vocabs=st.integers(1, 20)) if backend == "triton" else {}  # strided rows are slow
    explore(calls(**cases.sizes(backend) | small), check)
