"""Perplexity of a language model on documents of any length: sliding windows, no logits.

Windows are padded on the right to the longest of their batch. A causal model's token sees nothing
to its right, and positions count from the first column, so padding changes nothing. That the model
is causal is verified on a few tokens first. Every window leaves its sums in a row of a table. The
report adds up that table in the order of the text, so batch size, order and ranks change only the
rounding inside the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from ..checks import backend_name, flags
from ..distributed.checks import process_group
from . import checks
from .documents import Document, bos_id, eos_id, from_ids, from_text
from .language_model import device_of, evaluating, examine
from .progress import describe_text, describe_windows
from .report import EvaluationInterrupted, EvaluationReport
from .scoring import Scoring
from .windows import batches, sliding_windows


@torch.no_grad()
@checks.names_unknown
def evaluate_perplexity(
    model: Any,
    input_ids: Tensor | Sequence[Any] | None = None,
    *positional: NoReturn,
    text: str | Sequence[str] | None = None,
    tokenizer: Any = None,
    attention_mask: Tensor | None = None,
    context_length: int | None = None,
    stride: int | None = None,
    full_last_window: bool = False,
    batch_size: int = 8,
    bos: bool | int | None = None,
    eos: bool | int = False,
    rank: bool = False,
    per_document: bool = False,
    per_position: bool = False,
    per_window: bool = False,
    device: torch.device | str | None = None,
    progress: bool = False,
    group: Any = None,
    backend: str = "auto",
) -> EvaluationReport:
    """Compute the perplexity of a causal language model on documents, each token scored once.

    Sliding windows: see :mod:`chunked_ce.evaluation.windows`. The model runs in evaluation mode,
    in its dtype and under the autocast of the caller. Its output head is deferred if all the model
    does to the logits is a scale, a cap, a slice or a cast: logits [B, T, V] then never exist.
    Otherwise its own logits are used, and `report.logits_stored` is True.

    Args:
        model: a transformers causal LM, or a module that maps ids [B, T] to logits [B, T, V].
        input_ids: documents as token ids: [T], [N, T], or a sequence of them; or
        text: a document or a sequence of them, and
        tokenizer: its transformers tokenizer. Bytes and words are counted for text alone.
        attention_mask: [N, T], 0 where `input_ids` are padded, which must be on the right.
        context_length: most tokens the model sees at once; by default what its configuration says.
            More is refused where the model has no positions for them.
        stride: by how much a window goes beyond the one before, from 1 to `context_length`, which
            is the default. A token has at least context_length - stride + 1 tokens of context,
            or all there are.
        full_last_window: let a document's last window reach back as far as the context allows.
        batch_size: how many windows the model is shown at a time.
        bos: id put before each document: context, not scored. True for the tokenizer's or the
            model's, False for none; None does as the tokenizer does, and for `input_ids` none.
            Without it a document's first token is not scored, nor are its bytes.
        eos: id put after each document and scored; it has no bytes. True for the tokenizer's.
            A document that has one of them already is given no second one, with a warning.
        rank: top-1 accuracy and mean reciprocal rank too.
        per_document, per_position, per_window: reports of each, see :class:`EvaluationReport`.
        device: where batches go, by default where the model's parameters are. The model is not
            moved.
        progress: say on stderr when text is tokenized, and show a bar with the running
            perplexity; needs tqdm.
        group: a torch.distributed process group (`torch.distributed.group.WORLD` for all ranks):
            each rank, given the same documents, scores every so many-th batch, and all get the
            whole report, bit for bit. None: this process scores everything; so is WORLD until
            init_process_group() has been called.
        backend: see :func:`chunked_ce.token_stats`.

    Returns:
        EvaluationReport; sums in float64, counts exact.

    Raises:
        TypeError, ValueError: an argument of the wrong type or range, a document of fewer than two
            tokens, ids that the model does not know, a model that is not causal; before scoring.
        EvaluationInterrupted: on Ctrl-C, with the report so far; without `group`, and once there is
            something to report.

    >>> import torch
    >>> from chunked_ce import evaluate_perplexity
    >>> def model(ids):  # each of 16 tokens is equally likely
    ...     return torch.zeros(*ids.shape, 16)
    >>> report = evaluate_perplexity(model, [[1, 2, 3, 4, 5]], context_length=4)
    >>> f"{report.perplexity:.1f} per token, {report.tokens} tokens"
    '16.0 per token, 4 tokens'
    """
    flags(
        full_last_window=full_last_window, rank=rank, per_document=per_document,
        per_position=per_position, per_window=per_window, progress=progress,
    )  # fmt: skip
    checks.no_more_positional(positional)
    backend_name(backend)
    checks.progress_bar(progress)
    checks.model(model)
    checks.one_source(input_ids, text, attention_mask, tokenizer)
    where = checks.device(device_of(model) if device is None else device)
    group = None if group is None else process_group(group)
    context_length = checks.context_length(context_length, model, tokenizer)
    stride = checks.stride(stride, context_length)
    batch_size = checks.at_least_one("batch_size", batch_size)
    before, after = bos_id(bos, model, tokenizer), eos_id(eos, model, tokenizer)
    describe_text(text, shown=progress)
    documents = _documents(model, tokenizer, text, input_ids, attention_mask, before, after)
    ids = [document.ids for document in documents]
    settings: dict[str, Any] = dict(stride=stride, full_last_window=full_last_window)
    windows = sliding_windows([len(document) for document in ids], context_length, **settings)
    describe_windows(ids, len(windows), shown=progress)
    with evaluating(model):
        examined = examine(model, "document", ids, context_length, where, backend)
        scoring = Scoring(examined, documents, windows, where, rank, backend)
        interrupted = scoring.run(batches(windows, batch_size), group, progress)
    settings |= dict(context_length=context_length, bos=before, eos=after, partial=interrupted)
    return _complete(scoring.report(per_document, per_position, per_window, **settings))


def _complete(report: EvaluationReport) -> EvaluationReport:
    """Return the report; raise it where Ctrl-C left some of it out."""
    if report.partial:
        raise EvaluationInterrupted(report)
    return report


def _documents(
    model: Any,
    tokenizer: Any,
    text: str | Sequence[str] | None,
    input_ids: Any,
    attention_mask: Tensor | None,
    before: int | None,
    after: int | None,
) -> list[Document]:
    """Documents from text or from token ids, between BOS and EOS where these are wanted."""
    if text is not None:
        checks.vocabularies(model, tokenizer)
        documents = from_text(text, tokenizer, before, after)
    else:
        documents = from_ids(input_ids, attention_mask, before, after)
    checks.ids_known("document", [document.ids for document in documents], model, None)
    return documents
