"""A head in the place of its weight: a linear layer, or any callable of hidden states."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .. import checks
from ..core.row_stats import TokenStats
from ..ops import transforms
from ..ops.callable_head import head_loss, head_stats
from ..ops.head_calls import HeadCalls
from ..ops.library import Classes, Outputs
from .linear import flat_classes, in_target_shape, shared_arguments
from .shift import next_tokens
from .targets import describe_target, wanted_of


def plain_linear(head: object) -> nn.Linear | None:
    """Return the head if its weight and bias say all that it does."""
    if type(head) is not nn.Linear or "forward" in vars(head):
        return None
    hooks = (
        head._forward_hooks, head._forward_pre_hooks, head._backward_hooks,
        head._backward_pre_hooks,
    )  # fmt: skip
    given = (head.weight,) if head.bias is None else (head.weight, head.bias)
    plain = all(type(t) in (Tensor, nn.Parameter) for t in given)
    return head if plain and not any(hooks) else None


def call_with_head(function: Callable[..., Any], arguments: dict[str, Any]) -> Any:
    """`function(**arguments)`, where `linear_weight` is a head."""
    head, arguments = arguments["linear_weight"], dict(arguments)
    layer = plain_linear(head)
    bias, logits_dtype = arguments.pop("linear_bias"), arguments["logits_dtype"]
    checks.head_arguments(head, bias, logits_dtype, plain=layer is not None)
    if layer is not None:
        arguments |= dict(linear_weight=layer.weight, linear_bias=layer.bias)
        return function(**arguments)
    if transforms.is_active():
        checks.head_transform()
    checks.hidden_states(arguments["input"])
    call = head_token_stats if function.__name__ == "linear_token_stats" else head_cross_entropy
    del arguments["linear_weight"]
    return call(head, weight_like(head, arguments["input"]), **arguments)


def weight_like(head: Callable[[Tensor], Tensor], input: Tensor) -> Tensor:
    """Return a weight [V, D] without memory, for all that is asked of its shape and dtype."""
    width = getattr(head, "out_features", None)
    if type(width) is not int:
        token = input.detach().reshape(-1, input.shape[-1])[:1]
        with torch.no_grad():
            logits = head(token)
        checks.head_logits(logits, token)
        width = logits.shape[1]
    return input.new_empty(()).expand(width, input.shape[-1])


def head_cross_entropy(
    head: Callable[[Tensor], Tensor],
    like: Tensor,  # [V, D]
    input: Tensor,
    target: Any,
    *,
    weight: Tensor | None,
    ignore_index: int | None,
    shift: bool,
    position_ids: Tensor | None,
    cu_seqlens: Tensor | None,
    reduction: str,
    label_smoothing: float,
    z_loss_weight: float,
    softcap: float | None,
    logit_scale: float,
    vocab_size: int | None,
    token_weight: Tensor | None,
    num_items: int | Tensor | None,
    spread_rest: bool,
    backend: str,
    **chunking: Any,
) -> Tensor:
    """:func:`chunked_ce.linear_cross_entropy` of a head that is called."""
    checks.linear_input(input, like, None, target, dims=False)
    ignore_index = checks.linear_ignore_index(ignore_index, target)
    if shift is not False or position_ids is not None or cu_seqlens is not None:
        target = next_tokens(target, ignore_index, shift, position_ids, cu_seqlens, input)
    options = checks.loss_options(
        input, target, input.shape[:-1], reduction, label_smoothing, z_loss_weight, spread_rest,
        token_weight, num_items,
    )  # fmt: skip
    shared = shared_arguments(
        input, like, ignore_index, vocab_size, softcap, logit_scale, backend, **chunking
    )
    if weight is not None:
        weight = checks.head_class_weight(weight, like, shared[1])
    labels, reducer = describe_target(input, target, -1, weight, ignore_index, shared[1], options)
    of_tokens = None if reducer.weight is None else reducer.weight.reshape(-1)
    shared = (labels.ignore_index, *shared[1:])
    calls = HeadCalls(head, _flat(input), labels.index.reshape(-1), like.shape[0], shared)
    known = all(map(reducer.allows_grad_in_forward, (input.dtype, calls.dtype)))
    if reduction != "none" and labels.is_plain and known:
        return head_loss(
            calls, of_tokens, reducer.divisor, options.label_smoothing, options.z_loss_weight
        )
    outputs = _outputs(calls, labels.index, labels.classes, wanted_of(labels))
    return reducer.reduce_with_z_loss(
        labels.cross_entropy(outputs), outputs.lse, options.z_loss_weight
    )


def head_token_stats(
    head: Callable[[Tensor], Tensor],
    like: Tensor,
    input: Tensor,
    target: Tensor,
    *,
    weight: Tensor | None,
    ignore_index: int,
    shift: bool,
    position_ids: Tensor | None,
    cu_seqlens: Tensor | None,
    vocab_size: int | None,
    softcap: float | None,
    logit_scale: float,
    entropy: bool,
    mean_logprob: bool,
    rank: bool,
    argmax: bool,
    backend: str,
    **chunking: Any,
) -> TokenStats:
    """:func:`chunked_ce.linear_token_stats` of a head that is called."""
    checks.target_indices(target)
    checks.linear_input(input, like, None, target, dims=False)
    checks.flags(entropy=entropy, mean_logprob=mean_logprob, rank=rank, argmax=argmax)
    ignore_index = checks.ignore_index(ignore_index)
    if shift is not False or position_ids is not None or cu_seqlens is not None:
        target = next_tokens(target, ignore_index, shift, position_ids, cu_seqlens, input)
    shared = shared_arguments(
        input, like, ignore_index, vocab_size, softcap, logit_scale, backend, **chunking
    )
    weight = checks.class_weight(weight, like[..., 0], shared[1])
    wanted = (entropy, mean_logprob, rank, argmax)
    calls = HeadCalls(head, _flat(input), target.reshape(-1), like.shape[0], shared)
    classes = Classes(weight if mean_logprob else None)
    return _outputs(calls, target, classes, wanted).to_token_stats(wanted)


def _flat(input: Tensor) -> Tensor:
    return input.reshape(-1, input.shape[-1])


def _outputs(
    calls: HeadCalls, target: Tensor, classes: Classes, wanted: tuple[bool, bool, bool, bool]
) -> Outputs:
    return in_target_shape(head_stats(calls, flat_classes(classes), wanted), target)
