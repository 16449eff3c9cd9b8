"""What each class adds to the divergence of two rows, and its gradient.

chunked_ce/core/divergence.py says the same, and derives it. With d = log q - log p a class adds
probability f(d), f(d) = d - 1 + exp(-d), which has no cancellation and is never below 0.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .online_softmax import LOG2_E, minus_expm1

FORWARD, REVERSE, JSD = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


FAR_APART = tl.constexpr(16.0)  # maxima that differ by more: z and y are taken from them


class PairRow(NamedTuple):
    """The numbers of a pair of rows, in the dtype of the computation."""

    max: Any
    log_sum: Any
    teacher_max: Any
    teacher_log_sum: Any
    shift: Any
    student_kl: Any


class Shares(NamedTuple):
    """Of the mixture: beta and 1 - beta, each rounded once."""

    teacher: Any
    student: Any


class Probabilities(NamedTuple):
    p: Any
    q: Any
    d: Any  # log q - log p


@triton.jit
def probability(z, max, log_sum, inverse):
    """Return exp((z - max) / temperature - log_sum)."""
    scale = tl.full(z.shape, inverse * LOG2_E, z.dtype)
    return tl.exp2(tl.fma(z - max, scale, tl.broadcast_to(-log_sum * LOG2_E, z.shape)))


@triton.jit
def bases(max, teacher_max):
    """Return what z and y are less by in d, so that an offset of one row costs no digits."""
    apart = tl.abs(teacher_max - max) > FAR_APART
    return tl.where(apart, max, 0.0), tl.where(apart, teacher_max, 0.0)


@triton.jit
def probabilities(z, y, row, inverse):
    """Return the Probabilities of logits; inverse: 1 / temperature."""
    p = probability(z, row.max, row.log_sum, inverse)
    q = probability(y, row.teacher_max, row.teacher_log_sum, inverse)
    z_base, y_base = bases(row.max, row.teacher_max)
    return Probabilities(p, q, ((y - y_base) - (z - z_base)) * inverse - row.shift)


@triton.jit
def exponential_tail(d):
    """Return (exp(d) - 1 - d) / d², by its series, for |d| up to 1/2."""
    TERMS: tl.constexpr = 13 if d.dtype == tl.float64 else 9
    series = tl.full(d.shape, 1.0 / TERMS, d.dtype)
    for i in tl.static_range(TERMS - 3):
        series = (1.0 + d * series) * (1.0 / (TERMS - 1 - i))
    return (1.0 + d * series) * 0.5


@triton.jit
def class_term(weight, d, other):
    """Return weight f(d), `other` being weight exp(-d), where weight is 0 too."""
    near = weight * (d * d * exponential_tail(-d))
    far = weight * (d - 1.0) + other  # exp(-d) may be too large a number
    return tl.where(weight == 0.0, other, tl.where(tl.abs(d) < 0.5, near, far))


@triton.jit
def above_mixture(d, shares):
    """Return log p - log m and log q - log m.

    m is the larger of p and q times 1 + share (exp(-|d|) - 1), the share being the other's.
    """
    below = -tl.abs(d)
    share = tl.where(d > 0.0, shares.student, shares.teacher)
    near = -below * (1.0 + below * exponential_tail(below))
    taken = share * tl.where(below > -0.25, near, minus_expm1(below))
    u = 1.0 - taken
    # Kahan's log1p, as in `log1p`, of -taken.
    larger = tl.where(u == 1.0, taken, tl.log(u) * taken / tl.where(u == 1.0, 1.0, u - 1.0))
    return tl.where(d > 0.0, larger - d, larger), tl.where(d > 0.0, larger, larger + d)


@triton.jit
def class_terms(at, shares, KIND: tl.constexpr):
    """Return what classes add to the loss, of JSD to KL(q‖m), and to `student_kl`."""
    if KIND == FORWARD:
        loss = class_term(at.q, at.d, at.p)
        student_kl = tl.zeros(loss.shape, loss.dtype)
    elif KIND == REVERSE:
        loss = class_term(at.p, -at.d, at.q)
        student_kl = loss
    else:
        above = above_mixture(at.d, shares)
        mixture = shares.teacher * at.q + shares.student * at.p
        student_kl = class_term(at.p, above[0], mixture)
        loss = class_term(at.q, above[1], mixture)
    return loss, student_kl


@triton.jit
def class_slopes(at, student_kl, shares, KIND: tl.constexpr):
    """Return dL/d(z / temperature)."""
    if KIND == FORWARD:  # p - q = -p expm1(d), without cancellation where they are near
        near = -at.p * (at.d * (1.0 + at.d * exponential_tail(at.d)))
        slope = tl.where(tl.abs(at.d) < 0.25, near, at.p - at.q)
    elif KIND == REVERSE:
        slope = tl.where(at.p == 0.0, 0.0, at.p * (-at.d - student_kl))
    else:
        above = above_mixture(at.d, shares)[0] - student_kl
        slope = tl.where(at.p == 0.0, 0.0, at.p * (shares.student * above))
    return slope
