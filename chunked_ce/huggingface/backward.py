"""Let DistributedDataParallel and FSDP2 notice a backward from deferred logits.

Both look for tensors among a model's outputs. With labels that is the loss.
"""

from __future__ import annotations

import dataclasses
import sys
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
    return all(hasattr(state, "_pre_backward") for state in _fsdp_states(model))


def follow(model: nn.Module, hidden: Tensor) -> None:
    """Let FSDP2 prepare for backward when it reaches the hidden states."""
    if torch.is_grad_enabled() and hidden.requires_grad:
        for state in _fsdp_states(model):
            hidden.register_hook(state._pre_backward)


def _active_ddp() -> Any:
    return getattr(nn.parallel.DistributedDataParallel, "_active_ddp_module", None)


def _fsdp_states(model: nn.Module) -> list[Any]:
    """Return the states of the FSDP2 groups that hold the model, the outermost first.

    PEFT's and other wrappers may be such a group, and the model knows nothing of them. torch has a
    mapping of all modules to their states.
    """
    composable = sys.modules.get("torch.distributed._composable_state")
    known = list(getattr(composable, "_module_state_mapping", None) or {})
    around = [m for m in known if is_fully_sharded(m) and any(n is model for n in m.modules())]
    return [module._get_fsdp_state() for module in reversed(around)]
