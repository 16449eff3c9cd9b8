"""`chunked-ce compare`: two language models in local folders, on files of text."""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

from ..evaluation.comparison_report import ComparisonInterrupted, ComparisonReport
from ..evaluation.report import for_json
from .errors import INTERRUPTED, UsageError
from .evaluation_arguments import (
    DTYPES,
    MUCH_TEXT,
    add_text_arguments,
    in_words_of_the_command,
    torch_dtype,
)
from .files import STANDARD, check_files, read_text, write_text, write_whole
from .interrupts import exit_on_interrupt


def add_command(subparsers: Any) -> None:
    """Add the command to the parser's."""
    parser = subparsers.add_parser(
        "compare",
        help="how far a model is from a base on files of text: KL divergence and more",
        description="Shows both models the same windows and scores each token of each file once. "
        "Nothing is downloaded, and no code or pickle of the models' folders is run.",
    )
    add = parser.add_argument
    add("model", metavar="MODEL_DIR", help="folder of a Hugging Face causal LM and its tokenizer")
    add("base", metavar="BASE_DIR", help="folder of the model to compare it with")
    add_text_arguments(add)
    add("--dtype", choices=DTYPES, default="auto", metavar="DTYPE",
        help="of the model: bf16, fp16, fp32, fp64; default: auto, as it was saved")  # fmt: skip
    add("--base-dtype", choices=DTYPES, default="auto", metavar="DTYPE",
        help="of the base; default: auto, as it was saved")  # fmt: skip
    add("--device", help="default: cuda where there is a GPU, else cpu")
    add("--take-turns", action="store_true",
        help="keep one model at a time on the device, where both do not fit")  # fmt: skip
    add("--vocab-size", type=int, metavar="CLASSES",
        help="classes to compare; default: those of both, if the others are padding")  # fmt: skip
    add("--seed", type=int, default=0, metavar="N",
        help="of the documents resampled for errors; default: %(default)s")  # fmt: skip
    add("--json", type=Path, metavar="OUT",
        help="write the report, also by file and by folder; - writes it to the standard output "
        "and the table to stderr")  # fmt: skip
    add("--plot", type=Path, metavar="OUT.png",
        help="draw the KL divergence, also against position, and both log-probabilities; .png, "
        ".pdf or .svg")  # fmt: skip
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Load both, compare and report; after Ctrl-C report what has been scored."""
    check_files(args)
    texts = [read_text(path) for path in args.text]
    progress = sys.stderr.isatty() or sum(map(len, texts)) >= MUCH_TEXT
    try:
        if progress:
            size = sum(len(text.encode()) for text in texts) / 1e6
            line = f"read {size:.1f} MB; loading {args.model} and {args.base}"
            print(line, file=sys.stderr, flush=True)
        with exit_on_interrupt():
            models = _load(args)
        report = _compare(args, models, texts, progress)
    except ComparisonInterrupted as interruption:
        report = interruption.report
    except KeyboardInterrupt:
        print("chunked-ce: interrupted before anything was scored", file=sys.stderr)
        return INTERRUPTED
    from .comparison_table import table

    own, of_base = (
        f"{name} ({_dtype(model)})"
        for name, (model, _) in zip((args.model, args.base), models, strict=True)
    )
    to_stdout = args.json == STANDARD
    print(table(report, own, of_base, args.text), file=sys.stderr if to_stdout else sys.stdout)
    if args.json:
        write_text(args.json, "--json", _as_json(report, args, models))
    if args.plot and report.tokens:
        from .comparison_plot import draw

        write_whole(args.plot, "--plot", lambda path: draw(report, own, of_base, path))
    return INTERRUPTED if report.partial else 0


def _load(args: argparse.Namespace) -> list[tuple[Any, Any]]:
    """Return model and tokenizer, of the model and of the base."""
    from .local_model import load, usable_device

    device = usable_device(args.device)
    if args.take_turns:
        device = usable_device("cpu")  # from where each is moved
    return [
        load(name, torch_dtype(dtype), device)
        for name, dtype in ((args.model, args.dtype), (args.base, args.base_dtype))
    ]


def _compare(
    args: argparse.Namespace, models: list[tuple[Any, Any]], texts: list[str], progress: bool
) -> ComparisonReport:
    from ..evaluation.comparison import compare_models
    from .local_model import usable_device

    (model, tokenizer), (base, base_tokenizer) = models
    try:
        return compare_models(
            model,
            base,
            text=texts,
            tokenizer=tokenizer,
            base_tokenizer=base_tokenizer,
            context_length=args.context,
            stride=args.stride,
            full_last_window=args.full_last_window,
            batch_size=args.batch_size,
            bos=args.bos,
            eos=args.eos,
            vocab_size=args.vocab_size,
            groups=folders_of(args.text),
            per_document=True,
            seed=args.seed,
            take_turns=args.take_turns,
            device=usable_device(args.device),
            progress=progress and importlib.util.find_spec("tqdm") is not None,
        )
    except ValueError as error:
        message = str(error)
        if message.startswith("base: "):
            shown = in_words_of_the_command(message.removeprefix("base: "), args.text)
            raise UsageError(f"{args.base}: {shown}") from error
        message = message.replace("vocab_size=", "--vocab-size ")
        raise UsageError(in_words_of_the_command(message, args.text)) from error


def folders_of(files: list[Path]) -> list[str] | None:
    """Return the folder of each file, or None if they are in one."""
    names = ["-" if path == STANDARD else str(path.parent) for path in files]
    return names if len(set(names)) > 1 else None


def _as_json(
    report: ComparisonReport, args: argparse.Namespace, models: list[tuple[Any, Any]]
) -> str:
    import torch

    from .local_model import usable_device

    settings = {
        "model": args.model,
        "base": args.base,
        "text": [str(path) for path in args.text],
        "dtype": _dtype(models[0][0]),
        "base_dtype": _dtype(models[1][0]),
        "device": str(usable_device(args.device)),
        "torch": torch.__version__,
    }
    contents = settings | report.to_dict()
    for path, document in zip(args.text, contents["per_document"], strict=True):
        document["file"] = str(path)
    return json.dumps(for_json(contents), indent=1, allow_nan=False) + "\n"


def _dtype(model: Any) -> str:
    return str(next(model.parameters()).dtype).removeprefix("torch.")
