"""`chunked-ce plan`: what head and loss take at their peak, and the line of code to use."""

from __future__ import annotations

import argparse
import re
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import UsageError
from .files import STANDARD, check_writable, write_text
from .interrupts import exit_on_interrupt

if TYPE_CHECKING:
    from ..planner import HeadShape

DTYPES = {
    "bfloat16": "bfloat16", "bf16": "bfloat16",
    "float16": "float16", "fp16": "float16",
    "float32": "float32", "fp32": "float32",
    "float64": "float64", "fp64": "float64",
}  # fmt: skip
_FACTORS = {"": 1, "k": 1 << 10, "m": 1 << 20}  # as in a context of 8k
_UNITS = {"B": 1, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30, "TIB": 1 << 40,
          "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}  # fmt: skip


def add_command(subparsers: Any) -> None:
    """Add the command to the parser's."""
    parser = subparsers.add_parser(
        "plan",
        help="peak memory of head and loss, predicted, and the code to use",
        description="Predicts the peak memory of a model's head and loss in training, hidden "
        "states to gradients, for each way to compute them.",
    )
    add = parser.add_argument
    add("--config", metavar="DIR_OR_JSON", help="a Hugging Face config.json or its folder")
    add("--vocab", type=_count, metavar="V", help="vocabulary size, instead of the config's")
    add("--hidden", type=_count, metavar="D", help="hidden size, instead of the config's")
    add("--tokens", type=_count, default=8192, metavar="N",
        help="tokens of a batch, such as 8192 or 8k; default: %(default)s")  # fmt: skip
    add("--dtype", choices=DTYPES, metavar="DTYPE",
        help="bf16, fp16, fp32, fp64; default: the config's, or bf16")  # fmt: skip
    add("--device", choices=("cuda", "cpu"), default="cuda", help="default: %(default)s")
    add("--memory", type=_bytes, metavar="24GiB",
        help="memory for weight, hidden states and loss: adds the largest batch")  # fmt: skip
    add("--gpu", choices=("a100", "h100", "h200", "b200"),
        help="add the time, predicted from this GPU's peak rates")  # fmt: skip
    add("--json", type=Path, metavar="OUT",
        help="write the plan as JSON instead; - writes it to the standard output")  # fmt: skip
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the plan, or write it as JSON."""
    if args.json not in (None, STANDARD):
        check_writable(args.json, "--json")
    if args.gpu is not None and args.device != "cuda":
        raise UsageError("--gpu goes with --device cuda")
    with exit_on_interrupt():
        from .. import planner
        from . import plan_output

    try:
        head = _head(args)
        estimates = planner.plan(head, args.tokens, memory=args.memory, device=args.device)
        shown = plan_output.Plan(
            head, args.tokens, args.device, args.memory, args.gpu, args.config is not None,
            estimates, planner.recommend(estimates),
        )  # fmt: skip
        if args.json is None:
            print(plan_output.as_text(shown))
        else:
            write_text(args.json, "--json", plan_output.as_json(shown))
    except (TypeError, ValueError) as error:
        raise UsageError(str(error)) from error
    return 0


def _head(args: argparse.Namespace) -> HeadShape:
    import torch

    from .. import planner

    given: dict[str, Any] = {
        "vocab_size": args.vocab,
        "hidden_size": args.hidden,
        "dtype": None if args.dtype is None else getattr(torch, DTYPES[args.dtype]),
    }
    if args.config is not None:
        return planner.head_of_config(args.config, **given)
    if args.vocab is None or args.hidden is None:
        raise UsageError("plan needs the sizes of a head: give --config, or --vocab and --hidden")
    return planner.HeadShape(**{name: value for name, value in given.items() if value is not None})


def _count(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:[,_]\d{3})*(?:\.\d+)?)([kmKM]?)", text)
    number = Decimal(re.sub("[,_]", "", match[1])) if match else Decimal(0)
    count = number * _FACTORS[match[2].lower()] if match else number
    if count < 1 or count != int(count):
        raise argparse.ArgumentTypeError(
            f"expected a positive whole number, such as 8192 or 8k, got {text!r}"
        )
    return int(count)


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
