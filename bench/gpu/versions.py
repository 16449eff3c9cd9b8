"""Versions that do not work together."""

from __future__ import annotations

import importlib.metadata
import re


def interpreter_fault(triton: str, numpy: str) -> str:
    """Say why Triton's interpreter cannot run with these versions, or "" where it can.

    Triton up to 3.6 converts arrays of one element in a way that numpy 2.4 has removed.
    """
    if _numbers(triton) < (3, 7) and _numbers(numpy) >= (2, 4):
        return (
            f"the interpreter of Triton {triton} does not work with numpy {numpy}, whatever the "
            "kernel: install 'numpy<2.4', or Triton 3.7 or later"
        )
    return ""


def installed_interpreter_fault() -> str:
    """Return the fault of the installed versions; "" without Triton or numpy."""
    try:
        versions = [importlib.metadata.version(package) for package in ("triton", "numpy")]
    except importlib.metadata.PackageNotFoundError:
        return ""
    return interpreter_fault(*versions)


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", version)[:2]))
