"""Sizes and configs that a plan is made for."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from .values import LARGEST, LOGIT_DTYPES, brief, integer, is_int, names

PLAN_DEVICES = ("cuda", "cpu")
PLAN_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in LOGIT_DTYPES}


def plan_sizes(**sizes: object) -> None:
    for name, value in sizes.items():
        if integer(name, value, "an int") < 1:
            raise ValueError(f"{name} is {value}, expected at least 1")


def plan_device(device: object) -> None:
    if device not in PLAN_DEVICES:
        raise ValueError(f"device is {brief(device)}, expected one of {names(PLAN_DEVICES)}")


def plan_dtype(dtype: object) -> None:
    if dtype not in LOGIT_DTYPES:
        raise ValueError(f"dtype is {brief(dtype)}, expected one of {names(LOGIT_DTYPES)}")


def timed_dtype(dtype: object) -> None:
    known = (torch.bfloat16, torch.float16, torch.float32)
    if dtype not in known:
        raise ValueError(
            f"dtype is {brief(dtype)}, expected one of {names(known)}: no other rate is known"
        )


def config_size(config: Mapping[str, Any], what: str, keys: tuple[str, ...]) -> int:
    """Return the first of `keys` that the config has."""
    for key in keys:
        value = config.get(key)
        if value is not None:
            if not is_int(value) or value < 1:
                raise ValueError(f"config has {key} {brief(value)}, expected a positive int")
            return value
    option = "vocab" if what.startswith("vocab") else "hidden"
    raise ValueError(
        f"config has no {what}, expected one of {names(keys)}, and transformers, which may know a "
        f"default, is not installed or has none: pass --{option} ({option}_size= in Python)"
    )


def config_factor(config: Mapping[str, Any], key: str) -> float | None:
    """Return a factor above 0, or None where the config has none."""
    value = config.get(key)
    if value is None:
        return None
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not 1 / LARGEST <= value <= LARGEST:  # nor NaN
        raise ValueError(
            f"config has {key} {brief(value)}, expected a finite number above 0, or null for none"
        )
    return float(value)


def config_dtype(value: object) -> torch.dtype:
    """Return a dtype by its name; bfloat16 where a config says nothing."""
    name = "bfloat16" if value is None else str(value).removeprefix("torch.")
    if name not in PLAN_DTYPES:
        raise ValueError(f"config has dtype {brief(value)}, expected one of {names(LOGIT_DTYPES)}")
    return PLAN_DTYPES[name]


def unreadable_config(path: Path, why: str) -> ValueError:
    return ValueError(
        f"config {str(path)!r} cannot be read ({why}): give a config.json or the folder that has it"
    )
