"""Builds the kernels' variants for one GPU: `python compile_all.py sm_90 [bfloat16 ...]` prints a line of JSON.

A process of its own, for an interpreted Triton cannot compile.
"""

import itertools
import json
import sys

import torch

from bench.compiled import build, launches
from chunked_ce import backend_triton
from chunked_ce.blocks import Head
from chunked_ce.stats import Coefficients

PLAIN, CAPPED = Head(None, 1.0), Head(30.0, 0.5)
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
NAMES = ("entropy", "mean_logprob", "rank", "argmax")
# GPT-2's ragged rows; rows on 16 bytes; a view whose classes are strided
VIEWS = {
    "50257": lambda dtype: torch.empty(8, 50257, dtype=dtype),
    "50304": lambda dtype: torch.empty(8, 50304, dtype=dtype),
    "strided": lambda dtype: torch.empty(8, 3000, dtype=dtype)[:, ::3],
}


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


def main(target: str, *dtypes: str) -> None:
    results = []
    for label, call in variants([getattr(torch, d) for d in dtypes] or DTYPES):
        for launch in launches(call):
            built = build(launch, target)
            size = len(built.assembly)
            results.append(
                dict(label=label, spills=built.spills, registers=built.registers, size=size)
            )
    print(json.dumps(results))


main(*sys.argv[1:])
