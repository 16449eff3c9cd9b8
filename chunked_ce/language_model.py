"""Token statistics of a causal language model, through its head's weight where that can be done.

Whether it can is tried, not assumed: on a few tokens the head's product with the hidden states must
be the model's own logits, as they are, scaled (Granite, Cohere) or capped (Gemma 2). Where it is
not, the model's own logits are used, some rows of a batch at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import checks
from .functional import token_stats
from .linear import linear_token_stats
from .stats import TokenStats

PROBE_TOKENS = 8
_LOGITS_BYTES = 256 << 20
"""Of the model's own logits at a time, where there is no way around them."""


@dataclass(frozen=True)
class Head:
    """z = softcap * tanh(logit_scale * (hidden @ weight.T + bias) / softcap)"""

    base: nn.Module
    linear: Any  # a module with `weight` [V, D] and `bias` [V] or None
    softcap: float | None
    logit_scale: float


@dataclass(frozen=True)
class LanguageModel:
    """A model, the number of its classes, and its head where the logits need not exist."""

    model: Any
    vocab_size: int
    head: Head | None

    def token_stats(
        self, input_ids: Tensor, target: Tensor, *, rank: bool, backend: str
    ) -> TokenStats:
        """Of `target` [B, T], -100 where nothing is scored, after `input_ids` [B, T]."""
        head = self.head
        if head is None:
            return self._from_logits(input_ids, target, rank, backend)
        hidden = _at_weight(_first(_call(head.base, input_ids)), head.linear.weight)
        return linear_token_stats(
            hidden, head.linear.weight, target.to(hidden.device),
            linear_bias=head.linear.bias, vocab_size=self.vocab_size, softcap=head.softcap,
            logit_scale=head.logit_scale, rank=rank, backend=backend,
        )  # fmt: skip

    def _from_logits(
        self, input_ids: Tensor, target: Tensor, rank: bool, backend: str
    ) -> TokenStats:
        rows = max(1, _LOGITS_BYTES // (input_ids.shape[1] * self.vocab_size * 4))
        parts = []
        for ids, labels in zip(input_ids.split(rows), target.split(rows), strict=True):
            logits = _logits(_call(self.model, ids))
            labels = labels.to(logits.device)
            parts.append(token_stats(logits, labels, rank=rank, backend=backend))
        joined = [None if s[0] is None else torch.cat(s) for s in zip(*parts, strict=True)]
        return TokenStats(*joined)  # type: ignore[arg-type]


@torch.no_grad()
def examine(model: Any, ids: Tensor, device: torch.device) -> LanguageModel:
    """Tries `model` on the first tokens of a document, `ids` [T].

    Raises:
        ValueError: the model is not causal, or gives no logits [B, T, V].
    """
    tokens = ids[:PROBE_TOKENS]
    other = tokens.clone()
    other[-1] = tokens[0] if tokens[0] != tokens[-1] else (tokens[-1] == 0).long()
    probe = torch.stack([tokens, other]).to(device)
    logits = _logits(_call(model, probe))
    checks.model_logits(logits, probe)
    before = logits[:, :-1].double()
    if before.numel():
        noise = max(1e-4, 8 * torch.finfo(logits.dtype).eps) * before.abs().amax()
        checks.causal(not bool(((before[0] - before[1]).abs() > noise).any()))  # NaN is no sign
    heads = (_head(base, model, probe, logits) for base in _bases(model))
    return LanguageModel(model, logits.shape[-1], next(filter(None, heads), None))


def _head(base: nn.Module, model: Any, probe: Tensor, logits: Tensor) -> Head | None:
    """None where the logits are not a capped, scaled product of hidden states and a weight."""
    linear = _output_embeddings(model)
    if linear is None or linear.weight.shape[0] < logits.shape[-1]:
        return None
    weight = linear.weight
    hidden = _first(_call(base, probe))
    if not isinstance(hidden, Tensor) or hidden.shape != (*probe.shape, weight.shape[1]):
        return None
    product = F.linear(_at_weight(hidden, weight), weight, linear.bias)[..., : logits.shape[-1]]
    eps = max(torch.finfo(product.dtype).eps, torch.finfo(logits.dtype).eps)
    transform = _recognise(product.double(), logits.double().to(product.device), eps, model)
    return None if transform is None else Head(base, linear, *transform)


def _recognise(x: Tensor, z: Tensor, eps: float, model: Any) -> tuple[float | None, float] | None:
    """The (softcap, scale) with which x comes closest to z, if as close as rounding does.

    The configuration's own numbers come first: one fitted to them must do clearly better.
    """
    best, smallest = None, eps
    config = checks.text_config(model)
    cap = getattr(config, "final_logit_softcapping", None)
    named = [v for n in _SCALES if isinstance(v := getattr(config, n, None), (int, float)) and v]
    for softcap in (None,) if not cap else (cap, None):
        flat = z if softcap is None else softcap * torch.atanh((z / softcap).clamp(-0.999, 0.999))
        fitted = float((x * flat).sum() / x.square().sum())
        for scale in (1.0, *named, *(1 / v for v in named), fitted):
            y = scale * x
            y = y if softcap is None else softcap * torch.tanh(y / softcap)
            error = float((y - z).norm() / z.norm())  # NaN, which is not less, for logits of 0
            if error < smallest:
                best, smallest = (softcap, scale), 0.9 * error
    return best


_SCALES = ("logit_scale", "logits_scaling", "lm_head_multiplier")


def _bases(model: Any) -> list[nn.Module]:
    """Where the hidden states may come from."""
    found = [model.get_decoder()] if hasattr(model, "get_decoder") else []
    found.append(getattr(model, getattr(model, "base_model_prefix", None) or "", None))
    return [base for base in found if isinstance(base, nn.Module) and base is not model]


def _output_embeddings(model: Any) -> Any:
    """The head, if its weight can be multiplied with: not quantized, sharded or elsewhere."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    weight = getattr(head, "weight", None)
    usable = (
        isinstance(weight, Tensor)
        and type(weight).__name__ != "DTensor"
        and weight.dim() == 2
        and weight.dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)
        and weight.layout == torch.strided
        and weight.device.type != "meta"
        and hasattr(head, "bias")
    )
    return head if usable else None


def _call(model: Any, input_ids: Tensor) -> Any:
    """transformers' models by name, without a cache; any other callable with the ids alone."""
    if hasattr(model, "config"):
        return model(input_ids=input_ids, use_cache=False)
    return model(input_ids)


def _at_weight(hidden: Tensor, weight: Tensor) -> Tensor:
    """On its device, and in its dtype but where autocast sees to that."""
    cast = not torch.is_autocast_enabled(weight.device.type)
    return hidden.to(weight.device, weight.dtype if cast else None)


def _first(output: Any) -> Any:
    return output if isinstance(output, Tensor) else output[0]


def _logits(output: Any) -> Any:
    return getattr(output, "logits", None) if hasattr(output, "logits") else _first(output)


def device_of(model: Any) -> torch.device:
    """Where a model takes its ids."""
    if hasattr(model, "get_input_embeddings"):
        weight = getattr(model.get_input_embeddings(), "weight", None)
        if isinstance(weight, Tensor) and weight.device.type != "meta":
            return weight.device
    parameters = model.parameters() if isinstance(model, nn.Module) else iter(())
    return next((p.device for p in parameters), torch.device("cpu"))


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """In evaluation mode; afterwards each module is as it was."""
    modules = list(model.modules()) if isinstance(model, nn.Module) else []
    modes = [module.training for module in modules]
    try:
        if isinstance(model, nn.Module):
            model.eval()
        yield
    finally:
        for module, mode in zip(modules, modes, strict=True):
            module.training = mode
