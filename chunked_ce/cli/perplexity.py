"""`chunked-ce perplexity`: a language model in a local folder, on files of text."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..evaluation.evaluate import evaluate_perplexity
from ..evaluation.report import EvaluationInterrupted, EvaluationReport, for_json
from .errors import UsageError
from .files import check_files, read_text, whole
from .perplexity_report import draw, table

DTYPES = {
    "auto": "auto",
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}
INTERRUPTED = 130


def add_command(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "perplexity",
        help="perplexity, bits per byte and more of a model on files of text",
        description="Scores each token of each file once, through sliding windows. Nothing is "
        "downloaded, and no code or pickle of the model's folder is run.",
    )
    add = parser.add_argument
    add("model", metavar="MODEL_DIR", help="folder of a Hugging Face causal LM and its tokenizer")
    add("--text", nargs="+", type=Path, required=True, metavar="FILE",
        help="UTF-8; each file is a document")  # fmt: skip
    add("--context", type=int, metavar="TOKENS", help="shown at once; default: all the model takes")
    add("--stride", type=int, metavar="TOKENS", help="between windows; default: the context")
    add("--full-last-window", action="store_true",
        help="a file's last window reaches back as far as the context allows")  # fmt: skip
    add("--batch-size", type=int, default=8, metavar="WINDOWS", help="default: %(default)s")
    add("--bos", type=_special, default=None, metavar="auto|yes|no|ID",
        help="before each file, not scored; auto, the default: as the tokenizer does")  # fmt: skip
    add("--eos", type=_special, default=False, metavar="yes|no|ID",
        help="after each file, scored; default: no")  # fmt: skip
    add("--dtype", choices=DTYPES, default="auto", help="auto, the default: as it was saved")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu",
        help="default here: %(default)s")  # fmt: skip
    add("--no-rank", dest="rank", action="store_false", help="no accuracy and reciprocal rank")
    add("--json", type=Path, metavar="OUT", help="write the report, by file and by position too")
    add("--plot", type=Path, metavar="OUT.png",
        help="draw the loss against the position, and the running perplexity")  # fmt: skip
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    check_files(args)
    texts = [read_text(path) for path in args.text]
    try:
        model, tokenizer = load(args.model, DTYPES[args.dtype], usable_device(args.device))
        report = evaluate(args, model, tokenizer, texts)
    except EvaluationInterrupted as interruption:
        report = interruption.report
    except KeyboardInterrupt:
        print("chunked-ce: interrupted before anything was scored", file=sys.stderr)
        return INTERRUPTED
    print(table(report, args.model))
    if args.json:
        whole(args.json, "--json", lambda path: path.write_text(as_json(report, args)))
    if args.plot and report.tokens:
        whole(args.plot, "--plot", lambda path: draw(report, args.model, path))
    return INTERRUPTED if report.partial else 0


def evaluate(
    args: argparse.Namespace, model: Any, tokenizer: Any, texts: list[str]
) -> EvaluationReport:
    try:
        return evaluate_perplexity(
            model,
            text=texts,
            tokenizer=tokenizer,
            context_length=args.context,
            stride=args.stride,
            full_last_window=args.full_last_window,
            batch_size=args.batch_size,
            bos=args.bos,
            eos=args.eos,
            rank=args.rank,
            per_document=True,
            per_position=True,
            per_window=args.plot is not None,
            progress=sys.stderr.isatty() and importlib.util.find_spec("tqdm") is not None,
        )
    except ValueError as error:
        raise UsageError(str(error)) from error


def as_json(report: EvaluationReport, args: argparse.Namespace) -> str:
    settings = {
        "model": args.model,
        "text": [str(path) for path in args.text],
        "dtype": args.dtype,
        "device": args.device,
        "torch": torch.__version__,
    }
    contents = settings | replace(report, per_window=None).to_dict()
    return json.dumps(for_json(contents), indent=1, allow_nan=False) + "\n"


# What the user gave


def _special(text: str) -> bool | int | None:
    known: dict[str, bool | None] = {"auto": None, "yes": True, "no": False}
    if text in known:
        return known[text]
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected auto, yes, no or a token id, got {text!r}")
    return int(text)


def usable_device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.zeros((), dtype=torch.float64, device=device).item()  # sums are float64
    except (AssertionError, NotImplementedError, RuntimeError, TypeError) as error:
        raise UsageError(
            f"--device: {name!r} cannot be used here; expected cpu, or cuda with a GPU"
        ) from error
    return device


def check_folder(folder: Path) -> None:
    """What transformers would do with this folder that is not promised here.

    A configuration may name a repository of kernels, whose code would be fetched and run; an
    adapter may come as a pickle.
    """
    try:
        nested = [json.loads((folder / "config.json").read_bytes())]
    except (OSError, ValueError):
        nested = []  # transformers says what is wrong
    while nested:
        found = nested.pop()
        for key, value in found.items() if isinstance(found, dict) else ():
            if key.endswith("_implementation") and "/" in str(value):
                raise UsageError(
                    f"{str(folder)!r}: config.json has {key} {value!r}, code from elsewhere, and "
                    "none is run: remove that line"
                )
            nested.append(value)
    if (folder / "adapter_config.json").is_file():
        if not (folder / "adapter_model.safetensors").is_file():
            raise UsageError(
                f"{str(folder)!r} has an adapter without adapter_model.safetensors, and no pickle "
                "is read: save it with safe_serialization=True"
            )


def load(name: str, dtype: Any, device: torch.device) -> tuple[Any, Any]:
    """(model, tokenizer) from safetensors and JSON alone, without a network."""
    if importlib.util.find_spec("transformers") is None:
        raise UsageError("perplexity needs transformers: pip install 'chunked-ce[hf,cli]'")
    if Path(name).is_dir() and not (Path(name) / "config.json").is_file():
        raise UsageError(f"{name!r} is no model folder: it has no config.json")
    if Path(name).is_file():
        raise UsageError(f"{name!r} is a file, expected the folder of a model")
    check_folder(Path(name))
    os.environ["HF_HUB_OFFLINE"] = "1"  # for what transformers imports and calls by itself
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    options = {"local_files_only": True, "trust_remote_code": False}
    with failing_on_one_line(name, "tokenizer"):
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, **options)
    with failing_on_one_line(name, "causal LM"):
        loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
            name, dtype=dtype, use_safetensors=True, output_loading_info=True, **options
        )
    model, found = loaded
    check_weights(name, found)
    return model.to(device), tokenizer


@contextmanager
def failing_on_one_line(name: str, what: str) -> Iterator[None]:
    """Whatever a broken file makes its reader raise, and each has errors of its own."""
    try:
        yield
    except Exception as error:
        if not Path(name).is_dir():
            raise UsageError(
                f"{name!r} is no folder, and the local Hugging Face cache has no whole model of "
                "that name: nothing is downloaded, so give the folder of a model"
            ) from error
        reason = " ".join(str(error).split())
        if "ignore_mismatched_sizes" in reason:  # "see the report above", which is not shown
            reason = "its weights have other sizes than config.json says"
        elif not isinstance(error, (OSError, ValueError)):  # whose messages stand alone
            reason = f"{type(error).__name__}: {reason}"
        raise UsageError(f"{name!r} cannot be loaded as a {what}: {reason}") from error


def check_weights(name: str, found: dict[str, Any]) -> None:
    """What the folder lacks is random numbers by now; a tied weight is not missing."""
    lacking = sorted(map(str, {*found["missing_keys"], *found["mismatched_keys"]}))
    if lacking:
        more = f" and {len(lacking) - 3} more" if len(lacking) > 3 else ""
        raise UsageError(
            f"{name!r} has no weights for {', '.join(lacking[:3])}{more}, which would be random: "
            "save the whole model, head included, with the config.json that belongs to it"
        )
