"""Token statistics of a causal language model, through its head's weight where that can be done.

Whether it can is tried, not assumed: on a few tokens the head's product with the hidden states must
be the model's own logits, as they are, scaled (Granite, Cohere) or capped (Gemma 2). Where it is
not, or where trying it fails, the model's own logits are used, some rows of a batch at a time.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checks.values import is_dtensor
from ..core.row_stats import TokenStats
from ..functional.linear import linear_token_stats
from ..functional.logits import token_stats
from . import checks

PROBE_TOKENS = 8
NOT_CAUSAL = 1e-3  # of the largest logit, in any dtype; a small untrained BERT moves by 4e-3
UNEXPLAINED = 1e-4  # error of a head that the configuration does not name; of a plain one it is 0
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
            logits = _logits_of(self.model, ids)
            labels = labels.to(logits.device)
            parts.append(token_stats(logits, labels, rank=rank, backend=backend))
        joined = [None if s[0] is None else torch.cat(s) for s in zip(*parts, strict=True)]
        return TokenStats(*joined)  # type: ignore[arg-type]


@torch.no_grad()
def examine(model: Any, ids: Tensor, device: torch.device) -> LanguageModel:
    """Tries `model` on the first tokens of a document, `ids` [T].

    Raises:
        TypeError: the model cannot be called with ids alone.
        ValueError: the model is not causal, or gives no logits [B, T, V].
    """
    probe, *further = _probes(ids[:PROBE_TOKENS].to(device))
    try:
        logits = _logits_of(model, probe)
    except TypeError as error:
        raise checks.not_of_ids_alone(error) from error
    checks.model_logits(logits, probe)
    looks_ahead = _looks_ahead(logits)
    for another in further if looks_ahead else ():  # rounding may depend on the tokens beside
        looks_ahead = looks_ahead and _looks_ahead(_logits_of(model, another))
    checks.causal(not looks_ahead)
    heads = (_attempt(_head, base, model, probe, logits) for base in _bases(model))
    return LanguageModel(model, logits.shape[-1], next(filter(None, heads), None))


@torch.no_grad()
def try_length(examined: LanguageModel, ids: Tensor, device: torch.device, backend: str) -> None:
    """Try a window `ids` [T] that is longer than the configuration's maximum, where it may fail.

    Raises:
        ValueError: the model has no positions for it.
    """
    if not checks.exceeds_maximum(len(ids), examined.model):
        return
    inputs = ids[None].to(device)
    try:
        examined.token_stats(inputs, inputs, rank=False, backend=backend)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise checks.too_long(len(ids), examined.model) from error


def _probes(tokens: Tensor) -> list[Tensor]:
    """[2, T] each: the tokens, and with another one in all places of the second half."""
    probes = []
    for token in dict.fromkeys((int(tokens[0]), 0, 1)):
        other = tokens.clone()
        other[len(tokens) // 2 :] = token
        if len(tokens) == 1 or not torch.equal(other, tokens):
            probes.append(torch.stack([tokens, other]))
    return probes[:2]


def _looks_ahead(logits: Tensor) -> bool:
    """Whether logits [2, T, V] of the first half differ where only the second half does."""
    before = logits[:, : logits.shape[1] // 2].double()
    if not before.numel():
        return False
    change = (before[0] - before[1]).abs()
    return bool((change > NOT_CAUSAL * before.abs().amax()).any())  # NaN is no sign


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

    The configuration's own numbers come first: one fitted to them must do clearly better. What it
    does not name must come closer than half precision rounds: a cap of 30 looks like rounding.
    """
    best, smallest = None, eps
    config = checks.text_config(model)
    cap = next((v for n in _CAPS if isinstance(v := getattr(config, n, None), (int, float))), None)
    named = [v for n in _SCALES if isinstance(v := getattr(config, n, None), (int, float)) and v]
    for softcap in (None,) if not cap else (cap, None):
        flat = z if softcap is None else softcap * torch.atanh((z / softcap).clamp(-0.999, 0.999))
        fitted = float((x * flat).sum() / x.square().sum())
        for scale in (1.0, *named, *(1 / v for v in named), fitted):
            y = scale * x
            y = y if softcap is None else softcap * torch.tanh(y / softcap)
            error = float((y - z).norm() / z.norm())  # NaN, which is not less, for logits of 0
            explained = softcap is not None or scale in (*named, *(1 / v for v in named))
            if error < (smallest if explained else min(smallest, UNEXPLAINED)):
                best, smallest = (softcap, scale), 0.9 * error
    return best


_CAPS = ("final_logit_softcapping", "logits_soft_cap")
_SCALES = ("logit_scale", "logits_scaling", "lm_head_multiplier")


def _bases(model: Any) -> list[nn.Module]:
    """Return the modules that the hidden states may come from.

    None of a model with trained prompts: what it puts before the ids is put by the model itself.
    """
    if checks.virtual_tokens(model):
        return []
    prefix = getattr(model, "base_model_prefix", None) or ""
    found = [_attempt(_method(model, "get_decoder")), getattr(model, prefix, None)]
    head = _attempt(_method(model, "get_output_embeddings"))
    return [b for b in found if isinstance(b, nn.Module) and b is not model and b is not head]


def _method(model: Any, name: str) -> Any:
    return getattr(model, name, lambda: None)


def _attempt(function: Any, *args: Any) -> Any:
    """Return None where it fails: the model's own logits are there for whatever that is."""
    try:
        return function(*args)
    except Exception:
        return None


def _output_embeddings(model: Any) -> Any:
    """The head, if its weight can be multiplied with: not quantized, sharded or elsewhere."""
    head = _attempt(_method(model, "get_output_embeddings"))
    weight = getattr(head, "weight", None)
    usable = (
        isinstance(weight, Tensor)
        and not is_dtensor(weight)
        and weight.dim() == 2
        and weight.dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)
        and weight.layout == torch.strided
        and weight.device.type != "meta"
        and hasattr(head, "bias")
    )
    return head if usable else None


def _call(model: Any, input_ids: Tensor) -> Any:
    """transformers' models by name, without a cache; any other callable with the ids alone.

    A `config` alone does not tell: many a GPT of one file has one, and names its ids `idx`.
    """
    if not hasattr(model, "config"):
        return model(input_ids)
    try:
        parameters = inspect.signature(getattr(model, "forward", model)).parameters
    except (TypeError, ValueError):  # a callable without a signature
        return model(input_ids)
    any_name = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    cache = {"use_cache": False} if any_name or "use_cache" in parameters else {}
    if any_name or "input_ids" in parameters:
        return model(input_ids=input_ids, **cache)
    return model(input_ids)


def _at_weight(hidden: Tensor, weight: Tensor) -> Tensor:
    """On its device, and in its dtype but where autocast sees to that."""
    cast = not torch.is_autocast_enabled(weight.device.type)
    return hidden.to(weight.device, weight.dtype if cast else None)


def _first(output: Any) -> Any:
    """Of a tuple, or of transformers' outputs; what is neither is told by its type later."""
    several = isinstance(output, (tuple, list)) or hasattr(output, "to_tuple")
    return output[0] if several and len(output) else output


def _logits(output: Any) -> Any:
    if isinstance(output, Mapping) and "logits" in output:
        return output["logits"]
    return output.logits if hasattr(output, "logits") else _first(output)


def _logits_of(model: Any, input_ids: Tensor) -> Any:
    """Return logits [B, T, V], without those of trained prompts before the ids [B, T]."""
    logits = _logits(_call(model, input_ids))
    extra = checks.virtual_tokens(model)
    if not extra or not isinstance(logits, Tensor) or logits.dim() != 3:
        return logits
    return logits[:, extra:] if logits.shape[1] == extra + input_ids.shape[1] else logits


def device_of(model: Any) -> torch.device:
    """Where a model takes its ids."""
    weight = getattr(checks.input_embeddings(model), "weight", None)
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
