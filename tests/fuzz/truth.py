"""The truth: dense, eager, in fp64; every target as class probabilities. And how near to it one must come."""

from typing import Any, NamedTuple

import oracle
import torch
from helpers import ULP
from torch import Tensor

EPSILON = {torch.float32: 2.0**-23, torch.float64: 2.0**-52}


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


class Loss(NamedTuple):
    of_rows: Tensor  # [...] before reduction, after token weights
    value: Tensor
    broken: Tensor  # [...] rows that are NaN: a NaN or +inf among their logits, or -inf alone
    steepest: Tensor  # [...] bound of the gradient of a row's loss in its z
    divisor: Tensor
    unweighted: Tensor  # [...] size of a token's loss, before its weight


def cross_entropy(
    z: Tensor,  # [..., V] fp64, after the head
    prob: Tensor,  # [..., V] fp64
    counted: Tensor,  # [...]
    *,
    indices: bool,
    unspread: Tensor | None = None,  # see cases.TargetSpec
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss_weight: float = 0.0,
    weight: Tensor | None = None,
    token_weight: Tensor | None = None,
    num_items: Any = None,
    **_: Any,
) -> Loss:
    z = torch.where(counted[..., None], z, 0.0)
    broken = (z.isnan() | (z == torch.inf)).any(-1) | (z == -torch.inf).all(-1)
    z = torch.where(broken[..., None], 0.0, z)
    w = torch.ones_like(z) if weight is None else weight.double().expand(z.shape)
    if unspread is not None:  # no rounding makes a loss infinite
        masked = ((z == -torch.inf) & (w != 0)).any(-1, keepdim=True)
        prob = torch.where(masked, unspread, prob)
    q = w * ((1.0 - label_smoothing) * prob + label_smoothing / z.shape[-1])
    largest = z.detach().amax(-1, keepdim=True)  # which costs 1e4 its digits, in fp64 too
    near = z - largest
    above = near.logsumexp(-1, keepdim=True)
    logp, lse = near - above, (largest + above)[..., 0]
    logp = torch.where((q == 0) & logp.isinf(), 0.0, logp)
    of_token = torch.ones_like(lse) if token_weight is None else token_weight.double()
    in_mean = of_token * counted
    z_share = 1.0  # of the z-loss in the mean, which is over tokens whatever the classes weigh
    if indices and weight is not None:
        tokens, in_mean = in_mean.sum(), in_mean * (w * prob).sum(-1)
        if reduction == "mean" and num_items is None and tokens != 0:
            z_share = (in_mean.sum() / tokens).detach()
    loss = -(q * logp).sum(-1) + z_share * z_loss_weight * lse.square()
    loss = torch.where(broken, torch.nan, loss)
    unweighted = loss.detach().where(counted & loss.isfinite(), 0.0).abs()
    nothing = ~counted | ((of_token == 0) & loss.isinf())
    loss = torch.where(nothing, 0.0, loss * of_token)
    divisor = torch.ones_like(loss.sum())
    if reduction == "mean":
        divisor = in_mean.sum() if num_items is None else torch.as_tensor(num_items).double()
    value = loss if reduction == "none" else loss.sum() / divisor
    steepest = (q.abs().sum(-1) + 2.0 * z_share * z_loss_weight * lse.abs()) * of_token.abs()
    return Loss(
        loss.detach(), value, broken & counted, steepest.detach(), divisor.detach(), unweighted
    )


def rounding(x: Tensor, z: Tensor, head: dict[str, Any]) -> Tensor:
    """[...] by how much the head's arithmetic may move a row's z: as much as all its p, relatively."""
    exact = head.get("softcap") is None and abs(head.get("logit_scale", 1.0)) in (0.0, 1.0, 2.0)
    size = z.detach().abs().nan_to_num(0.0, 0.0, 0.0).amax(-1)
    return size * (0.0 if exact else 4.0 * EPSILON[compute_dtype(x.dtype)])


def assert_values(
    ours: Tensor, truth: Tensor, dtype: torch.dtype, slack: Tensor | float = 0.0
) -> None:
    """Values in the compute dtype of `dtype`, to 1e-6 and what the truth itself is rounded by."""
    wide = compute_dtype(dtype)
    assert ours.dtype == wide and ours.shape == truth.shape, (ours.dtype, ours.shape, truth.shape)
    truth = truth.detach().to(wide).double()  # what overflows, overflows
    rtol = 1e-11 if wide == torch.float64 else 2e-6
    near = (ours.detach().double() - truth).abs() <= rtol * truth.abs() + slack + 1e-13
    same = near | (ours == truth) | (ours.isnan() & truth.isnan())
    assert same.all(), f"{ours[~same]} should be {truth[~same]}"


def slack(exact: Loss, moved: Tensor, reduction: str, dtype: torch.dtype) -> Tensor:
    """What the head's rounding, and a sum's, may add to the error of a loss."""
    of_rows = moved * exact.steepest
    if reduction == "none":
        return of_rows
    eps = EPSILON[compute_dtype(dtype)]
    of_sum = 4 * eps * exact.of_rows.abs().nan_to_num(0.0, 0.0).sum()
    return (of_rows.sum() + of_sum) / exact.divisor.abs()


def gradient_tolerance(
    truth: Tensor,  # [..., V] dL/dx
    dtype: torch.dtype,
    bound: Tensor,  # [...] of |dL/dx| in a row before rounding errors
    moved: Tensor,  # [...] see `rounding`
) -> Tensor:
    """One ulp of the element, and rounding errors of the terms that it is the difference of."""
    eps = EPSILON[compute_dtype(dtype)]
    floor = 2.0**-24 if dtype == torch.float16 else 1e-36
    return ULP[dtype] * truth.abs() + ((8 * eps + 2 * moved) * bound)[..., None] + floor


def assert_gradient(
    ours: Tensor, truth: Tensor, tolerance: Tensor, dtype: torch.dtype, skip: Tensor
) -> None:
    assert ours.dtype == dtype and ours.shape == truth.shape
    near = ((ours.double() - truth).abs() <= tolerance) | _overflows(ours, truth) | skip
    assert near.all(), (
        f"{ours[~near][:9]} should be {truth[~near][:9]} within {tolerance.expand_as(near)[~near][:9]}"
    )


def _overflows(ours: Tensor, truth: Tensor) -> Tensor:
    """Both, in the dtype of ours: 80000 is inf in fp16."""
    return (ours == truth.sign() * torch.inf) & (truth.abs() > torch.finfo(ours.dtype).max * 0.995)


def assert_gradient_of_weights(weight: Tensor, truth: Tensor, moved: Tensor) -> None:
    """Of token weights, or of class probabilities: computed in 32 bits or 64, rounded.

    `moved`: see `rounding`; times what a z-loss makes of it.
    """
    largest = truth.abs().amax() if truth.numel() else 0.0
    rtol = max(ULP[weight.dtype], 4e-6)
    near = (
        weight.grad.double() - truth
    ).abs() <= rtol * truth.abs() + 1e-5 * largest + moved.sum() + 1e-7
    assert (near | _overflows(weight.grad, truth)).all(), (weight.grad, truth)


def head_of(x: Tensor, head: dict[str, Any], vocab_size: int | None) -> Tensor:
    return oracle.logits(x, vocab_size=vocab_size, **head)
