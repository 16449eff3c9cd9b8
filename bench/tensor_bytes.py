"""Peak bytes of tensors, exactly, for any shape and device on any machine.

Runs the code on fake tensors, which have shapes and no memory, and follows every storage from its
making to its end. chunked_ce's operators are entered: their own Python runs, with kernels that do
nothing, so that their buffers count. What libraries take beside tensors (a matrix product's
workspace, an allocator's rounding) is not seen.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from chunked_ce import backends
from chunked_ce.backends import clusters, cpu_binary, gpu
from chunked_ce.backends import cpu as backend_cpu
from chunked_ce.functional import head_loss, logits
from chunked_ce.ops import chunks, one_pass
from chunked_ce.ops import linear as linear_ops
from chunked_ce.ops import logits as ops

_OPERATORS = (ops, one_pass, linear_ops)
_chosen = backends.choose_backend
_KERNELS = ("token_stats", "merge_parts", "token_grad", "loss_and_grad", "scale")


class TensorBytes(TorchDispatchMode):
    """Counts the bytes of the storages that are made while it is active."""

    def __init__(self) -> None:
        super().__init__()
        self.now: int = 0
        self.peak: int = 0
        self._alive: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._local_scalar_dense.default:
            # A fake tensor has no values. 0 leads the questions that the code asks of its data
            # (a range of targets, of logits; any? all?) along the usual way, but for `all`.
            if args[0].dtype.is_floating_point:
                return 0.0
            return 1 if hasattr(args[0], "of_all") else 0
        if func.namespace == "chunked_ce":
            name = func._schema.name.split("::")[1]
            bodies = [getattr(m, f"_{name}") for m in _OPERATORS if hasattr(m, f"_{name}")]
            body = bodies[0] if bodies else getattr(backends, name)  # `scale_` is the backend's
            with self:
                return body(*args, **kwargs)
        if func.namespace == "aten":
            with self:  # below autograd, operators made of others come whole
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        out = func(*args, **kwargs)
        if func is torch.ops.aten.all.default:
            out.of_all = True
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self._follow(leaf.untyped_storage())
        return out

    def _follow(self, storage: torch.UntypedStorage) -> None:
        key = id(storage)
        if key in self._alive and self._alive[key]() is storage:
            return
        size = storage.nbytes()

        def ended(_: Any) -> None:
            self.now -= size
            self._alive.pop(key, None)

        self._alive[key] = weakref.ref(storage, ended)
        self.now += size
        self.peak = max(self.peak, self.now)


def predicted_peak(
    make: Callable[[], tuple[Any, ...]], step: Callable[..., Any], architecture: str = "sm_90"
) -> int:
    """Return the peak bytes of `step(*make())` beyond what `make` made, on fake tensors.

    `make` decides on the device: "cpu", or "meta" for a GPU of that architecture, whose kernels
    need Triton installed.
    """
    with fake_gpu(architecture), FakeTensorMode(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")
        arguments = make()
        with TensorBytes() as counter:
            for leaf in tree_leaves(arguments):
                if isinstance(leaf, torch.Tensor):  # a view or an alias of it is nothing new
                    counter._follow(leaf.untyped_storage())
            before = counter.peak = counter.now
            kept = step(*arguments)
            del kept
    peak: int = counter.peak - before
    return peak


def _choose_backend(backend: str, device: torch.device) -> str:
    return "triton" if backend == "auto" and device.type == "meta" else _chosen(backend, device)


def _has_wide_products(x: torch.Tensor, dtype: torch.dtype) -> bool:
    return x.device.type == "meta" and dtype == torch.float32


class _NoKernel:
    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return lambda **arguments: None


@contextmanager
def fake_gpu(architecture: str) -> Iterator[None]:
    """Make the "meta" device act as a GPU of an architecture with kernels that do nothing."""
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(clusters, "is_verified", lambda device: False))
        stack.enter_context(mock.patch.object(chunks, "has_wide_products", _has_wide_products))
        stack.enter_context(mock.patch.object(chunks, "adds_in_products", lambda x: True))
        stack.enter_context(mock.patch.object(head_loss, "autocast", lambda *given: given[:3]))
        for module in (logits, head_loss):
            stack.enter_context(mock.patch.object(module, "choose_backend", _choose_backend))
        gpu_values = {"architecture": architecture, "processors": 132, "l2_bytes": 50 << 20}
        for name, value in gpu_values.items():
            stack.enter_context(mock.patch.object(gpu, name, lambda device, value=value: value))
        for module in (backend_cpu, cpu_binary):
            stack.enter_context(mock.patch.object(module, "_run", lambda *args, **kwargs: None))
        try:
            from chunked_ce.backends import triton as backend_triton
        except ImportError:  # no Triton: then nothing asks for its kernels
            pass
        else:
            stack.enter_context(
                mock.patch.object(backend_triton, "on_device", lambda device: nullcontext())
            )
            for name in _KERNELS:
                stack.enter_context(
                    mock.patch.object(backend_triton, f"{name}_kernel", _NoKernel())
                )
        yield
