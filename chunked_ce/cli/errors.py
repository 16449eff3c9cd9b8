"""What a user of the command line got wrong."""

from __future__ import annotations


class UsageError(Exception):
    """Its message, one line, is all that is printed; the exit code is 2."""
