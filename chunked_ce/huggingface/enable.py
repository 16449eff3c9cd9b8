"""Make a model of transformers defer its logits, and undo it.

Attributes of two instances are set, none of a class: the model's `forward`, which knows whether
there are labels, its loss function, its refusal of DataParallel, and the output head's `forward`.
"""

from __future__ import annotations

import copy
import functools
import inspect
import warnings
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import loss as loss_checks
from . import checks
from .deferred import DeferredLogits, scale_and_softcap
from .evaluated import as_tensors
from .head import Head
from .loss import causal_lm_loss

_STATE = "_chunked_ce"


def enable(model: nn.Module, *, evaluation: bool = False, label_smoothing: float = 0.0) -> Enabled:
    """Make a causal language model of transformers train without its logits.

    While it trains with labels, the output head returns :class:`DeferredLogits` and the loss is
    :func:`chunked_ce.linear_cross_entropy`, whatever factor or softcap the model puts between the
    two. Without labels, in evaluation and in generation the model is as it was. `outputs.logits` is
    computed when something asks for it, which must be before `optimizer.step()`. A head put in the
    place of the first (resized, or PEFT's `modules_to_save`) defers too, or a warning says why not;
    training without labels warns once.

    Args:
        model: a `PreTrainedModel` whose forward calls `self.loss_function`, or a PEFT model of one.
            Enable it before it is compiled, prepared by accelerate or handed to a trainer.
        evaluation: whether to do the same in evaluation with labels: for a Trainer without
            `compute_metrics`. Without gradients `outputs.logits` is then a tensor that is computed
            when something is done to it, as `Trainer.predict` does.
        label_smoothing: smooths the labels of the model's loss, as :func:`chunked_ce.cross_entropy`
            does. Use it in place of TrainingArguments' `label_smoothing_factor`, which takes the
            labels away. As there, the loss in evaluation is smoothed too.

    Returns:
        A handle whose `disable()` undoes it; also a context manager. Printed, it says what it did.

    Raises:
        TypeError: not a model of transformers, or a head that cannot be called on some of the
            hidden states (sharded, dispatched, of integers).
        ValueError: nothing would change (no output head, no labels, a loss of its own), or the
            model is enabled already.

    While it is enabled, pickling the model and replicating it for DataParallel raise; a deep
    copy, `state_dict` and `save_pretrained` are as ever.

    Example:
        >>> import torch, transformers, chunked_ce.huggingface
        >>> sizes = dict(vocab_size=64, hidden_size=16, intermediate_size=16)
        >>> heads = dict(num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2)
        >>> config = transformers.LlamaConfig(**sizes, **heads)
        >>> model = transformers.LlamaForCausalLM(config).train()
        >>> handle = chunked_ce.huggingface.enable(model)
        >>> ids = torch.arange(12).view(2, 6)
        >>> outputs = model(input_ids=ids, labels=ids)  # the model shifts the labels
        >>> outputs.logits  # not computed
        DeferredLogits(shape=[2, 6, 64], dtype=torch.float32)
        >>> outputs.loss.backward()
        >>> handle.disable()
    """
    model = checks.causal_lm(model)
    head = refuse_others(model)
    label_smoothing = loss_checks.label_smoothing(label_smoothing)
    return Enabled(model, head, evaluation, label_smoothing)


def refuse_others(model: nn.Module) -> nn.Module:
    """Return the head of a model that can be enabled."""
    checks.not_enabled(_STATE in vars(model))
    head = checks.output_head(model)
    checks.calls_loss_function(model)
    from transformers.loss.loss_utils import ForCausalLMLoss

    checks.replaceable_loss(model, (ForCausalLMLoss, causal_lm_loss))
    return head


class Enabled:
    """Hold what :func:`enable` changed, and undo it."""

    _function, _no_labels = "enable", checks.NO_LABELS

    def __init__(
        self, model: nn.Module, head: nn.Module, evaluation: bool, label_smoothing: float
    ) -> None:
        self._evaluation = evaluation
        self._label_smoothing = label_smoothing
        self._model = model
        self._factors: tuple[float, float | None] | None = None  # of the last step's logits
        self._deferring = False
        self._warned: set[str] = set()
        self._labels = list(inspect.signature(type(model).forward).parameters).index("labels") - 1
        self._changes: list[tuple[nn.Module, str, Any, dict[str, Any]]] = []
        self._change(
            model, forward=MethodType(_model_forward(model), model),
            _loss_function=self._loss_of_model(), _replicate_for_data_parallel=checks.no_replica,
        )  # fmt: skip
        self._enable_head(head)

    def _loss_of_model(self) -> Callable[..., Tensor]:
        if self._label_smoothing:
            return functools.partial(causal_lm_loss, label_smoothing=self._label_smoothing)
        return causal_lm_loss

    def _run(self, run: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call the model's own forward."""
        return run(*args, **kwargs)

    def _change(self, module: nn.Module, **values: Any) -> None:
        for name, value in {_STATE: self, **values}.items():
            before = {name: vars(module)[name]} if name in vars(module) else {}
            self._changes.append((module, name, value, before))
            vars(module)[name] = value

    def _enable_head(self, head: nn.Module) -> None:
        copied = MethodType(_head_copied, head)
        self._change(head, forward=MethodType(_head_forward, head), __deepcopy__=copied)

    def _enable_new_head(self) -> None:
        """Enable a head that took the place of the first: resized, or PEFT's modules_to_save."""
        head: Any = self._model.get_output_embeddings()  # type: ignore[operator]
        original = getattr(head, "original_module", None)
        heads = [head] if original is None else [original, *head.modules_to_save.values()]
        for each in heads:
            if each is None or vars(each).get(_STATE) is self:
                continue
            try:
                self._enable_head(checks.deferrable_head(self._model, each))
            except TypeError as error:
                self._warn(checks.new_head(error))

    def disable(self) -> None:
        """Set everything back. Does nothing the second time.

        A forward that others put around the model's since stays, and calls the model's.
        """
        for module, name, value, before in self._changes:
            if vars(module).get(name) == value:
                del vars(module)[name]
                vars(module).update(before)
        self._changes = []

    def __reduce_ex__(self, protocol: Any) -> Any:
        # A method pickles as its name, which the unpickled module would look up and not find.
        checks.not_pickled()

    def __deepcopy__(self, memo: dict[int, Any]) -> Enabled:
        twin = memo[id(self)] = object.__new__(type(self))
        vars(twin).update(copy.deepcopy(vars(self), memo))
        return twin

    def __repr__(self) -> str:
        name = type(self._model).__name__
        if not self._changes:
            return f"<{name}: enable was undone>"
        head: Any = self._model.get_output_embeddings()  # type: ignore[operator]
        weight = getattr(head, "weight", None)
        shape = "" if weight is None else f" {list(weight.shape)}"
        when = "in training and evaluation" if self._evaluation else "in training"
        parts = [f"head {type(head).__name__}{shape} defers its logits {when} with labels"]
        if vars(head).get(_STATE) is not self:
            parts = [f"the head was replaced by {type(head).__name__}{shape}"]
        parts.append(self._transforms())
        if self._label_smoothing:
            parts.append(f"label smoothing {self._label_smoothing:g}")
        return f"<{name} enabled: {', '.join(parts)}; disable() undoes it>"

    def _transforms(self) -> str:
        if self._factors is None:
            return "softcap and logit scale seen at the first step"
        scale, softcap = scale_and_softcap(*self._factors)
        return f"softcap {'none' if softcap is None else f'{softcap:g}'}, logit scale {scale:g}"

    def __enter__(self) -> Enabled:
        return self

    def __exit__(self, *exception: object) -> None:
        self.disable()

    def _on_use(self) -> None:
        """Say once that the model itself uses its logits, so that nothing is saved."""
        if self._deferring and not torch.compiler.is_compiling():
            self._warn(checks.LOGITS_WERE_MADE.format(self._function))

    def _warn(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            warnings.warn(message, stacklevel=6)

    def _prepare(self, labelled: bool) -> bool:
        """Return whether a forward that begins may defer."""
        deferring = (self._model.training or self._evaluation) and labelled
        if not torch.compiler.is_compiling():
            if deferring:
                self._enable_new_head()
            elif self._model.training and torch.is_grad_enabled() and not labelled:
                self._warn(self._no_labels)
        return deferring

    def _note_factors(self, outputs: Any) -> None:
        """Keep what the model did to its logits, for `repr`."""
        if not torch.compiler.is_compiling():
            values = outputs if isinstance(outputs, tuple) else (getattr(outputs, "logits", None),)
            for value in values:
                if isinstance(value, DeferredLogits):
                    self._factors = value.factors

    def _has_labels(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        if kwargs.get("labels") is not None:
            return True
        return len(args) > self._labels and args[self._labels] is not None


def _model_forward(model: nn.Module) -> Callable[..., Any]:
    """Return a forward of the model that knows whether its head may defer.

    It is a method, so that a deep copy of the model runs on itself.
    """
    method = model.forward
    original = getattr(method, "__func__", None)

    @functools.wraps(type(model).forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        state: Enabled | None = vars(self).get(_STATE)
        run = method if original is None else functools.partial(original, self)
        if state is None:
            return run(*args, **kwargs)
        before, deferring = state._deferring, state._prepare(state._has_labels(args, kwargs))
        state._deferring = deferring
        try:
            outputs = state._run(run, args, kwargs)
        finally:
            state._deferring = before
        if deferring:
            state._note_factors(outputs)
        evaluating = not (self.training or torch.is_grad_enabled() or torch.compiler.is_compiling())
        return as_tensors(outputs) if deferring and evaluating else outputs

    # Trainers read the signature; but accelerate unwraps by __wrapped__, and would unwrap this too.
    forward.__signature__ = inspect.signature(type(model).forward)  # type: ignore[attr-defined]
    del forward.__wrapped__  # type: ignore[attr-defined]
    return forward


def _head_forward(self: Any, input: Tensor, *args: Any, **kwargs: Any) -> Tensor | DeferredLogits:
    state: Enabled | None = vars(self).get(_STATE)
    plain = checks.is_linear(self)
    sharded = checks.is_sharded(input, *self.parameters())
    traced = not plain and torch.compiler.is_compiling()  # a tracer calls no head within a loss
    if state is None or not state._deferring or sharded or traced:
        computed: Tensor = type(self).forward(self, input, *args, **kwargs)
        return computed
    checks.no_group_of_its_own(self)
    if plain:
        return DeferredLogits(Head.capture(input, self.weight, self.bias, state._on_use), input)

    def call(hidden: Tensor) -> Tensor:
        before, state._deferring = state._deferring, False  # so that a layer within it computes
        try:
            logits: Tensor = type(self).forward(self, hidden, *args, **kwargs)
        finally:
            state._deferring = before
        return logits

    call.out_features = self.out_features  # type: ignore[attr-defined]
    given = (input, call, self.out_features, list(self.parameters()), state._on_use)
    return DeferredLogits(Head.of_call(*given), input)


def _head_copied(self: Any, memo: dict[int, Any]) -> Any:
    """Make a deep copy: enabled within a copy of the model, plain if copied alone."""
    state: Enabled = vars(self)[_STATE]
    whole = id(state._model) in memo
    changes = [c for c in state._changes if c[0] is self and (not whole or c[1] == "__deepcopy__")]
    now = {name: vars(self).pop(name) for _, name, _, _ in changes if name in vars(self)}
    for _, _, _, before in changes:
        vars(self).update(before)
    try:
        twin = copy.deepcopy(self, memo)
    finally:
        vars(self).update(now)
    if whole:
        vars(twin)["__deepcopy__"] = MethodType(_head_copied, twin)
    return twin
