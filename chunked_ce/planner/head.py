"""The sizes of a model's head, given or read from a Hugging Face config."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .. import checks

_VOCAB_KEYS = ("vocab_size",)
# OPT projects its hidden states to word_embed_proj_dim before the head.
_HIDDEN_KEYS = ("word_embed_proj_dim", "hidden_size", "n_embd", "d_model", "dim")


class HeadShape(NamedTuple):
    """A head: its sizes, its dtype, and what it does to logits.

    >>> from chunked_ce.planner import HeadShape
    >>> HeadShape(vocab_size=128256, hidden_size=4096).weight_bytes
    1050673152
    """

    vocab_size: int
    hidden_size: int
    dtype: torch.dtype = torch.bfloat16
    softcap: float | None = None
    logit_scale: float = 1.0

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weight [V, D]."""
        return self.vocab_size * self.hidden_size * self.dtype.itemsize


def head_of_config(
    config: Mapping[str, Any] | str | Path,
    *,
    vocab_size: int | None = None,
    hidden_size: int | None = None,
    dtype: torch.dtype | None = None,
) -> HeadShape:
    """Return the head of a Hugging Face config: its dict, its JSON file, or the file's folder.

    Some configs leave a size to the default of their class. It is looked up where transformers is
    installed.

    Args:
        config: the config; its softcap and logit scale are read too.
        vocab_size, hidden_size, dtype: used instead of the config's.

    Raises:
        TypeError, ValueError: the file cannot be read or is no JSON; it has no vocabulary or
            hidden size, or a value that is none.

    >>> from chunked_ce.planner import head_of_config
    >>> head_of_config({"vocab_size": 50257, "n_embd": 768, "dtype": "float32"}).hidden_size
    768
    """
    if not isinstance(config, Mapping):
        config = _read(Path(config))
    nested = config.get("text_config")
    text = {**config, **nested} if isinstance(nested, Mapping) else dict(config)
    if vocab_size is None:
        vocab_size = _size(config, text, "vocabulary size", _VOCAB_KEYS)
    if hidden_size is None:
        hidden_size = _size(config, text, "hidden size", _HIDDEN_KEYS)
    if dtype is None:
        dtype = checks.config_dtype(text.get("dtype") or text.get("torch_dtype"))
    softcap = checks.config_factor(text, "final_logit_softcapping")
    scale = checks.config_factor(text, "logit_scale") or 1.0
    divisor = checks.config_factor(text, "logits_scaling") or 1.0  # Granite's
    return HeadShape(vocab_size, hidden_size, dtype, softcap, scale / divisor)


def _size(
    config: Mapping[str, Any], text: Mapping[str, Any], what: str, keys: tuple[str, ...]
) -> int:
    """Return a size of the language model, or its class's default."""
    if all(text.get(key) is None for key in keys):
        text = _class_defaults(config, keys)
    return checks.config_size(text, what, keys)


def _class_defaults(config: Mapping[str, Any], keys: tuple[str, ...]) -> dict[str, Any]:
    """Return the values of `keys` that the config's class in transformers has."""
    if "model_type" not in config or importlib.util.find_spec("transformers") is None:
        return {}
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    try:
        whole = CONFIG_MAPPING[config["model_type"]](**dict(config))
        text = whole.get_text_config()
    except Exception:  # of a class that is not known, or that rejects the rest of the config
        return {}
    return {key: getattr(text, key, None) for key in keys}


def _read(path: Path) -> Mapping[str, Any]:
    if path.is_dir():
        path = path / "config.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise checks.unreadable_config(path, error.strerror or str(error)) from error
    except ValueError as error:
        raise checks.unreadable_config(path, "it holds no JSON") from error
    if not isinstance(content, Mapping):
        raise checks.unreadable_config(path, "it holds no JSON object")
    return content
