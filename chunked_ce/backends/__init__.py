"""One face of the backends: which one runs, and each with the same arguments."""

from __future__ import annotations

import importlib.util
import os

from torch import Tensor
from torch import device as Device

from .. import checks
from ..core.gradient import Coefficients
from ..core.head import Head
from ..core.row_stats import UNIFORM, ClassWeights, Part, RowStatistics
from . import cpu as backend_cpu
from . import cpu_binary, cpu_library
from . import torch as backend_torch

TRITON_INSTALLED = importlib.util.find_spec("triton") is not None
# As Triton reads it, and when it does: a change after the import comes too late for both.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")


def choose_backend(backend: str, device: Device) -> str:
    """Return the backend asked for, if it can run, or for "auto" the best one for `device`."""
    if backend == "auto":
        if device.type in ("cuda", "xpu") and TRITON_INSTALLED:
            return "triton"
        return "cpu" if device.type == "cpu" and cpu_library.IS_THERE else "torch"
    if backend == "triton":
        on_gpu = device.type in ("cuda", "xpu")
        if not (TRITON_INSTALLED and (on_gpu or (device.type == "cpu" and INTERPRETED))):
            checks.triton_cannot_run(installed=TRITON_INSTALLED)
    elif backend == "cpu":
        if not (cpu_library.IS_THERE and device.type == "cpu"):
            checks.cpu_cannot_run(device, built=cpu_library.IS_THERE)
    elif backend != "torch":
        checks.backend_name(backend)
    return backend


def row_statistics(
    backend: str,
    input: Tensor,  # [..., V]
    target: Tensor,
    ignore_index: int,
    vocab_size: int,
    head: Head,
    weights: ClassWeights = UNIFORM,
    **wanted: bool,  # entropy, mean_logprob, rank, argmax
) -> RowStatistics:
    """The statistics of every row, flat."""
    if backend == "triton":
        from . import triton as backend_triton

        return backend_triton.row_statistics(
            input, target, ignore_index, vocab_size, head, weights, **wanted
        )
    if backend == "cpu":
        return backend_cpu.row_statistics(
            input, target, ignore_index, vocab_size, head, weights, **wanted
        )
    options = backend_torch.Options(vocab_size, head)
    return backend_torch.row_statistics(input, target, ignore_index, options, weights, **wanted)


def row_part(
    backend: str,
    input: Tensor,  # [..., C], some classes of a larger vocabulary
    target: Tensor,  # counted from the first of them; outside of [0, vocab_size): not among them
    ignore_index: int,
    vocab_size: int,
    head: Head,
    **wanted: bool,  # entropy, mean_logprob, argmax
) -> tuple[Part, Tensor]:
    """Of every row the sums over these classes, and the target's logit, -inf if elsewhere."""
    if backend == "triton":
        from . import triton_shard as triton_part

        return triton_part.row_part(input, target, ignore_index, vocab_size, head, **wanted)
    if backend == "cpu":
        return backend_cpu.row_part(input, target, ignore_index, vocab_size, head, **wanted)
    options = backend_torch.Options(vocab_size, head)._replace(shard=True)
    return backend_torch.row_part(input, target, ignore_index, options, rank=False, **wanted)


def logits_gradient(
    backend: str,
    input: Tensor,
    target: Tensor,
    lse: Tensor,
    logprob: Tensor,
    lse_low: Tensor,
    coefficients: Coefficients,
    ignore_index: int,
    vocab_size: int,
    head: Head,
    weights: ClassWeights = UNIFORM,
    *,
    inplace: bool,
    shard: bool = False,
) -> Tensor:
    """dL/dinput, in a new tensor or over `input`; `shard`: both given as to `row_part`."""
    given = (input, target, lse, logprob, lse_low, coefficients, ignore_index)
    if backend == "triton":
        from . import triton as backend_triton

        return backend_triton.logits_gradient(*given, vocab_size, head, weights, inplace=inplace)
    if backend == "cpu":
        return backend_cpu.logits_gradient(
            *given, vocab_size, head, weights, inplace=inplace, shard=shard
        )
    options = backend_torch.Options(vocab_size, head)._replace(shard=shard)
    return backend_torch.logits_gradient(*given, options, weights, inplace=inplace)


def loss_and_gradient(
    backend: str,
    input: Tensor,
    target: Tensor,
    token_weight: Tensor | None,
    divisor: Tensor | None,
    label_smoothing: float,
    z_loss_weight: float,
    ignore_index: int,
    vocab_size: int,
    head: Head,
    *,
    inplace: bool,
) -> tuple[Tensor, Tensor]:
    """Each token's loss before its weight, flat, and the gradient of loss * token_weight / divisor.

    That in a new tensor or over `input`.
    """
    losses = (token_weight, divisor, label_smoothing, z_loss_weight)
    if backend == "triton":
        from . import clusters
        from . import triton as backend_triton

        return backend_triton.loss_and_gradient(
            input, target, *losses, ignore_index, vocab_size, head,
            inplace=inplace, on_clusters=clusters.checked(input.device),
        )  # fmt: skip
    if backend == "cpu":
        return backend_cpu.loss_and_gradient(
            input, target, *losses, ignore_index, vocab_size, head, inplace=inplace
        )
    return backend_torch.loss_and_gradient(
        input,
        target,
        *losses,
        ignore_index,
        backend_torch.Options(vocab_size, head),
        inplace=inplace,
    )


def scale_(grad: Tensor, upstream: Tensor, backend: str) -> None:
    """grad [..., V] *= upstream [...] or []; nothing is done where that is 1."""
    if grad.numel() == 0:
        return
    if backend == "triton":
        from . import triton as backend_triton

        backend_triton.scale_(grad, upstream)
    elif not (upstream.device.type == "cpu" and bool((upstream == 1.0).all())):
        (cpu_binary if backend == "cpu" else backend_torch).scale_(grad, upstream)


def check_targets(
    target: Tensor, vocab_size: int, ignore_index: int, *, free: bool = False, per_row: int = 1
) -> None:
    """Where looking at targets is not free, but means waiting for a GPU, the user says when to."""
    if free or os.environ.get("CHUNKED_CE_CHECK_TARGETS") == "1":
        checks.targets_in_range(target, vocab_size, ignore_index, per_row)
