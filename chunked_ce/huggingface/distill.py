"""Train one model of transformers on another's predictions, without the logits of either.

The student is enabled as by :func:`enable`, with another loss. Before each of its forwards that may
defer, the teacher reads the same inputs; its head is deferred too, and nothing of it is changed.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, nn

from .. import checks as loss_checks
from ..functional.distillation import kl_div, linear_kl_div
from ..functional.logits import cross_entropy
from . import checks
from . import distillation_checks as pair_checks
from .calls import Deferring
from .deferred import DeferredLogits
from .enable import Enabled, refuse_others
from .head_product import HeadProduct
from .loss import causal_lm_loss, labels_and_items

AnyLogits = Tensor | DeferredLogits


class Objective(NamedTuple):
    """What the student minimizes."""

    kind: str
    beta: float
    temperature: float
    cross_entropy_weight: float
    vocab_size: int


@loss_checks.hides_unknown
def distill(
    student: nn.Module,
    teacher: nn.Module,
    *,
    kind: str = "forward",
    beta: float = 0.5,
    temperature: float = 1.0,
    cross_entropy_weight: float = 0.0,
    vocab_size: int | None = None,
    tokenizers: tuple[Any, Any] | None = None,
    evaluation: bool = False,
    **unknown: NoReturn,
) -> Distilled:
    """Make a causal language model of transformers train on another's predictions.

    While the student trains with labels, `outputs.loss` is its divergence from the teacher, by
    :func:`chunked_ce.linear_kl_div`: neither model's logits are stored. Positions that the model's
    own loss would leave out (label -100) are left out here too. A Trainer works unchanged. In
    evaluation the student's loss is the cross-entropy of the labels, as ever.

    The teacher reads the student's inputs in each forward, in evaluation mode (it is put into it)
    and without gradients. Each model keeps its own softcap and logit scale. The hidden sizes may
    differ. A head that is not a plain linear layer (LoRA on the head, quantized) has its logits
    computed, and a warning says so.

    Args:
        student: a `PreTrainedModel`, or a PEFT model of one, as :func:`enable` takes it.
        teacher: another one, on the same device.
        kind: "forward", "reverse" or "jsd"; see :func:`chunked_ce.kl_div`.
        beta: the teacher's share of the mixture, from 0 to 1; used by "jsd" alone.
        temperature: what both models' logits are divided by, above 0.
        cross_entropy_weight: adds so many times the cross-entropy of the labels, at temperature 1.
        vocab_size: number of tokens that both models share, `len(tokenizer)`. Needed where they
            pad their vocabulary differently.
        tokenizers: the student's and the teacher's. They are compared, and give `vocab_size`.
        evaluation: whether the loss in evaluation with labels is the divergence too.

    Returns:
        A handle whose `disable()` undoes it; also a context manager. Printed, it says what it did.

    Raises:
        TypeError, ValueError: as :func:`enable`; vocabularies or tokenizers that differ, student
            and teacher are one model, `temperature` or `beta` out of range, an unknown argument.

    A forward raises ValueError where the student is given `inputs_embeds` or `past_key_values`,
    which the teacher cannot read, or where the two models are on different devices.

    Example:
        >>> import torch, transformers, chunked_ce.huggingface
        >>> def model(width):
        ...     sizes = dict(vocab_size=64, hidden_size=width, intermediate_size=16)
        ...     heads = dict(num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2)
        ...     return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads))
        >>> student, teacher = model(16).train(), model(32)
        >>> handle = chunked_ce.huggingface.distill(student, teacher, temperature=2.0)
        >>> ids = torch.arange(12).view(2, 6)
        >>> outputs = student(input_ids=ids, labels=ids)  # the model shifts the labels
        >>> outputs.loss.backward()
        >>> handle.disable()
    """
    if unknown:
        loss_checks.unknown_keywords(distill, unknown)
    divergence = loss_checks.divergence(kind, beta, temperature)
    weight = loss_checks.cross_entropy_weight(cross_entropy_weight)
    model = checks.causal_lm(student)
    head = refuse_others(model)
    own_teacher = pair_checks.teacher_model(teacher)
    pair_checks.two_models(model, own_teacher)
    shared = pair_checks.shared_tokens(model, own_teacher, vocab_size, tokenizers)
    return Distilled(
        model, head, evaluation, teacher, own_teacher, Objective(*divergence, weight, shared)
    )


class Distilled(Enabled):
    """Hold what :func:`distill` changed, and undo it."""

    _function, _no_labels = "distill", checks.NO_LABELS_TO_DISTILL

    def __init__(
        self,
        student: nn.Module,
        head: nn.Module,
        evaluation: bool,
        teacher: nn.Module,
        own_teacher: Any,  # without PEFT's wrapper
        objective: Objective,
    ) -> None:
        self._teacher, self._own_teacher, self._objective = teacher, own_teacher, objective
        self._teacher_was_training = teacher.training
        self._student_names = list(inspect.signature(type(student).forward).parameters)[1:]
        parameters = inspect.signature(type(own_teacher).forward).parameters
        self._teacher_names = set(parameters)
        self._takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        self._teacher_logits: AnyLogits | None = None
        self._in_loss = False
        teacher.eval()
        super().__init__(student, head, Deferring(evaluation, without_labels=False), 0.0)

    def disable(self) -> None:
        """Set everything back, the teacher's mode too. Does nothing the second time."""
        if self._changes:
            self._teacher.train(self._teacher_was_training)
        super().disable()

    def __deepcopy__(self, memo: dict[int, Any]) -> Enabled:
        for shared in (self._teacher, self._own_teacher):
            memo[id(shared)] = shared
        return super().__deepcopy__(memo)

    def __repr__(self) -> str:
        name, teacher = type(self._model).__name__, type(self._own_teacher).__name__
        if not self._changes:
            return f"<{name}: distill was undone>"
        kind, beta, temperature, weight, vocab_size = self._objective
        parts = [f"kind {kind}" + (f", beta {beta:g}" if kind == "jsd" else "")]
        parts += [f"temperature {temperature:g}", f"cross-entropy weight {weight:g}"]
        parts += [f"{vocab_size} tokens", self._transforms()]
        return f"<{name} distilled from {teacher}: {', '.join(parts)}; disable() undoes it>"

    def _loss_of_model(self) -> Callable[..., Tensor]:
        return self._loss

    def _run(self, run: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not self._deferring:
            return run(*args, **kwargs)
        before = self._teacher_logits
        names = self._student_names  # torch 2.6 does not trace zip with `strict`
        named = {names[i]: value for i, value in enumerate(args[: len(names)])}
        self._teacher_logits = self._ask_teacher(named | kwargs)
        try:
            return run(*args, **kwargs)
        finally:
            self._teacher_logits = before

    def _ask_teacher(self, given: dict[str, Any]) -> AnyLogits:
        """Return the teacher's logits of the student's inputs, deferred where they can be."""
        pair_checks.inputs_of_both(given, self._model, self._own_teacher)
        inputs = {
            name: value
            for name, value in given.items()
            if name not in pair_checks.OF_THE_STUDENT
            and value is not None
            and (self._takes_any or name in self._teacher_names)
        }
        if "use_cache" in self._teacher_names:
            inputs["use_cache"] = False
        head = self._own_teacher.get_output_embeddings()
        weight = head.weight if checks.is_linear(head) else None
        with torch.no_grad():
            outputs = HeadProduct().defer(weight, lambda: self._teacher(**inputs))
        logits: AnyLogits = outputs.logits if hasattr(outputs, "logits") else outputs[0]
        return logits

    def _on_use(self) -> None:
        if not self._in_loss:
            super()._on_use()

    def _loss(
        self,
        logits: AnyLogits,
        labels: Tensor | None,
        vocab_size: int | None = None,
        num_items_in_batch: int | Tensor | None = None,
        ignore_index: int = -100,
        shift_labels: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Return the divergence, as transformers calls the loss of a model."""
        given = (logits, labels, num_items_in_batch, ignore_index, shift_labels)
        teacher = self._teacher_logits
        if teacher is None:
            return causal_lm_loss(
                logits, labels, vocab_size, num_items_in_batch, ignore_index, shift_labels
            )
        target, num_items = labels_and_items(*given)
        pair_checks.same_tokens(logits, teacher)
        options = self._objective._asdict() | dict(ignore_index=ignore_index, num_items=num_items)
        before, self._in_loss = self._in_loss, True
        try:
            return self._divergence(logits, teacher, target, options)
        finally:
            self._in_loss = before

    def _divergence(
        self, logits: AnyLogits, teacher: AnyLogits, target: Tensor, options: dict[str, Any]
    ) -> Tensor:
        student_head, teacher_head = _linear(logits), _linear(teacher)
        if student_head is None or teacher_head is None:
            if not torch.compiler.is_compiling():
                self._warn(checks.logits_of(student=student_head is None))
            return _of_logits(_tensor(logits), _tensor(teacher), target, options)
        hidden, head, own = student_head
        teacher_hidden, head_of_teacher, others = teacher_head
        target = target.to(hidden.device, non_blocking=True).reshape(hidden.shape[:-1])
        with head.original_autocast():
            return linear_kl_div(
                hidden, head.weight, teacher_hidden, head_of_teacher.weight.detach(),
                target=target, linear_bias=own["linear_bias"], softcap=own["softcap"],
                logit_scale=own["logit_scale"], teacher_softcap=others["softcap"],
                teacher_logit_scale=others["logit_scale"],
                teacher_bias=_detached(others["linear_bias"]), **options,
            )  # fmt: skip


def _linear(logits: AnyLogits) -> Any:
    """Return (hidden states, head, transforms) of the logits of a weight; None of others."""
    product = logits.linear() if isinstance(logits, DeferredLogits) else None
    return product if product is not None and isinstance(product[1].weight, Tensor) else None


def _tensor(logits: AnyLogits) -> Tensor:
    return logits.tensor() if isinstance(logits, DeferredLogits) else logits


def _detached(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.detach()


def _of_logits(student: Tensor, teacher: Tensor, target: Tensor, options: dict[str, Any]) -> Tensor:
    """Return the same as `linear_kl_div` from two models' logits."""
    weight = options.pop("cross_entropy_weight")
    target = target.to(student.device, non_blocking=True).reshape(student.shape[:-1])
    loss = kl_div(student, teacher.detach(), target=target, **options)
    if weight:
        tokens = {name: options[name] for name in ("ignore_index", "num_items", "vocab_size")}
        loss = loss + weight * cross_entropy(student, target, dim=-1, **tokens)
    return loss
