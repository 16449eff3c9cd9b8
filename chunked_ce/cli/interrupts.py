"""Ctrl-C during imports, where KeyboardInterrupt may be swallowed or become another error."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

from .errors import INTERRUPTED


@contextmanager
def exit_on_interrupt() -> Iterator[None]:
    """End the process at once on Ctrl-C, with one line; for work that leaves nothing behind."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may set a handler
        return
    before = signal.signal(signal.SIGINT, _exit)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _exit(*_: Any) -> NoReturn:
    os.write(2, b"chunked-ce: interrupted\n")
    os._exit(INTERRUPTED)
