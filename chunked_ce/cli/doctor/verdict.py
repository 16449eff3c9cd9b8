"""What `chunked-ce doctor` prints: the verdict first, then what is wrong, then the machine."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from .machine import Finding


def summary(findings: Sequence[Finding], *, verbose: bool) -> str:
    """Return the verdict and the findings, of the checks only the failed ones unless `verbose`."""
    wrong = [finding for finding in findings if not finding.ok]
    checks = [finding for finding in findings if finding.is_check]
    lines = [_verdict(len(wrong), len(checks))]
    if wrong and not verbose:
        lines += ["", *(f"  {f.section}: {f.what}: {f.result}" for f in wrong)]
    shown = [f for f in findings if verbose or (f.ok and not f.is_check)]
    lines += ["", *_by_section(shown)]
    if not verbose:
        lines += ["", "chunked-ce doctor --verbose shows every check, for a bug report."]
    return "\n".join(lines)


def _verdict(wrong: int, checks: int) -> str:
    if not wrong:
        return f"Nothing is wrong: {checks} checks agree with eager torch."
    return "1 finding is wrong:" if wrong == 1 else f"{wrong} findings are wrong:"


def _by_section(findings: Iterable[Finding]) -> Iterable[str]:
    section = ""
    for finding in findings:
        if finding.section != section:
            section = finding.section
            yield section
        yield f"  {finding.what}: {finding.result}"
