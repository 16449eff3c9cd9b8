"""Perplexity of a language model on documents of any length: sliding windows, no logits.

Windows are padded on the right to the longest of their batch. A causal model's token sees nothing
to its right, and positions count from the first column, so padding changes nothing. That the model
is causal is verified on a few tokens first. Every window leaves its sums in a row of a table. The
report adds up that table in the order of the text, so batch size, order and ranks change only the
rounding inside the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor

from ..checks import backend_name, flags
from ..distributed.checks import process_group
from . import checks
from .documents import Prepared, Source, bos_id, eos_id, from_ids, from_text
from .language_model import device_of, evaluating, examine
from .parts import Parts, restrict, scoring_windows
from .progress import describe_text, describe_windows
from .recipe_plan import plan_recipe
from .report import EvaluationInterrupted, EvaluationReport
from .scoring import Scoring, Wanted
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
    recipe: str | None = None,
    mask: Any = None,
    spans: Sequence[Sequence[tuple[int, int]]] | None = None,
    after: str | None = None,
    groups: Sequence[str] | None = None,
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
        recipe: name of a tool whose windows, BOS, joins and counts are used, so that the
            perplexity is that tool's: "gptq-2048", "llama.cpp-512", "hf-stride" or
            "lm-eval-rolling". An argument that contradicts it is an error.
        mask: for `input_ids`, a bool for each token, in the shape of `input_ids` or a sequence for
            each document: True where it is scored. The others are context.
        spans: for `text`, a list of (start, stop) for each document, in characters: a token is
            scored if it starts within one of them.
        after: for `text`, a marker: what follows its first occurrence in each document is scored,
            such as an answer. A token that starts within the marker is not.
        groups: a name for each document, such as its language or its source; the report has
            measures of each group.
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
    checks.no_more_positional(positional)
    wanted = Wanted(rank, per_document, per_position, per_window, groups, progress)
    where = _device(model, device, wanted, full_last_window, backend)
    checks.one_source(input_ids, text, attention_mask, tokenizer)
    checks.one_part(mask, spans, after, text, recipe)
    group = None if group is None else process_group(group)
    batch_size = checks.at_least_one("batch_size", batch_size)
    describe_text(text, shown=progress)
    source = Source(model, tokenizer, text, input_ids, attention_mask)
    parts = Parts(mask, spans, after)
    planner = partial(plan_windows, parts) if recipe is None else partial(plan_recipe, recipe)
    plan = planner(source, context_length, stride, full_last_window, bos, eos)
    plan.settings["after"] = after
    return _score(model, plan, wanted, where, batch_size, group, backend)


def _device(
    model: Any, device: Any, wanted: Wanted, full_last_window: bool, backend: str
) -> torch.device:
    """Return where batches go, once the flags, the backend and the model are right."""
    flags(
        full_last_window=full_last_window, rank=wanted.rank, per_document=wanted.per_document,
        per_position=wanted.per_position, per_window=wanted.per_window, progress=wanted.progress,
    )  # fmt: skip
    backend_name(backend)
    checks.progress_bar(wanted.progress)
    checks.model(model)
    return checks.device(device_of(model) if device is None else device)


def _score(
    model: Any,
    plan: Prepared,
    wanted: Wanted,
    where: torch.device,
    batch_size: int,
    group: Any,
    backend: str,
) -> EvaluationReport:
    """Return the report of the planned windows; raise it where Ctrl-C left some of them out."""
    ids = [document.ids for document in plan.documents]
    groups = checks.document_groups(wanted.groups, len(ids), plan.joins)
    checks.ids_known("document", ids, model, None)
    describe_windows(ids, len(plan.windows), shown=wanted.progress)
    with evaluating(model):
        examined = examine(model, "document", ids, plan.settings["context_length"], where, backend)
        scoring = Scoring(examined, plan.documents, plan.windows, where, wanted.rank, backend)
        interrupted = scoring.run(batches(plan.windows, batch_size), group, wanted.progress)
    settings = plan.settings | dict(partial=interrupted)
    report = scoring.report(wanted._replace(groups=groups), **settings)
    if report.partial:
        raise EvaluationInterrupted(report)
    return report


def plan_windows(
    parts: Parts,
    source: Source,
    context_length: int | None,
    stride: int | None,
    full_last_window: bool,
    bos: bool | int | None,
    eos: bool | int,
) -> Prepared:
    """Return each document between BOS and EOS where these are wanted, and its windows."""
    model, tokenizer = source.model, source.tokenizer
    context_length = checks.context_length(context_length, model, tokenizer)
    stride = checks.stride(stride, context_length)
    before, after = bos_id(bos, model, tokenizer), eos_id(eos, model, tokenizer)
    if source.text is not None:
        checks.vocabularies(model, tokenizer)
        documents = from_text(source.text, tokenizer, before, after)
    else:
        documents = from_ids(source.input_ids, source.attention_mask, before, after)
    documents = restrict(documents, parts, source, after)
    settings: dict[str, Any] = dict(stride=stride, full_last_window=full_last_window)
    lengths = [len(document.ids) for document in documents]
    windows = scoring_windows(sliding_windows(lengths, context_length, **settings), documents)
    settings |= dict(context_length=context_length, bos=before, eos=after)
    return Prepared(documents, windows, settings)
