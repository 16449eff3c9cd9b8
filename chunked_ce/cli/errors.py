"""Exit codes, and the error that a mistake on the command line raises."""

from __future__ import annotations

INTERRUPTED = 130


class UsageError(Exception):
    """A mistake of the user: its message, one line, is all that is printed; the exit code is 2."""
