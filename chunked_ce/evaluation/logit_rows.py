"""Logits of the scored tokens of a batch: hidden states and a head, or the model's own logits."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..core.head import COMPUTE_DTYPE, IDENTITY, Head
from ..functional.head_loss import autocast
from ..huggingface.deferred import DeferredLogits
from ..ops.chunks import Logits, padded_row_bytes


class LogitRows(NamedTuple):
    """Rows of logits [n, V] that are computed some at a time."""

    values: Tensor  # hidden states [n, D]; without a weight the logits themselves
    weight: Tensor | None = None  # [V, D]
    bias: Tensor | None = None  # [V]
    head: Head = IDENTITY

    @classmethod
    def of(cls, logits: Tensor | DeferredLogits, index: Tensor) -> LogitRows:
        """Return the rows `index` [n] of logits [B, T, V], deferred or not, as [B T, V]."""
        product = logits.linear() if isinstance(logits, DeferredLogits) else None
        if product is None:
            real = logits.tensor() if isinstance(logits, DeferredLogits) else logits
            return cls(real.flatten(0, 1)[index.to(real.device)])
        hidden, head, transforms = product
        assert isinstance(head.weight, Tensor)
        hidden = hidden.flatten(0, 1)[index.to(hidden.device)]
        with head.original_autocast():
            hidden, weight, bias = autocast(hidden, head.weight, transforms["linear_bias"])
        classes = transforms["vocab_size"]
        bias = None if bias is None else bias.detach()[:classes]
        # detach: a model that is moved away leaves this memory where it is
        weight = weight.detach()[:classes]
        return cls(hidden, weight, bias, Head(transforms["softcap"], transforms["logit_scale"]))

    @property
    def stored(self) -> bool:
        """Return whether the logits exist."""
        return self.weight is None

    @property
    def device(self) -> torch.device:
        """Return where the logits are, or will be."""
        return (self.values if self.weight is None else self.weight).device

    @property
    def row_bytes(self) -> int:
        """Return the bytes of a row of logits, once computed."""
        if self.weight is None:
            return 0
        wide = self.head != IDENTITY and COMPUTE_DTYPE[self.weight.dtype] != self.weight.dtype
        return padded_row_bytes(len(self.weight), self.weight.element_size() + 4 * wide)

    def on_host(self) -> LogitRows:
        """Return the same with its hidden states on the host; the head stays where it is."""
        return self._replace(values=self.values.cpu())


class LogitChunks:
    """Computes rows of logits in one buffer, chunk after chunk."""

    def __init__(self, rows: LogitRows, chunk: int) -> None:
        self.rows = rows
        self.product = None if rows.weight is None else Logits(rows.weight, rows.bias, chunk)

    def of(self, index: slice) -> Tensor:
        """Return the logits [R, V] of some rows, with the head's scale and cap."""
        values = self.rows.values[index]
        if self.product is None:
            return values
        logits = self.product.of(values.to(self.rows.device))
        if self.rows.head == IDENTITY:
            return logits
        return self.rows.head.apply_(logits.to(COMPUTE_DTYPE[logits.dtype]))
