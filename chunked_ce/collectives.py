"""Tensors of all ranks, over torch.distributed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist


def rank_and_size(group: Any) -> tuple[int, int]:
    """Of this process in `group`; (0, 1) where there is no process group."""
    if not (dist.is_available() and dist.is_initialized()):
        return 0, 1
    return dist.get_rank(group), dist.get_world_size(group)


def all_gather(tensor: Tensor, group: Any) -> list[Tensor]:
    """`tensor` of every rank, by rank, on the device of this rank's; all of one shape."""
    _, size = rank_and_size(group)
    if size == 1:
        return [tensor]
    local = tensor.contiguous().to(_device(group))
    gathered = [torch.empty_like(local) for _ in range(size)]
    dist.all_gather(gathered, local, group=group)
    return [part.to(tensor.device) for part in gathered]


def all_reduce(tensor: Tensor, group: Any) -> Tensor:
    """The sum of every rank's `tensor`, on the device of this rank's; all of one shape."""
    if rank_and_size(group)[1] == 1:
        return tensor
    total = tensor.to(_device(group), copy=True)
    dist.all_reduce(total, group=group)
    return total.to(tensor.device)


def _device(group: Any) -> torch.device:
    """Where the group's backend communicates; a group of several backends has one for the CPU."""
    accelerator = torch.accelerator.current_accelerator()
    if accelerator is None or dist.get_backend(group) in ("gloo", "mpi", "undefined"):
        return torch.device("cpu")
    return accelerator
