"""Peak memory of scoring text with a language model: the stock way, and evaluate_perplexity.

    python -m bench perplexity                                 a minute on two cores
    python -m bench perplexity --dtype bfloat16 --csv out.csv  with the figures in a file

The stock way is the model's forward with logits [B, T, V], then F.cross_entropy on them shifted and
in float32, as transformers' own loss has it. Each is measured in a fresh process, above what the
process holds once the model is loaded (needs /proc), and both must give the same mean NLL.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

import chunked_ce

from . import measure, options
from .cases import DTYPES, FORWARD, LINEAR, Case

STOCK, OURS = "stock", "evaluate_perplexity"
MODES = {STOCK: "forward with logits, then F.cross_entropy", OURS: "chunked_ce"}


class Sizes(NamedTuple):
    context: int
    batch: int
    vocab: int
    hidden: int
    dtype: str


def main(arguments: Sequence[str] | None = None) -> int:
    """Return 1 where the two disagree, for then the memory means nothing."""
    args = _parser().parse_args(arguments)
    if not measure.memory_is_measurable():
        print("memory is not measured: it needs /proc")
        return 0
    sizes = Sizes(args.context, args.batch_size, args.vocab, args.hidden, args.dtype)
    case = Case(LINEAR, sizes.batch * sizes.context, sizes.hidden, sizes.vocab, DTYPES[sizes.dtype])
    with options.reporting(args.threads, args.csv) as report:
        report.title(
            f"peak memory beside the model: context {sizes.context}, batch {sizes.batch}, "
            f"V = {sizes.vocab}, D = {sizes.hidden}, {sizes.dtype}; the logits alone "
            f"{case.logits_bytes / 2**20:.0f} MiB"
        )
        found = {w: measure.in_fresh_process(peak, w, sizes, args.threads) for w in MODES}
        rows = [("", "", "MiB", "mean NLL")]
        for way, (size, nats) in found.items():
            rows.append((way, MODES[way], f"{size / 2**20:.0f}", f"{nats:.6f}"))
            report.add(case, way, FORWARD, "peak_extra_bytes", size)
        report.print_table(rows, labels=2)
        (stock, truth), (ours, nats) = found[STOCK], found[OURS]
        print(f"\nmemory: {OURS} / {STOCK} {ours / stock:.3f}")
    if abs(nats / truth - 1) > (1e-6 if sizes.dtype == "float32" else 1e-3):
        print(f"WRONG  mean NLL {nats}, stock {truth}: the memory means nothing")
        return 1
    return 0


def peak(way: str, sizes: Sizes, threads: int) -> tuple[int, float]:
    """Return the peak bytes and the mean NLL."""
    torch.set_num_threads(threads)
    model = model_of(sizes)
    ids = torch.randint(sizes.vocab, (sizes.batch, sizes.context + 1))
    run = stock_nll if way == STOCK else our_nll
    run(model, ids[:, :9])  # what is set up once
    return measure.extra_peak_memory(lambda: run(model, ids))


@torch.no_grad()
def stock_nll(model: Any, ids: torch.Tensor) -> float:
    logits = model(input_ids=ids[:, :-1], use_cache=False).logits.float()
    return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).item()


def our_nll(model: Any, ids: torch.Tensor) -> float:
    return chunked_ce.evaluate_perplexity(model, ids, batch_size=len(ids)).mean_nll


def model_of(sizes: Sizes) -> Any:
    """Return a GPT-2 of two layers: the head is what is measured."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=sizes.vocab, n_positions=sizes.context, n_embd=sizes.hidden, n_layer=2, n_head=4,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model: Any = GPT2LMHeadModel(config).eval()
    return model.to(DTYPES[sizes.dtype])


def _parser() -> argparse.ArgumentParser:
    parser = options.parser_of("perplexity", __doc__)
    options.add_sizes(parser, context=1024, batch_size=4, vocab=50257, hidden=256, threads=2)
    options.add_csv(parser)
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="default: %(default)s")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
