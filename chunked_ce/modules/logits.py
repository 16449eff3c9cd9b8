"""The module of `cross_entropy`."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .. import checks
from ..core.row_stats import TokenStats
from ..functional.logits import cross_entropy
from .options import COMMON_ARGUMENTS, SHARED_OPTIONS, differing_arguments

_LOGITS_OPTIONS = ("dim", "inplace_backward", "grad_in_forward")


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
            `z_loss_weight`, `softcap`, `logit_scale`, `vocab_size`, `spread_rest`, `group`,
            `return_stats`, `inplace_backward`, `grad_in_forward`, `backend`.

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
        checks.known_options(
            "CrossEntropyLoss", options, SHARED_OPTIONS + _LOGITS_OPTIONS, COMMON_ARGUMENTS
        )
        checks.weight_of_classes(weight)
        checks.reduction(reduction)
        checks.return_stats(options.get("return_stats", False))
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
    ) -> Tensor | tuple[Tensor, TokenStats]:
        """Return the loss of logits; see :func:`chunked_ce.cross_entropy`.

        Args:
            input: logits [N, V], or [..., V] with `dim=-1`.
            target: class indices, class probabilities, or a teacher's pair (indices,
                probabilities).
            position_ids: where packed documents begin, with `shift=True`; of `target`'s shape.
            cu_seqlens: the same as offsets [num_docs + 1].

        Returns:
            The loss, a 0-d tensor, or one loss per target for "none". With the option
            `return_stats` a pair of the loss and the TokenStats.
        """
        weight: Any = self.weight
        found: Tensor | tuple[Tensor, TokenStats] = cross_entropy(
            input,
            target,
            weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
            position_ids=position_ids,
            cu_seqlens=cu_seqlens,
            **self.options,
        )
        return found

    def extra_repr(self) -> str:
        """Return the arguments that differ from the defaults."""
        defaults = dict(ignore_index=-100, reduction="mean", label_smoothing=0.0)
        return ", ".join(differing_arguments(self, defaults, self.options))
