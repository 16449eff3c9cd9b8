"""Options that the commands for language models on files of text share."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

DTYPES = {
    "auto": "auto",
    "float32": "float32", "fp32": "float32",
    "bfloat16": "bfloat16", "bf16": "bfloat16",
    "float16": "float16", "fp16": "float16",
    "float64": "float64", "fp64": "float64",
}  # fmt: skip
MUCH_TEXT = 1_000_000
"""Characters from which on each step is named, also where stderr is no terminal."""


def add_text_arguments(add: Callable[..., Any]) -> None:
    """Add which text is scored, and in which windows."""
    add("--text", nargs="+", type=Path, required=True, metavar="FILE",
        help="UTF-8; each file is a document; - reads the standard input")  # fmt: skip
    add("--context", type=int, metavar="TOKENS",
        help="tokens the model sees at once; default: all it can take")  # fmt: skip
    add("--stride", type=int, metavar="TOKENS",
        help="step from one window to the next; default: the context")  # fmt: skip
    add("--full-last-window", action="store_true",
        help="let a file's last window reach back as far as the context allows")  # fmt: skip
    add("--batch-size", type=int, default=8, metavar="WINDOWS", help="default: %(default)s")
    add("--bos", type=special_token, default=None, metavar="auto|yes|no|ID",
        help="token before each file, unscored; default: auto, the tokenizer's way")  # fmt: skip
    add("--eos", type=special_token, default=False, metavar="yes|no|ID",
        help="token after each file, scored; default: no")  # fmt: skip


def in_words_of_the_command(message: str, files: list[Path]) -> str:
    """Return the library's message with the files' names and the command's options."""

    def file_name(match: re.Match[str]) -> str:
        index = int(match[1])
        return f"--text: {files[index]}" if index < len(files) else match[0]

    if ", but recipe " in message:
        message = message.replace("context_length", "context")
        message = re.sub(r"^\w+(?= is )", lambda m: "--" + m[0].replace("_", "-"), message)
    message = re.sub(r"^document (\d+)\b", file_name, message)
    return message.replace("bos=True", "--bos yes").replace("eos=True", "--eos yes")


def special_token(text: str) -> bool | int | None:
    """Return what --bos or --eos says."""
    known: dict[str, bool | None] = {"auto": None, "yes": True, "no": False}
    if text in known:
        return known[text]
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected auto, yes, no or a token id, got {text!r}")
    return int(text)


def torch_dtype(name: str) -> Any:
    """Return the dtype that --dtype names, or "auto"."""
    if DTYPES[name] == "auto":
        return "auto"
    import torch

    return getattr(torch, DTYPES[name])
