"""The labels of next-token prediction: position i predicts the token at position i + 1.

Only the target moves. The logits or hidden states are read where they are, without a copy, and the
last position of each sequence is ignored. Documents packed into one sequence are told apart by
their first tokens: these are no position's label.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import checks
from .targets import AnyTarget

ROWS = ("input", "target", "position_ids")
"""The arguments that may have further dimensions in front. Offsets count through all of them."""


def next_tokens(
    target: AnyTarget,
    ignore_index: int,
    shift: bool,
    position_ids: Tensor | None,
    cu_seqlens: Tensor | None,
    input: Tensor,
    dim: int = -1,
) -> Tensor:
    """Return the label [..., T] of each position of `input`, whose classes are in `dim`."""
    checks.shift(shift, target, position_ids, cu_seqlens, input, dim)
    assert isinstance(target, Tensor)
    labels = target.to(torch.int64, copy=True)  # uint8 has no room for an ignore_index of -100
    labels[..., :1] = ignore_index
    starts = None if position_ids is None else position_ids == 0
    if cu_seqlens is not None:
        starts = _starts(cu_seqlens, target)
    if starts is not None:
        labels = labels.masked_fill(starts, ignore_index)
    return labels.roll(-1, -1)


def _starts(cu_seqlens: Tensor, target: Tensor) -> Tensor:
    """Return where a document begins, of `target`'s shape. Nothing waits for a value."""
    tokens = target.numel()
    begins = torch.zeros(tokens + 1, dtype=torch.bool, device=target.device)  # the end is one more
    begins[cu_seqlens.long().clamp(0, tokens)] = True
    return begins[:tokens].view(target.shape)
