"""Check models of transformers, their heads and their labels."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from ..checks.heads import is_fully_sharded
from ..checks.values import LOGIT_DTYPES, integer, is_dtensor, shape

LOGITS_WERE_MADE = (
    "the model uses its logits before the loss for more than a factor, a softcap or a slice of the "
    "tokens, so they are computed after all: chunked_ce.huggingface.{} saves nothing here"
)

NO_LABELS = (
    "an enabled model (chunked_ce.huggingface.enable) trains without labels, so its logits are "
    "computed and nothing is saved: pass labels to it. TrainingArguments' label_smoothing_factor "
    "takes the labels away: set it to 0 and call enable(model, label_smoothing=...). A Trainer's "
    "compute_loss_func takes them away too: leave it out. A trainer that takes its loss from the "
    "logits, as some of TRL's do, passes none: call enable(model, without_labels=True)"
)

NO_LABELS_TO_DISTILL = (
    "a model that is distilled (chunked_ce.huggingface.distill) trains without labels, so its "
    "logits are computed and the teacher is not asked: pass labels, -100 where nothing is to be "
    "learned"
)


def logits_of(student: bool) -> str:
    """Return the warning about logits that cannot be deferred."""
    return (
        f"the logits of the {'student' if student else 'teacher'} are computed whole, because its "
        "head is no plain linear layer or because the model uses its logits for more than a "
        "factor, a softcap or a slice of the tokens"
    )


def causal_lm(model: Any) -> nn.Module:
    """Return the model of transformers itself, without PEFT's wrapper."""
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"model must be a causal language model of transformers, got {type(model).__name__}"
        )
    kind = type(model).__name__
    if isinstance(getattr(model, "_orig_mod", None), nn.Module):
        raise TypeError(f"model is compiled ({kind}): enable it first, then compile it")
    if kind in ("DistributedDataParallel", "DataParallel", "FullyShardedDataParallel"):
        raise TypeError(
            f"model is wrapped in {kind}: call enable(model.module), or before wrapping"
        )
    of_peft = getattr(model, "get_base_model", None)
    base: Any = of_peft() if callable(of_peft) else model
    if not callable(getattr(base, "get_output_embeddings", None)):
        raise TypeError(
            f"{kind} is no model of transformers (it has no get_output_embeddings): in your own "
            "forward call chunked_ce.linear_cross_entropy(hidden, lm_head.weight, labels)"
        )
    found: nn.Module = base
    return found


def not_enabled(already: bool) -> None:
    """Refuse to enable a model twice."""
    if already:
        raise ValueError("model is enabled already: call disable() on the handle you have first")


def new_head(reason: TypeError) -> str:
    """Return the warning about a head that took the place of the enabled one."""
    return (
        "chunked_ce.huggingface.enable no longer acts: the head was replaced, and now "
        f"{reason}. Then call disable() on enable's handle, and enable again"
    )


def no_replica() -> NoReturn:
    """Refuse replicas: they share the methods of their model, and would run on its weights."""
    raise TypeError(
        "an enabled model is replicated by DataParallel, whose replicas cannot defer their logits: "
        "run one process per GPU (torchrun, DistributedDataParallel), let one GPU be visible, or "
        "disable() it and set model.loss_function = chunked_ce.huggingface.causal_lm_loss"
    )


def not_pickled() -> NoReturn:
    """Refuse to pickle an enabled model: its forwards could not be loaded again."""
    raise TypeError(
        "an enabled model cannot be pickled: save its state_dict() or save_pretrained(), or call "
        "disable() first, and enable it again once it is loaded"
    )


def output_head(model: Any) -> nn.Module:
    """The head, if it can be called on a chunk of hidden states."""
    name, head = type(model).__name__, model.get_output_embeddings()
    if head is None:
        raise ValueError(
            f"{name} has no output head (get_output_embeddings() is None), so nothing would "
            "change: load it as AutoModelForCausalLM"
        )
    # PEFT's modules_to_save keeps copies of it, which are followed.
    return deferrable_head(model, getattr(head, "original_module", head))


def input_device(given: dict[str, Any]) -> torch.device | None:
    """Return where a model's token ids are."""
    ids = given.get("input_ids")
    return ids.device if isinstance(ids, Tensor) else None


def is_linear(head: Any) -> bool:
    """Whether `F.linear` and its weight say all that a head does."""
    return isinstance(head, nn.Linear) and type(head).forward is nn.Linear.forward


def deferrable_head(model: Any, head: Any) -> nn.Module:
    """A module that the model calls for its logits, and that others may call on some tokens."""
    kind = f"{type(head).__module__.partition('.')[0]}'s {type(head).__name__}"
    otherwise = "or set model.loss_function = chunked_ce.huggingface.causal_lm_loss"
    if not isinstance(head, nn.Module):
        raise TypeError(
            f"the output head is {kind}, expected a module: wrap it in one, {otherwise}"
        )
    if is_linear(head) and head.weight.dtype not in LOGIT_DTYPES:
        raise TypeError(
            f"the output head's weight has dtype {head.weight.dtype}, expected a floating one: "
            f"keep the head out of quantization, {otherwise}"
        )
    freed_after_forward(head)
    _one_piece(model, head, otherwise)
    return head


def freed_after_forward(head: nn.Module) -> bool:
    """Return whether FSDP2 frees the head's weight before the loss, unless told to keep it."""
    if not is_fully_sharded(head) or not _resharded_after_forward(head):
        return False
    if not hasattr(head, "set_reshard_after_forward"):
        raise TypeError(
            "the output head is a group of its own under FSDP2, and this torch cannot keep its "
            "weight until the loss: call fully_shard(head, reshard_after_forward=False), or call "
            "fully_shard on the layers and on the model, but not on the head"
        )
    return True


def _resharded_after_forward(head: Any) -> bool:
    """Return whether FSDP2 frees a weight of the head after its forward; True if unknown."""
    state = head._get_fsdp_state() if hasattr(head, "_get_fsdp_state") else None
    groups = getattr(state, "_fsdp_param_groups", None)
    if groups is None:
        only = getattr(state, "_fsdp_param_group", None)
        groups = () if only is None else (only,)
    if state is None:
        return True
    return any(getattr(group, "post_forward_mesh_info", group) is not None for group in groups)


def _one_piece(model: Any, head: nn.Module, otherwise: str) -> None:
    # FSDP2 gathers it in the model's forward.
    sharded = is_sharded(*head.parameters()) and not is_fully_sharded(model)
    if sharded or (getattr(model, "_tp_size", None) or 1) > 1:
        raise TypeError(
            "the output head's weight is sharded over devices (tensor parallelism): use "
            f"chunked_ce.distributed for shards of the vocabulary, {otherwise}"
        )


def is_sharded(*tensors: Tensor) -> bool:
    """Return whether one of the tensors is a DTensor."""
    return any(map(is_dtensor, tensors))


def calls_loss_function(model: nn.Module) -> None:
    """Check that a forward of the model's classes takes labels and calls `self.loss_function`."""
    name = type(model).__name__
    if "labels" not in inspect.signature(type(model).forward).parameters:
        raise ValueError(
            f"{name}.forward takes no labels, so nothing would change: load the model with its "
            "head, as AutoModelForCausalLM"
        )
    forwards = [vars(cls)["forward"] for cls in type(model).__mro__ if "forward" in vars(cls)]
    codes = [getattr(inspect.unwrap(forward), "__code__", None) for forward in forwards]
    if not any(code is not None and "loss_function" in code.co_names for code in codes):
        raise ValueError(
            f"{name}.forward never calls self.loss_function, so nothing would change: call it "
            "without labels and give outputs.logits to chunked_ce.cross_entropy(..., dim=-1)"
        )


def replaceable_loss(model: Any, known: tuple[Callable[..., Tensor], ...]) -> None:
    """Check that the model's loss is one that deferred logits may replace."""
    loss = model.loss_function
    if loss not in known:
        raise ValueError(
            f"model.loss_function is {getattr(loss, '__name__', type(loss).__name__)}, which "
            "deferred logits would replace: expected transformers' ForCausalLMLoss"
        )


def head_unchanged(unchanged: bool) -> None:
    """Refuse to compute logits from a head or hidden states that have changed."""
    if not unchanged:
        raise RuntimeError(
            "outputs.logits was asked for after the output head's weight (or the hidden states) "
            "had changed or been freed: read it before optimizer.step(), or call the model again "
            "under torch.no_grad() without labels"
        )


def no_memory(kind: str) -> NoReturn:
    """Refuse to show memory to a kernel. Autograd would not see what the kernel reads."""
    raise RuntimeError(
        f"{kind} has no memory for a kernel to read: pass outputs.logits.tensor(), which computes "
        "the logits and lets autograd see their use"
    )


def gradient_of_logits(name: str, loss_taken: bool) -> None:
    """Refuse gradients of deferred logits whose loss was taken: the loss does not use them."""
    if loss_taken and name in ("retain_grad", "register_hook", "requires_grad_"):
        raise RuntimeError(
            f"outputs.logits.{name} would see no gradient of the loss, which was taken without "
            "computing the logits: call the model without labels and take the loss of "
            "outputs.logits, or call outputs.logits.tensor() for the logits' other uses"
        )


def causal_lm_labels(logits: Any, labels: Any, shift_labels: Any) -> None:
    """Check that the labels fit the logits, shifted or not."""
    if labels is None and shift_labels is None:
        raise ValueError(
            "labels is None, and so is shift_labels: pass labels of shape [..., T], -100 where "
            "nothing is scored"
        )
    for name, value in (("labels", labels), ("shift_labels", shift_labels)):
        if value is not None and not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a Tensor of class indices, got {type(value).__name__}")
    if labels is not None and shift_labels is not None:
        # Where logits_to_keep picked tokens by a mask, shift_labels is flat and labels is not.
        if labels.dim() == shift_labels.dim() and labels.shape != shift_labels.shape:
            raise ValueError(
                f"labels has shape {shape(labels)}, but shift_labels has shape "
                f"{shape(shift_labels)}: pass shift_labels of the shape of labels, or one of them"
            )
    if not hasattr(logits, "shape") or len(logits.shape) == 0:
        raise TypeError(f"logits must be a Tensor [..., V], got {type(logits).__name__}")
    rows = torch.Size(logits.shape[:-1])
    if shift_labels is not None:
        if shift_labels.numel() != rows.numel():
            raise ValueError(
                f"shift_labels has shape {shape(shift_labels)}, but logits of shape "
                f"{list(logits.shape)} have {rows.numel()} rows: pass one label for each"
            )
    elif labels.shape != rows and (len(rows) != 1 or labels.numel() != rows[0]):  # flat logits
        raise ValueError(
            f"labels has shape {shape(labels)}, but logits of shape {list(logits.shape)} want "
            f"{list(rows)}: pass one label per token (they are shifted here)"
        )


def num_items_in_batch(value: Any) -> int | Tensor | None:
    """Return None, a positive int, or a 0-d tensor (DataParallel's scatter gives [1])."""
    if value is None:
        return None
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ValueError(
                f"num_items_in_batch has shape {shape(value)}, expected one number: sum it first"
            )
        items: Tensor = value.reshape(())
        return items
    count = integer("num_items_in_batch", value, "an int or a tensor of one number")
    if count <= 0:
        raise ValueError(
            f"num_items_in_batch is {count}, expected at least 1: skip a batch with no labels"
        )
    return count
