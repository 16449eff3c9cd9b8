"""Log-likelihoods of continuations, as multiple-choice evaluations want them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import checks
from .language_model import device_of, evaluating, examine
from .scoring import IGNORE


class Loglikelihood(NamedTuple):
    """Of a continuation after its context."""

    logprob: float  # summed over the continuation's tokens, in nats
    is_greedy: bool  # each of them was the model's first choice


@torch.no_grad()
def loglikelihood(
    model: Any,
    pairs: Sequence[tuple[Any, Any]],
    *,
    context_length: int | None = None,
    batch_size: int = 8,
    device: torch.device | str | None = None,
    backend: str = "auto",
) -> list[Loglikelihood]:
    """Log-probability of each continuation after its context, and whether greedy decoding gives it.

    What lm-evaluation-harness calls `_loglikelihood_tokens`. A context that is too long loses its
    beginning. Padding is on the right, and changes nothing.

    Args:
        model: see :func:`chunked_ce.evaluate_perplexity`.
        pairs: (context, continuation), both token ids; neither empty.
        context_length: most tokens the model sees at once, by default what its configuration says.
        batch_size, device, backend: see :func:`chunked_ce.evaluate_perplexity`.

    Returns:
        One (logprob, is_greedy) per pair, in order; logprob summed in float64.

    Raises:
        TypeError, ValueError: an empty context or continuation, a continuation longer than
            `context_length`, ids that the model does not know; before anything is scored.
    """
    checks.model(model)
    where = checks.device(device_of(model) if device is None else device)
    context_length = checks.context_length(context_length, model, None)
    batch_size = checks.at_least_one("batch_size", batch_size)
    checks.backend_name(backend)
    checked = checks.likelihood_pairs(pairs, context_length)
    if not checked:
        return []
    # The last token is predicted and never shown.
    tokens = [torch.cat(pair)[-context_length - 1 :] for pair in checked]
    checks.ids_known("pair", tokens, model, None)
    order = sorted(range(len(tokens)), key=lambda i: -len(tokens[i]))
    results: dict[int, Loglikelihood] = {}
    with evaluating(model):
        examined = examine(model, tokens[order[0]][:-1], where)
        checks.ids_known("pair", tokens, model, examined.vocab_size)
        for begin in range(0, len(order), batch_size):
            chosen = order[begin : begin + batch_size]
            inputs, target = _padded(
                [tokens[i] for i in chosen], [len(checked[i][1]) for i in chosen]
            )
            stats = examined.token_stats(
                inputs.to(where), target.to(where), rank=True, backend=backend
            )
            assert stats.rank is not None
            sums = stats.logprob.sum(1, dtype=torch.float64).tolist()
            greedy = (stats.rank <= 0).all(1).tolist()  # -1 where nothing is scored
            results.update(zip(chosen, map(Loglikelihood, sums, greedy), strict=True))
    return [results[i] for i in range(len(order))]


def _padded(tokens: list[Tensor], scored: list[int]) -> tuple[Tensor, Tensor]:
    """Inputs and targets [B, T]; of each row's targets the last `scored` count."""
    width = max(map(len, tokens)) - 1
    inputs = torch.zeros(len(tokens), width, dtype=torch.int64)
    target = torch.full_like(inputs, IGNORE)
    for row, (ids, count) in enumerate(zip(tokens, scored, strict=True)):
        last = len(ids) - 1
        inputs[row, :last] = ids[:-1]
        target[row, last - count : last] = ids[-count:]
    return inputs, target
