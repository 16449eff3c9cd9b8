"""`torch.nn.Module` faces of the functions."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from . import checks
from .functional.binary import binary_cross_entropy_with_logits
from .functional.linear import linear_cross_entropy
from .functional.logits import cross_entropy

_OPTIONS = (
    "z_loss_weight", "softcap", "logit_scale", "vocab_size", "spread_rest", "backend",
)  # fmt: skip
_LOGITS_OPTIONS = ("dim", "inplace_backward", "grad_in_forward")
_LINEAR_OPTIONS = ("acc_dtype", "logits_dtype", "chunk_bytes", "token_chunk_size", "drop_ignored")


def _said(module: nn.Module, defaults: dict[str, Any], options: dict[str, Any]) -> list[str]:
    """The arguments that are not what they are by default."""
    given = {name: getattr(module, name) for name in defaults}
    differ = {name: value for name, value in given.items() if value != defaults[name]}
    return [f"{name}={value!r}" for name, value in (differ | options).items()]


class CrossEntropyLoss(nn.Module):
    """:func:`chunked_ce.cross_entropy` as `torch.nn.CrossEntropyLoss`, with its state_dict.

    Args:
        weight, size_average, ignore_index, reduce, reduction, label_smoothing: as torch's, in its
            order.
        options: further arguments of :func:`chunked_ce.cross_entropy` by name, such as `dim` or
            `z_loss_weight`.

    Raises:
        TypeError, ValueError: as the function; of its own arguments already when it is made.
    """

    def __init__(
        self,
        weight: Tensor | None = None,
        size_average: None = None,
        ignore_index: int = -100,
        reduce: None = None,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        **options: Any,
    ) -> None:
        super().__init__()
        checks.deprecated(size_average=size_average, reduce=reduce)
        checks.known_options(options, _OPTIONS + _LOGITS_OPTIONS)
        checks.weight_of_classes(weight)
        checks.reduction(reduction)
        self.register_buffer("weight", weight)
        self.ignore_index = checks.ignore_index(ignore_index)
        self.reduction = reduction
        self.label_smoothing = checks.label_smoothing(label_smoothing)
        self.options = options

    def forward(self, input: Tensor, target: Tensor | tuple[Tensor, Tensor]) -> Tensor:
        """The loss of logits; see :func:`chunked_ce.cross_entropy`."""
        return cross_entropy(
            input,
            target,
            self.weight,  # type: ignore[arg-type]
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
            **self.options,
        )

    def extra_repr(self) -> str:
        defaults = dict(ignore_index=-100, reduction="mean", label_smoothing=0.0)
        return ", ".join(_said(self, defaults, self.options))


class BCEWithLogitsLoss(nn.Module):
    """:func:`chunked_ce.binary_cross_entropy_with_logits` as `torch.nn.BCEWithLogitsLoss`.

    Args:
        weight, size_average, reduce, reduction, pos_weight: as torch's, in its order.
        ignore_index: what class indices are padded with, where the target is that.
        backend: see :func:`chunked_ce.binary_cross_entropy_with_logits`.

    Raises:
        TypeError, ValueError: as the function; of its own arguments already when it is made.
    """

    def __init__(
        self,
        weight: Tensor | None = None,
        size_average: None = None,
        reduce: None = None,
        reduction: str = "mean",
        pos_weight: Tensor | None = None,
        *,
        ignore_index: int = -100,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        checks.deprecated(size_average=size_average, reduce=reduce)
        checks.reduction(reduction)
        checks.backend_name(backend)
        self.register_buffer("weight", weight)
        self.register_buffer("pos_weight", pos_weight)
        self.reduction, self.backend = reduction, backend
        self.ignore_index = checks.ignore_index(ignore_index)

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """The loss of logits, the labels dense or by index."""
        return binary_cross_entropy_with_logits(
            input,
            target,
            self.weight,  # type: ignore[arg-type]
            reduction=self.reduction,
            pos_weight=self.pos_weight,  # type: ignore[arg-type]
            ignore_index=self.ignore_index,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        defaults = dict(reduction="mean", ignore_index=-100, backend="auto")
        return ", ".join(_said(self, defaults, {}))


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
        checks.known_options(options, _OPTIONS + _LINEAR_OPTIONS)
        checks.weight_of_head(weight, num_classes, options.get("vocab_size"))
        checks.reduction(reduction)
        self.label_smoothing = checks.label_smoothing(label_smoothing)
        self.ignore_index = None if ignore_index is None else checks.ignore_index(ignore_index)
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

    def forward(self, input: Tensor, target: Tensor | tuple[Tensor, Tensor]) -> Tensor:
        """The loss of hidden states [..., D]; see :func:`chunked_ce.linear_cross_entropy`."""
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
        defaults = dict(reduction="mean", ignore_index=None, label_smoothing=0.0)
        return ", ".join(said + _said(self, defaults, self.options))
