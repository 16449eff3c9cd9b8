"""Measures the launch tables' candidates on the GPU at hand, and prints the row to paste.

    python -m bench.tune --tokens 8192 --vocab 128256 --dtype bfloat16

Statistics, gradient (into new memory, never over what it reads) and both together, interleaved,
medians of CUDA events. A candidate changes the order of sums, and so rounding, alone.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Sequence
from unittest import mock

import torch

from chunked_ce import backend_triton, gpu
from chunked_ce.blocks import Head
from chunked_ce.kernels import launch
from chunked_ce.stats import UNIFORM, Coefficients

CANDIDATES = [
    launch.Row(groups, warps)
    for groups in (256, 512, 1024, 2048)
    for warps in (2, 4, 8, 16)
    if 32 <= groups // warps <= 256  # 1 to 8 groups a thread
]
ROUNDS = 15


def times(steps: dict[launch.Row, Callable[[], object]]) -> dict[launch.Row, float]:
    """Milliseconds, medians of interleaved rounds after one that compiles."""
    taken: dict[launch.Row, list[float]] = {row: [] for row in steps}
    for attempt in range(ROUNDS + 2):
        for row, step in steps.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            step()
            end.record()
            torch.cuda.synchronize()
            if attempt >= 2:
                taken[row].append(start.elapsed_time(end))
    return {row: statistics.median(t) for row, t in taken.items()}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.tune", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--vocab", type=int, default=128256)
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    args = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("bench.tune measures a GPU, and there is none here", file=sys.stderr)
        return 2
    device = torch.device("cuda", torch.cuda.current_device())
    architecture = gpu.architecture(device)
    x = torch.randn(args.tokens, args.vocab, device=device).to(getattr(torch, args.dtype))
    target = torch.randint(args.vocab, (args.tokens,), device=device)
    head = Head(None, 1.0)
    wanted = dict.fromkeys(("entropy", "mean_logprob", "rank", "argmax"), False)
    numbers = torch.full((args.tokens,), -1.0 / args.tokens, device=device)

    def step(row: launch.Row) -> Callable[[], object]:
        def run() -> None:
            with mock.patch.dict(launch.TABLE, {architecture: row}):
                stats, low, _ = backend_triton.row_statistics(
                    x, target, -100, args.vocab, head, UNIFORM, **wanted
                )
                backend_triton.logits_gradient(
                    x, target, stats.lse, stats.logprob, low,
                    Coefficients(None, None, numbers, None), -100, args.vocab, head, inplace=False,
                )  # fmt: skip

        return run

    measured = times({row: step(row) for row in CANDIDATES})
    print(f"{torch.cuda.get_device_name(device)}: statistics + gradient, ms")
    for row, milliseconds in sorted(measured.items(), key=lambda item: item[1]):
        now = "  (in the table)" if row == launch.TABLE.get(architecture, launch.GENERIC) else ""
        print(f"{row.groups:5d} groups {row.num_warps:3d} warps  {milliseconds:8.3f}{now}")
    best = min(measured, key=measured.__getitem__)
    print(f'\n    "{architecture}": Row({best.groups}, {best.num_warps}),')
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
