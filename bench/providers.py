"""Who is measured: each provider's loss from logits and from hidden states, and why one cannot run.

A loss from logits is called with (logits [N, V], target [N]), one from hidden states, the linear
layer in it, with (input [N, D], weight [V, D], target [N]); both give the mean.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import chunked_ce

EAGER, COMPILED, OURS = "eager", "torch.compile", "chunked_ce"
INPLACE = "chunked_ce inplace_backward"
TORCH, CUT, LIGER = "F.linear_cross_entropy", "cut-cross-entropy", "liger"
CUT_FILTER = "cut-cross-entropy (filter)"  # leaves small gradients out; CUT computes all of them
QUACK, FLASH = "quack", "flash-attn"

LOGITS, LINEAR = "logits", "linear"  # forms
PROVIDERS = {
    LOGITS: (EAGER, COMPILED, LIGER, QUACK, FLASH, OURS, INPLACE),
    LINEAR: (EAGER, COMPILED, TORCH, CUT, CUT_FILTER, LIGER, QUACK, OURS),
}
COMPILING = (COMPILED, CUT, CUT_FILTER)  # their first call shows whether they run here
GPU_ONLY = (LIGER, QUACK, FLASH)
OVERWRITING = (LIGER,)  # from logits: they hold the gradient after its forward

Loss = Callable[..., Tensor]


@cache
def loss_of(form: str, provider: str, device: str = "cpu") -> Loss:
    """Raises ImportError where what the provider needs is not installed."""
    return _from_logits(provider) if form == LOGITS else _from_hidden_states(provider, device)


def _from_logits(provider: str) -> Loss:
    if provider == COMPILED:
        return torch.compile(F.cross_entropy)
    if provider == LIGER:
        loss: Loss = _module("liger_kernel.transformers.functional").liger_cross_entropy
        return loss
    if provider == QUACK:
        return partial(_module("quack.cross_entropy").cross_entropy, reduction="mean")
    if provider == FLASH:
        module: Loss = _module("flash_attn.losses.cross_entropy").CrossEntropyLoss()
        return module
    losses: dict[str, Loss] = {
        EAGER: F.cross_entropy,
        OURS: chunked_ce.cross_entropy,
        INPLACE: partial(chunked_ce.cross_entropy, inplace_backward=True),
    }
    return losses[provider]


def _from_hidden_states(provider: str, device: str) -> Loss:
    if provider == COMPILED:
        return torch.compile(_eager)
    if provider == TORCH:
        options = torch.nn.LinearCrossEntropyOptions()
        return lambda x, w, target: F.linear_cross_entropy(x, w, target, options=options)
    if provider in (CUT, CUT_FILTER):
        how = "cce" if device == "cuda" else "torch_compile"
        cut: Loss = partial(_module("cut_cross_entropy").linear_cross_entropy, impl=how)
        return cut if provider == CUT_FILTER else partial(cut, filter_eps=None)
    if provider == LIGER:
        fused: Loss = _module(
            "liger_kernel.transformers.functional"
        ).liger_fused_linear_cross_entropy
        return fused
    if provider == QUACK:
        return partial(
            _module("quack.linear_cross_entropy").chunked_linear_cross_entropy, reduction="mean"
        )
    losses: dict[str, Loss] = {EAGER: _eager, OURS: chunked_ce.linear_cross_entropy}
    return losses[provider]


def _eager(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(x, weight), target)


def behind_its_head(loss: Loss) -> Loss:
    """From hidden states, of a loss from logits."""
    return lambda x, weight, target: loss(F.linear(x, weight), target)


def _module(name: str) -> Any:
    return importlib.import_module(name)


def why_not(form: str, provider: str, device: str = "cpu") -> str:
    """Why the provider cannot be measured on that kind of device; empty where it can."""
    if provider not in PROVIDERS[form]:
        return f"has no loss from {'logits' if form == LOGITS else 'hidden states'}"
    if provider in GPU_ONLY and device != "cuda":
        return "its kernels need a GPU"
    if provider == CUT_FILTER and device != "cuda":
        return "its filter needs a GPU"
    if provider == TORCH and not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        return f"torch {torch.__version__} has none with options"
    try:
        loss_of(form, provider, device)
    except ImportError as error:
        return f"not installed ({error})"
    return ""
