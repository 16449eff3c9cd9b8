"""Let DistributedDataParallel and FSDP2 notice a backward from deferred logits.

Both look for tensors among a model's outputs. With labels that is the loss.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from ..checks.heads import is_fully_sharded
from .deferred import DeferredLogits


def _graph(logits: DeferredLogits) -> tuple[Tensor, ...]:
    if logits._loss_taken or not logits.head.with_grad:
        return ()
    given = (t for t in logits.head.tensors if t.requires_grad)
    return tuple(t.flatten()[:0].sum() for t in given)


@dataclasses.dataclass(init=False, repr=False, eq=False)
class DeferredLogitsOfDDP(DeferredLogits):
    """Deferred logits that lead DDP's search for unused parameters to those of backward.

    It looks into dataclasses.
    """

    graph: tuple[Tensor, ...] = property(_graph)  # type: ignore[assignment]


def deferred_class() -> type[DeferredLogits]:
    """Return the class of the logits that a head defers now."""
    return DeferredLogits if _active_ddp() is None else DeferredLogitsOfDDP


def can_follow(model: nn.Module) -> bool:
    """Return whether a backward without a loss among the outputs can be made known."""
    if getattr(_active_ddp(), "static_graph", False):  # it wants a tensor to put its own node after
        return False
    return not is_fully_sharded(model) or hasattr(_fsdp_state(model), "_pre_backward")


def follow(model: nn.Module, hidden: Tensor) -> None:
    """Let FSDP2 prepare for backward when it reaches the hidden states."""
    if is_fully_sharded(model) and torch.is_grad_enabled() and hidden.requires_grad:
        hidden.register_hook(_fsdp_state(model)._pre_backward)


def _active_ddp() -> Any:
    return getattr(nn.parallel.DistributedDataParallel, "_active_ddp_module", None)


def _fsdp_state(model: Any) -> Any:
    return model._get_fsdp_state() if hasattr(model, "_get_fsdp_state") else None
