"""The sums over a shard of the vocabulary, from the Triton kernel that sums segments of rows."""

from __future__ import annotations

import math
import struct
from typing import TypeVar

import torch
from torch import Tensor

from ..core.head import Head, compute_dtype
from ..core.row_stats import UNIFORM, Part, concatenate, merge
from ..kernels.online_softmax import LOG2_E
from .triton import launch_sums

Number = TypeVar("Number", Tensor, float)

# As the kernels have it: in fp32 rounded.
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
    """Of every row the sums over a shard's classes, and the target's logit, -inf if elsewhere."""
    dtype = compute_dtype(input.dtype)
    target = target.reshape(-1).contiguous()
    here = (target >= 0) & (target < vocab_size)
    index = target.long().masked_fill(~here, 0).view(*input.shape[:-1], 1)
    logit = head.apply_(input.gather(-1, index).to(dtype)).view(-1)  # the first's, if elsewhere
    origin = logit.where(logit.isfinite(), 0.0)  # as the kernel has it
    target_logit = logit.masked_fill(logit == math.inf, math.nan).masked_fill(~here, -math.inf)
    wanted = dict(ENTROPY=entropy, MEAN_LOGPROB=mean_logprob, RANK=False, ARGMAX=argmax)
    parts = []
    for flat, sums in launch_sums(input, target, ignore_index, vocab_size, head, UNIFORM, **wanted):
        floats, integers = (numbers.unbind(-1) for numbers in sums["parts"])
        part: Part | None = None
        for f, i in zip(floats, integers, strict=True):
            segment = _natural(f, i, entropy, argmax)
            part = segment if part is None else merge(part, segment)
        assert part is not None
        if mean_logprob:
            part = _add_logit_sum(part, floats, origin[flat], vocab_size - here[flat].to(dtype))
        parts.append(part)
    return concatenate(parts), target_logit


def _natural(floats: Tensor, integers: Tensor, entropy: bool, argmax: bool) -> Part:
    """A segment's sums [fields, rows], the kernel's powers of 2 as powers of e.

    In fp64: rounding a maximum of 1e4 to fp32 would change the sum by 5e-4, and the kernel's
    log2 e, rounded to fp32, by 1e-4.
    """
    base_2, s = floats[0].double(), floats[1].double()
    log2_e = _LOG2_E[floats.dtype]
    m = (base_2 / log2_e).masked_fill(s == 0, -math.inf).to(floats.dtype)
    best_class = None
    if argmax:  # the kernel's maxima are of groups of classes, its keys those of single ones
        m = floats[4].masked_fill(s.isnan(), math.nan)
        best_class = integers[1].long()
    shift = (_less_product(base_2, m.double(), log2_e) / log2_e).masked_fill(m == -math.inf, 0.0)
    scale = shift.exp()
    ez_sum = None
    if entropy:
        ez_sum = (scale * (floats[2].double() * math.log(2) + s * shift)).to(m.dtype)
    return Part(m, (s * scale).to(m.dtype), ez_sum, None, None, None, best_class)


def _less_product(x: Tensor, a: Tensor, b: float) -> Tensor:
    """x - a b of fp64 numbers, the product not rounded: of halves (Veltkamp's split), as Dekker."""
    a_high, b_high = _high(a), _high(b)
    a_low, b_low = a - a_high, b - b_high
    return ((x - a_high * b_high) - a_high * b_low) - a_low * b_high - a_low * b_low


def _high(a: Number) -> Number:
    """The upper 26 of a's 53 bits."""
    c = a * (2.0**27 + 1.0)
    return c - (c - a)


def _add_logit_sum(part: Part, floats: tuple[Tensor, ...], origin: Tensor, columns: Tensor) -> Part:
    """`part` with the sum of z - m, from the kernel's sums of z - origin."""
    assert part.m is not None
    shift = (origin - part.m).masked_fill(part.m == -math.inf, 0.0)  # a sum of -inf, or of nothing
    logit_sum = torch.stack([f[3] for f in floats]).sum(0)
    return part._replace(logit_sum=logit_sum + columns * shift, weight_sum=columns)
