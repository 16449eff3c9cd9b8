"""`torch.nn.Module` faces of the functions."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from . import checks
from .linear import linear_cross_entropy

_OPTIONS = (
    "z_loss_weight", "softcap", "logit_scale", "vocab_size", "acc_dtype", "chunk_bytes",
    "token_chunk_size", "drop_ignored", "backend",
)  # fmt: skip


class LinearCrossEntropyLoss(nn.Module):
    """An output head and its loss, as `torch.nn.LinearCrossEntropyLoss`: no logits are stored.

    Args:
        in_features: D, numbers of a hidden state.
        num_classes: V.
        out_features: d1, ..., for a target [N, d1, ...].
        bias: whether the head has one.
        device, dtype: of the head's parameters.
        reduction, weight, ignore_index, label_smoothing: see
            :func:`chunked_ce.linear_cross_entropy`; `ignore_index=None` is -100.
        options: further arguments of :func:`chunked_ce.linear_cross_entropy` by name.

    The parameters are `linear.weight` [V d1 ..., D] and `linear.bias`, under torch's names.
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        out_features: tuple[int, ...] = (),
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        reduction: str = "mean",
        weight: Tensor | None = None,
        ignore_index: int | None = None,
        label_smoothing: float = 0.0,
        **options: Any,
    ) -> None:
        super().__init__()
        checks.known_options(options, _OPTIONS)
        checks.class_weight(weight)
        checks.reduction(reduction)
        self.label_smoothing = checks.label_smoothing(label_smoothing)
        self.ignore_index = checks.ignore_index(-100 if ignore_index is None else ignore_index)
        self.num_classes, self.out_features = num_classes, tuple(out_features)
        self.reduction, self.options = reduction, options
        self.register_buffer("weight", weight)
        self.linear = nn.Linear(
            in_features,
            math.prod(self.out_features, start=num_classes),
            bias=bias,
            device=device,
            dtype=dtype,
        )

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """The loss of hidden states [..., D] and class indices [...]."""
        outputs = (self.num_classes, *self.out_features)
        bias = None if self.linear.bias is None else self.linear.bias.view(outputs)
        return linear_cross_entropy(
            input,
            self.linear.weight.view(*outputs, self.linear.in_features),
            target,
            linear_bias=bias,
            weight=self.weight,  # type: ignore[arg-type]
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
            **self.options,
        )

    def extra_repr(self) -> str:
        """The arguments that differ from the defaults, after the sizes."""
        said = [f"in_features={self.linear.in_features}", f"num_classes={self.num_classes}"]
        if self.out_features:
            said.append(f"out_features={self.out_features}")
        said += [f"reduction={self.reduction!r}", f"ignore_index={self.ignore_index}"]
        if self.label_smoothing:
            said.append(f"label_smoothing={self.label_smoothing}")
        return ", ".join(said + [f"{name}={value!r}" for name, value in self.options.items()])
