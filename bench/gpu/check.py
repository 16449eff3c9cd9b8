"""Stage `check`: every kernel with the launch tables in use, against eager torch in fp64.

What is wrong is named: the kernel, its input, and by how much. The other cases go on.
"""

from __future__ import annotations

import time
from itertools import chain

import torch

from ..records import Table, one_line
from . import check_cases, check_system
from .cases import Case, NotHere, Wrong
from .stage import Context

COLUMNS = ("kernel", "dtype", "input", "result", "error", "detail", "seconds")
# After such an error no kernel can be launched in this process.
LOST = ("device-side assert", "illegal memory access", "launch failure", "misaligned address")


def run(context: Context) -> int:
    """Write check.csv. Return 1 where a kernel is wrong or fails."""
    table = Table(context.out / "check.csv", COLUMNS)
    counts = dict.fromkeys(("right", "wrong", "not run"), 0)
    lost = False
    for case in chain(check_cases.cases(context), check_system.cases(context)):
        start = time.perf_counter()
        if context.late or lost:
            why = "the GPU's context is lost" if lost else "out of time"
            result, error, detail = "not run", None, why
        else:
            result, error, detail = _outcome(case)
            lost = any(text in detail for text in LOST)
            if not lost:
                context.release()
        counts[result] += 1
        taken = time.perf_counter() - start
        table.add(
            kernel=case.kernel, dtype=case.dtype, input=case.input, result=result,
            error="" if error is None else error, detail=detail, seconds=taken,
        )  # fmt: skip
        if result != "right" or taken > 5:
            print(f"{result:8}{taken:6.1f} s {case.kernel} {case.input} {detail}", flush=True)
    print(", ".join(f"{n} {what}" for what, n in counts.items()), flush=True)
    return 1 if counts["wrong"] else 0


def _outcome(case: Case) -> tuple[str, float | None, str]:
    """Return the result, the largest relative error, and a detail."""
    try:
        return "right", case.run(), ""
    except NotHere as why:
        return "not run", None, str(why)
    except Wrong as wrong:
        return "wrong", wrong.error, str(wrong)
    except Exception as error:  # a launch that fails is a fault of the kernel too
        if isinstance(error, torch.OutOfMemoryError):
            return "not run", None, one_line(error)
        return "wrong", None, one_line(error)
