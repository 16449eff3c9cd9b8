"""Log-likelihoods of continuations, for multiple-choice evaluations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from ..checks import backend_name
from . import checks
from .documents import Document
from .language_model import device_of, evaluating, examine
from .scoring import NLL, TOKENS, TOP1, Scoring
from .windows import Window, batches


class Loglikelihood(NamedTuple):
    """Log-probability of a continuation after its context.

    >>> from chunked_ce import Loglikelihood
    >>> Loglikelihood(logprob=-2.5, is_greedy=False).logprob
    -2.5
    """

    logprob: float  # summed over the continuation's tokens, in nats
    is_greedy: bool  # each of them was the model's first choice


@torch.no_grad()
@checks.names_unknown
def loglikelihood(
    model: Any,
    pairs: Sequence[tuple[Any, Any]],
    *,
    context_length: int | None = None,
    batch_size: int = 8,
    device: torch.device | str | None = None,
    backend: str = "auto",
) -> list[Loglikelihood]:
    """Compute each continuation's log-probability after its context, and whether it is greedy.

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

    >>> import torch
    >>> from chunked_ce import loglikelihood
    >>> def model(ids):  # the next token is most likely the same again
    ...     return 5.0 * torch.nn.functional.one_hot(ids, 16).float()
    >>> same, other = loglikelihood(model, [([3], [3, 3]), ([3], [4])], context_length=8)
    >>> same.is_greedy, other.is_greedy, same.logprob > other.logprob
    (True, False, True)
    """
    checks.model(model)
    where = checks.device(device_of(model) if device is None else device)
    context_length = checks.context_length(context_length, model, None)
    batch_size = checks.at_least_one("batch_size", batch_size)
    backend_name(backend)
    checked = checks.likelihood_pairs(pairs, context_length)
    if not checked:
        return []
    tokens = [torch.cat(pair)[-context_length - 1 :] for pair in checked]
    checks.ids_known("pair", tokens, model, None)
    # The last token is predicted and never shown.
    windows = [
        Window(i, 0, len(ids) - 1, len(continuation))
        for i, (ids, (_, continuation)) in enumerate(zip(tokens, checked, strict=True))
    ]
    with evaluating(model):
        examined = examine(model, "pair", tokens, context_length, where, backend)
        documents = [Document(ids, None, None) for ids in tokens]
        scoring = Scoring(examined, documents, windows, where, rank=True, backend=backend)
        if scoring.run(batches(windows, batch_size), None, progress=False):
            raise KeyboardInterrupt
    table = scoring.table.tolist()
    return [Loglikelihood(-row[NLL], row[TOP1] == row[TOKENS]) for row in table]
