"""A head in the place of its weight: a linear layer, or any callable of hidden states."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .. import checks
from ..checks.loss import LossOptions
from ..checks.values import is_dtensor
from ..core.reduction import Reduction
from ..core.row_stats import TokenStats
from ..ops import transforms
from ..ops.callable_head import head_loss, head_stats
from ..ops.head_calls import AnyHead, HeadCalls
from ..ops.library import Classes, Outputs, flat_classes, in_target_shape, stats_from_list
from .targets import Target, loss_and_stats


def plain_linear(head: object) -> nn.Linear | None:
    """Return the head if its weight and bias say all that it does."""
    if type(head) is not nn.Linear or "forward" in head.__dict__:
        return None
    hooks = (
        head._forward_hooks, head._forward_pre_hooks, head._backward_hooks,
        head._backward_pre_hooks,
    )  # fmt: skip
    given = (head.weight,) if head.bias is None else (head.weight, head.bias)
    plain = all(type(t) in (Tensor, nn.Parameter) for t in given)
    return head if plain and not any(hooks) else None


def is_called_apart(head: object) -> bool:
    """Return whether a loss with this head is a call within another: see `sharded_heads.call`.

    Tensor parallelism that converts the head's inputs in hooks gathers its logits instead.
    """
    if torch.compiler.is_compiling() and plain_linear(head) is None:
        return True
    if not isinstance(head, nn.Module):
        return False
    itself, *within = head.modules()
    checks.head_of_fsdp(any(map(checks.is_fully_sharded, within)))
    if checks.is_fully_sharded(itself):
        return True
    converted = any(module._forward_pre_hooks for module in (itself, *within))
    return not converted and any(map(is_dtensor, head.parameters()))


def split_head(
    head: AnyHead, bias: object, input: Tensor, logits_dtype: object
) -> tuple[AnyHead | None, Tensor, Tensor | None]:
    """Return (head, weight, bias): of a plain linear layer its own and no head.

    Of another head the weight [V, D] has no memory. It is for all that is asked of a weight's shape
    and dtype.
    """
    layer = plain_linear(head)
    checks.head_arguments(head, bias, logits_dtype, plain=layer is not None)
    if layer is not None:
        return None, layer.weight, layer.bias
    if transforms.is_active():
        checks.head_transform()
    checks.hidden_states(input)
    checks.stateless_head(head, input)
    width = getattr(head, "out_features", None)
    if type(width) is not int:
        token, logits = logits_of_a_token(head, input)
        checks.head_logits(logits, token)
        width = logits.shape[1]
    return head, input.new_empty(()).expand(width, input.shape[-1]), None


def logits_of_a_token(call: Callable[[Tensor], Tensor], input: Tensor) -> tuple[Tensor, Tensor]:
    """Return the first hidden state [1, D] and its logits [1, V], to count them.

    Autocast of torch 2.6 would keep weights that it casts here, without gradients, for later calls.
    """
    token, cached = (
        input.detach().reshape(-1, input.shape[-1])[:1],
        torch.is_autocast_cache_enabled(),
    )
    torch.set_autocast_cache_enabled(False)
    try:
        with torch.no_grad():
            return token, call(token)
    finally:
        torch.set_autocast_cache_enabled(cached)


def loss_of_called_head(
    head: AnyHead,
    input: Tensor,
    shared: Any,
    options: LossOptions,
    like: Tensor,  # [V, D]
    reducer: Reduction,
    labels: Target,
) -> tuple[Tensor, TokenStats | None]:
    """Return the loss of a head that is called: a sum, or that of each token."""
    smoothing, z_loss_weight = options.label_smoothing, options.z_loss_weight
    calls = HeadCalls(head, _flat(input), labels.index.reshape(-1), like.shape[0], shared)
    known = all(map(reducer.allows_grad_in_forward, (input.dtype, calls.dtype)))
    if reducer.name != "none" and labels.is_plain and known:
        token_weight = None if reducer.weight is None else reducer.weight.reshape(-1)
        stats = options.stats
        loss, found = head_loss(
            calls, token_weight, reducer.divisor, stats, smoothing, z_loss_weight
        )
        return loss, stats_from_list(found, stats, labels.index) if stats else None
    statistics = partial(_outputs, calls, labels.index, labels.classes)
    return loss_and_stats(statistics, labels, reducer, options, calls.backend)


def outputs_of_called_head(
    head: AnyHead,
    input: Tensor,
    shared: Any,
    like: Tensor,
    target: Tensor,
    classes: Classes,
    wanted: tuple[bool, ...],  # entropy, mean_logprob, rank, argmax
) -> Outputs:
    """Return the statistics of a head that is called, in the shape of `target`."""
    calls = HeadCalls(head, _flat(input), target.reshape(-1), like.shape[0], shared)
    return _outputs(calls, target, classes, wanted)


def _flat(input: Tensor) -> Tensor:
    return input.reshape(-1, input.shape[-1])


def _outputs(
    calls: HeadCalls, target: Tensor, classes: Classes, wanted: tuple[bool, ...]
) -> Outputs:
    return in_target_shape(head_stats(calls, flat_classes(classes), wanted), target)
