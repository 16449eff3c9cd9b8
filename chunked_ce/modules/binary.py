"""The module of `binary_cross_entropy_with_logits`."""

from __future__ import annotations

from typing import NoReturn

from torch import Tensor, nn

from .. import checks
from ..functional.binary import binary_cross_entropy_with_logits
from .options import differing_arguments

_BINARY = ("weight", "reduction", "pos_weight", "ignore_index", "backend")


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
        return ", ".join(differing_arguments(self, defaults, {}))
