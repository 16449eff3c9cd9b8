"""Loops of a kernel, read from NVIDIA's machine code."""

from __future__ import annotations

import re
from collections import Counter
from typing import NamedTuple

_LABEL = re.compile(r"\s*(\.L_x_\d+):")
_INSTRUCTION = re.compile(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_.]+)")
_BRANCH = re.compile(r"\bBRA\b.*`\((\.L_x_\d+)\)")


class Code(NamedTuple):
    """A run of instructions: all of a kernel, or one of its innermost loops."""

    instructions: int
    exponentials: int  # MUFU.EX2
    loads: tuple[str, ...]  # kinds of global loads: LDG.E.128, ...
    stores: tuple[str, ...]
    multiplications: int  # FMUL

    @property
    def name(self) -> str:
        if self.loads and self.stores:
            return "gradient"
        return "sums" if self.loads else "zeros"


def whole(assembly: str) -> Code:
    """Return all instructions but the padding after the last exit."""
    lines = [line for line in assembly.splitlines() if _INSTRUCTION.match(line)]
    return _code(lines)


def loops(assembly: str) -> list[Code]:
    """Return the innermost loops that touch global memory."""
    labels: dict[str, int] = {}
    lines: list[str] = []
    for line in assembly.splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = len(lines)
        elif _INSTRUCTION.match(line):
            lines.append(line)
    spans = []
    for end, line in enumerate(lines):
        branch = _BRANCH.search(line)
        if branch and labels.get(branch[1], end) < end:
            spans.append((labels[branch[1]], end + 1))
    innermost = [
        span
        for span in spans
        if not any(span[0] <= a and b <= span[1] and (a, b) != span for a, b in spans)
    ]
    found = [_code(lines[a:b]) for a, b in innermost]
    return [code for code in found if code.loads or code.stores]


def _code(lines: list[str]) -> Code:
    names = [match[1] for line in lines if (match := _INSTRUCTION.match(line))]
    while names and names[-1] in ("NOP", "BRA"):  # padding
        names.pop()
    kinds = Counter(names)
    return Code(
        len(names),
        sum(n for name, n in kinds.items() if name.startswith("MUFU.EX2")),
        tuple(sorted(name for name in kinds if name.startswith("LDG"))),
        tuple(sorted(name for name in kinds if name.startswith("STG"))),
        sum(n for name, n in kinds.items() if name.startswith("FMUL")),
    )
