"""What a gradient may overwrite, and what backward cannot do."""

from __future__ import annotations

import torch
from torch import Tensor

from .values import flag, shape


def grad_in_forward(value: object, token_weight: object, num_items: object) -> None:
    flag("grad_in_forward", value)
    for name, t in (("token_weight", token_weight), ("num_items", num_items)):
        if value and isinstance(t, Tensor) and t.requires_grad:
            raise ValueError(
                f"grad_in_forward=True computes the gradient of input alone, but {name} requires "
                f"one too: pass {name}.detach(), or grad_in_forward=False"
            )


def inplace_backward(value: object, input: Tensor) -> None:
    """Whether backward may write the gradient over these logits."""
    flag("inplace_backward", value)
    if not (value and input.requires_grad and torch.is_grad_enabled()):
        return
    if torch.compiler.is_compiling():  # where it is not done
        return
    owner = input if input._base is None else input._base
    if owner.is_leaf and owner.requires_grad:
        raise ValueError(
            "inplace_backward=True would overwrite a leaf tensor, whose values you still own: "
            "pass logits that a model computed, or inplace_backward=False"
        )
    if _overlaps(input):
        raise ValueError(
            "inplace_backward=True needs one memory location per logit, "
            f"but input of shape {shape(input)} is expanded or overlaps "
            f"(strides {input.stride()}): pass inplace_backward=False"
        )


def _overlaps(tensor: Tensor) -> bool:
    """Whether two indices may share an address: a stride within the extent of the smaller ones."""
    if tensor.numel() == 0:
        return False
    extent = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride < extent:
                return True
            extent += (size - 1) * stride
    return False


def second_backward() -> None:
    raise RuntimeError(
        "grad_in_forward=True keeps one gradient, which the first backward has handed over: "
        "for a second backward pass grad_in_forward=False"
    )


def double_backward() -> None:
    raise RuntimeError(
        "chunked_ce computes first derivatives only: for a second derivative of the loss use "
        "torch.nn.functional's"
    )


def vmap_size(size: int) -> None:
    if size == 0:
        raise ValueError(
            "torch.func.vmap over a dimension of size 0, expected at least 1: leave the call out"
        )


def no_transforms(function: str, active: bool) -> None:
    """Ranks exchange plain tensors, as many times on each."""
    if active:
        raise NotImplementedError(
            f"{function} cannot be transformed by torch.func: take its gradient with "
            "loss.backward() or torch.autograd.grad"
        )


def compiled_transform() -> None:
    raise NotImplementedError(
        "torch.compile cannot trace chunked_ce's gradient inside a transform of torch.func: "
        "compile the loss and transform that, as in torch.func.grad(torch.compile(loss))"
    )
