"""Small faults in C text, each at one place: an operator for its neighbor, a number for the next one."""

from __future__ import annotations

import re
from collections.abc import Iterator

from operators import Mutant

# Operators stand between spaces (clang-format); a pointer's star does not.
SWAPS = {
    " + ": " - ", " - ": " + ", " * ": " / ", " / ": " * ", " < ": " <= ", " <= ": " < ", " > ": " >= ",
    " >= ": " > ", " == ": " != ", " != ": " == ", " && ": " || ", " || ": " && ", " += ": " -= ",
    " -= ": " += ", " *= ": " /= ", " ? ": " ? 0 * ", "++": "--",
}  # fmt: skip
_TOKEN = re.compile("|".join(map(re.escape, sorted(SWAPS, key=len, reverse=True))))
_NUMBER = re.compile(r"(?<![\w.])(\d+)(?![\w.])")
_COMMENT = re.compile(r"/\*.*?\*/", re.S)


def mutants(source: str) -> list[Mutant]:
    """Every mutant of a C file, in the order of its text; some do not compile."""
    code = _COMMENT.sub(lambda m: re.sub(r"[^\n]", " ", m[0]), source)
    found, start = [], 0
    for number, line in enumerate(code.splitlines(keepends=True), 1):
        for begin, end, after in _changes(line):
            whole = source[: start + begin] + after + source[start + end :]
            found.append(
                Mutant(number, line.strip(), (line[:begin] + after + line[end:]).strip(), whole)
            )
        start += len(line)
    return found


def _changes(line: str) -> Iterator[tuple[int, int, str]]:
    if line.lstrip().startswith(("#", "typedef")) or not line.strip():
        return
    for match in _TOKEN.finditer(line):
        yield match.start(), match.end(), SWAPS[match[0]]
    for match in _NUMBER.finditer(line):
        yield match.start(), match.end(), str(int(match[0]) + 1)
