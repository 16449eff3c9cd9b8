"""The truth about a pair of rows: a divergence by its definition, in fp64, and how near one must come."""

import math
from typing import Any, NamedTuple

import torch
import truth
from torch import Tensor

# Below these a probability is 0 in the dtype that it is computed in
LEAST = {torch.float32: -80.0, torch.float64: -700.0}


class Exact(NamedTuple):
    """In fp64, of each row [...] and of each class [..., V]."""

    loss: Tensor
    slack: Tensor  # of the loss
    grad: Tensor  # of the loss in the student's logits
    tolerance: Tensor  # of the gradient
    vague: Tensor  # [...] rows whose gradient is not compared
    beyond: Tensor  # [...] rows whose value depends on probabilities that underflow


def exactly(z: Tensor, y: Tensor, options: dict[str, Any], dtype: torch.dtype) -> Exact:
    """The divergence of logits [..., V] by its definition; -inf of both adds nothing."""
    kind, beta = options["kind"], options.get("beta", 0.5)
    temperature, wide = options.get("temperature", 1.0), truth.compute_dtype(dtype)
    if kind == "jsd" and beta in (0.0, 1.0):
        kind = "reverse" if beta else "forward"
    broken = torch.zeros(z.shape[:-1], dtype=torch.bool)
    for t in (z, y):
        broken |= (t.isnan() | (t == torch.inf)).any(-1) | (t == -torch.inf).all(-1)
    z, y = (torch.where(broken[..., None], 0.0, t) for t in (z, y))
    near = [(t - t.amax(-1, keepdim=True)) / temperature for t in (z, y)]
    log_p, log_q = (t.log_softmax(-1) for t in near)
    p, q = log_p.exp(), log_q.exp()
    m = beta * q + (1.0 - beta) * p
    log_m = torch.logaddexp(log_p + _log(1.0 - beta), log_q + _log(beta))

    def times(a: Tensor, b: Tensor) -> Tensor:
        return torch.where(a == 0, 0.0, a * b)

    def kl(a: Tensor, log_a: Tensor, log_b: Tensor) -> Tensor:
        return times(a, log_a - log_b).sum(-1)

    if kind == "forward":
        loss, slope = kl(q, log_q, log_p), p - q
    elif kind == "reverse":
        loss = kl(p, log_p, log_q)
        slope = times(p, log_p - log_q - loss[..., None])
    else:
        of_student = kl(p, log_p, log_m)
        loss = beta * kl(q, log_q, log_m) + (1.0 - beta) * of_student
        slope = (1.0 - beta) * times(p, log_p - log_m - of_student[..., None])
    # What moves log p and log q by their own rounding, and d by that of both.
    eps = truth.EPSILON[wide]
    logs = sum(t.abs().nan_to_num(0.0, 0.0, 0.0) for t in (log_p, log_q))
    apart = (log_q - log_p).abs().nan_to_num(0.0, 0.0, 0.0)
    of_terms = (p + q + m) * torch.minimum(apart, apart.square()) + (q - p).abs()
    slack = 4.0 * eps * (of_terms * (2.0 + logs)).sum(-1)
    finite_loss = loss.nan_to_num(0.0, 0.0, 0.0)[..., None]
    of_slopes = torch.maximum(p, q) if kind == "forward" else p * (1.0 + apart + finite_loss)
    tolerance = 8.0 * eps * of_slopes * (2.0 + logs)
    # A probability that is no normal number may be 0.
    tolerance = tolerance + torch.finfo(wide).tiny * (1.0 + apart + finite_loss)
    least = LEAST[wide]
    gone = ((log_q < least) & (log_p == -torch.inf)) | ((log_p < least) & (log_q == -torch.inf))
    finite = (log_p > -torch.inf) | (log_q > -torch.inf)
    nan = torch.where(broken, torch.nan, 0.0)
    return Exact(
        loss + nan, slack, slope / temperature, tolerance / temperature,
        broken | (loss.isinf() & (kind != "forward")), (gone & finite).any(-1) & ~broken,
    )  # fmt: skip


def _log(share: float) -> float:
    return math.log(share) if share > 0 else -math.inf
