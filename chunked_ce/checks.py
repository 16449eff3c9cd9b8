"""Every message a user's mistake can produce: what came, what was expected, what to do."""

from __future__ import annotations

from numbers import Integral, Real
from typing import Any, TypeGuard

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .stats import is_scored

LOGIT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
TARGET_DTYPES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
BACKENDS = ("auto", "torch", "inductor", "triton")
REDUCTIONS = ("mean", "sum", "none")


def _shape(tensor: Tensor) -> str:
    return "[" + ", ".join(str(size) for size in tensor.shape) + "]"


def _names(values: tuple[object, ...]) -> str:
    return ", ".join(str(value).removeprefix("torch.") for value in values)


def _brief(value: object) -> str:
    """`value` in a line of an error message."""
    text = " ".join(repr(value).split())
    return text if len(text) < 40 else text[:36] + "..."


def _is_int(value: object) -> TypeGuard[int]:
    return isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool)


def _int(name: str, value: Any, expected: str) -> int:
    """`value` as an int of 64 bits; numpy's integers are ints too."""
    if isinstance(value, Integral) and not isinstance(value, (int, torch.SymInt)):
        value = int(value)
    if not _is_int(value):
        raise TypeError(f"{name} must be {expected}, got {type(value).__name__}")
    if not -(2**63) <= value < 2**63:
        raise ValueError(f"{name} is {_brief(value)}, expected a number of 64 bits")
    return value


def _dense(name: str, tensor: Tensor) -> None:
    if tensor.layout != torch.strided or tensor.is_nested:
        kind = "nested" if tensor.is_nested else str(tensor.layout)
        raise TypeError(f"{name} is a {kind} tensor, expected a dense one: convert it to dense")


def one_target_per_row(input: Tensor, target: Tensor) -> None:
    """`input` [..., V] and `target` [...], class dimension last."""
    if target.shape != input.shape[:-1]:
        raise ValueError(
            f"target has shape {_shape(target)}, but input of shape {_shape(input)} has one row "
            f"per target of shape {_shape(input[..., 0])}: give one class index per row of logits"
        )
    same_device("target", target, input)


def _floating(name: str, tensor: Any, what: str, mend: str = "convert it with .float()") -> None:
    """A dense Tensor of a dtype we compute with, and no forward-mode tangent."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a Tensor{what}, got {type(tensor).__name__}")
    _dense(name, tensor)
    if tensor.dtype not in LOGIT_DTYPES:
        raise TypeError(
            f"{name} has dtype {tensor.dtype}, expected one of {_names(LOGIT_DTYPES)}: {mend}"
        )
    if not torch.compiler.is_compiling() and forward_ad.unpack_dual(tensor).tangent is not None:
        raise NotImplementedError(
            f"{name} carries a forward-mode tangent, but chunked_ce computes reverse-mode "
            "derivatives only: use torch.nn.functional.cross_entropy"
        )


def logits(input: Tensor) -> None:
    _floating("input", input, " of logits")
    if input.dim() == 0:
        raise ValueError("input is a 0-dimensional tensor, expected logits of shape [..., V]")
    if input.shape[-1] == 0:
        raise ValueError(
            f"input of shape {_shape(input)} has no classes: its last dimension must be at least 1"
        )


def target_indices(target: Tensor) -> None:
    if not isinstance(target, Tensor):
        raise TypeError(f"target must be a Tensor of class indices, got {type(target).__name__}")
    _dense("target", target)
    if target.is_floating_point() or target.is_complex():
        raise TypeError(
            f"target has dtype {target.dtype}, expected class indices of an integer dtype: "
            "use target.long() if it holds indices (class probabilities are not supported yet)"
        )
    if target.dtype not in TARGET_DTYPES:
        raise TypeError(
            f"target has dtype {target.dtype}, expected one of {_names(TARGET_DTYPES)}: "
            "use target.long()"
        )


def same_device(name: str, tensor: Tensor, input: Tensor) -> None:
    if tensor.device != input.device:
        raise ValueError(
            f"{name} is on {tensor.device}, but input is on {input.device}: "
            "move it with .to(input.device)"
        )


def class_dimension(input: Tensor, target: Tensor, dim: int) -> None:
    """`dim` says where the classes of `input` are, as in `F.cross_entropy`.

    Today that must be the last dimension.
    """
    if not _is_int(dim):
        raise TypeError(f"dim must be an int, got {type(dim).__name__}")
    n = input.dim()
    if n == 1:
        if dim not in (0, 1, -1):
            raise ValueError(
                f"dim is {dim}, but an input of shape {_shape(input)} has its classes "
                "in dimension 0"
            )
        return
    if not -n <= dim < n:
        raise ValueError(
            f"dim is {dim}, but input of shape {_shape(input)} has dimensions {-n} to {n - 1}"
        )
    if dim % n == n - 1:
        return
    classes_last = target.shape == input.shape[:-1]
    as_torch = target.shape == input.shape[:dim] + input.shape[dim:][1:]
    if classes_last and not as_torch:
        raise ValueError(
            f"input of shape {_shape(input)} and target of shape {_shape(target)} have the classes "
            f"in the last dimension, but dim={dim} (torch's default is 1): pass dim=-1"
        )
    raise NotImplementedError(
        f"input of shape {_shape(input)} with its classes in dimension {dim} is not supported yet: "
        "move them last with input.movedim(dim, -1) and pass dim=-1"
    )


def ignore_index(value: Any) -> int:
    return _int("ignore_index", value, "an int (-100 ignores no class)")


def vocab_size(value: Any, input: Tensor) -> int:
    """The number of classes that exist: `value`, or all columns of `input`."""
    columns = input.shape[-1]
    if value is None:
        return columns
    size = _int("vocab_size", value, "an int or None")
    if not 1 <= size <= columns:
        raise ValueError(
            f"vocab_size is {size}, but input of shape {_shape(input)} has {columns} columns: "
            f"give a number from 1 to {columns}, or None for all of them"
        )
    return size


def linear_vocab_size(value: Any, weight: Tensor) -> int:
    """The number of classes that exist: `value`, or all rows of `linear_weight`."""
    if value is None:
        return weight.shape[0]
    size = _int("vocab_size", value, "an int or None")
    if not 1 <= size <= weight.shape[0]:
        raise ValueError(
            f"vocab_size is {size}, but linear_weight of shape {_shape(weight)} has "
            f"{weight.shape[0]} classes: give a number from 1 to that, or None for all of them"
        )
    return size


_LARGEST = 1e30  # as large as fp32 can still be multiplied with


def _number(name: str, value: Any) -> float:
    numbers = (Real, torch.SymFloat, torch.SymInt)
    if not isinstance(value, numbers) or isinstance(value, bool):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if not -_LARGEST <= value <= _LARGEST:  # type: ignore[operator]
        raise ValueError(f"{name} is {_brief(value)}, expected a finite number up to {_LARGEST}")
    return float(value)


def softcap(value: Any) -> float | None:
    if value is None:
        return None
    number = _number("softcap", value)
    if number < 1 / _LARGEST:
        raise ValueError(f"softcap is {number}, expected a number above 0, or None for no cap")
    return number


def logit_scale(value: Any) -> float:
    return _number("logit_scale", value)


def label_smoothing(value: Any) -> float:
    number = _number("label_smoothing", value)
    if not 0 <= number <= 1:
        raise ValueError(f"label_smoothing is {number}, expected a number from 0 to 1")
    return number


def z_loss_weight(value: Any) -> float:
    number = _number("z_loss_weight", value)
    if number < 0:
        raise ValueError(
            f"z_loss_weight is {number}, expected a number of at least 0 (1e-4 is usual)"
        )
    return number


def flag(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {type(value).__name__}")


def reduction(value: object) -> None:
    if not isinstance(value, str) or value not in REDUCTIONS:
        raise ValueError(f"reduction is {_brief(value)}, expected one of {_names(REDUCTIONS)}")


def known_options(given: dict[str, Any], known: tuple[str, ...]) -> None:
    for name in given:
        if name not in known:
            raise TypeError(f"{name} is no option of this loss, expected of {_names(known)}")


def drop_ignored(value: object, device: torch.device) -> bool:
    """None: where finding the tokens that count makes nothing wait."""
    if value is None:
        return device.type == "cpu" and not torch.compiler.is_compiling()
    flag("drop_ignored", value)
    return bool(value)


def token_weight(weight: Any, input: Tensor, target: Tensor) -> None:
    if weight is None:
        return
    if not isinstance(weight, Tensor):
        raise TypeError(f"token_weight must be a Tensor, got {type(weight).__name__}")
    _dense("token_weight", weight)
    if not weight.is_floating_point():
        raise TypeError(
            f"token_weight has dtype {weight.dtype}, expected a floating dtype: "
            "use token_weight.float()"
        )
    if weight.shape != target.shape:
        raise ValueError(
            f"token_weight has shape {_shape(weight)}, expected one weight per target, "
            f"{_shape(target)} (for one weight per class, see weight)"
        )
    same_device("token_weight", weight, input)


def num_items(value: Any, reduction: str) -> int | Tensor | None:
    if value is None:
        return None
    if reduction != "mean":
        raise ValueError(
            f"num_items is what reduction='mean' divides by, but reduction is {reduction!r}: "
            "leave it None"
        )
    if isinstance(value, Tensor):
        if value.dim() != 0:
            raise ValueError(
                f"num_items has shape {_shape(value)}, expected an int or a 0-dimensional tensor: "
                "sum it first"
            )
        if value.is_complex() or value.dtype == torch.bool:
            raise TypeError(f"num_items has dtype {value.dtype}, expected a number of tokens")
        tensor: Tensor = value
        return tensor
    count = _int("num_items", value, "an int or a 0-dimensional tensor")
    if count <= 0:
        raise ValueError(
            f"num_items is {count}, expected at least 1: skip a batch that has no tokens"
        )
    return count


def class_weight(weight: object) -> None:
    if weight is not None:
        raise NotImplementedError(
            f"weight is a {type(weight).__name__}, but class weights are not supported yet: "
            "pass None (for one weight per token, see token_weight)"
        )


def grad_in_forward(value: object, token_weight: object, num_items: object) -> None:
    flag("grad_in_forward", value)
    for name, t in (("token_weight", token_weight), ("num_items", num_items)):
        if value and isinstance(t, Tensor) and t.requires_grad:
            raise ValueError(
                f"grad_in_forward=True computes the gradient of input alone, but {name} requires "
                f"one too: pass {name}.detach(), or grad_in_forward=False"
            )


def hidden_states(input: Tensor) -> None:
    _floating("input", input, " of hidden states")
    if input.dim() == 0:
        raise ValueError("input is a 0-dimensional tensor, expected hidden states [..., D]")
    if input.shape[-1] == 0:
        raise ValueError(
            f"input of shape {_shape(input)} has hidden states of 0 numbers: expected at least 1"
        )


def linear_weight(weight: Tensor, input: Tensor, *, dims: bool) -> None:
    """[V, D], or [V, d1, ..., D] where `dims` may be."""
    if type(weight).__name__ == "DTensor":
        raise TypeError(
            "linear_weight is a DTensor, whose shards are elsewhere: gather it first "
            "(linear_weight.full_tensor(), or module.unshard() with FSDP2)"
        )
    _floating("linear_weight", weight, "", "dequantise it, or convert it to input's dtype")
    if weight.dim() < 2 or (weight.dim() > 2 and not dims):
        expected = "[V, D] or [V, d1, ..., D]" if dims else "[V, D]"
        raise ValueError(
            f"linear_weight has shape {_shape(weight)}, expected {expected}: pass lm_head.weight "
            "(under FSDP inside the module that owns it, where it is whole)"
        )
    if weight.shape[-1] != input.shape[-1]:
        raise ValueError(
            f"linear_weight of shape {_shape(weight)} takes hidden states of "
            f"{weight.shape[-1]} numbers, but input has shape {_shape(input)}: "
            "pass the weight as [V, D], as torch.nn.Linear keeps it"
        )
    if 0 in weight.shape:
        raise ValueError(f"linear_weight of shape {_shape(weight)} has no classes, or no heads")
    if weight.dim() > 2 and input.dim() != 2:
        raise ValueError(
            f"linear_weight of shape {_shape(weight)} has more than two dimensions and wants "
            f"input [N, D], but input has shape {_shape(input)}"
        )
    same_device("linear_weight", weight, input)


def linear_bias(bias: object, weight: Tensor) -> None:
    if bias is None:
        return
    if not isinstance(bias, Tensor):
        raise TypeError(f"linear_bias must be a Tensor or None, got {type(bias).__name__}")
    _dense("linear_bias", bias)
    if bias.shape != weight.shape[:-1]:
        raise ValueError(
            f"linear_bias has shape {_shape(bias)}, expected one number per class, "
            f"{_shape(weight[..., 0])}"
        )
    same_device("linear_bias", bias, weight)


def same_dtype(input: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    for name, t in (("linear_weight", weight), ("linear_bias", bias)):
        if t is not None and t.dtype != input.dtype:
            raise TypeError(
                f"{name} has dtype {t.dtype}, but input has dtype {input.dtype}: "
                "convert one of them, or use torch.autocast"
            )


def linear_target(input: Tensor, weight: Tensor, target: Tensor) -> None:
    expected = input.shape[:-1] + weight.shape[1:-1]
    if target.shape != expected:
        raise ValueError(
            f"target has shape {_shape(target)}, but input of shape {_shape(input)} and "
            f"linear_weight of shape {_shape(weight)} have one class index for each of "
            f"[{', '.join(map(str, expected))}]"
        )
    same_device("target", target, input)


def acc_dtype(value: object, weight: Tensor) -> torch.dtype:
    """The dtype in which chunks' gradients of the weight are added."""
    if not isinstance(value, torch.dtype) or not value.is_floating_point:
        raise TypeError(f"acc_dtype must be a floating dtype, got {_brief(value)}")
    return value if value.itemsize > weight.dtype.itemsize else weight.dtype


def rows_per_chunk(
    chunk_bytes: object, token_chunk_size: object, row_bytes: int, default_bytes: int
) -> int:
    """Tokens whose logits are held at a time."""
    if token_chunk_size is not None:
        if chunk_bytes is not None:
            raise ValueError("chunk_bytes and token_chunk_size say the same: give one of them")
        size = _int("token_chunk_size", token_chunk_size, "an int or None")
        if size < 1:
            raise ValueError(f"token_chunk_size is {size}, expected at least 1")
        return size
    if chunk_bytes is None:
        return max(1, default_bytes // row_bytes)
    size = _int("chunk_bytes", chunk_bytes, "an int or None")
    if size < row_bytes:
        raise ValueError(
            f"chunk_bytes is {size}, but the logits of one token take {row_bytes} bytes: "
            f"give at least that, or None for {default_bytes}"
        )
    return size // row_bytes


def second_backward() -> None:
    raise RuntimeError(
        "grad_in_forward=True keeps one gradient, which the first backward has handed over: "
        "for a second backward pass grad_in_forward=False"
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
            f"but input of shape {_shape(input)} is expanded or overlaps "
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


def backend_name(value: object) -> None:
    if not isinstance(value, str) or value not in BACKENDS:
        raise ValueError(f"backend is {_brief(value)}, expected one of {_names(BACKENDS)}")


def triton_can_run(device: torch.device, *, installed: bool, interpreted: bool) -> None:
    if not installed:
        raise ValueError(
            "backend='triton' needs the triton package, which is not installed: "
            "pip install 'chunked-ce[triton]', or pass backend='auto'"
        )
    if device.type not in ("cuda", "xpu") and not (device.type == "cpu" and interpreted):
        raise ValueError(
            "backend='triton' needs tensors on a GPU, but input is on cpu: "
            "move it with .to('cuda'), pass backend='auto', or set TRITON_INTERPRET=1 "
            "before the first import to run the kernels in Triton's interpreter"
        )


def targets_in_range(target: Tensor, vocab_size: int, ignore_index: int) -> None:
    """`IndexError` that names the first offending row."""
    target = target.reshape(-1).long()
    bad = ((target < 0) | (target >= vocab_size)) & is_scored(target, ignore_index)
    if not bad.any():
        return
    row = int(bad.long().argmax())
    raise IndexError(
        f"target {int(target[row])} in row {row} is out of range: "
        f"expected a class from 0 to {vocab_size - 1} or ignore_index={ignore_index} "
        "(use ignore_index for padding)"
    )


def double_backward() -> None:
    raise RuntimeError(
        "chunked_ce computes first derivatives only: for a second derivative of the loss use "
        "torch.nn.functional.cross_entropy"
    )


def text_count(name: str, value: Any) -> int | None:
    if value is None:
        return None
    count = _int(name, value, "an int or None")
    if count < 0:
        raise ValueError(f"{name} is {count}, expected at least 0")
    return count


def nll_and_tokens(nll_sum: Any, tokens: Any) -> tuple[Tensor, Tensor]:
    """As 0-d tensors, where they are."""
    for name, value in (("nll_sum", nll_sum), ("tokens", tokens)):
        if isinstance(value, Tensor) and value.dim() != 0:
            raise ValueError(
                f"{name} has shape {_shape(value)}, expected a number or a 0-dimensional tensor: "
                "sum it first"
            )
    if not isinstance(nll_sum, Tensor):
        if not isinstance(nll_sum, Real) or isinstance(nll_sum, bool):
            raise TypeError(
                f"nll_sum must be a number or a 0-dimensional tensor, got {type(nll_sum).__name__}"
            )
        nll_sum = torch.tensor(nll_sum, dtype=torch.float64)
    elif nll_sum.is_complex() or nll_sum.dtype == torch.bool:
        raise TypeError(f"nll_sum has dtype {nll_sum.dtype}, expected a sum of losses in nats")
    if not isinstance(tokens, Tensor):
        tokens = _int("tokens", tokens, "an int or a 0-dimensional integer tensor")
        if tokens < 0:
            raise ValueError(f"tokens is {tokens}, expected at least 0")
        tokens = torch.tensor(tokens, dtype=torch.int64)
    elif tokens.dtype not in TARGET_DTYPES:
        raise TypeError(
            f"tokens has dtype {tokens.dtype}, expected an integer dtype: it is a count"
        )
    return nll_sum, tokens
