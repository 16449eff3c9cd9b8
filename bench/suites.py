"""What `python -m bench run --suite NAME` measures."""

from __future__ import annotations

from typing import NamedTuple

import torch

from .linear_providers import Shape
from .providers import COMPILING, INPLACE, LINEAR, LOGITS, PROVIDERS

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
FULL = "full"  # a loss from logits behind its head: comparable with one from hidden states
ALL_PROVIDERS = tuple(dict.fromkeys((*PROVIDERS[LOGITS], *PROVIDERS[LINEAR])))
_OF_FULL = tuple(p for p in PROVIDERS[LOGITS] if p not in ("eager", "torch.compile"))
OF_FORM = {
    LINEAR: PROVIDERS[LINEAR],
    FULL: _OF_FULL,  # the others are those from hidden states
    LOGITS: tuple(p for p in PROVIDERS[LOGITS] if p != INPLACE),  # which wants computed logits
}
FULL_SIZE = tuple(Shape(8192, 4096, v) for v in (32000, 50257, 128256, 262144))


class Suite(NamedTuple):
    device: str
    shapes: tuple[Shape, ...]
    dtypes: tuple[str, ...]
    providers: tuple[str, ...]
    repeats: int  # at most; fewer where a round is slow
    seconds_per_case: float  # of timing, a form at a shape in a dtype
    budget: float  # seconds after which nothing more is begun
    processes: bool  # memory of a CPU is measured, each step in a process of its own
    minutes: float  # what it takes as it stands: on 2 cores that have nothing else to do, on a GPU
    also: tuple[tuple[Shape, str], ...] = ()  # beyond every shape in every dtype, and after them


SUITES = {
    "quick": Suite(
        "cpu", tuple(Shape(256, 64, v) for v in (4096, 32000)), ("float32", "bfloat16"),
        tuple(p for p in ALL_PROVIDERS if p not in COMPILING), 5, 5.0, 120.0, False, 1,
    ),
    # What is begun in 600 s is done in 720: nothing in it takes two minutes.
    "cpu": Suite(
        "cpu", tuple(Shape(1024, 768, v) for v in (50257, 16384, 131072)),
        ("bfloat16",), ALL_PROVIDERS, 9, 12.0, 600.0, True, 8,
        also=((Shape(1024, 768, 50257), "float32"),),
    ),
    # What is begun in 400 s is done in 480: a case takes some 15 s, compiling included.
    "gpu": Suite(
        "cuda", tuple(Shape(8192, 4096, v) for v in (128256, 50257, 262144, 32000)),
        ("bfloat16",), ALL_PROVIDERS, 30, 8.0, 400.0, False, 8,
    ),
}  # fmt: skip
