"""Triton's interpreter, made to round like a GPU and to take a third of its time."""

from dataclasses import replace
from functools import cache
from typing import Any


@cache
def prepare() -> None:
    """Call it before the first kernel."""
    _fuse_multiply_add()
    _patch_the_language_once()
    _leave_overflow_to_the_sanitizer()
    _derive_types_once()


def _fuse_multiply_add() -> None:
    """Triton's interpreter rounds twice where every GPU rounds once."""
    import numpy as np
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def create_fma(self, x, y, z):
        wide = np.longdouble if x.data.dtype == np.float64 else np.float64
        with np.errstate(all="ignore"):
            exact = x.data.astype(wide) * y.data.astype(wide) + z.data.astype(wide)
            return TensorHandle(exact.astype(x.data.dtype), x.dtype)

    InterpreterBuilder.create_fma = create_fma


def _patch_the_language_once() -> None:
    """Triton's interpreter patches its language anew for every call of a device function: half its time."""
    import triton.language as tl
    from triton.runtime import interpreter

    patch, patched = interpreter._patch_lang, set()

    @cache
    def modules(fn):
        return {name for name, m in (("tl", tl), ("core", tl.core)) if m in fn.__globals__.values()}

    def patch_once(fn):
        if modules(fn) <= patched:
            return None  # of a device function, which restores nothing
        patched.update(modules(fn))
        scope = patch(fn)
        if scope is not None:  # older versions leave the language patched
            restore = scope.restore
            scope.restore = lambda: (restore(), patched.clear())
        return scope

    interpreter._patch_lang = patch_once


def _leave_overflow_to_the_sanitizer() -> None:
    """Checks every sum of int32 by one of int64: a fifth of its time."""
    from triton.runtime.interpreter import interpreter_builder as builder

    builder.options = replace(builder.options, sanitize_overflow=False)


def _derive_types_once() -> None:
    """It derives each value's type and shape anew: a third of its time."""
    import triton.language as tl
    from triton.runtime import interpreter

    dtype_of = interpreter._get_np_dtype
    init_block, init_tensor = tl.block_type.__init__, tl.tensor.__init__
    dtypes: dict[str, Any] = {}
    of_block: dict[Any, dict[str, Any]] = {}
    of_tensor: dict[str, dict[str, Any]] = {}

    def _get_np_dtype(dtype):
        if dtype.name not in dtypes:
            dtypes[dtype.name] = dtype_of(dtype)
        return dtypes[dtype.name]

    def init_block_once(self, element_ty, shape):
        key = (element_ty.name, *shape)
        if key not in of_block:
            init_block(self, element_ty, shape)
            of_block[key] = self.__dict__.copy()
        self.__dict__.update(of_block[key])

    def init_tensor_once(self, handle, type):
        if type.name not in of_tensor:
            init_tensor(self, handle, type)
            of_tensor[type.name] = self.__dict__.copy()
        self.__dict__.update(of_tensor[type.name], handle=handle, type=type)

    interpreter._get_np_dtype = _get_np_dtype
    tl.block_type.__init__, tl.tensor.__init__ = init_block_once, init_tensor_once
