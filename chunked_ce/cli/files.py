"""Files that a user names: which may be read, which may be written, and how."""

from __future__ import annotations

import argparse
import importlib.util
import os
import stat
import sys
from collections.abc import Callable
from pathlib import Path

from .errors import UsageError

STANDARD = Path("-")
"""The standard input or output, where a file is expected."""
_PICTURES = (".png", ".pdf", ".svg")
_OF_A_MODEL = ("config", "tokenizer", "vocab", "tokens", ".index")
"""Parts of the names of the JSON files that a model is loaded from."""


def check_files(args: argparse.Namespace) -> None:
    """Raise before the work where a file of `args.text`, `json` or `plot` cannot serve."""
    if args.text.count(STANDARD) > 1:
        raise UsageError("--text: - is given twice, but the standard input can be read once")
    taken = {path.resolve(): "a file of --text" for path in args.text if path != STANDARD}
    for name in ("json", "plot"):
        path = getattr(args, name)
        if path is None or (name == "json" and path == STANDARD):
            continue
        check_writable(path, f"--{name}")
        real = path.resolve()
        folders = [Path(name).resolve() for name in (args.model, getattr(args, "base", args.model))]
        if real.is_file() and real.parent in folders and any(p in real.name for p in _OF_A_MODEL):
            taken[real] = "a file of a model"
        if real in taken:
            raise UsageError(
                f"--{name}: {str(path)!r} is {taken[real]}, which it would overwrite: "
                "give another name"
            )
        taken[real] = f"that of --{name}"
    if args.plot is not None:
        if args.plot.suffix.lower() not in _PICTURES:
            raise UsageError(
                f"--plot: expected a name that ends in .png, .pdf or .svg, got {str(args.plot)!r}"
            )
        if importlib.util.find_spec("matplotlib") is None:
            raise UsageError("--plot needs matplotlib: pip install 'chunked-ce[bench]'")


def check_writable(path: Path, option: str) -> None:
    """Raise where no file can be written at `path`."""
    if not path.parent.is_dir():
        raise UsageError(f"{option}: the folder {str(path.parent)!r} does not exist")
    if path.is_dir() or not _can_write(path):
        raise UsageError(f"{option}: no file can be written at {str(path)!r}")


def _can_write(path: Path) -> bool:
    """Return whether opening `path` to append works: permissions alone do not tell."""
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


def write_text(path: Path, option: str, text: str) -> None:
    """Write a text to a file, all of it or nothing, or to the standard output."""
    if path == STANDARD:
        sys.stdout.write(text)
    else:
        write_whole(path, option, lambda part: part.write_text(text))


def write_whole(path: Path, option: str, write: Callable[[Path], object]) -> None:
    """Have `write` write a file; an interruption or a full disk leaves the old one as it was."""
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
    """Return the text of a file of `--text`, or of the standard input."""
    try:
        if path == STANDARD:
            text = sys.stdin.buffer.read().decode()
        else:
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
