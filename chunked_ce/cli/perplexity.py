"""`chunked-ce perplexity`: a language model in a local folder, on files of text."""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..evaluation.recipes import RECIPES
from ..evaluation.report import EvaluationInterrupted, EvaluationReport, for_json
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
        "perplexity",
        help="perplexity, bits per byte and more of a model on files of text",
        description="Scores each token of each file once, through sliding windows. Nothing is "
        "downloaded, and no code or pickle of the model's folder is run.",
    )
    add = parser.add_argument
    add("model", metavar="MODEL_DIR", help="folder of a Hugging Face causal LM and its tokenizer")
    add_text_arguments(add)
    add("--recipe", choices=RECIPES, metavar="NAME",
        help="windows, BOS, joins and counts of another tool: " + ", ".join(RECIPES))  # fmt: skip
    add("--after", metavar="MARKER",
        help="score only what follows MARKER in each file; the rest is context")  # fmt: skip
    add("--group-by", choices=("folder", "file"),
        help="report each group of files, and the mean over groups")  # fmt: skip
    add("--dtype", choices=DTYPES, default="auto", metavar="DTYPE",
        help="bf16, fp16, fp32, fp64; default: auto, as it was saved")  # fmt: skip
    add("--device", help="default: cuda where there is a GPU, else cpu")
    add("--no-rank", dest="rank", action="store_false",
        help="leave out accuracy and reciprocal rank")  # fmt: skip
    add("--json", type=Path, metavar="OUT",
        help="write the report, also by file and by position; - writes it to the standard output "
        "and the table to stderr")  # fmt: skip
    add("--plot", type=Path, metavar="OUT.png",
        help="draw loss against position, and running perplexity; .png, .pdf or .svg")  # fmt: skip
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Load, score and report; after Ctrl-C report what has been scored."""
    check_files(args)
    texts = [read_text(path) for path in args.text]
    progress = sys.stderr.isatty() or sum(map(len, texts)) >= MUCH_TEXT
    try:
        if progress:
            size = sum(len(text.encode()) for text in texts) / 1e6
            print(f"read {size:.1f} MB; loading {args.model}", file=sys.stderr, flush=True)
        with exit_on_interrupt():
            model, tokenizer = _load(args)
        report = _evaluate(args, model, tokenizer, texts, progress)
    except EvaluationInterrupted as interruption:
        report = interruption.report
    except KeyboardInterrupt:
        print("chunked-ce: interrupted before anything was scored", file=sys.stderr)
        return INTERRUPTED
    from .perplexity_table import table

    to_stdout = args.json == STANDARD
    print(table(report, args.model, args.text), file=sys.stderr if to_stdout else sys.stdout)
    if args.json:
        write_text(args.json, "--json", _as_json(report, args, model))
    if args.plot and report.tokens:
        from .perplexity_plot import draw

        write_whole(args.plot, "--plot", lambda path: draw(report, args.model, path))
    return INTERRUPTED if report.partial else 0


def _load(args: argparse.Namespace) -> tuple[Any, Any]:
    from .local_model import load, usable_device

    return load(args.model, torch_dtype(args.dtype), usable_device(args.device))


def _evaluate(
    args: argparse.Namespace, model: Any, tokenizer: Any, texts: list[str], progress: bool
) -> EvaluationReport:
    from ..evaluation.evaluate import evaluate_perplexity

    try:
        return evaluate_perplexity(
            model,
            text=texts,
            tokenizer=tokenizer,
            context_length=args.context,
            stride=args.stride,
            full_last_window=args.full_last_window,
            recipe=args.recipe,
            after=args.after,
            groups=_groups(args),
            batch_size=args.batch_size,
            bos=args.bos,
            eos=args.eos,
            rank=args.rank,
            per_document=True,
            per_position=True,
            per_window=args.plot is not None,
            progress=progress and importlib.util.find_spec("tqdm") is not None,
        )
    except ValueError as error:
        raise UsageError(in_words_of_the_command(str(error), args.text)) from error


def _groups(args: argparse.Namespace) -> list[str] | None:
    """Return the group of each file, if they are grouped."""
    if args.group_by == "folder":
        return [str(STANDARD if path == STANDARD else path.parent) for path in args.text]
    return None if args.group_by is None else [str(path) for path in args.text]


def _as_json(report: EvaluationReport, args: argparse.Namespace, model: Any) -> str:
    import torch

    parameter = next(model.parameters())
    settings: dict[str, Any] = {
        "model": args.model,
        "text": [str(path) for path in args.text],
        "dtype": str(parameter.dtype).removeprefix("torch."),
        "device": str(parameter.device),
        "torch": torch.__version__,
    }
    contents = settings | replace(report, per_window=None).to_dict()
    joined = report.documents_given != len(args.text)
    names = [" + ".join(settings["text"])] if joined else settings["text"]
    for name, document in zip(names, contents["per_document"], strict=True):
        document["file"] = name
    for position, measures in enumerate(contents["per_position"], 1):
        measures["context_tokens"] = position
    return json.dumps(for_json(contents), indent=1, allow_nan=False) + "\n"
