"""What is read off deferred logits over their classes: each is a statistic of their rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.row_stats import TokenStats
from ..functional.linear_stats import linear_token_stats
from .distribution import DeferredDistribution
from .head import Head
from .lazy import Lazy, dtype_of


class Reductions(Lazy):
    """Reduce logits over their classes by :func:`chunked_ce.linear_token_stats`."""

    head: Head
    _parent: Reductions | None
    _of_tokens: Callable[[Tensor], Tensor] | None
    _of_all: bool
    _kept: tuple[Tensor, Tensor, bool] | None = None  # lse, entropy, whether with gradients

    def _computed(self) -> bool:
        raise NotImplementedError

    def _take_loss(self) -> None:
        raise NotImplementedError

    def _arguments(self) -> tuple[Tensor, Head, dict[str, Any]]:
        raise NotImplementedError

    def log_softmax(self, dim: Any = None, dtype: Any = None, _stacklevel: int = 3) -> Any:
        return self._distribution(F.log_softmax, dim, dtype)

    def softmax(self, dim: Any = None, dtype: Any = None, _stacklevel: int = 3) -> Any:
        return self._distribution(F.softmax, dim, dtype)

    def _distribution(self, function: Any, dim: Any, dtype: Any) -> Any:
        if not self._is_last(dim) or self._computed():
            return function(self.tensor(), dim=dim, dtype=dtype)
        dtype = dtype_of(lambda x: function(x, dim=-1, dtype=dtype), self)
        real = lambda: function(self.tensor(), dim=-1, dtype=dtype)  # noqa: E731
        return DeferredDistribution(self, function.__name__, dtype, real)

    def gather(self, dim: Any, index: Any, **options: Any) -> Any:
        if self._computed() or options or not self._picks_a_class(dim, index):
            return self.tensor().gather(dim, index, **options)
        stats = self.statistics(index.squeeze(-1))
        return (stats.logprob + stats.lse).unsqueeze(-1).to(self.dtype)

    def logsumexp(self, dim: Any, keepdim: bool = False) -> Tensor:
        if not self._is_last(dim) or self._computed():
            return self.tensor().logsumexp(dim, keepdim)
        lse = self.lse_and_entropy()[0].to(dtype_of(lambda x: x.logsumexp(-1), self))
        return lse.unsqueeze(-1) if keepdim else lse

    def argmax(self, dim: Any = None, keepdim: bool = False) -> Tensor:
        if not self._is_last(dim) or self._computed():
            return self.tensor().argmax(dim, keepdim)
        with torch.no_grad():
            found = self.statistics(argmax=True).argmax
        assert found is not None
        return found.unsqueeze(-1) if keepdim else found

    def statistics(self, target: Tensor | None = None, argmax: bool = False) -> TokenStats:
        """Return the statistics of each row, and keep those that need no target."""
        hidden, head, transforms = self._arguments()
        head.check_unchanged()
        if target is None:
            target = torch.zeros(self.shape[:-1], dtype=torch.int64, device=hidden.device)
        grad, shape = self._wants_gradients(), self.shape[:-1]
        if grad:
            self._take_loss()
        with torch.set_grad_enabled(grad), head.original_autocast():
            flat = linear_token_stats(
                hidden.reshape(-1, hidden.shape[-1]), head.weight,
                target.to(hidden.device).reshape(-1), entropy=True, argmax=argmax, **transforms,
            )  # fmt: skip
            of_tokens = (s if s is None else s.view(shape).to(self.device) for s in flat)
            stats = TokenStats(*of_tokens)  # type: ignore[arg-type]
        assert stats.entropy is not None
        if self._kept is None or grad:
            self._kept = stats.lse, stats.entropy, grad
        return stats

    def lse_and_entropy(self) -> tuple[Tensor, Tensor]:
        """Return both statistics of each row, kept from an earlier use if there was one."""
        found = self._find_kept()
        if found is None:
            whole: Reductions = self
            while whole._of_all and whole._parent is not None:
                whole = whole._parent  # one pass for all the rows of a loop
            whole.statistics()
            found = self._find_kept()
        assert found is not None
        lse, entropy, _ = found
        return (lse, entropy) if torch.is_grad_enabled() else (lse.detach(), entropy.detach())

    def _find_kept(self) -> tuple[Tensor, Tensor, bool] | None:
        if self._kept is not None and self._kept[2] >= self._wants_gradients():
            return self._kept
        if self._parent is None or self._of_tokens is None:
            return None
        kept = self._parent._find_kept()
        if kept is None:
            return None
        return self._of_tokens(kept[0]), self._of_tokens(kept[1]), kept[2]

    def _wants_gradients(self) -> bool:
        return self.head.with_grad and torch.is_grad_enabled()
