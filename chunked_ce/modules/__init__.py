"""`torch.nn.Module` faces of the functions."""

from .binary import BCEWithLogitsLoss
from .distillation import DistillationLoss, LinearDistillationLoss
from .linear import LinearCrossEntropyLoss
from .logits import CrossEntropyLoss

__all__ = [
    "BCEWithLogitsLoss",
    "CrossEntropyLoss",
    "DistillationLoss",
    "LinearCrossEntropyLoss",
    "LinearDistillationLoss",
]
