"""Find and load the library of CPU kernels for this machine.

The library is plain C without Python. So ctypes can load it, and releases the interpreter lock.
"""

from __future__ import annotations

import ctypes
import platform
import struct
import warnings
from pathlib import Path

import torch

_INT, _DOUBLE, _POINTER = ctypes.c_int64, ctypes.c_double, ctypes.c_void_p
_LAYOUT = 1  # LAYOUT in kernels/cpu/run.c
DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
_BY_CAPABILITY = {"AVX512": ("avx512", "avx2", "base"), "AVX2": ("avx2", "base")}
_X86 = ("x86_64", "AMD64")


class Rows(ctypes.Structure):
    """Strided rows [outer, inner, V]; see kernels/cpu/job.h."""

    _fields_ = [("data", _POINTER), ("stride", _INT * 3), ("dtype", _INT)]


# The fields of `Job` in kernels/cpu/job.h, 8 bytes each. Packing them at once takes 2 us; setting
# the fields of a ctypes.Structure takes 16.
POINTERS = (  # [rows] each; they follow the pointer to the class weights
    "target", "lse", "logprob", "lse_low", "entropy", "mean_logprob", "weight_sum",
    "rank", "argmax", "m", "s", "ez_sum", "logit_sum", "target_logit",
    "a", "b", "c", "u", "token_weight", "loss",
)  # fmt: skip
_DOUBLES = (
    "divisor", "label_smoothing", "z_loss_weight",
    "softcap", "logit_scale", "prob_scale", "prob_shift",
)  # fmt: skip
_INTEGERS = (
    "outer", "inner", "vocab_size", "columns", "ignore_index", "kind", "shard", "threads",
)  # fmt: skip
JOB = struct.Struct(f"={'Q3qq' * 3}{1 + len(POINTERS)}Q{len(_DOUBLES)}d{len(_INTEGERS)}q")


class Elementwise(ctypes.Structure):
    """Arguments of an elementwise call; see kernels/cpu/elementwise.h."""

    _fields_ = [
        *((name, Rows) for name in ("x", "out", "label", "weight", "pos_weight", "upstream")),
        ("left_out", _POINTER),
        ("sums", _POINTER),
        ("loss_sum", _DOUBLE),
        *(
            (name, _INT)
            for name in ("outer", "inner", "columns", "left_out_per_row", "kind", "threads")
        ),
    ]


class Pair(ctypes.Structure):
    """See kernels/cpu/pair.h."""

    _fields_ = [
        *((name, Rows) for name in ("x", "teacher", "grad")),
        *(
            (name, _POINTER)
            for name in (
                "ignored", "loss", "student_kl", "max", "log_sum", "teacher_max",
                "teacher_log_sum", "shift", "upstream",
            )
        ),
        *((name, _DOUBLE) for name in ("beta", "temperature")),
        *(
            (name, _INT)
            for name in (
                "outer", "inner", "columns", "vocab_size", "kind", "threads", "has_norms",
            )
        ),
    ]  # fmt: skip


def built_libraries() -> list[Path]:
    """Return the paths of all libraries that were built."""
    return sorted(Path(__file__).parent.glob("cpu_*.bin"))


def path() -> Path | None:
    """Return the path of the best library for this machine, or None if none was built."""
    capability = torch.backends.cpu.get_cpu_capability() if platform.machine() in _X86 else ""
    for name in _BY_CAPABILITY.get(capability, ("base",)):
        file = Path(__file__).with_name(f"cpu_{name}.bin")
        if file.exists():
            return file
    return None


def load(file: Path | None) -> ctypes.CDLL | None:
    """Return the library in `file`. If it does not work, warn and return None."""
    if file is None:
        return None
    try:
        if _is_truncated(file):
            raise OSError("the file is cut off")
        library = ctypes.CDLL(str(file))
        library.chunked_ce_run.argtypes = [ctypes.c_char_p]
        library.chunked_ce_elementwise.argtypes = [ctypes.POINTER(Elementwise)]
        library.chunked_ce_elementwise.restype = _INT
        library.chunked_ce_pair.argtypes = [ctypes.POINTER(Pair)]
        library.chunked_ce_pair.restype = None
        library.chunked_ce_run.restype = library.chunked_ce_layout.restype = _INT
        layout = int(library.chunked_ce_layout())
        sizes = JOB.size + ctypes.sizeof(Elementwise) + ctypes.sizeof(Pair)
    except (OSError, AttributeError) as error:
        reason = str(error)
    else:
        if layout == _LAYOUT * 10000 + sizes:
            return library
        reason = "it was built from another version"
    warnings.warn(
        f"the CPU kernels in {file} are not used, backend 'torch' is: {reason}. "
        "Installing chunked-ce again builds them anew",
        stacklevel=2,
    )
    return None


def _is_truncated(file: Path) -> bool:
    """Return whether an ELF file ends before its section headers. Loading it would crash."""
    with open(file, "rb") as opened:
        header, length = opened.read(64), opened.seek(0, 2)
    if len(header) < 64 or header[:6] != b"\x7fELF\x02\x01":  # not 64-bit little-endian
        return False
    (start,) = struct.unpack_from("<Q", header, 40)
    size, count = struct.unpack_from("<HH", header, 58)
    return bool(length < start + size * count)


LIBRARY = load(path())  # loaded at import, so that torch.compile does not trace it
IS_AVAILABLE = LIBRARY is not None
