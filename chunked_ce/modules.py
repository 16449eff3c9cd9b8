"""`torch.nn.Module` faces of the functions."""

from __future__ import annotations

import math
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from . import checks
from .functional.binary import binary_cross_entropy_with_logits
from .functional.linear import linear_cross_entropy
from .functional.logits import cross_entropy

_OPTIONS = (
    "shift", "z_loss_weight", "softcap", "logit_scale", "vocab_size", "spread_rest", "backend",
)  # fmt: skip
_LOGITS_OPTIONS = ("dim", "inplace_backward", "grad_in_forward")
_LINEAR_OPTIONS = ("acc_dtype", "logits_dtype", "chunk_bytes", "token_chunk_size", "drop_ignored")
_COMMON = ("weight", "ignore_index", "reduction", "label_smoothing")
_BINARY = ("weight", "reduction", "pos_weight", "ignore_index", "backend")
_HEAD = ("in_features", "num_classes", "out_features", "bias", "device", "dtype")


def _differing(module: nn.Module, defaults: dict[str, Any], options: dict[str, Any]) -> list[str]:
    """Return the arguments that differ from the defaults."""
    values = {name: getattr(module, name) for name in defaults}
    differ = {name: value for name, value in values.items() if value != defaults[name]}
    return [f"{name}={value!r}" for name, value in (differ | options).items()]


class CrossEntropyLoss(nn.Module):
    """Compute :func:`chunked_ce.cross_entropy`; drop-in for `torch.nn.CrossEntropyLoss`.

    Arguments come in torch's order, and the state_dict is torch's.

    Args:
        weight: weight of each class [V], or None.
        size_average: None; torch's deprecated name for `reduction`.
        ignore_index: class index of rows to leave out.
        reduce: None; torch's deprecated name for `reduction`.
        reduction: "mean", "sum" or "none".
        label_smoothing: share of the target that is spread evenly over all classes, from 0 to 1.
        options: further arguments of :func:`chunked_ce.cross_entropy` by name: `dim`, `shift`,
            `z_loss_weight`, `softcap`, `logit_scale`, `vocab_size`, `spread_rest`,
            `inplace_backward`, `grad_in_forward`, `backend`.

    Raises:
        TypeError, ValueError: an unknown option, or an argument of the wrong type or range.

    Example:
        >>> import torch, chunked_ce
        >>> loss = chunked_ce.CrossEntropyLoss(dim=-1, z_loss_weight=1e-4)
        >>> print(f"{loss(torch.zeros(2, 3, 10), torch.ones(2, 3, dtype=torch.long)).item():.4f}")
        2.3031
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
        checks.known_options("CrossEntropyLoss", options, _OPTIONS + _LOGITS_OPTIONS, _COMMON)
        checks.weight_of_classes(weight)
        checks.reduction(reduction)
        self.register_buffer("weight", weight)
        self.ignore_index = checks.ignore_index(ignore_index)
        self.reduction = reduction
        self.label_smoothing = checks.label_smoothing(label_smoothing)
        self.options = options

    def forward(
        self,
        input: Tensor,
        target: Tensor | tuple[Tensor, Tensor],
        *,
        position_ids: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        """Return the loss of logits; see :func:`chunked_ce.cross_entropy`.

        Args:
            input: logits [N, V], or [..., V] with `dim=-1`.
            target: class indices, class probabilities, or a teacher's pair (indices,
                probabilities).
            position_ids: where packed documents begin, with `shift=True`; of `target`'s shape.
            cu_seqlens: the same as offsets [num_docs + 1].

        Returns:
            The loss, a 0-d tensor, or one loss per target for "none".
        """
        return cross_entropy(
            input,
            target,
            self.weight,  # type: ignore[arg-type]
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
            position_ids=position_ids,
            cu_seqlens=cu_seqlens,
            **self.options,
        )

    def extra_repr(self) -> str:
        """Return the arguments that differ from the defaults."""
        defaults = dict(ignore_index=-100, reduction="mean", label_smoothing=0.0)
        return ", ".join(_differing(self, defaults, self.options))


class BCEWithLogitsLoss(nn.Module):
    """Compute the binary cross-entropy of logits; drop-in for `torch.nn.BCEWithLogitsLoss`.

    Arguments come in torch's order; see :func:`chunked_ce.binary_cross_entropy_with_logits`.

    Args:
        weight: weight of each logit's loss, broadcast to the logits, or None.
        size_average: None; torch's deprecated name for `reduction`.
        reduce: None; torch's deprecated name for `reduction`.
        reduction: "mean", "sum" or "none".
        pos_weight: weight of the positive labels, broadcast to the logits, or None.
        ignore_index: padding of class indices; -100 beside labels of the logits' shape.
        backend: "auto", "cpu", "torch" or "triton".

    Raises:
        TypeError, ValueError: an unknown option, or an argument of the wrong type or range.

    Example:
        >>> import torch, chunked_ce
        >>> loss = chunked_ce.BCEWithLogitsLoss(pos_weight=torch.tensor([1.0, 3.0]))
        >>> print(f"{loss(torch.zeros(4, 2), torch.ones(4, 2)).item():.4f}")  # 2 ln 2
        1.3863
    """

    @checks.hides_unknown
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
        **unknown: NoReturn,
    ) -> None:
        super().__init__()
        checks.known_options("BCEWithLogitsLoss", unknown, _BINARY)
        checks.deprecated(size_average=size_average, reduce=reduce)
        checks.reduction(reduction)
        checks.backend_name(backend)
        self.register_buffer("weight", weight)
        self.register_buffer("pos_weight", pos_weight)
        self.reduction, self.backend = reduction, backend
        self.ignore_index = checks.ignore_index(ignore_index)

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """Return the loss of logits.

        Args:
            input: logits of any shape, [N, V].
            target: labels from 0 to 1 of `input`'s shape, or indices of the true classes [..., K].

        Returns:
            The loss, a 0-d tensor, or that of each logit for "none".
        """
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
        """Return the arguments that differ from the defaults."""
        defaults = dict(reduction="mean", ignore_index=-100, backend="auto")
        return ", ".join(_differing(self, defaults, {}))


class LinearCrossEntropyLoss(nn.Module):
    """Compute a head and its loss; drop-in for `torch.nn.LinearCrossEntropyLoss`.

    The logits are not stored; see :func:`chunked_ce.linear_cross_entropy`. The parameters are
    `linear.weight` [V d1 ..., D] and `linear.bias`, under torch's names.

    Args:
        in_features: D, the size of a hidden state.
        num_classes: V, the number of classes.
        out_features: d1, ..., for a target [N, d1, ...].
        bias: True for a head with a bias.
        device: device of the head's parameters.
        dtype: dtype of the head's parameters.
        reduction: "mean", "sum" or "none".
        weight: weight of each class [V], or None.
        ignore_index: class index of rows to leave out. None: -100.
        label_smoothing: share of the target that is spread evenly over all classes, from 0 to 1.
        options: further arguments of :func:`chunked_ce.linear_cross_entropy` by name: `shift`,
            `z_loss_weight`, `softcap`, `logit_scale`, `vocab_size`, `spread_rest`, `acc_dtype`,
            `chunk_bytes`, `token_chunk_size`, `drop_ignored`, `backend`.

    Raises:
        TypeError, ValueError: an unknown option, or an argument of the wrong type or range.

    Example:
        >>> import torch, chunked_ce
        >>> loss = chunked_ce.LinearCrossEntropyLoss(8, 10, shift=True)
        >>> tokens = torch.tensor([[1, 2, 3], [4, 5, 6]])
        >>> loss(torch.randn(2, 3, 8), tokens).backward()
        >>> tuple(loss.linear.weight.grad.shape)
        (10, 8)
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
        checks.known_options(
            "LinearCrossEntropyLoss", options, _OPTIONS + _LINEAR_OPTIONS, _HEAD + _COMMON
        )
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

    def forward(
        self,
        input: Tensor,
        target: Tensor | tuple[Tensor, Tensor],
        *,
        position_ids: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        """Return the loss of hidden states; see :func:`chunked_ce.linear_cross_entropy`.

        Args:
            input: hidden states [..., D].
            target: class indices, class probabilities, or a teacher's pair (indices,
                probabilities).
            position_ids: where packed documents begin, with `shift=True`; of `target`'s shape.
            cu_seqlens: the same as offsets [num_docs + 1].

        Returns:
            The loss, a 0-d tensor, or one loss per target for "none".
        """
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
            position_ids=position_ids,
            cu_seqlens=cu_seqlens,
            **self.options,
        )

    def extra_repr(self) -> str:
        """Return the arguments that differ from the defaults, after the sizes."""
        shown = [f"in_features={self.linear.in_features}", f"num_classes={self.num_classes}"]
        if self.out_features:
            shown.append(f"out_features={self.out_features}")
        defaults = dict(reduction="mean", ignore_index=None, label_smoothing=0.0)
        return ", ".join(shown + _differing(self, defaults, self.options))
