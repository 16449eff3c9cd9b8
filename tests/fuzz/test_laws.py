"""What holds between two calls, whatever the truth is."""

import math
from dataclasses import dataclass, replace
from typing import Any

import cases
import pytest
import torch
from helpers import ULP
from hypothesis import strategies as st
from torch import Tensor

from chunked_ce import cross_entropy, linear_cross_entropy

pytestmark = pytest.mark.filterwarnings("ignore:(input|target) of shape")


@dataclass
class Call:
    x: Tensor  # [N, V], fp32 or fp64: multiples of 1/8
    target_spec: cases.TargetSpec
    options: dict[str, Any]
    block: int
    g: torch.Generator

    @property
    def tokens(self) -> int:
        return self.x.shape[0]


@st.composite
def calls(draw, kinds=tuple(cases.TARGET_SPECS)):
    g, tokens, vocab = cases.generator(draw), draw(st.integers(1, 9)), draw(cases.VOCABS)
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    x = (torch.randint(-80, 81, (tokens, vocab), generator=g) / 8).to(dtype)
    target_spec = cases.TARGET_SPECS[draw(st.sampled_from(kinds))](draw, g, (tokens,), vocab)
    options = cases.loss_options(draw, g, (tokens,), vocab)
    options.pop("num_items", None)
    return Call(x, target_spec, options | cases.heads(draw), draw(cases.BLOCKS), g)


def loss_and_gradient(
    call: Call, upstream: Tensor | float = 1.0, **changed: Any
) -> tuple[Tensor, Tensor]:
    x = changed.pop("x", call.x).detach().clone().requires_grad_()
    options = call.target_spec.options | call.options | changed
    target = options.pop("target", call.target_spec.target)
    with cases.block_size(options.pop("block", call.block)):
        loss = cross_entropy(x, target, dim=-1, **options)
        (loss * upstream).sum().backward()
    return loss.detach(), x.grad


def assert_same(one: tuple[Tensor, ...], other: tuple[Tensor, ...], times: float = 1.0) -> None:
    """But for the rounding of sums in another order."""
    for a, b in zip(one, other, strict=True):
        size = float(b.nan_to_num(0.0, 0.0, 0.0).abs().amax()) if b.numel() else 0.0
        rtol = times * ULP[a.dtype]
        torch.testing.assert_close(a, b, rtol=rtol, atol=rtol * (1.0 + size), equal_nan=True)


def rows_of(target: Any, index: Any) -> Any:
    return tuple(t[index] for t in target) if isinstance(target, tuple) else target[index]


def joined(a: Any, b: Any) -> Any:
    if isinstance(a, tuple):
        return tuple(torch.cat(pair) for pair in zip(a, b, strict=True))
    return torch.cat([a, b])


def check_shift(call: Call) -> None:
    """+c on a row; the z-loss alone sees it."""
    call.options |= dict(z_loss_weight=0.0, softcap=None, logit_scale=1.0)
    c = torch.randint(-512, 513, (call.tokens, 1), generator=call.g).to(call.x.dtype)
    assert_same(loss_and_gradient(call, x=call.x + c), loss_and_gradient(call))


def check_permutation(call: Call) -> None:
    """Classes in another order."""
    vocab = call.x.shape[-1]
    order = torch.randperm(vocab, generator=call.g)
    place = order.argsort()
    target, changed = call.target_spec.target, {}
    if call.target_spec.kind == "probabilities":
        target = target[:, order]
    elif call.target_spec.kind == "indices":
        target = torch.where(
            call.target_spec.counted, place[target.long().clamp(0, vocab - 1)], -100
        )
    else:
        given = target[0] != call.target_spec.options["ignore_index"]
        target = torch.where(given, place[target[0].long().clamp(0, vocab - 1)], -100), target[1]
    if "weight" in call.options:
        changed["weight"] = call.options["weight"][order]
    if call.target_spec.kind != "probabilities":
        changed["ignore_index"] = -100
    loss, grad = loss_and_gradient(call, x=call.x[:, order], target=target, **changed)
    assert_same((loss, grad[:, place]), loss_and_gradient(call), 4.0)


def check_rows(call: Call) -> None:
    """A row's loss and gradient, bit by bit, are the same among whatever others."""
    call.options["reduction"] = "none"
    whole = loss_and_gradient(call)
    cut = int(torch.randint(0, call.tokens + 1, (), generator=call.g))
    for part in (slice(0, cut), slice(cut, None)):
        changed = dict(target=rows_of(call.target_spec.target, part))
        if "token_weight" in call.options:
            changed["token_weight"] = call.options["token_weight"][part]
        for a, b in zip(loss_and_gradient(call, x=call.x[part], **changed), whole, strict=True):
            assert torch.equal(a, b[part])


def check_padding(call: Call) -> None:
    """Columns that do not exist; and, where nothing is spread over all classes, masked ones."""
    pad = int(torch.randint(1, 70, (), generator=call.g))
    vocab = call.x.shape[-1]
    x = torch.nn.functional.pad(call.x, (0, pad), value=math.nan)
    target = call.target_spec.target
    if call.target_spec.kind == "probabilities":
        target = torch.nn.functional.pad(target, (0, pad))
    loss, grad = loss_and_gradient(call, x=x, target=target, vocab_size=vocab)
    assert (grad[:, vocab:] == 0).all()
    assert_same((loss, grad[:, :vocab]), loss_and_gradient(call))
    if (
        call.options["label_smoothing"]
        or call.options.get("softcap")
        or call.target_spec.options.get("spread_rest")
    ):
        return
    scale = call.options.get("logit_scale", 1.0)
    if scale:
        x = torch.nn.functional.pad(call.x, (0, pad), value=-math.inf * scale)
        weight = call.options.get("weight")
        changed = (
            {}
            if weight is None
            else dict(weight=torch.nn.functional.pad(weight, (0, pad), value=0.5))
        )
        loss, grad = loss_and_gradient(call, x=x, target=target, **changed)
        assert (grad[:, vocab:] == 0).all()
        assert_same((loss, grad[:, :vocab]), loss_and_gradient(call))


def check_duplicates(call: Call) -> None:
    """Every token twice, at half its weight."""
    call.options["reduction"] = (
        "mean" if call.options["reduction"] == "none" else call.options["reduction"]
    )
    half = call.options.get("token_weight", torch.ones(call.tokens)).double() / 2
    twice = dict(
        target=joined(call.target_spec.target, call.target_spec.target),
        token_weight=torch.cat([half, half]),
    )
    loss, grad = loss_and_gradient(call, x=torch.cat([call.x, call.x]), **twice)
    expected = loss_and_gradient(call)
    assert_same((loss, grad[: call.tokens] + grad[call.tokens :]), expected, 2.0)


def check_masking(call: Call) -> None:
    """A masked token is one that is not there."""
    kept = call.target_spec.counted
    changed = dict(target=rows_of(call.target_spec.target, kept))
    if "token_weight" in call.options:
        changed["token_weight"] = call.options["token_weight"][kept]
    loss, grad = loss_and_gradient(call)
    assert (grad[~kept] == 0).all()
    if call.options["reduction"] == "none":
        assert (loss[~kept] == 0).all()
        loss = loss[kept]
    assert_same((loss, grad[kept]), loss_and_gradient(call, x=call.x[kept], **changed))


def check_upstream(call: Call) -> None:
    """The gradient is linear in what comes from above, bit by bit in powers of 2."""
    _, grad = loss_and_gradient(call)
    _, eight = loss_and_gradient(call, upstream=-8.0)
    assert torch.equal(eight, -8.0 * grad) or grad.isnan().any()
    assert_same((loss_and_gradient(call, upstream=3.7)[1],), (3.7 * grad,))


def check_sum_over_classes(call: Call) -> None:
    """The gradient of a row adds up to the z-loss's 2 z_loss_weight lse."""
    call.options |= dict(softcap=None, logit_scale=1.0, reduction="sum")
    _, grad = loss_and_gradient(call)
    of_token = (
        call.options.get("token_weight", torch.ones(call.tokens)).double()
        * call.target_spec.counted
    )
    expected = 2.0 * call.options["z_loss_weight"] * call.x.double().logsumexp(-1) * of_token
    size = grad.double().abs().sum(-1) + expected.abs()
    rtol = 1e-6 if grad.dtype == torch.float32 else 1e-13
    assert ((grad.double().sum(-1) - expected).abs() <= rtol * (size + 1e-3)).all()


def check_chunks(call: Call) -> None:
    """However the work is cut, and in one pass, two, or in place: the same but for rounding."""
    whole = loss_and_gradient(call, block=1 << 20)
    for schedule in ({}, dict(grad_in_forward=True)):
        for block in (5, 64, 300):
            assert_same(loss_and_gradient(call, block=block, **schedule), whole)
    leaf = call.x.clone().requires_grad_()
    x = leaf * 1.0
    loss = cross_entropy(
        x,
        call.target_spec.target,
        dim=-1,
        inplace_backward=True,
        **call.target_spec.options,
        **call.options,
    )
    loss.sum().backward()
    assert_same((loss.detach(), leaf.grad), whole)


def check_linear(call: Call) -> None:
    """A head that is the identity; chunks of any size."""
    eye = torch.eye(call.x.shape[-1], dtype=call.x.dtype)
    options = call.target_spec.options | call.options
    expected = loss_and_gradient(call)
    for size, drop in ((None, None), (1, True), (2, False), (4, None)):
        x = call.x.clone().requires_grad_()
        loss = linear_cross_entropy(
            x, eye, call.target_spec.target, token_chunk_size=size, drop_ignored=drop, **options
        )
        loss.sum().backward()
        assert_same((loss.detach(), x.grad), expected)


def law(check, kinds=tuple(cases.TARGET_SPECS), share=20):
    return pytest.param(
        check, kinds, marks=pytest.mark.cases(share), id=check.__name__.removeprefix("check_")
    )


@pytest.mark.parametrize(
    "check, kinds",
    [
        law(check_shift),
        law(check_permutation),
        law(check_rows),
        law(check_padding),
        law(check_duplicates, ("indices", "top k")),
        law(check_masking, ("indices", "top k")),
        law(check_upstream),
        law(check_sum_over_classes),
        law(check_chunks),
        law(check_linear, share=10),
    ],
)
def test_law(explore, check, kinds):
    explore(calls(kinds).map(lambda call: replace(call, options=dict(call.options))), check)
