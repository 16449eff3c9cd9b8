"""The transforms of a model's head: z = softcap * tanh(logit_scale * x / softcap)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# By the dtype of the logits. A dict, for torch 2.6 does not compile the bound method of one.
COMPUTE_DTYPE = {
    torch.float16: torch.float32,
    torch.bfloat16: torch.float32,
    torch.float32: torch.float32,
    torch.float64: torch.float64,
}
WITHOUT_FLOAT64 = {"mps"}


def sum_dtype(device: torch.device) -> torch.dtype:
    """Return the dtype of sums over many rows or classes: the widest that the device has."""
    return torch.float32 if device.type in WITHOUT_FLOAT64 else torch.float64


class Head(NamedTuple):
    """Transforms of a head: z = softcap tanh(logit_scale x / softcap). softcap None: no cap."""

    softcap: float | None
    logit_scale: float

    def apply_(self, z: Tensor) -> Tensor:
        """Apply the transforms to `z` in place and return it."""
        if self.logit_scale != 1.0:
            z = z.mul_(self.logit_scale)
        if self.softcap is not None:
            z = z.div_(self.softcap).tanh_().mul_(self.softcap)
        return z

    def derivative(self, x: Tensor) -> Tensor | float:
        """Return dz/dx.

        1 - tanh^2 would cancel near the cap. 4e / (1 + e)^2 with e = exp(-2 |y|) does not.
        """
        if self.softcap is None:
            return self.logit_scale
        y = x.to(COMPUTE_DTYPE[x.dtype], copy=True).mul_(2 * self.logit_scale / self.softcap)
        e = y.abs_().neg_().exp_()
        return (e * (4 * self.logit_scale)).div_(e.add_(1.0).square_())


IDENTITY = Head(None, 1.0)
