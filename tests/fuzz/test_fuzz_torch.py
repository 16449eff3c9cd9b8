"""Calls as torch takes them, functions and modules, against torch itself in fp64, whatever class dimension."""

from dataclasses import dataclass
from typing import Any

import cases
import pytest
import torch
import torch.nn.functional as F
import truth
from hypothesis import strategies as st
from torch import Tensor

import chunked_ce

SHAPES = [(), (0,), (1,), (3,), (2, 3), (3, 2, 2), (1, 4, 1), (2, 0), (2, 1, 2, 2), (5, 1)]
LOSSES = dict(
    cross_entropy="CrossEntropyLoss", binary_cross_entropy_with_logits="BCEWithLogitsLoss"
)
pytestmark = pytest.mark.filterwarnings("ignore:(input|target) of shape")


@dataclass
class Call:
    name: str
    x: Tensor  # [N, C, d1, ...] or [C]
    view: str
    target: Tensor
    options: dict[str, Any]
    upstream: Tensor
    module: bool


def indices(draw, g: torch.Generator, rows: tuple[int, ...], classes: int) -> tuple[Tensor, int]:
    target = torch.randint(0, classes, rows, generator=g)
    ignore_index = draw(st.sampled_from([-100, 0, classes - 1, 10**6]))
    if ignore_index in (-100, 10**6):
        masked = torch.rand(rows, generator=g) < draw(st.sampled_from([0.0, 0.4, 1.0]))
        target = torch.where(masked, ignore_index, target)
    return target, ignore_index


@st.composite
def calls(draw, vocabs=cases.VOCABS):
    g, classes, shape = cases.generator(draw), draw(vocabs), draw(st.sampled_from(SHAPES))
    shape = (*shape[:1], classes, *shape[1:]) if shape else (classes,)
    rows = shape[:1] + shape[2:] if len(shape) > 1 else ()
    x = torch.randn(shape, generator=g, dtype=torch.float64) * draw(st.sampled_from([0.0, 1.0, 6.0]))  # fmt: skip
    options: dict[str, Any] = dict(reduction=draw(st.sampled_from(["mean", "sum", "none"])))
    kind = draw(st.sampled_from(["indices", "probabilities", "labels"]))
    if kind == "labels":
        target = torch.rand(shape, generator=g)
        target = target if draw(st.booleans()) else target.round()
        per_class = (classes, *[1] * (len(shape) - 2))
        for name in ("weight", "pos_weight"):
            options[name] = torch.rand(per_class, generator=g) if draw(st.booleans()) else None
    else:
        options["label_smoothing"] = draw(st.sampled_from([0.0, 0.1, 1.0]))
        weight = torch.rand(classes, generator=g, dtype=torch.float64)
        if options["reduction"] != "mean" and draw(st.booleans()):
            weight[0] = 0  # a mean whose weights sum to 0 is nothing to compare
        options["weight"] = weight if draw(st.booleans()) else None
    if kind == "probabilities":
        target = torch.rand(shape, generator=g)
        if draw(st.booleans()):
            target = target / target.sum(1 if rows else 0, keepdim=True)
    elif kind == "indices":
        target, options["ignore_index"] = indices(draw, g, rows, classes)
    names = list(LOSSES)
    size = shape if kind == "labels" else rows
    return Call(
        name=names[kind == "labels"],
        x=x.to(draw(st.sampled_from(cases.DTYPES))),
        view=draw(st.sampled_from(cases.VIEWS)),
        target=target,
        options=options,
        upstream=cases.upstreams(draw, g, size if options["reduction"] == "none" else ()),
        module=draw(st.booleans()),
    )  # fmt: skip


def loss_of(where: Any, call: Call, x: Tensor, **more: Any) -> Tensor:
    """By the function or the module, of torch (`where` is torch.nn) or ours."""
    options, target = dict(call.options), call.target
    if where is torch.nn:
        options = {k: v.double() if isinstance(v, Tensor) else v for k, v in options.items()}
        target = target.double() if target.is_floating_point() else target
    if call.module:
        return getattr(where, LOSSES[call.name])(**options, **more)(x, target)
    function = getattr(F if where is torch.nn else where, call.name)
    return function(x, target, **options, **more)


def check(call: Call, backend: str = "torch") -> None:
    leaf, wide = call.x.clone().requires_grad_(), call.x.double().requires_grad_()
    loss = loss_of(chunked_ce, call, cases.seen(leaf, call.view), backend=backend)
    exact = loss_of(torch.nn, call, cases.seen(wide, call.view))
    of_sum = 0.0 if call.options["reduction"] == "none" else 1e-6 * exact.detach().abs()
    truth.assert_values(loss, exact, call.x.dtype, of_sum if loss.dtype == torch.float32 else 1e-11)
    loss.backward(call.upstream.to(loss))
    exact.backward(call.upstream.to(exact))
    expected = wide.grad.nan_to_num(0.0)  # the mean of nothing
    rows = call.x.shape[0] if call.view == "expanded" and call.x.dim() > 1 else 1
    largest = float(expected.abs().amax()) if expected.numel() else 0.0
    rounded = rows * truth.ULP[call.x.dtype] * (largest if rows > 1 else expected.abs())
    tolerance = rounded + noise(call) * max(1.0, largest)
    tolerance = torch.as_tensor(tolerance + (2.0**-24 * rows if call.x.dtype == torch.float16 else 0.0))  # fmt: skip
    nowhere = torch.zeros((), dtype=torch.bool)
    truth.assert_gradient(leaf.grad, expected, tolerance, call.x.dtype, nowhere)


def noise(call: Call) -> float:
    """Of the difference p - q, in fp32 but for fp64, of which upstream is a factor."""
    of_one = 1e-12 if call.x.dtype == torch.float64 else 4e-7
    up = call.upstream.abs().amax() if call.upstream.numel() else torch.zeros(())
    return of_one * max(1.0, float(up))


@cases.backends(torch=200, triton=2, long=15)
def test_calls(explore, backend):
    """At length, of the torch backend: 2000 calls, counted in the summary."""
    # The interpreter takes half a minute for 3 x 301 x 2 x 2 labels; other tests have the long rows.
    explore(calls(**dict(vocabs=st.integers(1, 12)) if backend == "triton" else {}), check)
