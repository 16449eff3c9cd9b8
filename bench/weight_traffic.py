"""Bytes that the weight's gradient moves in the linear form, counted on tensors without memory.

    python -m bench weight_traffic                       Llama 3's head, 8192 tokens, 4096 a chunk

Follows every operator that reads or writes the sum over chunks, a product beside it, or the
gradient that the sum is rounded to. "apart" is the schedule that zeroes the sum first and adds a
product to it once a chunk. Prints the bytes, and the seconds that they and the three products of
forward and backward take at the peak of memory and of tensor cores.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from chunked_ce.ops import chunks

from .tensor_bytes import fake_gpu

DEVICES = {"H100": (3.35e12, 989e12), "H200": (4.8e12, 989e12)}  # bytes, bf16 FLOPs a second


class WeightTraffic(TorchDispatchMode):
    """Count the bytes read and written of tensors [rows, hidden] as wide as the sum, or `dtype`."""

    def __init__(self, hidden: int, gradient: tuple[int, ...], dtype: torch.dtype) -> None:
        super().__init__()
        self.hidden, self.gradient, self.dtype = hidden, gradient, dtype
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func.is_view or "empty" in func._schema.name:
            return result
        schema, given = func._schema.arguments, [*args]
        given += [kwargs.get(a.name) for a in schema[len(args) :]]
        written: list[Any] = []
        for argument, value in zip(schema, given, strict=True):
            if argument.alias_info is not None and argument.alias_info.is_write:
                written.append(value)
                # What it held before counts where the operator reads it: x += y, x = x * y.
                reads = func._schema.name.split("::")[1] in ("add_", "addmm_")
            else:
                reads = True
            if reads:
                self._count(value)
        for value in written or [result]:
            self._count(value, written=True)
        return result

    def _count(self, value: Any, *, written: bool = False) -> None:
        if not isinstance(value, torch.Tensor) or value.dim() != 2:
            return
        wide = value.dtype == self.dtype and value.shape[1] == self.hidden
        if wide or (written and tuple(value.shape) == self.gradient):
            self.bytes += value.numel() * value.element_size()


def counted(step: Callable[[], object], vocab: int, hidden: int) -> int:
    """Return the bytes that `step` moves for the weight's gradient."""
    with WeightTraffic(hidden, (vocab, hidden), torch.float32) as traffic:
        step()
    moved: int = traffic.bytes
    return moved


def walked(tokens: int, hidden: int, vocab: int, rows: int | None = None) -> int:
    """Return the bytes that the library's own walk moves, `rows` tokens a chunk."""
    with fake_gpu("sm_90"):
        x, w = (
            torch.empty(n, hidden, dtype=torch.bfloat16, device="meta") for n in (tokens, vocab)
        )
        target = torch.zeros(tokens, dtype=torch.int64, device="meta")
        row_bytes = chunks.padded_row_bytes(vocab, 2)
        most = chunks.default_rows(tokens, row_bytes, "cuda") if rows is None else rows
        indices = chunks.chunk_indices(target, -100, most, False)

        def step() -> None:
            gradients = chunks.Gradients(
                x, w, None, vocab, [False, True, False], torch.float32, indices
            )
            for index in indices:
                grad = x.new_empty(x[index].shape[0], vocab)
                gradients.add(index, x[index], grad)
            gradients.finish()

        return counted(step, vocab, hidden)


def apart(tokens: int, hidden: int, vocab: int, rows: int) -> int:
    """Return the bytes of a zeroed sum to which one product a chunk is added."""

    def step() -> None:
        sum = torch.empty(vocab, hidden, device="meta").zero_()
        for start in range(0, tokens, rows):
            n = min(rows, tokens - start)
            grad, x = (
                torch.empty(n, k, dtype=torch.bfloat16, device="meta") for k in (vocab, hidden)
            )
            sum.add_(torch.mm(grad.t(), x, out_dtype=torch.float32))
        torch.empty(vocab, hidden, dtype=torch.bfloat16, device="meta").copy_(sum)

    return counted(step, vocab, hidden)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="bench weight_traffic",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    for name, default in (("--tokens", 8192), ("--hidden", 4096), ("--vocab", 128256)):
        parser.add_argument(name, type=int, default=default)
    sizes = vars(parser.parse_args(arguments))
    quarter_gib = (256 << 20) // chunks.padded_row_bytes(sizes["vocab"], 2)
    rows = {
        f"apart, {quarter_gib} rows": apart(**sizes, rows=quarter_gib),
        f"in the product, {quarter_gib} rows": walked(**sizes, rows=quarter_gib),
        "in the product, 2048 rows": walked(**sizes, rows=2048),
        "in the product, default": walked(**sizes),
        "one chunk": walked(**sizes, rows=sizes["tokens"]),
    }
    flops = 6 * sizes["tokens"] * sizes["hidden"] * sizes["vocab"]
    print(f"{'schedule':28} {'GB':>6}" + "".join(f"  {d} ms, of products" for d in DEVICES))
    for name, moved in rows.items():
        times = [(moved / bandwidth, flops / peak) for bandwidth, peak in DEVICES.values()]
        row = "".join(f"  {1e3 * t:7.2f}  {100 * t / p:9.1f} %" for t, p in times)
        print(f"{name:28} {moved / 1e9:6.1f}{row}")
    return 0
