"""`chunked-ce plan`: what head and loss take at their peak, and the line of code to use."""

from __future__ import annotations

import argparse
import re
from decimal import Decimal
from typing import Any

from .. import planner
from ..checks.planner import PLAN_DEVICES, PLAN_DTYPES
from .errors import UsageError

_UNITS = {"B": 1, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30, "TIB": 1 << 40,
          "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}  # fmt: skip
GIB = 1 << 30


def add_command(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "plan",
        help="peak memory of head and loss, predicted",
        description="Predicts the peak memory of a model's head and loss in training, hidden "
        "states to gradients, for each way to compute them.",
    )
    add = parser.add_argument
    add("--config", metavar="DIR_OR_JSON", help="a Hugging Face config.json or its folder")
    add("--vocab", type=_count, metavar="V", help="classes of the head; goes before the config's")
    add("--hidden", type=_count, metavar="D", help="hidden size; goes before the config's")
    add("--tokens", type=_count, default=8192, metavar="N", help="of a batch; default: %(default)s")
    add(
        "--dtype",
        choices=PLAN_DTYPES,
        help="of the head; goes before the config's; default: bfloat16",
    )
    add("--device", choices=PLAN_DEVICES, default="cuda", help="default: %(default)s")
    add("--memory", type=_bytes, metavar="24GiB",
        help="of weight, hidden states and loss, with a unit: adds the largest batch")  # fmt: skip
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    try:
        head = _head(args)
        estimates = planner.plan(head, args.tokens, memory=args.memory, device=args.device)
    except (TypeError, ValueError) as error:
        raise UsageError(str(error)) from error
    dtype = str(head.dtype).removeprefix("torch.")
    print(
        f"Head and loss, forward + backward: N = {args.tokens} tokens, D = {head.hidden_size}, "
        f"V = {head.vocab_size}, {dtype}, {args.device}.\n"
        "Peak beside the weight "
        f"({_gib(head.weight_bytes)} GiB) and the hidden states; its gradients are in it.\n"
    )
    header: tuple[str, ...] = ("", "peak, GiB", "of eager's")
    if args.memory is not None:
        header += (f"tokens in {_gib(args.memory)} GiB",)
    rows = [header]
    for e in estimates:
        row = (e.name, _gib(e.peak_bytes), f"{e.peak_bytes / estimates[0].peak_bytes:.0%}")
        rows.append(row if e.largest_batch is None else (*row, str(e.largest_batch)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for name, *numbers in rows:
        cells = (n.rjust(w) for n, w in zip(numbers, widths[1:], strict=True))
        print("  ".join((name.ljust(widths[0]), *cells)).rstrip())
    chosen = planner.best(estimates)
    if chosen.largest_batch is not None and chosen.largest_batch < args.tokens:
        fits = max(e.largest_batch or 0 for e in estimates)
        print(f"\n{args.tokens} tokens do not fit in {_gib(args.memory)} GiB; {fits} at most do.")
    print(f"\nUse:\n\n    loss = {chosen.code}")
    if "inplace_backward" in (chosen.code or ""):
        print("\nwhich overwrites the logits in backward.")
    return 0


def _head(args: argparse.Namespace) -> planner.HeadShape:
    given: dict[str, Any] = {
        "vocab_size": args.vocab,
        "hidden_size": args.hidden,
        "dtype": PLAN_DTYPES.get(args.dtype),
    }
    if args.config is not None:
        return planner.head_of_config(args.config, **given)
    if args.vocab is None or args.hidden is None:
        raise UsageError("plan needs the sizes of a head: give --config, or --vocab and --hidden")
    return planner.HeadShape(**{name: value for name, value in given.items() if value is not None})


def _gib(size: int) -> str:
    return f"{size / GIB:.2f}"


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"expected a positive whole number, got {text!r}")
    return int(text)


def _bytes(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]i?B|B)?", text, re.IGNORECASE)
    if match and not match[2]:
        raise argparse.ArgumentTypeError(
            f"{text} has no unit: write {text}GiB, or {text}B for bytes"
        )
    size = int(Decimal(match[1]) * _UNITS[match[2].upper()]) if match else 0
    if size == 0:
        raise argparse.ArgumentTypeError(f"expected a size such as 24GiB, got {text!r}")
    return size
