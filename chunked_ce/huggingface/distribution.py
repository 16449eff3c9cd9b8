"""Probabilities of deferred logits, as far as a statistic of their rows answers for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..core.row_stats import TokenStats
from .lazy import Lazy, dtype_of, functions_named

if TYPE_CHECKING:
    from .reductions import Reductions

LOG_SOFTMAX, SOFTMAX, LOGITS = "log_softmax", "softmax", "logits"
P_LOG_P, P_LOGITS = "p log p", "p z"

_GATHERED: dict[str, Callable[[TokenStats], Tensor]] = {
    LOG_SOFTMAX: lambda stats: stats.logprob,
    SOFTMAX: lambda stats: stats.logprob.exp(),
}
_PRODUCTS = {
    frozenset((SOFTMAX, LOG_SOFTMAX)): P_LOG_P,
    frozenset((SOFTMAX, LOGITS)): P_LOGITS,
}
_SUMS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    P_LOG_P: lambda lse, entropy: -entropy,
    P_LOGITS: lambda lse, entropy: lse - entropy,
}


class DeferredDistribution(Lazy):
    """A function of each row of deferred logits [..., V], not computed.

    `kind` names it: log_softmax or softmax, the product of both, or that of softmax and logits.
    """

    def __init__(
        self, logits: Reductions, kind: str, dtype: torch.dtype, compute: Callable[[], Tensor]
    ) -> None:
        self.logits, self.kind, self.dtype = logits, kind, dtype
        self.device = logits.device
        self._compute = compute
        self._real: Tensor | None = None

    def tensor(self) -> Tensor:
        """Return the values, computed at the first call from the logits."""
        if self._real is None:
            self._real = self._compute()
        return self._real

    @property
    def shape(self) -> torch.Size:
        return self.logits.shape

    def exp(self) -> Any:
        if self.kind != LOG_SOFTMAX or self._is_computed():
            return self.tensor().exp()
        dtype = dtype_of(torch.exp, self)
        return DeferredDistribution(self.logits, SOFTMAX, dtype, lambda: self.tensor().exp())

    def mul(self, other: Any) -> Any:
        logits, kind = getattr(other, "logits", other), getattr(other, "kind", LOGITS)
        product = _PRODUCTS.get(frozenset((self.kind, kind)))
        if logits is not self.logits or product is None or self._is_computed():
            return self.tensor() * other
        dtype = torch.promote_types(self.dtype, other.dtype)
        real = lambda: self.tensor() * other.tensor()  # noqa: E731
        return DeferredDistribution(self.logits, product, dtype, real)

    __mul__ = __rmul__ = mul

    def sum(self, dim: Any = None, keepdim: bool = False, **options: Any) -> Tensor:
        if self.kind not in _SUMS or options or self._is_computed() or not self._is_last(dim):
            return self.tensor().sum(dim, keepdim, **options)
        total = _SUMS[self.kind](*self.logits.lse_and_entropy())
        total = total.to(dtype_of(torch.sum, self))
        return total.unsqueeze(-1) if keepdim else total

    def gather(self, dim: Any, index: Any, **options: Any) -> Any:
        known = self.kind in _GATHERED and not options and not self._is_computed()
        if not known or not self._picks_a_class(dim, index):
            return self.tensor().gather(dim, index, **options)
        stats = self.logits.statistics(index.squeeze(-1))
        return _GATHERED[self.kind](stats).unsqueeze(-1).to(self.dtype)

    def __getitem__(self, index: Any) -> Any:
        logits: Any = self.logits[index]
        rows = isinstance(logits, type(self.logits)) and logits.shape[-1] == self.shape[-1]
        if not rows or self.kind not in _GATHERED or self._is_computed():
            return self.tensor()[index]
        return DeferredDistribution(logits, self.kind, self.dtype, lambda: self.tensor()[index])

    def _is_computed(self) -> bool:
        return self._real is not None or self.logits._computed()


DeferredDistribution.recorded = functions_named("exp", "mul", "sum", "gather", "take_along_dim")
