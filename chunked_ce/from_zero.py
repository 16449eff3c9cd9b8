"""exp z as it is, with no maximum subtracted: a pass less, wherever that stays a normal number."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .blocks import Head, compute_dtype
from .stats import inverse_total

# Between these, exp z of the target and its sum over the others may be taken as they are; and so
# may exp z in a gradient between these lse, where p >= 1e-37.
SMALLEST_SUM, LARGEST_SUM = 1e-18, 1e17
_SMALLEST_LSE, _LARGEST_LSE = -1.0, 40.0


def extremes(t: Tensor) -> tuple[float, float]:
    """Least and largest; NaN both if one is."""
    lowest, highest = t.aminmax()
    return float(lowest), float(highest)


def all_in_range(sums: Tensor) -> bool:
    smallest, largest = extremes(sums)
    return smallest > SMALLEST_SUM and largest < LARGEST_SUM


def in_range(sums: Tensor) -> Tensor:
    return (sums > SMALLEST_SUM) & (sums < LARGEST_SUM)


def relative_to_zero(lse: Tensor, lse_low: Tensor) -> tuple[Tensor | None, Tensor]:
    """(reference, factor) of p = factor exp(z - reference); None for 0.

    That is 0 wherever exp z stays a normal number, else lse.
    """
    lowest, highest = extremes(lse)
    if lowest > _SMALLEST_LSE and highest < _LARGEST_LSE:
        return None, inverse_total(lse, lse_low)
    near_zero = (lse > _SMALLEST_LSE) & (lse < _LARGEST_LSE)
    factor = torch.where(near_zero, inverse_total(lse, lse_low), (-lse_low).exp())
    return lse.masked_fill(near_zero, 0.0), factor


def sample(x: Tensor, reference: Tensor | None, vocab_size: int, head: Head) -> tuple[float, float]:
    """Least and largest of a sample of z, or of z - reference [rows, 1].

    A CPU's exp is 30 to 100 times slower where its result is subnormal: masked vocabularies. The
    sample decides whether to clamp, and only speed depends on it.
    """
    if x.dim() != 2:
        return -math.inf, math.inf  # a sample is not free there
    rows, columns = max(1, x.shape[0] // 64), max(1, vocab_size // 64)
    some = x[::rows, :vocab_size:columns]
    if not head.is_identity:
        some = head.apply_(some.to(compute_dtype(x.dtype), copy=True))
    if reference is not None:
        some = some - reference[::rows]
    return extremes(some)
