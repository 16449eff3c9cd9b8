"""Token statistics of a causal language model, without its logits where its head can be deferred.

The model's own forward runs. Its output head gives deferred logits, which record what the model
does to them: a scale, a cap, slices, a cast. `linear_token_stats` reads the recording. Whether
that works is tried on a few tokens first. Where it does not, the model's own logits are used, some
rows of a batch at a time.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..core.row_stats import TokenStats
from ..functional.linear_stats import linear_token_stats
from ..functional.logits_stats import token_stats
from ..huggingface.deferred import DeferredLogits
from ..huggingface.head_product import HeadProduct
from . import checks

PROBE_TOKENS = 8
ROUNDING = 1e-3  # of the largest logit, in any dtype; a token ahead moves a small BERT's by 4e-3
_UNLIMITED = 1 << 31
_LOGITS_BYTES = 256 << 20
"""Size of the model's own logits at a time, where they must be stored."""


@dataclass
class LanguageModel:
    """A model, the number of its classes, and the weight of its head if that can be deferred."""

    model: Any
    vocab_size: int
    head_weight: Tensor | None
    logits_stored: bool = False

    def token_stats(
        self, input_ids: Tensor, target: Tensor, *, rank: bool, backend: str
    ) -> TokenStats:
        """Return statistics of `target` [B, T] after `input_ids` [B, T]; -100 is not scored."""
        rows = self.windows_at_a_time(input_ids.shape[1])
        parts = []
        for ids, labels in zip(input_ids.split(rows), target.split(rows), strict=True):
            parts.append(self._stats_of(self.logits(ids), labels, rank, backend))
        joined = [None if s[0] is None else torch.cat(s) for s in zip(*parts, strict=True)]
        return TokenStats(*joined)  # type: ignore[arg-type]

    def windows_at_a_time(self, length: int) -> int:
        """Return how many windows of `length` tokens the model may be shown, for its logits."""
        if self.head_weight is not None:
            return _UNLIMITED
        return max(1, _LOGITS_BYTES // (length * self.vocab_size * 4))

    def logits(self, input_ids: Tensor) -> Any:
        """Return logits [B, T, V] of `input_ids` [B, T], deferred where that works."""
        return _logits_of(self.model, input_ids, self.head_weight)

    def _stats_of(
        self, logits: Tensor | DeferredLogits, target: Tensor, rank: bool, backend: str
    ) -> TokenStats:
        product = logits.linear() if isinstance(logits, DeferredLogits) else None
        if product is None:
            self.logits_stored = True
            real = logits.tensor() if isinstance(logits, DeferredLogits) else logits
            return token_stats(real, target.to(real.device), rank=rank, backend=backend)
        hidden, head, transforms = product
        with head.original_autocast():
            target = target.to(hidden.device)
            return linear_token_stats(
                hidden, head.weight, target, rank=rank, backend=backend, **transforms
            )


@torch.no_grad()
def examine(
    model: Any, kind: str, documents: list[Tensor], context_length: int, device: torch.device,
    backend: str,
) -> LanguageModel:  # fmt: skip
    """Try `model` on the first tokens of the longest of `documents` [T], each called `kind`.

    Raises:
        TypeError: the model cannot be called with ids alone.
        ValueError: the model is not causal, gives no logits [B, T, V], does not know all ids, or
            has no positions for `context_length` tokens, if that exceeds its configuration's.
    """
    ids = max(documents, key=len)[: context_length + 1].to(device)
    probe, *further = _probes(ids[:context_length][:PROBE_TOKENS])
    products = HeadProduct()
    try:
        logits = products.watch(lambda: _logits_of(model, probe))
    except TypeError as error:
        raise checks.not_of_ids_alone(error) from error
    checks.model_logits(logits, probe)
    # Rounding may depend on the tokens beside, so one pair that differs is no proof.
    others = (_looks_ahead(_logits_of(model, another)) for another in further)
    checks.causal(not (_looks_ahead(logits) and all(others)))
    weight = products.last_weight(logits.shape[-1])
    if weight is not None and not _defers(model, weight, probe, logits):
        weight = None
    examined = LanguageModel(model, logits.shape[-1], weight)
    checks.ids_known(kind, documents, model, examined.vocab_size)
    _try_length(examined, ids[None, :-1][:, :context_length], backend)
    return examined


def _defers(model: Any, weight: Tensor, probe: Tensor, logits: Tensor) -> bool:
    """Return whether a model whose product with `weight` is deferred gives the same logits."""
    try:
        deferred = _logits_of(model, probe, weight)
        return (
            isinstance(deferred, DeferredLogits)
            and deferred.shape == logits.shape
            and deferred.linear() is not None
            and not _differ(deferred.tensor(), logits)
        )
    except Exception:  # of any model, for any reason: its own logits are there for it
        return False


def _try_length(examined: LanguageModel, ids: Tensor, backend: str) -> None:
    """Try a window `ids` [1, T] that is longer than the configuration's maximum."""
    if not checks.exceeds_maximum(ids.shape[1], examined.model):
        return
    try:
        examined.token_stats(ids, ids, rank=False, backend=backend)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise checks.too_long(ids.shape[1], examined.model) from error


def _probes(tokens: Tensor) -> list[Tensor]:
    """Return pairs [2, T]: the tokens, and with another one in all places of the second half."""
    probes = []
    for token in dict.fromkeys((int(tokens[0]), 0, 1)):
        other = tokens.clone()
        other[len(tokens) // 2 :] = token
        if len(tokens) == 1 or not torch.equal(other, tokens):
            probes.append(torch.stack([tokens, other]))
    return probes[:2]


def _looks_ahead(logits: Tensor) -> bool:
    """Return whether logits [2, T, V] of the first half differ where only the second half does."""
    before = logits[:, : logits.shape[1] // 2]
    return _differ(before[0], before[1])


def _differ(some: Tensor, others: Tensor) -> bool:
    """Return whether logits differ by more than rounding; NaN is no sign."""
    some, others = some.double(), others.double()
    largest = max(t.abs().amax() for t in (some, others)) if some.numel() else 0.0
    return bool(((some - others).abs() > ROUNDING * largest).any())


def _call(model: Any, input_ids: Tensor) -> Any:
    """Call transformers' models by name, without a cache; any other callable with the ids alone.

    A `config` alone does not tell: many a GPT of one file has one, and names its ids `idx`.
    """
    try:
        known: Mapping[str, Any] = inspect.signature(getattr(model, "forward", model)).parameters
    except (TypeError, ValueError):  # a callable without a signature
        known = {}
    any_name = any(p.kind is p.VAR_KEYWORD for p in known.values())
    if not hasattr(model, "config") or not (any_name or "input_ids" in known):
        return model(input_ids)
    cache = {"use_cache": False} if any_name or "use_cache" in known else {}
    return model(input_ids=input_ids, **cache)


def _logits(output: Any) -> Any:
    """Take the logits out of a mapping, of transformers' outputs or of a tuple, if it is one."""
    if isinstance(output, Mapping) and "logits" in output:
        return output["logits"]
    if hasattr(output, "logits"):
        return output.logits
    several = isinstance(output, (tuple, list)) or hasattr(output, "to_tuple")
    return output[0] if several and len(output) else output


def _logits_of(model: Any, input_ids: Tensor, head_weight: Tensor | None = None) -> Any:
    """Return logits [B, T, V], without those of trained prompts before the ids [B, T].

    With `head_weight` they are deferred, if the model does nothing that needs them.
    """
    logits = _logits(HeadProduct().defer(head_weight, lambda: _call(model, input_ids)))
    extra, shape = checks.virtual_tokens(model), list(getattr(logits, "shape", ()))
    prompted = extra and shape[1:-1] == [extra + input_ids.shape[1]]
    return logits[:, extra:] if prompted else logits


def device_of(model: Any) -> torch.device:
    """Return where a model takes its ids."""
    weight = getattr(checks.input_embeddings(model), "weight", None)
    if isinstance(weight, Tensor) and weight.device.type != "meta":
        return weight.device
    parameters = model.parameters() if isinstance(model, nn.Module) else iter(())
    return next((p.device for p in parameters), torch.device("cpu"))


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Set evaluation mode; afterwards each module is as it was."""
    modules = list(model.modules()) if isinstance(model, nn.Module) else []
    modes = [module.training for module in modules]

    def set_back() -> None:
        for module, mode in zip(modules, modes, strict=True):
            module.training = mode

    try:
        try:
            if isinstance(model, nn.Module):
                model.eval()
            yield
        finally:
            set_back()
    finally:  # again, for a Ctrl-C may strike the first
        set_back()
