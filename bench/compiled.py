"""Builds the kernels for GPUs that are not here, with Triton's own compiler.

`launches(call)` runs `call` with launching replaced by recording; `build(launch, target)` compiles
a recorded launch as Triton would on that GPU. Only where Triton is not interpreted.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_89": GPUTarget("cuda", 89, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
TYPES = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.int16: "i16",
    torch.int32: "i32",
    torch.int64: "i64",
}
OPTIONS = ("num_warps", "num_ctas", "num_stages", "maxnreg", "enable_fp_fusion")


@dataclass(frozen=True)
class Launch:
    """A kernel, its grid and its arguments, as the launching code gave them."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]

    @property
    def name(self) -> str:
        return str(self.kernel.__name__)


@dataclass(frozen=True)
class Built:
    """What the compiler made of a launch; `spills` are bytes of local memory per thread."""

    name: str
    target: str
    registers: int
    spills: int
    shared: int
    assembly: str = field(repr=False)  # SASS, or gfx assembly
    ptx: str = field(repr=False)


def launches(call: Callable[[], Any]) -> list[Launch]:
    """Return the launches that `call` would make. Nothing is launched or written."""
    recorded: list[Launch] = []

    def record(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        recorded.append(Launch(self, tuple(grid), kwargs))

    real = JITFunction.run
    JITFunction.run = record
    try:
        call()
    finally:
        JITFunction.run = real
    return recorded


def build(launch: Launch, target: str) -> Built:
    signature: dict[str, Any] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}
    for i, parameter in enumerate(launch.kernel.params):
        value = launch.arguments[parameter.name]
        if parameter.is_constexpr:
            signature[parameter.name] = "constexpr"
            constants[(i,)] = value
        else:
            signature[parameter.name] = parameter.annotation_type or _specialized(
                (i,), value, not parameter.do_not_specialize, constants, attributes
            )
    source = ASTSource(launch.kernel, signature, constants, attributes)
    options = {k: v for k, v in launch.arguments.items() if k in OPTIONS}
    compiled = triton.compile(source, target=TARGETS[target], options=options)
    return (
        _read_hip(launch, target, compiled)
        if target.startswith("gfx")
        else _read_cuda(launch, target, compiled)
    )


def _specialized(
    path: tuple[int, ...],
    value: Any,
    specialize: bool,
    constants: dict[tuple[int, ...], Any],
    attributes: dict[tuple[int, ...], Any],
) -> Any:
    """Return the type of an argument as in Triton's launcher. A tuple has a tuple of types.

    Triton specializes every field of a tuple, even if `do_not_specialize` names it.
    """
    if isinstance(value, tuple):
        types = [
            _specialized((*path, i), field, True, constants, attributes)
            for i, field in enumerate(value)
        ]
        return type(value)(*types) if hasattr(value, "_fields") else tuple(types)
    if value is None or (type(value) is int and value == 1 and specialize):
        constants[path] = value
        return "constexpr"
    if isinstance(value, torch.Tensor):
        if value.data_ptr() % 16 == 0:
            attributes[path] = [["tt.divisibility", 16]]
        return "*" + TYPES[value.dtype]
    if isinstance(value, int):
        if value % 16 == 0 and specialize:
            attributes[path] = [["tt.divisibility", 16]]
        return "i32" if -(2**31) <= value < 2**31 else "i64"
    return "fp32"


def _read_cuda(launch: Launch, target: str, compiled: Any) -> Built:
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder) / "kernel.cubin"
        binary.write_bytes(compiled.asm["cubin"])
        usage = _nvidia("cuobjdump", "-res-usage", str(binary))
        sass = _nvidia("nvdisasm", "-c", str(binary))
    registers, stack, local = (
        int(re.findall(rf"{key}:(\d+)", usage)[-1]) for key in ("REG", "STACK", "LOCAL")
    )
    return Built(
        launch.name,
        target,
        registers,
        stack + local,
        compiled.metadata.shared,
        sass,
        compiled.asm["ptx"],
    )


def _read_hip(launch: Launch, target: str, compiled: Any) -> Built:
    text = compiled.asm["amdgcn"]
    registers, spills = (
        int(re.findall(rf"\.{key}:\s*(\d+)", text)[-1])
        for key in ("vgpr_count", "vgpr_spill_count")
    )
    return Built(launch.name, target, registers, 4 * spills, compiled.metadata.shared, text, "")


def _nvidia(tool: str, *arguments: str) -> str:
    """Run one of NVIDIA's disassemblers from Triton's package, and return its output."""
    from triton.backends import nvidia

    path = Path(nvidia.__file__).parent / "bin" / tool
    return subprocess.run(
        [str(path), *arguments], check=True, capture_output=True, text=True
    ).stdout
