"""Load a language model and its tokenizer from a local folder, and run no code from there."""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from .errors import UsageError

_TOKENIZER_FILES = ("tokenizer*", "vocab.*", "*.model", "*.tiktoken", "tekken.json")


def usable_device(name: str | None) -> torch.device:
    """Return the device named, or by default a GPU that torch can use, else the CPU."""
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.zeros((), dtype=torch.float64, device=device).item()  # sums are float64
    except (AssertionError, NotImplementedError, RuntimeError, TypeError) as error:
        raise UsageError(
            f"--device: {name!r} cannot be used here; expected cpu, or cuda with a GPU"
        ) from error
    return device


def check_folder(folder: Path) -> None:
    """Raise where the folder lacks a file, or where loading it would run code from it.

    A configuration may name a repository of kernels, whose code would be fetched and run; an
    adapter may come as a pickle.
    """
    if folder.is_file():
        raise UsageError(f"{str(folder)!r} is a file, expected the folder of a model")
    if folder.is_dir():
        _check_contents(folder)
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
    """Return (model, tokenizer), from safetensors and JSON alone, without a network."""
    if importlib.util.find_spec("transformers") is None:
        raise UsageError("this command needs transformers: pip install 'chunked-ce[hf,cli]'")
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


def _check_contents(folder: Path) -> None:
    """Raise where the folder has no model, or no tokenizer."""
    if not (folder / "config.json").is_file():
        inner = sorted(str(path.parent) for path in folder.glob("*/config.json"))
        mend = f"; did you mean {inner[0]!r}?" if inner else ""
        raise UsageError(f"{str(folder)!r} is no model folder: it has no config.json{mend}")
    if not any(any(folder.glob(pattern)) for pattern in _TOKENIZER_FILES):
        raise UsageError(
            f"{str(folder)!r} has no tokenizer files, such as tokenizer.json: save the model's "
            "tokenizer there, tokenizer.save_pretrained(folder)"
        )


@contextmanager
def failing_on_one_line(name: str, what: str) -> Iterator[None]:
    """Turn whatever a broken file makes its reader raise into one line."""
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
    """Raise where weights are missing, which are random by now; a tied one is not missing."""
    lacking = sorted(map(str, {*found["missing_keys"], *found["mismatched_keys"]}))
    if lacking:
        more = f" and {len(lacking) - 3} more" if len(lacking) > 3 else ""
        raise UsageError(
            f"{name!r} has no weights for {', '.join(lacking[:3])}{more}, which would be random: "
            "save the whole model, head included, with the config.json that belongs to it"
        )
