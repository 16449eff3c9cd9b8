"""Backends and what they need."""

from __future__ import annotations

from typing import NoReturn

import torch

from .values import brief, names

BACKENDS = ("auto", "cpu", "torch", "triton")


def backend_name(value: object) -> None:
    if not isinstance(value, str) or value not in BACKENDS:
        raise ValueError(f"backend is {brief(value)}, expected one of {names(BACKENDS)}")


def triton_cannot_run(*, installed: bool) -> NoReturn:
    if not installed:
        raise ValueError(
            "backend='triton' needs the triton package, which is not installed: "
            "pip install 'chunked-ce[triton]', or pass backend='auto'"
        )
    raise ValueError(
        "backend='triton' needs tensors on a GPU, but input is on cpu: "
        "move it with .to('cuda'), pass backend='auto', or set TRITON_INTERPRET=1 "
        "before the first import to run the kernels in Triton's interpreter"
    )


def cpu_cannot_run(device: torch.device, *, built: bool) -> NoReturn:
    if not built:
        raise ValueError(
            "backend='cpu' needs its kernels in C, which were not built or cannot be loaded: "
            "install a C compiler (gcc or clang), then chunked-ce again with "
            "pip install --force-reinstall --no-deps, or pass backend='auto'"
        )
    raise ValueError(
        f"backend='cpu' needs tensors on the CPU, but input is on {device}: "
        "move it with .cpu() or pass backend='auto'"
    )
