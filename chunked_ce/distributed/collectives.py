"""Tensors of all ranks, over torch.distributed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from ..core.reduction import Reduction


def rank_and_size(group: Any) -> tuple[int, int]:
    """Return rank and size of `group`; (0, 1) if there is no process group."""
    if not (dist.is_available() and dist.is_initialized()):
        return 0, 1
    return dist.get_rank(group), dist.get_world_size(group)


def all_gather(tensor: Tensor, group: Any) -> Tensor:
    """Return every rank's `tensor` as [ranks, ...] on this rank's device; all have one shape."""
    _, size = rank_and_size(group)
    if size == 1 or not tensor.numel():
        return tensor.expand(size, *tensor.shape)
    local = tensor.contiguous().to(_device(group, tensor.device))
    gathered = local.new_empty(size, *local.shape)
    # Its name since torch 2.13, and before.
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    gather(gathered.view(-1), local.view(-1), group=group)
    return gathered.to(tensor.device)


def all_reduce(tensor: Tensor, group: Any) -> Tensor:
    """Return the sum of every rank's `tensor` on this rank's device; all have one shape."""
    if rank_and_size(group)[1] == 1:
        return tensor
    total = tensor.to(_device(group, tensor.device), copy=True)
    dist.all_reduce(total, group=group)
    return total.to(tensor.device)


def over_ranks(reducer: Reduction, group: Any) -> Reduction:
    """Return the Reduction that divides by the tokens of all ranks. It takes one collective."""
    divisor, z_divisor = reducer.divisor, reducer.z_divisor
    assert divisor is not None
    if z_divisor is None:
        return reducer._replace(divisor=all_reduce(divisor, group))
    both = all_reduce(torch.stack([divisor, z_divisor.to(divisor.dtype)]), group)
    return reducer._replace(divisor=both[0], z_divisor=both[1])


def _device(group: Any, device: torch.device) -> torch.device:
    """Return the device on which the group's backend communicates a tensor of `device`."""
    # Torch 2.6 raises where there is none, later ones return None.
    available = torch.accelerator.is_available()
    accelerator = torch.accelerator.current_accelerator() if available else None
    if accelerator is None or dist.get_backend(group) in ("gloo", "mpi", "undefined"):
        return torch.device("cpu")
    return device if device.type == accelerator.type else accelerator
