"""What a gradient may overwrite, and what backward cannot do."""

from __future__ import annotations


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


def functionalized() -> None:
    raise NotImplementedError(
        "torch.func.functionalize cannot see into chunked_ce's losses: leave it out, because "
        "torch.compile and torch.export functionalize by themselves"
    )


def compiled_transform() -> None:
    raise NotImplementedError(
        "torch.compile cannot trace chunked_ce's gradient inside a transform of torch.func: "
        "compile the loss and transform that, as in torch.func.grad(torch.compile(loss))"
    )
