"""Peak memory of a policy-gradient step of a model of transformers: stock, and enabled.

    python -m bench log_probabilities                     seconds on two cores
    python -m bench log_probabilities --dtype bfloat16 --csv out.csv

Log-probabilities of the tokens and entropies, with gradients, as TRL's
`selective_log_softmax_and_entropy` computes them from the logits of a model without dropout. Each
way is measured in a fresh process, above what the process holds once the model and its gradients
are there (needs /proc). Both must give the same loss.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from chunked_ce.huggingface import enable

from . import measure, options
from .cases import BOTH, DTYPES, LINEAR, Case
from .perplexity import Sizes, model_of

STOCK, OURS = "stock", "enable"
MODES = {STOCK: "logits", OURS: "enable(model, without_labels=True)"}


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
            f"peak memory beside the model and its gradients: context {sizes.context}, batch "
            f"{sizes.batch}, V = {sizes.vocab}, D = {sizes.hidden}, {sizes.dtype}; the logits "
            f"alone {case.logits_bytes / 2**20:.0f} MiB"
        )
        found = {w: measure.in_fresh_process(peak, w, sizes, args.threads) for w in MODES}
        rows = [("", "", "MiB", "loss")]
        for way, (size, loss) in found.items():
            rows.append((way, MODES[way], f"{size / 2**20:.0f}", f"{loss:.6f}"))
            report.add(case, way, BOTH, "peak_extra_bytes", size)
        report.print_table(rows, labels=2)
        (stock, truth), (ours, loss) = found[STOCK], found[OURS]
        print(f"\nmemory: {OURS} / {STOCK} {ours / stock:.3f}")
    if abs(loss / truth - 1) > (1e-5 if sizes.dtype == "float32" else 1e-2):
        print(f"WRONG  loss {loss}, stock {truth}: the memory means nothing")
        return 1
    return 0


def peak(way: str, sizes: Sizes, threads: int) -> tuple[int, float]:
    """Return the peak bytes and the loss."""
    torch.set_num_threads(threads)
    model = model_of(sizes)
    if way == OURS:
        enable(model, without_labels=True)
    ids = torch.randint(sizes.vocab, (sizes.batch, sizes.context + 1))
    step(model, ids[:, :9])  # what is set up once, and the gradients
    return measure.extra_peak_memory(lambda: step(model, ids))


def step(model: Any, ids: Tensor) -> float:
    logits = model(input_ids=ids[:, :-1], use_cache=False).logits
    logps, entropies = log_probabilities_and_entropies(logits, ids[:, 1:])
    loss = -(logps.float() + 0.01 * entropies.float()).mean()
    loss.backward()
    return loss.item()


def log_probabilities_and_entropies(logits: Any, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Compute both as TRL does on a CPU."""
    if logits.dtype == torch.float32:
        chosen = torch.gather(logits, dim=-1, index=ids.unsqueeze(-1)).squeeze(-1)
        logps = chosen - torch.stack([torch.logsumexp(row, dim=-1) for row in logits])
    else:
        rows = zip(logits, ids.unsqueeze(-1), strict=True)
        logps = torch.stack([F.log_softmax(r, dim=-1).gather(-1, i) for r, i in rows]).squeeze(-1)
    entropies = []
    for chunk in logits.reshape(-1, logits.shape[-1]).split(128, dim=0):
        logp = F.log_softmax(chunk, dim=-1)
        entropies.append(-(torch.exp(logp) * logp).sum(-1))
    return logps, torch.cat(entropies).reshape(ids.shape)


def _parser() -> argparse.ArgumentParser:
    parser = options.parser_of("log_probabilities", __doc__)
    options.add_sizes(parser, context=512, batch_size=4, vocab=50257, hidden=256, threads=2)
    options.add_csv(parser)
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="default: %(default)s")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
