"""Choose a backend and call it. All backends take the same arguments."""

from __future__ import annotations

import importlib.util
import os
from typing import Any

from torch import Tensor
from torch import device as Device

from .. import checks
from ..core.reduction import token_loss
from ..core.row_stats import LOGGED, Part, RowStatistics, TokenStats, copy_stats, logged_flags
from . import cpu as backend_cpu
from . import cpu_binary, cpu_library, cpu_pair, torch_pair
from . import torch as backend_torch

TRITON_INSTALLED = importlib.util.find_spec("triton") is not None
# Triton reads the variable at import, so a later change has no effect there and here.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")


def choose_backend(backend: str, device: Device) -> str:
    """Return the backend asked for, if it can run, or for "auto" the best one for `device`."""
    if backend == "auto":
        if device.type in ("cuda", "xpu") and TRITON_INSTALLED:
            return "triton"
        return "cpu" if device.type == "cpu" and cpu_library.IS_AVAILABLE else "torch"
    if backend == "triton":
        on_gpu = device.type in ("cuda", "xpu")
        if not (TRITON_INSTALLED and (on_gpu or (device.type == "cpu" and INTERPRETED))):
            checks.triton_cannot_run(installed=TRITON_INSTALLED)
    elif backend == "cpu":
        if not (cpu_library.IS_AVAILABLE and device.type == "cpu"):
            checks.cpu_cannot_run(device, built=cpu_library.IS_AVAILABLE)
    elif backend != "torch":
        checks.backend_name(backend)
    return backend


def _backend(name: str) -> Any:
    """Return the module of a backend."""
    if name == "triton":
        from . import triton

        return triton
    return backend_cpu if name == "cpu" else backend_torch


def pair_backend(name: str) -> Any:
    """Return the module that has `pair_stats` and `pair_gradient`."""
    if name == "triton":
        from . import triton_pair

        return triton_pair
    return cpu_pair if name == "cpu" else torch_pair


def row_statistics(
    backend: str,
    input: Tensor,  # [..., V]
    *arguments: Any,  # target, ignore_index, vocab_size, head, weights
    **wanted: bool,  # entropy, mean_logprob, rank, argmax
) -> RowStatistics:
    """Return the statistics of every row, [rows]."""
    rows: RowStatistics = _backend(backend).row_statistics(input, *arguments, **wanted)
    return rows


def row_part(
    backend: str,
    input: Tensor,  # [..., C], some classes of a larger vocabulary
    target: Tensor,  # index into these classes; outside of [0, vocab_size) if in another shard
    *arguments: Any,  # ignore_index, vocab_size, head
    **wanted: bool,  # entropy, mean_logprob, argmax
) -> tuple[Part, Tensor]:
    """Return every row's sums over these classes, and the target's logit (-inf if elsewhere)."""
    module = _backend(backend)
    if backend == "triton":
        from . import triton_shard

        module = triton_shard
    part: tuple[Part, Tensor] = module.row_part(input, target, *arguments, **wanted)
    return part


def logits_gradient(
    backend: str,
    input: Tensor,
    *arguments: Any,  # target, lse, logprob, lse_low, coefficients, ..., vocab_size, head, weights
    inplace: bool,
    shard: bool = False,
) -> Tensor:
    """Return dL/dinput, in a new tensor or written over `input`.

    shard: input and target are those of a shard, like the arguments of `row_part`.
    """
    options = dict(inplace=inplace) | ({} if backend == "triton" else dict(shard=shard))
    grad: Tensor = _backend(backend).logits_gradient(input, *arguments, **options)
    return grad


def row_losses(
    backend: str,
    input: Tensor,
    target: Tensor,
    label_smoothing: float,
    z_loss_weight: float,
    *arguments: Any,  # ignore_index, vocab_size, head
    stats: TokenStats | None = None,  # memory [rows] each, written
) -> Tensor:
    """Return each token's loss [rows], without its gradient."""
    wanted = dict.fromkeys(LOGGED, False)
    if stats is not None and backend != "triton":
        wanted = logged_flags(stats)
    found, *_ = row_statistics(
        backend, input, target, *arguments, mean_logprob=label_smoothing > 0, **wanted
    )
    if stats is not None:
        copy_stats(stats, found, ("lse", "logprob") if backend == "triton" else found._fields)
        if backend == "triton":
            _launch_logged(stats, input, target, *arguments)
    return token_loss(found, label_smoothing, z_loss_weight)


def _launch_logged(stats: TokenStats, input: Tensor, *arguments: Any) -> None:
    """Write the statistics in LOGGED, by a launch of their own where any is wanted.

    In the launch of the loss they would change the tile, and with it the last bits of the loss.
    """
    wanted = logged_flags(stats)
    if any(wanted.values()):
        found, *_ = row_statistics("triton", input, *arguments, mean_logprob=False, **wanted)
        copy_stats(stats, found, LOGGED)


def loss_and_gradient(
    backend: str,
    input: Tensor,
    target: Tensor,
    *arguments: Any,  # token_weight, divisor, label_smoothing, ..., vocab_size, head
    inplace: bool,
    stats: TokenStats | None = None,  # memory [rows] each, written
) -> tuple[Tensor, Tensor]:
    """Return each token's loss [rows], and the gradient of loss * token_weight / divisor.

    The losses are not weighted. The gradient is in a new tensor or written over `input`.
    """
    options: dict[str, Any] = dict(inplace=inplace)
    if stats is not None:
        options["stats"] = stats
    if backend == "triton":
        from . import clusters

        options["on_clusters"] = clusters.is_verified(input.device)
        if stats is not None:  # first, because the gradient may be written over the logits
            _launch_logged(stats, input, target, *arguments[4:])
    both: tuple[Tensor, Tensor] = _backend(backend).loss_and_gradient(
        input, target, *arguments, **options
    )
    return both


def scale_(grad: Tensor, upstream: Tensor, backend: str) -> None:
    """Multiply grad [..., V] in place by upstream [...] or []. Do nothing if all upstream are 1."""
    # Read the value only on the host. The Triton kernel reads it on the device.
    on_host = backend != "triton" and upstream.is_cpu
    if grad.numel() == 0 or (on_host and bool((upstream == 1.0).all())):
        return
    (cpu_binary if backend == "cpu" else _backend(backend)).scale_(grad, upstream)


def check_targets(
    target: Tensor, vocab_size: int, ignore_index: int, *, on_host: bool = False, per_row: int = 1
) -> None:
    """Raise IndexError if a target is out of range.

    Targets on a GPU are checked only on request (CHUNKED_CE_CHECK_TARGETS=1), because the check
    waits for the GPU.
    """
    if on_host or os.environ.get("CHUNKED_CE_CHECK_TARGETS") == "1":
        checks.targets_in_range(target, vocab_size, ignore_index, per_row)
