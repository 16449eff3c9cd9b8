"""Files that a user names: which may be read, which may be written, and how."""

from __future__ import annotations

import argparse
import importlib.util
import os
import stat
from collections.abc import Callable
from pathlib import Path

from .errors import UsageError


def check_files(args: argparse.Namespace) -> None:
    """Before the work rather than after it."""
    taken = {path.resolve(): "a file of --text" for path in args.text}
    for name in ("json", "plot"):
        path = getattr(args, name)
        if path is None:
            continue
        if path.is_dir() or not path.parent.is_dir() or not _can_write(path):
            raise UsageError(f"--{name}: no file can be written at {str(path)!r}")
        real = path.resolve()
        if real.is_file() and real.parent == Path(args.model).resolve():
            taken[real] = "a file of the model"
        if real in taken:
            raise UsageError(
                f"--{name}: {str(path)!r} is {taken[real]}, which it would overwrite: "
                "give another name"
            )
        taken[real] = f"that of --{name}"
    if args.plot is not None:
        if args.plot.suffix.lower() != ".png":
            raise UsageError(f"--plot: expected a name that ends in .png, got {str(args.plot)!r}")
        if importlib.util.find_spec("matplotlib") is None:
            raise UsageError("--plot needs matplotlib: pip install 'chunked-ce[bench]'")


def _can_write(path: Path) -> bool:
    """Tried: permissions alone do not tell. What is there stays as it is."""
    new = not path.exists()
    if not (new or path.is_file()):
        return True  # a pipe would wait
    try:
        path.open("ab").close()
        if new:
            path.unlink()
    except OSError:
        return False
    return True


def whole(path: Path, option: str, write: Callable[[Path], object]) -> None:
    """The file as it was, or all of the new one: an interruption leaves no half of it."""
    special = path.exists() and not path.is_file()  # /dev/stdout, a pipe
    real = path if special else path.resolve()  # a link stays a link
    part = real if special else real.with_name(f".{os.getpid()}.{real.name}")
    try:
        write(part)
        if not special:
            part.replace(real)
    except OSError as error:
        raise UsageError(f"{option}: {path}: {error.strerror}") from error
    finally:
        if not special:
            part.unlink(missing_ok=True)


def read_text(path: Path) -> str:
    try:
        mode = path.stat().st_mode
        if stat.S_ISCHR(mode) or stat.S_ISBLK(mode):  # some of them never end
            raise UsageError(f"--text: {path}: a device; expected a file of text")
        text = path.read_bytes().decode()
    except OSError as error:
        raise UsageError(f"--text: {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UsageError(
            f"--text: {path}: not UTF-8 at byte {error.start}: convert it to UTF-8 first"
        ) from error
    if not text:
        raise UsageError(f"--text: {path}: empty; expected a file of text")
    return text
