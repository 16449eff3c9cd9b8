"""Sums over a shard of the vocabulary, from the Triton kernel that sums segments of rows."""

from __future__ import annotations

import math
import struct
from typing import TypeVar

import torch
from torch import Tensor

from ..core.head import COMPUTE_DTYPE, Head
from ..core.row_stats import UNIFORM, Part, concatenate, merge
from ..kernels.online_softmax import LOG2_E
from .triton import launch_sums

Number = TypeVar("Number", Tensor, float)

# The value that the kernels use: rounded to fp32, or fp64.
_LOG2_E = {
    torch.float32: struct.unpack("f", struct.pack("f", LOG2_E.value))[0],
    torch.float64: LOG2_E.value,
}


def row_part(
    input: Tensor,
    target: Tensor,
    ignore_index: int,
    vocab_size: int,
    head: Head,
    *,
    entropy: bool,
    mean_logprob: bool,
    argmax: bool,
) -> tuple[Part, Tensor]:
    """Return the sums of every row over a shard, and the target's logit (-inf if elsewhere)."""
    dtype = COMPUTE_DTYPE[input.dtype]
    target = target.reshape(-1).contiguous()
    inside = (target >= 0) & (target < vocab_size)
    index = target.long().masked_fill(~inside, 0).view(*input.shape[:-1], 1)
    # If the target is elsewhere, this is the logit of the first class.
    logit = head.apply_(input.gather(-1, index).to(dtype)).view(-1)
    origin = logit.where(logit.isfinite(), 0.0)  # the same origin as in the kernel
    target_logit = logit.masked_fill(logit == math.inf, math.nan).masked_fill(~inside, -math.inf)
    wanted = dict(ENTROPY=entropy, MEAN_LOGPROB=mean_logprob, RANK=False, ARGMAX=argmax)
    parts = []
    for flat, sums in launch_sums(input, target, ignore_index, vocab_size, head, UNIFORM, **wanted):
        floats, integers = (numbers.unbind(-1) for numbers in sums["parts"])
        part: Part | None = None
        for f, i in zip(floats, integers, strict=True):
            segment = _to_base_e(f, i, entropy, argmax)
            part = segment if part is None else merge(part, segment)
        assert part is not None
        if mean_logprob:
            part = _add_logit_sum(part, floats, origin[flat], vocab_size - inside[flat].to(dtype))
        parts.append(part)
    return concatenate(parts), target_logit


def _to_base_e(floats: Tensor, integers: Tensor, entropy: bool, argmax: bool) -> Part:
    """Convert a segment's sums [fields, rows] from powers of 2 to powers of e.

    It is done in fp64. Rounding a maximum of 1e4 to fp32 would change the sum by 5e-4, and the
    kernel's log2 e, rounded to fp32, would change it by 1e-4.
    """
    base_2, s = floats[0].double(), floats[1].double()
    log2_e = _LOG2_E[floats.dtype]
    m = (base_2 / log2_e).masked_fill(s == 0, -math.inf).to(floats.dtype)
    best_class = None
    if argmax:  # the kernel's m is rounded in base 2; its best value is exact
        m = floats[4].masked_fill(s.isnan(), math.nan)
        best_class = integers[1].long()
    shift = _subtract_product(base_2, m.double(), log2_e) / log2_e
    shift = shift.masked_fill(m == -math.inf, 0.0)
    scale = shift.exp()
    ez_sum = None
    if entropy:
        ez_sum = (scale * (floats[2].double() * math.log(2) + s * shift)).to(m.dtype)
    return Part(m, (s * scale).to(m.dtype), ez_sum, None, None, None, best_class)


def _subtract_product(x: Tensor, a: Tensor, b: float) -> Tensor:
    """Return x - a b in fp64 without rounding the product (Veltkamp's split, Dekker's product)."""
    a_high, b_high = _upper_half(a), _upper_half(b)
    a_low, b_low = a - a_high, b - b_high
    return ((x - a_high * b_high) - a_high * b_low) - a_low * b_high - a_low * b_low


def _upper_half(a: Number) -> Number:
    """Return the upper 26 of the 53 bits of a."""
    c = a * (2.0**27 + 1.0)
    return c - (c - a)


def _add_logit_sum(part: Part, floats: tuple[Tensor, ...], origin: Tensor, columns: Tensor) -> Part:
    """Return `part` with logit_sum, computed from the kernel's sums of z - origin."""
    assert part.m is not None
    shift = (origin - part.m).masked_fill(part.m == -math.inf, 0.0)  # the sum is -inf, or empty
    logit_sum = torch.stack([f[3] for f in floats]).sum(0)
    return part._replace(logit_sum=logit_sum + columns * shift, weight_sum=columns)
