"""Two language models on the same tokens: how far one is from the other, without logits.

Windows, documents and ranks are those of :func:`chunked_ce.evaluate_perplexity`. Each chunk of
tokens has the logits of both models at a time; see :mod:`chunked_ce.evaluation.pair_scoring`.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from ..checks import backend_name, flags
from ..distributed.checks import process_group
from . import checks
from .comparison_estimates import compare_tokens
from .comparison_report import ComparisonInterrupted, ComparisonReport, TokenComparison
from .documents import Document, Prepared, Source
from .evaluate import plan_windows
from .language_model import LanguageModel, device_of, evaluating, examine
from .pair_scoring import BASE_LOGPROB, KL, LOGPROB, SAME_TOP, SCORED, PairScoring, on_device
from .parts import Parts
from .progress import describe_text, describe_windows
from .windows import Window, batches

_SETTINGS = ("context_length", "stride", "full_last_window", "bos", "eos")


@torch.no_grad()
@checks.names_unknown
def compare_models(
    model: Any,
    base: Any,
    input_ids: Tensor | Sequence[Any] | None = None,
    *positional: NoReturn,
    text: str | Sequence[str] | None = None,
    tokenizer: Any = None,
    base_tokenizer: Any = None,
    attention_mask: Tensor | None = None,
    context_length: int | None = None,
    stride: int | None = None,
    full_last_window: bool = False,
    batch_size: int = 8,
    bos: bool | int | None = None,
    eos: bool | int = False,
    vocab_size: int | None = None,
    groups: Sequence[str] | None = None,
    per_document: bool = False,
    seed: int = 0,
    resamples: int = 1000,
    take_turns: bool = False,
    device: torch.device | str | None = None,
    progress: bool = False,
    group: Any = None,
    backend: str = "auto",
) -> ComparisonReport:
    """Measure how far a model is from a base: KL divergence, same top token, paired perplexity.

    For a quantized, pruned or fine-tuned model. Both models see the same windows, and each token
    is scored once, as in :func:`chunked_ce.evaluate_perplexity`. The logits of one chunk of tokens
    exist at a time, of both models. A model whose head cannot be deferred gives its own logits.

    Args:
        model: a transformers causal LM, or a module that maps ids [B, T] to logits [B, T, V].
        base: what it is compared with, the same. The two may differ in everything but the
            vocabulary.
        input_ids, text, tokenizer, attention_mask: see :func:`chunked_ce.evaluate_perplexity`.
        base_tokenizer: the base's tokenizer, which must give the same ids. None: not checked.
        context_length: most tokens the models see at once; by default what both can take.
        stride, full_last_window, batch_size, bos, eos: see
            :func:`chunked_ce.evaluate_perplexity`. By default BOS is that of `tokenizer`.
        vocab_size: number of classes to compare; columns at or past it do not exist. None: those
            that both have, where further ones are padding that no token of `tokenizer` has.
        groups: the group of each document, such as its folder; the report has measures of each.
        per_document: measures of each document too.
        seed, resamples: of the documents that are resampled for the errors of documents.
        take_turns: for two models that do not fit on `device` together. Both are on the host, and
            one at a time is on the device, with the other's head. The base's hidden states wait on
            the host, 1 GiB at a time. The result is the same, bit for bit.
        device: where batches go, by default where the parameters of each model are. The models are
            not moved, unless they take turns.
        progress: say on stderr when text is tokenized, and show a bar with the running mean of the
            KL divergence; needs tqdm.
        group: a torch.distributed process group, see :func:`chunked_ce.evaluate_perplexity`.
        backend: see :func:`chunked_ce.token_stats`.

    Returns:
        ComparisonReport; divergences and losses in nats. Sums are in float64.

    Raises:
        TypeError, ValueError: an argument of the wrong type or range, vocabularies or tokenizers
            that differ, a document that one of the models cannot read; before scoring. What is
            wrong with the base begins with "base:".
        ComparisonInterrupted: on Ctrl-C, with the report so far; without `group`, and once there is
            something to report.

    >>> import torch
    >>> from chunked_ce import compare_models
    >>> def base(ids):  # each of 16 tokens is equally likely
    ...     return torch.zeros(*ids.shape, 16)
    >>> def model(ids):  # half of them, and the others never
    ...     return torch.zeros(*ids.shape, 16).index_fill(-1, torch.arange(8, 16), -40.0)
    >>> report = compare_models(model, base, [[1, 2, 3, 4, 5]], context_length=4)
    >>> f"{report.perplexity.value:.1f} against {report.base_perplexity.value:.1f}"
    '8.0 against 16.0'
    """
    checks.no_more_positional(positional, "compare_models", "model, base")
    flags(full_last_window=full_last_window, take_turns=take_turns)
    pair = Pair(model, base, _devices(model, base, device, take_turns), take_turns, backend)
    wanted = _checked(Wanted(vocab_size, groups, per_document, seed, resamples, progress), backend)
    checks.one_source(input_ids, text, attention_mask, tokenizer)
    group = None if group is None else process_group(group)
    batch_size = checks.at_least_one("batch_size", batch_size)
    context_length = checks.shared_context(context_length, model, base, tokenizer)
    describe_text(text, shown=progress)
    source = Source(model, tokenizer, text, input_ids, attention_mask)
    plan = plan_windows(Parts(), source, context_length, stride, full_last_window, bos, eos)
    _check_readable(base, base_tokenizer, source, plan.documents)
    return _score(pair, plan, tokenizer, wanted, batch_size, group)


class Pair(NamedTuple):
    """The two models and where they run."""

    model: Any
    base: Any
    devices: tuple[torch.device, torch.device]
    take_turns: bool
    backend: str


class Wanted(NamedTuple):
    """What is to be compared and reported."""

    vocab_size: int | None
    groups: Sequence[str] | None
    per_document: bool
    seed: int
    resamples: int
    progress: bool


def _checked(wanted: Wanted, backend: str) -> Wanted:
    flags(per_document=wanted.per_document, progress=wanted.progress)
    backend_name(backend)
    checks.progress_bar(wanted.progress)
    seed, resamples = checks.seed(wanted.seed), checks.resamples(wanted.resamples)
    return wanted._replace(seed=seed, resamples=resamples)


def _devices(
    model: Any, base: Any, device: Any, take_turns: bool
) -> tuple[torch.device, torch.device]:
    """Return where the batches of each go."""

    def place(model: Any) -> torch.device:
        checks.model(model)
        own = device_of(model)
        checks.on_host(not take_turns or own.type == "cpu", own)
        return checks.device(own if device is None else device)

    own = place(model)
    with checks.naming("base"):
        return own, place(base)


def _check_readable(
    base: Any, base_tokenizer: Any, source: Source, documents: list[Document]
) -> None:
    """Check that both models read the same tokens."""
    ids = [document.ids for document in documents]
    checks.ids_known("document", ids, source.model, None)
    tokenizer, text = source.tokenizer, source.text
    if base_tokenizer is not None:
        checks.same_tokenizer(tokenizer, base_tokenizer, [text] if isinstance(text, str) else text)
    with checks.naming("base"):
        if tokenizer is not None:
            checks.vocabularies(base, tokenizer)
        checks.ids_known("document", ids, base, None)


def _score(
    pair: Pair, plan: Prepared, tokenizer: Any, wanted: Wanted, batch_size: int, group: Any
) -> ComparisonReport:
    """Return the report of the planned windows; raise it where Ctrl-C left some of them out."""
    ids = [document.ids for document in plan.documents]
    groups = checks.document_groups(wanted.groups, len(ids), None)
    describe_windows(ids, len(plan.windows), shown=wanted.progress)
    with evaluating(pair.model), evaluating(pair.base):
        model, base = _examine(pair, ids, plan.settings["context_length"])
        tokens = len(tokenizer) if hasattr(tokenizer, "__len__") else None
        classes = checks.shared_classes(
            wanted.vocab_size, model.vocab_size, base.vocab_size, tokens, max(map(_highest, ids))
        )
        scoring = PairScoring(
            model, base, plan.documents, plan.windows, pair.devices, classes, pair.backend,
            pair.take_turns,
        )  # fmt: skip
        interrupted = scoring.run(batches(plan.windows, batch_size), group, wanted.progress)
    settings = {name: plan.settings[name] for name in _SETTINGS}
    settings |= dict(seed=wanted.seed, resamples=wanted.resamples, vocab_size=classes)
    settings |= dict(partial=interrupted, took_turns=pair.take_turns)
    report = _report(scoring, groups, wanted.per_document, settings)
    if interrupted:
        raise ComparisonInterrupted(report)
    return report


def _highest(ids: Tensor) -> int:
    return int(ids.max())


def _examine(
    pair: Pair, ids: list[Tensor], context_length: int
) -> tuple[LanguageModel, LanguageModel]:
    """Try both models on a few tokens."""

    def tried(model: Any, device: torch.device) -> LanguageModel:
        with on_device(model, device) if pair.take_turns else nullcontext():
            return examine(model, "document", ids, context_length, device, pair.backend)

    model = tried(pair.model, pair.devices[0])
    with checks.naming("base"):
        return model, tried(pair.base, pair.devices[1])


def _report(
    scoring: PairScoring,
    groups: list[str] | None,
    per_document: bool,
    settings: dict[str, Any],
) -> ComparisonReport:
    tokens, seeded = _tokens(scoring), (settings["seed"], settings["resamples"])
    windows, documents = scoring.windows, len(scoring.documents)

    def part(kept: Tensor) -> Any:
        return compare_tokens(TokenComparison(*(column[kept] for column in tokens)), *seeded)

    of_documents = of_groups = None
    if per_document:
        of_documents = tuple(part(tokens.document == i) for i in range(documents))
    if groups is not None:
        names = list(dict.fromkeys(groups))
        numbers = torch.tensor([names.index(name) for name in groups])[tokens.document]
        of_groups = {name: part(numbers == i) for i, name in enumerate(names)}
    scored = scoring.table[:, SCORED].cpu()
    starts = torch.tensor(scoring.starts[:-1])
    return ComparisonReport(
        **vars(compare_tokens(tokens, *seeded)),
        **settings,
        documents_given=documents,
        windows=len(windows),
        windows_scored=int(scored[starts].sum()),
        logits_stored=scoring.model.logits_stored,
        base_logits_stored=scoring.base.logits_stored,
        per_document=of_documents,
        per_group=of_groups,
        per_token=tokens,
    )


def _tokens(scoring: PairScoring) -> TokenComparison:
    """Return the numbers of the tokens that were scored."""
    table = scoring.table.cpu()
    kept = table[:, SCORED] > 0
    counts = torch.tensor([window.scored for window in scoring.windows])
    document = torch.tensor([w.document for w in scoring.windows]).repeat_interleave(counts)
    position = torch.cat([_positions(window) for window in scoring.windows])
    table = table[kept]
    return TokenComparison(
        document[kept], position[kept], table[:, KL], table[:, LOGPROB], table[:, BASE_LOGPROB],
        table[:, SAME_TOP] > 0,
    )  # fmt: skip


def _positions(window: Window) -> Tensor:
    """Return the tokens of context of each scored token, [scored]."""
    return torch.arange(window.length - window.scored + 1, window.length + 1)
