"""Objects that stand for a tensor that nobody has computed yet.

Some uses are recorded, by the methods of a subclass. Every other use, as a method, an operator or
an argument of a torch function, computes the tensor once and goes on with it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_map

from . import checks

_KEYWORDS = {
    "dim",
    "index",
    "indices",
    "keepdim",
    "dtype",
    "_stacklevel",
}  # F.softmax adds the last one


class Lazy:
    """Stand for a tensor of known shape, dtype and device."""

    recorded: ClassVar[dict[Any, str]] = {}  # torch's functions, and the methods that record them
    dtype: torch.dtype
    device: torch.device

    def tensor(self) -> Tensor:
        raise NotImplementedError

    @property
    def shape(self) -> torch.Size:
        raise NotImplementedError

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def dim(self) -> int:
        return self.ndim

    def size(self, dim: int | None = None) -> torch.Size | int:
        return self.shape if dim is None else self.shape[dim]

    def stride(self, dim: int | None = None) -> tuple[int, ...] | int:
        """Return zeros: there is no memory to walk through, so no kernel takes it for a tensor."""
        strides = (0,) * self.ndim
        return strides if dim is None else strides[dim]

    def data_ptr(self) -> int:
        checks.no_memory(type(self).__name__)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or not hasattr(Tensor, name):
            raise AttributeError(f"'{type(self).__name__}' object has no attribute '{name}'")
        return getattr(self.tensor(), name)

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs, name = kwargs or {}, cls.recorded.get(function)
        if name is not None and args and isinstance(args[0], cls) and kwargs.keys() <= _KEYWORDS:
            return getattr(args[0], name)(*args[1:], **kwargs)
        args, kwargs = tree_map(as_tensor, (args, kwargs))
        return function(*args, **kwargs)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: Any) -> Any:
        return self.tensor()[as_tensor(index)]

    def __iter__(self) -> Iterator[Any]:
        return iter(self.tensor())

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.tensor().__reduce_ex__(protocol)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(shape={list(self.shape)}, dtype={self.dtype})"

    __hash__ = object.__hash__
    __array_priority__ = 1000  # as Tensor's: numpy's numbers leave `number * logits` to us

    def gather(self, dim: Any, index: Any, **options: Any) -> Any:
        return self.tensor().gather(dim, index, **options)

    def take_along_dim(self, indices: Any, dim: Any = None) -> Any:
        if isinstance(indices, Tensor) and indices.shape[:-1] == self.shape[:-1]:
            return self.gather(dim, indices)  # nothing to broadcast
        return self.tensor().take_along_dim(indices, dim)

    def _is_last(self, dim: Any) -> bool:
        return type(dim) is int and dim in (-1, self.ndim - 1) and not torch.compiler.is_compiling()

    def _picks_a_class(self, dim: Any, index: Any) -> bool:
        """Return whether `gather(dim, index)` is of one class a row. Raises what torch raises."""
        if not self._is_last(dim):
            return False
        no_memory = torch.zeros((), dtype=self.dtype, device=self.device).expand(self.shape)
        return no_memory.gather(dim, index).shape == (*self.shape[:-1], 1)


def as_tensor(value: Any) -> Any:
    return value.tensor() if isinstance(value, Lazy) else value


def functions_named(*names: str) -> dict[Any, str]:
    """Return torch's functions and the methods of tensors that have the names."""
    spaces = (torch, torch.special, F, Tensor)
    return {getattr(s, name): name for name in names for s in spaces if hasattr(s, name)}


def dtype_of(function: Callable[..., Tensor], *values: Lazy) -> torch.dtype:
    """Return the dtype of `function(*values)`, under the autocast of now."""
    with torch.no_grad():
        return function(*(torch.zeros(1, dtype=v.dtype, device=v.device) for v in values)).dtype


def _tensor_operator(name: str) -> Callable[..., Any]:
    def operator(self: Lazy, *others: Any, **options: Any) -> Any:
        return getattr(self.tensor(), name)(*(as_tensor(other) for other in others), **options)

    operator.__name__ = name
    return operator


_BINARY = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "and", "or", "xor")
_OTHERS = (
    *("eq", "ne", "lt", "le", "gt", "ge", "neg", "pos", "abs", "invert", "contains"),
    *("setitem", "array", "dlpack", "dlpack_device", "bool", "int", "float", "index", "complex"),
)
for _name in (*(r + name for name in _BINARY for r in ("", "r", "i")), *_OTHERS):
    _operator = f"__{_name}__"  # looked up on the class, past __getattr__
    if hasattr(Tensor, _operator):
        setattr(Lazy, _operator, _tensor_operator(_operator))
