"""Heads that are called for their logits."""

from __future__ import annotations

from typing import Any, NoReturn

from torch import Tensor, nn

from .values import LOGIT_DTYPES, is_dtensor, same_device, shape


def head_arguments(head: Any, bias: object, logits_dtype: object, *, plain: bool) -> None:
    """What belongs to a weight and says nothing about a head."""
    name = type(head).__name__
    if bias is not None:
        raise ValueError(
            f"linear_bias is given beside a head ({name}), which has its own: leave it out"
        )
    if logits_dtype is not None and not plain:
        raise ValueError(
            f"logits_dtype is {logits_dtype}, but the head ({name}) computes its logits itself: "
            "let it return float32, or pass its weight"
        )


def stateless_head(head: object, x: Tensor) -> None:
    """Refuse a module whose logits of a token depend on others, or that is on another device."""
    if not isinstance(head, nn.Module):
        return
    for name, module in head.named_modules():
        mixes = isinstance(module, nn.modules.batchnorm._BatchNorm)
        if mixes and (module.training or not module.track_running_stats):
            raise ValueError(
                f"the head's {type(module).__name__}{f' {name!r}' if name else ''} normalizes over "
                "the tokens of a call, but the head is called on a chunk of them at a time: put it "
                "in front of the loss, or call head.eval()"
            )
        if "forward" in vars(module):  # as accelerate's, which moves what goes in and out
            return
    tensors = [t for t in (*head.parameters(), *head.buffers()) if t.dim() > 0]
    if tensors and all(t.device != x.device for t in tensors):
        raise ValueError(
            f"the head is on {tensors[0].device}, but the hidden states are on {x.device}: move "
            "one of them"
        )


def state_of_head(head: object) -> dict[str, tuple[int, int]]:
    """Return what changes where a call of a module writes to a buffer."""
    if not isinstance(head, nn.Module):
        return {}
    buffers = head.named_buffers()
    return {name: (id(t), 0 if t.is_inference() else t._version) for name, t in buffers}


def unchanged_head(before: dict[str, tuple[int, int]], head: object) -> None:
    """Refuse a head that a call has changed: each chunk would see another one."""
    changed = [name for name, state in state_of_head(head).items() if before.get(name) != state]
    if changed:
        raise ValueError(
            f"the head keeps state between calls: a call has changed its buffer {changed[0]!r}, "
            "but it is called on several chunks, and again in backward: call head.eval(), or move "
            "what keeps state in front of the loss"
        )


def head_transform() -> NoReturn:
    raise TypeError(
        "linear_weight is a head that is called, which torch.func's transforms cannot see into: "
        "pass its weight as a Tensor, or use cross_entropy(head(hidden), ...)"
    )


def head_logits(logits: Any, x: Tensor, width: int | None = None) -> None:
    """What a head made of hidden states [R, D]."""
    if not isinstance(logits, Tensor):
        raise TypeError(
            f"the head returned {type(logits).__name__}, expected its logits as one Tensor: pass "
            "a function that returns them, such as lambda hidden: head(hidden)[0]"
        )
    if logits.dtype not in LOGIT_DTYPES:
        raise TypeError(f"the head's logits have dtype {logits.dtype}, expected a floating one")
    same_device("the head's output", logits, x)
    if logits.dim() != 2 or logits.shape[0] != x.shape[0] or logits.shape[1] == 0:
        raise ValueError(
            f"the head made logits of shape {shape(logits)} of hidden states of shape {shape(x)}, "
            f"expected [{x.shape[0]}, V]: it is called on some tokens at a time, without a batch"
        )
    if width is not None and logits.shape[1] != width:
        raise ValueError(
            f"the head made logits of shape {shape(logits)}, but of other hidden states "
            f"{width} logits, or that is its out_features: expected the same for every token"
        )


def head_without_gradient() -> NoReturn:
    raise RuntimeError(
        "input requires a gradient, but the head's logits do not depend on it differentiably: "
        "let the head run with gradients, or call this under torch.no_grad()"
    )


def is_fully_sharded(module: object) -> bool:
    """Return whether FSDP2's `fully_shard` was called on the module."""
    return any(cls.__name__ == "FSDPModule" for cls in type(module).__mro__)


def no_hooks_but_fsdp(head: nn.Module) -> None:
    """Refuse hooks that would see the loss of all chunks where they expect logits."""
    hooks = [*head._forward_pre_hooks.values(), *head._forward_hooks.values()]
    others = [h for h in hooks if not getattr(h, "__module__", "").startswith("torch.distributed.")]
    if others:
        raise TypeError(
            "the head is a group of its own under FSDP2 and has other forward hooks: register them "
            "on a module within the head, or leave the head in the model's group"
        )


def head_of_fsdp(within: bool) -> None:
    """Refuse a call of a function that calls a module of FSDP2, whose gradient would be lost."""
    if within:
        raise TypeError(
            "the head calls a module that fully_shard made a group of its own, which would be "
            "gathered for each chunk, and its gradient lost: pass that module itself, or call "
            "fully_shard on the whole head"
        )


def replicated_operands(operands: dict[str, Any]) -> dict[str, Any]:
    """Return the local tensors of DTensors that every rank holds whole, beside a sharded head."""
    for name, value in operands.items():
        if is_dtensor(value) and not all(p.is_replicate() for p in value.placements):
            raise ValueError(
                f"{name} is a DTensor with placements {value.placements}, expected Replicate() "
                "beside a head of DTensors: redistribute it"
            )
    if not is_dtensor(operands["input"]):
        raise TypeError(
            "the head's parameters are DTensors, but input is a plain tensor: under FSDP2 call "
            "this in the forward of the module that owns the head, or call fully_shard(head) too; "
            "under tensor parallelism pass DTensor.from_local(input, mesh, [Replicate()])"
        )
    return {n: v.to_local() if is_dtensor(v) else v for n, v in operands.items()}
