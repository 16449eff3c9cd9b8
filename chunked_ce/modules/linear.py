"""The module of `linear_cross_entropy`, with its head."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from .. import checks
from ..core.row_stats import TokenStats
from ..functional.linear import linear_cross_entropy
from .options import COMMON_ARGUMENTS, SHARED_OPTIONS, differing_arguments

_LINEAR_OPTIONS = ("acc_dtype", "logits_dtype", "chunk_bytes", "token_chunk_size", "drop_ignored")
_HEAD = ("in_features", "num_classes", "out_features", "bias", "device", "dtype")


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
            `z_loss_weight`, `softcap`, `logit_scale`, `vocab_size`, `spread_rest`, `group`,
            `return_stats`, `acc_dtype`, `logits_dtype`, `chunk_bytes`, `token_chunk_size`,
            `drop_ignored`, `backend`.

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
            "LinearCrossEntropyLoss",
            options,
            SHARED_OPTIONS + _LINEAR_OPTIONS,
            _HEAD + COMMON_ARGUMENTS,
        )
        checks.weight_of_head(weight, num_classes, options.get("vocab_size"))
        checks.reduction(reduction)
        checks.return_stats(options.get("return_stats", False))
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
    ) -> Tensor | tuple[Tensor, TokenStats]:
        """Return the loss of hidden states; see :func:`chunked_ce.linear_cross_entropy`.

        Args:
            input: hidden states [..., D].
            target: class indices, class probabilities, or a teacher's pair (indices,
                probabilities).
            position_ids: where packed documents begin, with `shift=True`; of `target`'s shape.
            cu_seqlens: the same as offsets [num_docs + 1].

        Returns:
            The loss, a 0-d tensor, or one loss per target for "none". With the option
            `return_stats` a pair of the loss and the TokenStats.
        """
        outputs = (self.num_classes, *self.out_features)
        bias = None if self.linear.bias is None else self.linear.bias.view(outputs)
        weight: Any = self.weight
        found: Tensor | tuple[Tensor, TokenStats] = linear_cross_entropy(
            input,
            self.linear.weight.view(*outputs, self.linear.in_features),
            target,
            linear_bias=bias,
            weight=weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
            position_ids=position_ids,
            cu_seqlens=cu_seqlens,
            **self.options,
        )
        return found

    def extra_repr(self) -> str:
        """Return the arguments that differ from the defaults, after the sizes."""
        shown = [f"in_features={self.linear.in_features}", f"num_classes={self.num_classes}"]
        if self.out_features:
            shown.append(f"out_features={self.out_features}")
        defaults = dict(reduction="mean", ignore_index=None, label_smoothing=0.0)
        return ", ".join(shown + differing_arguments(self, defaults, self.options))
