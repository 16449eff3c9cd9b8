"""Process groups."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import Tensor


def process_group(group: Any) -> dist.ProcessGroup:
    """Return `group`, or the default group. This process must be a member."""
    if not dist.is_available():
        raise RuntimeError(
            "this build of torch has no torch.distributed: use chunked_ce.cross_entropy, "
            "or install a build that has it"
        )
    if group is None:
        if not dist.is_initialized():
            raise RuntimeError(
                "group is None, and there is no default process group: call "
                "torch.distributed.init_process_group() first, in a program started by torchrun"
            )
        return dist.group.WORLD  # type: ignore[return-value]
    if group == dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError(
            "group does not contain this process: call the loss on its ranks alone, "
            "or pass the group of this rank"
        )
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(
            f"group must be a torch.distributed.ProcessGroup or None, got {type(group).__name__}: "
            "make one with torch.distributed.new_group(), or take mesh.get_group()"
        )
    return group


def group_of_mean(group: Any, reduction: str, num_items: object, weights: Tensor | None) -> Any:
    """Return a group whose ranks hold the tokens that "mean" divides by."""
    if reduction != "mean":
        raise ValueError(
            f"group holds the tokens that reduction='mean' divides by, but reduction is "
            f"{reduction!r}: leave it None"
        )
    if num_items is not None:
        raise ValueError(
            "num_items and group both say what reduction='mean' divides by: leave one of them None"
        )
    if weights is not None and weights.requires_grad:
        raise ValueError(
            "token_weight requires a gradient, but with group the mean divides by the weights of "
            "all ranks, of which a rank has no gradient: pass token_weight.detach(), or num_items"
        )
    return process_group(group)
