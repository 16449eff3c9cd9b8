"""Builds the kernels' variants for one GPU: `python compile_all.py sm_90 [bfloat16 ...]` prints a line of JSON.

A process of its own, for an interpreted Triton cannot compile.
"""

import itertools
import json
import sys

import torch

from bench.compiled import build, launches
from chunked_ce import backend_triton, binary_triton, gpu
from chunked_ce.blocks import Head
from chunked_ce.stats import ClassWeights, Coefficients

PLAIN, CAPPED = Head(None, 1.0), Head(30.0, 0.5)
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
NAMES = ("entropy", "mean_logprob", "rank", "argmax")
# GPT-2's ragged rows; a view whose classes are strided
VIEWS = {
    "50257": lambda dtype: torch.empty(8, 50257, dtype=dtype),
    "strided": lambda dtype: torch.empty(8, 3000, dtype=dtype)[:, ::3],
}
# A row that one CTA holds; rows that are streamed; that a cluster holds
ONE_PASS = {"on chip": (12000, False), "streamed": (50257, False), "cluster": (128256, True)}


def variants(dtypes):
    for dtype, view, head, everything in itertools.product(
        dtypes, VIEWS, (PLAIN, CAPPED), (False, True)
    ):
        if dtype == torch.float16 and (head is CAPPED or everything):
            continue  # as bfloat16 but for the conversion
        x = VIEWS[view](dtype)
        rows, vocab = x.shape
        target = torch.empty(rows, dtype=torch.int64)
        wanted = dict.fromkeys(NAMES, everything)
        label = f"{dtype} {view} {'capped' if head is CAPPED else ''} {'everything' if everything else ''}"
        yield (
            f"stats {label}",
            lambda x=x, t=target, v=vocab, h=head, w=wanted: backend_triton.row_statistics(
                x, t, -100, v, h, **w
            ),
        )
        vector = torch.empty(rows, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
        numbers = (
            Coefficients(*[vector] * 4) if everything else Coefficients(None, None, vector, None)
        )
        yield (
            f"grad {label}",
            lambda x=x, t=target, v=vocab, h=head, n=numbers, r=vector: (
                backend_triton.logits_gradient(x, t, r, r, r, n, -100, v, h, inplace=False)
            ),
        )


def weighted_variants(dtypes):
    """Class weights and probabilities, the latter of the logits' dtype and of another."""
    for dtype, view in itertools.product(dtypes, VIEWS):
        if dtype == torch.float16 or (view == "strided" and dtype != torch.bfloat16):
            continue  # as bfloat16 but for the conversion
        x = VIEWS[view](dtype)
        rows, vocab = x.shape
        target = torch.empty(rows, dtype=torch.int64)
        vector = torch.empty(rows, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
        wanted = dict.fromkeys(NAMES, False) | dict(mean_logprob=True)
        for prob in (x, torch.empty(rows, vocab)):
            weights = ClassWeights(torch.empty(vocab), prob, 0.9, 0.1)
            label = f"weighted {dtype} {view} {prob.dtype}"
            yield (
                f"stats {label}",
                lambda x=x, t=target, v=vocab, w=weights, n=wanted: backend_triton.row_statistics(
                    x, t, -100, v, PLAIN, w, **n
                ),
            )
            numbers = Coefficients(vector, None, vector, vector)
            yield (
                f"grad {label}",
                lambda x=x, t=target, v=vocab, w=weights, n=numbers, r=vector: (
                    backend_triton.logits_gradient(
                        x, t, r, r, r, n, -100, v, PLAIN, w, inplace=False
                    )
                ),
            )


def binary_variants(dtypes):
    for dtype, view, everything in itertools.product(dtypes, VIEWS, (False, True)):
        if dtype == torch.float16 and (view == "strided" or everything):
            continue
        x = VIEWS[view](dtype)
        labels = x if everything else None
        per_class = torch.empty(x.shape[-1]).expand(x.shape) if everything else None
        left_out = None if everything else torch.empty(x.shape[0], 5, dtype=torch.int32)
        label = f"binary {dtype} {view} {'everything' if everything else 'by index'}"
        given = (x, labels, per_class, per_class)
        yield f"sum {label}", lambda g=given, k=left_out: binary_triton.total(*g, k)
        yield f"grad {label}", lambda g=given, x=x: binary_triton.gradient(*g, x)


def one_pass_variants(dtypes, target):
    for dtype, form, everything in itertools.product(dtypes, ONE_PASS, (False, True)):
        vocab, on_clusters = ONE_PASS[form]
        if on_clusters and (dtype == torch.float64 or target not in ("sm_90", "sm_100")):
            continue
        if dtype == torch.float16 and everything:
            continue
        x = torch.empty(8, vocab, dtype=dtype)
        rows = torch.empty(8)
        options = (rows, torch.empty(()), 0.1, 1e-4) if everything else (None, None, 0.0, 0.0)
        yield (
            f"one pass {dtype} {form} {'everything' if everything else ''}",
            lambda x=x, r=rows, o=options, v=vocab - 7 * everything, e=everything, c=on_clusters: (
                backend_triton.loss_and_gradient(
                    x, r.long(), *o, -100, v, CAPPED if e else PLAIN, inplace=False, on_clusters=c
                )
            ),
        )


def main(target: str, *names: str) -> None:
    gpu.architecture = lambda device: target
    gpu.l2_bytes = lambda device: 50 << 20
    dtypes = [getattr(torch, name) for name in names] or DTYPES
    results = []
    calls = itertools.chain(
        variants(dtypes),
        weighted_variants(dtypes),
        binary_variants(dtypes),
        one_pass_variants(dtypes, target),
    )
    for label, call in calls:
        for launch in launches(call):
            built = build(launch, target)
            size = len(built.assembly)
            results.append(
                dict(
                    label=label,
                    kernel=launch.name,
                    spills=built.spills,
                    registers=built.registers,
                    size=size,
                )
            )
    print(json.dumps(results))


main(*sys.argv[1:])
