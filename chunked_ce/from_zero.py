"""exp z as it is, with no maximum subtracted: a pass less, wherever that stays a normal number."""

from __future__ import annotations

import math

from torch import Tensor

from .blocks import Head, compute_dtype
from .stats import RowGradient

# Between these, exp z of the target and its sum over the others may be taken as they are; and so
# may exp z in a gradient between these lse, where p >= 1e-37.
_SMALLEST_SUM, _LARGEST_SUM = 1e-18, 1e18
_SMALLEST_LSE, _LARGEST_LSE = -1.0, 40.0


def all_in_range(sums: Tensor) -> bool:
    smallest, largest = sums.aminmax()
    return float(smallest) > _SMALLEST_SUM and float(largest) < _LARGEST_SUM


def in_range(sums: Tensor) -> Tensor:
    return (sums > _SMALLEST_SUM) & (sums < _LARGEST_SUM)


def relative_to_zero(lse: Tensor, rows: RowGradient) -> tuple[Tensor | None, RowGradient]:
    """(what to subtract from z before exp, rows): nothing, and p = exp(z) exp(-lse), wherever
    exp z stays a normal number."""
    lowest, highest = lse.aminmax()
    if float(lowest) > _SMALLEST_LSE and float(highest) < _LARGEST_LSE:
        return None, rows._replace(scale=rows.scale * (-lse).exp())
    reference = lse.masked_fill((lse > _SMALLEST_LSE) & (lse < _LARGEST_LSE), 0.0)
    return reference, rows._replace(scale=rows.scale * (reference - lse).exp())


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
    lowest, highest = some.aminmax()
    return float(lowest), float(highest)
