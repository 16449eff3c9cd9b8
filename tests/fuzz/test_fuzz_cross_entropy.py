"""cross_entropy: any target, options, schedule, memory layout, against the truth."""

from dataclasses import dataclass
from typing import Any

import cases
import pytest
import torch
import truth
from hypothesis import strategies as st
from torch import Tensor

from chunked_ce import cross_entropy

SCHEDULES = [{}, {}, dict(grad_in_forward=True), dict(inplace_backward=True), dict(grad_in_forward=True, inplace_backward=True)]  # fmt: skip
pytestmark = pytest.mark.filterwarnings("ignore:(input|target) of shape")


@dataclass
class Call:
    x: Tensor  # [..., columns]
    view: str
    target_spec: cases.TargetSpec
    options: dict[str, Any]
    head: dict[str, Any]
    schedule: dict[str, Any]
    vocab: int
    upstream: Tensor
    dim: int
    block: int


@st.composite
def calls(draw, shapes=cases.SHAPES, vocabs=cases.VOCABS, largest=cases.LARGEST["torch"]):
    g, shape, vocab = cases.generator(draw), draw(shapes), draw(vocabs)
    x = cases.values(draw, g, (*shape, vocab), draw(st.sampled_from(cases.DTYPES)), largest)
    padding = draw(st.sampled_from([0, 0, 1, 3]))
    x = torch.nn.functional.pad(x, (0, padding), value=cases.NAN)
    schedule = draw(st.sampled_from(SCHEDULES))
    view = draw(st.sampled_from(cases.VIEWS))
    if view == "expanded" and "inplace_backward" in schedule:
        schedule = {}
    target_spec = cases.target_specs(draw, g, shape, vocab)
    options = cases.loss_options(draw, g, shape, vocab)
    if padding:
        options["vocab_size"] = vocab
        if target_spec.kind == "probabilities":  # of columns that do not exist
            target_spec.target = torch.nn.functional.pad(
                target_spec.target, (0, padding), value=0.5
            )
    if "token_weight" in options and "grad_in_forward" not in schedule and draw(st.booleans()):
        options["token_weight"] = options["token_weight"].requires_grad_()
    if target_spec.kind == "probabilities" and draw(st.booleans()):
        target_spec.target.requires_grad_()
    upstream = cases.upstreams(draw, g, shape if options["reduction"] == "none" else ())
    dim = draw(st.sampled_from([-1, -1, 1]))
    return Call(
        x, view, target_spec, options, cases.heads(draw), schedule, vocab, upstream, dim, draw(cases.BLOCKS)
    )  # fmt: skip


def ours(call: Call, backend: str) -> tuple[Tensor, Tensor]:
    """(the loss, the gradient of x), and nothing else is written."""
    leaf = call.x.clone().requires_grad_()
    x = cases.seen(leaf, call.view)
    before, beside = x.detach().clone(), cases.outside(x)
    target, dim = call.target_spec.target, call.dim
    if dim == 1 and x.dim() > 1:
        x = x.movedim(-1, 1)
        target = target.movedim(-1, 1) if call.target_spec.kind == "probabilities" else target
    with cases.block_size(call.block):
        loss = cross_entropy(
            x, target, dim=dim, backend=backend, **call.target_spec.options, **call.options, **call.head, **call.schedule
        )  # fmt: skip
        loss.backward(call.upstream.to(loss))
    x = x.movedim(1, -1) if dim == 1 and x.dim() > 1 else x
    if "inplace_backward" not in call.schedule:
        assert torch.equal(x.nan_to_num(7.0), before.nan_to_num(7.0))
    torch.testing.assert_close(cases.outside(x), beside, rtol=0, atol=0, equal_nan=True)
    return loss.detach(), leaf.grad


def learned(call: Call) -> list[Tensor]:
    """Tensors other than the logits that want a gradient."""
    given = (call.target_spec.target, call.options.get("token_weight"))
    return [t for t in given if isinstance(t, Tensor) and t.requires_grad]


def check(call: Call, backend: str = "torch") -> None:
    loss, grad = ours(call, backend)
    wide = {id(t): t.detach().double().requires_grad_() for t in learned(call)}
    options = {k: wide.get(id(v), v) for k, v in call.options.items()}
    prob = call.target_spec.prob
    if id(call.target_spec.target) in wide:
        prob = wide[id(call.target_spec.target)][..., : call.vocab]
    leaf = call.x.double().requires_grad_()
    z = truth.head_of(cases.seen(leaf, call.view), call.head, call.vocab)
    indices = call.target_spec.kind == "indices"
    exact = truth.cross_entropy(
        z,
        prob,
        call.target_spec.counted,
        indices=indices,
        unspread=call.target_spec.unspread,
        **options,
    )
    exact.value.backward(call.upstream.to(exact.value))
    moved = truth.rounding(call.x, z, call.head)
    slack = truth.slack(exact, moved, call.options["reduction"], call.x.dtype)
    truth.assert_values(loss, exact.value, call.x.dtype, slack)

    if (
        exact.divisor == 0 and call.target_spec.counted.any()
    ):  # the weights add up to 0: any gradient is
        return
    steepest = exact.steepest * abs(call.head.get("logit_scale", 1.0))
    bound = (call.upstream.abs() / exact.divisor.abs() * steepest).nan_to_num(0.0)
    expected = leaf.grad.nan_to_num(0.0)  # the mean of nothing; and see `skip`
    broken, added = exact.broken, 0.0
    if (
        call.view == "expanded" and broken.numel() and broken.dim()
    ):  # autograd adds up the rounded ones
        bound, moved, broken = bound.sum(0, True), moved.amax(0, True), broken.any(0, True)
        added = truth.ULP[call.x.dtype] * bound[..., None]
    if backend == "triton" and "grad_in_forward" in call.schedule:
        # Rounded in forward, and where upstream is not 1 again: the interpreter truncates twice.
        added = added + truth.ULP[call.x.dtype] * expected.abs()
    tolerance = truth.gradient_tolerance(expected, call.x.dtype, bound, moved) + added
    truth.assert_gradient(grad, expected, tolerance, call.x.dtype, broken[..., None])
    if exact.of_rows.numel() and exact.of_rows.isfinite().all() and exact.value.isfinite().all():
        for t in learned(call):
            of_z = 1.0 + 2.0 * call.options["z_loss_weight"] * z.detach().abs().nan_to_num(
                0.0, 0.0
            ).amax(-1)
            size = call.upstream.abs().amax() / exact.divisor.abs()
            truth.assert_gradient_of_weights(
                t, wide[id(t)].grad, (4 * moved * of_z + 1e-6 * exact.unweighted.amax()) * size
            )


@cases.backends(torch=100, triton=4, long=45)
def test_cross_entropy(explore, backend):
    explore(calls(**cases.sizes(backend), largest=cases.LARGEST[backend]), check)
