"""Calls of the Triton backend that between them launch every specialization of every kernel."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch

from chunked_ce.backends import clusters
from chunked_ce.backends import triton as backend_triton
from chunked_ce.backends import triton_binary as binary_triton
from chunked_ce.backends import triton_pair as pair_triton
from chunked_ce.core.divergence import KINDS, Divergence, PairStats
from chunked_ce.core.gradient import Coefficients
from chunked_ce.core.head import Head
from chunked_ce.core.row_stats import ClassWeights, TokenStats

PLAIN, CAPPED = Head(None, 1.0), Head(30.0, 0.5)
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
Call = tuple[str, Callable[[], Any]]  # what it is, the call
NAMES = ("entropy", "mean_logprob", "rank", "argmax")
# GPT-2's ragged rows; a view with strided classes
VIEWS = {
    "50257": lambda dtype: torch.empty(8, 50257, dtype=dtype),
    "strided": lambda dtype: torch.empty(8, 3000, dtype=dtype)[:, ::3],
}
# A row that one CTA holds; rows that are streamed; that a cluster holds
ONE_PASS = {"on chip": (12000, False), "streamed": (50257, False), "cluster": (128256, True)}


def every_call(target: str, dtypes: Iterable[torch.dtype] = DTYPES) -> Iterator[Call]:
    """Yield the calls of all variants of the kernels for `target`."""
    dtypes = tuple(dtypes)
    yield from head_calls(dtypes)
    yield from weighted_calls(dtypes)
    yield from binary_calls(dtypes)
    yield from pair_calls(dtypes)
    yield from one_pass_calls(dtypes, target)


def head_calls(dtypes: tuple[torch.dtype, ...]) -> Iterator[Call]:
    """Yield calls for statistics and gradient with head transforms and further statistics."""
    for dtype, view, head, everything in itertools.product(
        dtypes, VIEWS, (PLAIN, CAPPED), (False, True)
    ):
        if dtype == torch.float16 and (head is CAPPED or everything):
            continue  # as bfloat16 but for the conversion
        x = VIEWS[view](dtype)
        rows, vocab = x.shape
        target = torch.empty(rows, dtype=torch.int64)
        wanted: Any = dict.fromkeys(NAMES, everything)
        capped, more = "capped" if head is CAPPED else "", "everything" if everything else ""
        label = f"{dtype} {view} {capped} {more}"
        vector = torch.empty(rows, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
        only_c = Coefficients(None, None, vector, None)
        numbers = Coefficients(*[vector] * 4) if everything else only_c
        arguments: Any = (x, target, vector, vector, vector, numbers, -100, vocab, head)
        statistics = partial(backend_triton.row_statistics, x, target, -100, vocab, head, **wanted)
        yield f"stats {label}", statistics
        yield f"grad {label}", partial(backend_triton.logits_gradient, *arguments, inplace=False)


def weighted_calls(dtypes: tuple[torch.dtype, ...]) -> Iterator[Call]:
    """Yield calls with class weights, and with probabilities of two dtypes."""
    for dtype, view in itertools.product(dtypes, VIEWS):
        if dtype == torch.float16 or (view == "strided" and dtype != torch.bfloat16):
            continue  # as bfloat16 but for the conversion
        x = VIEWS[view](dtype)
        rows, vocab = x.shape
        target = torch.empty(rows, dtype=torch.int64)
        vector = torch.empty(rows, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
        wanted: Any = dict.fromkeys(NAMES, False) | dict(mean_logprob=True)
        for prob in (x, torch.empty(rows, vocab)):
            weights = ClassWeights(torch.empty(vocab), prob, 0.9, 0.1)
            label = f"weighted {dtype} {view} {prob.dtype}"
            arguments: Any = (x, target, -100, vocab, PLAIN, weights)
            yield f"stats {label}", partial(backend_triton.row_statistics, *arguments, **wanted)
            numbers = Coefficients(vector, None, vector, vector)
            arguments = (x, target, vector, vector, vector, numbers, -100, vocab, PLAIN, weights)
            yield (
                f"grad {label}",
                partial(backend_triton.logits_gradient, *arguments, inplace=False),
            )


def binary_calls(dtypes: tuple[torch.dtype, ...]) -> Iterator[Call]:
    """Yield calls for binary sums and gradients, with dense labels and label indices."""
    for dtype, view, everything in itertools.product(dtypes, VIEWS, (False, True)):
        if dtype == torch.float16 and (view == "strided" or everything):
            continue
        x = VIEWS[view](dtype)
        labels = x if everything else None
        per_class = torch.empty(x.shape[-1]).expand(x.shape) if everything else None
        left_out = None if everything else torch.empty(x.shape[0], 5, dtype=torch.int32)
        label = f"binary {dtype} {view} {'everything' if everything else 'by index'}"
        total = partial(binary_triton.loss_sum, x, labels, per_class, per_class, left_out)
        yield f"sum {label}", total
        yield f"grad {label}", partial(binary_triton.gradient, x, labels, per_class, per_class, x)


def pair_calls(dtypes: tuple[torch.dtype, ...]) -> Iterator[Call]:
    """Each divergence of a student from a teacher of the same dtype, and of another."""
    for dtype, view, kind in itertools.product(dtypes, VIEWS, KINDS):
        if kind != "forward" and (view == "strided" or dtype == torch.float16):
            continue  # addresses and conversions, which are the same for every divergence
        if dtype == torch.float16 and view == "strided":
            continue
        x = VIEWS[view](dtype)
        rows, vocab = x.shape
        y = torch.empty(rows, vocab) if kind == "reverse" else x
        vector = torch.empty(rows, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
        ignored = torch.empty(rows, dtype=torch.bool) if kind == "jsd" else None
        how, stats = Divergence(kind, 0.5, 2.0), PairStats(*[vector] * len(PairStats._fields))
        given: Any = (x, y, ignored, stats, vector, how, vocab)
        label = f"{kind} {dtype} {view}"
        yield f"pair stats {label}", partial(pair_triton.pair_stats, x, y, ignored, how, vocab)
        yield f"pair grad {label}", partial(pair_triton.pair_gradient, *given)
        if kind == "jsd":  # of a shard
            terms: Any = (x, y, ignored, stats, how, vocab)
            yield f"pair terms {label}", partial(pair_triton.pair_terms, *terms)


def one_pass_calls(dtypes: tuple[torch.dtype, ...], target: str) -> Iterator[Call]:
    """Yield calls for loss and gradient in one pass, in each form of the kernel."""
    has_clusters = target in ("sm_90", "sm_100") and clusters.triton_supports_clusters()
    for dtype, form, everything in itertools.product(dtypes, ONE_PASS, (False, True)):
        vocab, on_clusters = ONE_PASS[form]
        if on_clusters and (dtype == torch.float64 or not has_clusters):
            continue
        if dtype == torch.float16 and everything:
            continue
        x, numbers = torch.empty(8, vocab, dtype=dtype), torch.empty(8)
        loss_options: Any = (None, None, 0.0, 0.0)
        head = PLAIN
        if everything:
            loss_options, head = (numbers, torch.empty(()), 0.1, 1e-4), CAPPED
            vocab -= 7
        arguments: Any = (x, numbers.long(), *loss_options, -100, vocab, head)
        options: Any = dict(inplace=False, on_clusters=on_clusters)
        if everything:
            options["stats"] = TokenStats(numbers, numbers)
        label = f"one pass {dtype} {form} {'everything' if everything else ''}"
        yield label, partial(backend_triton.loss_and_gradient, *arguments, **options)
