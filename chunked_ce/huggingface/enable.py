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
from .backward import can_follow
from .calls import Call, Deferring, positions
from .deferred import DeferredLogits, scale_and_softcap
from .evaluated import as_tensors
from .head_forward import STATE, head_copied, head_forward
from .loss import causal_lm_loss


def enable(
    model: nn.Module,
    *,
    evaluation: bool = False,
    without_labels: bool = False,
    label_smoothing: float = 0.0,
) -> Enabled:
    """Make a causal language model of transformers train without its logits.

    While it trains with labels, the output head returns :class:`DeferredLogits` and the loss is
    :func:`chunked_ce.linear_cross_entropy`, whatever factor or softcap the model puts between the
    two. Without labels, in evaluation and in generation the model is as it was. `outputs.logits` is
    computed when something asks for it, which must be before `optimizer.step()`. A head put in the
    place of the first (resized, or PEFT's `modules_to_save`) defers too, or a warning says why not;
    training without labels warns once, unless `without_labels` is set.

    Args:
        model: a `PreTrainedModel` whose forward calls `self.loss_function`, or a PEFT model of one.
            Enable it before it is compiled, prepared by accelerate or handed to a trainer.
        evaluation: whether to do the same in evaluation with labels: for a Trainer without
            `compute_metrics`. Without gradients `outputs.logits` is then a tensor that is computed
            when something is done to it, as `Trainer.predict` does.
        without_labels: whether `outputs.logits` of a call without labels is :class:`DeferredLogits`
            too, in training and evaluation, with gradients or without: for trainers that take
            log-probabilities and entropies from the logits (TRL's `selective_log_softmax`), and for
            their reference model. A call with `past_key_values`, as generation makes it, and a call
            that torch.compile traces are as they were.
        label_smoothing: smooths the labels of the model's loss, as :func:`chunked_ce.cross_entropy`
            does. Use it in place of TrainingArguments' `label_smoothing_factor`, which takes the
            labels away. As there, the loss in evaluation is smoothed too.

    Returns:
        A handle whose `disable()` undoes it; also a context manager. Printed, it says what it did.

    Raises:
        TypeError: not a model of transformers, or a head that cannot be called on some of the
            hidden states (under tensor parallelism, of integers).
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
    return Enabled(model, head, Deferring(evaluation, without_labels), label_smoothing)


def refuse_others(model: nn.Module) -> nn.Module:
    """Return the head of a model that can be enabled."""
    checks.not_enabled(STATE in vars(model))
    head = checks.output_head(model)
    checks.calls_loss_function(model)
    from transformers.loss.loss_utils import ForCausalLMLoss

    checks.replaceable_loss(model, (ForCausalLMLoss, causal_lm_loss))
    return head


class Enabled:
    """Hold what :func:`enable` changed, and undo it."""

    _function, _no_labels = "enable", checks.NO_LABELS

    def __init__(
        self, model: nn.Module, head: nn.Module, wanted: Deferring, label_smoothing: float
    ) -> None:
        self._wanted = wanted
        self._label_smoothing = label_smoothing
        self._model = model
        self._factors: tuple[float, float | None] | None = None  # of the last step's logits
        self._deferring = False
        self._returning = False  # whether backward begins at the logits, for want of a loss
        self._warned: set[str] = set()
        self._positions = positions(model)
        self._changes: list[tuple[nn.Module, str, Any, dict[str, Any]]] = []
        self._change(
            model, forward=MethodType(_model_forward(model), model),
            _loss_function=self._loss_of_model(), _replicate_for_data_parallel=checks.no_replica,
        )  # fmt: skip
        self._kept: list[Any] = []  # heads whose weight FSDP2 would free
        self._enable_head(head)

    def _loss_of_model(self) -> Callable[..., Tensor]:
        if self._label_smoothing:
            return functools.partial(causal_lm_loss, label_smoothing=self._label_smoothing)
        return causal_lm_loss

    def _run(self, run: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call the model's own forward."""
        return run(*args, **kwargs)

    def _change(self, module: nn.Module, **values: Any) -> None:
        for name, value in {STATE: self, **values}.items():
            before = {name: vars(module)[name]} if name in vars(module) else {}
            self._changes.append((module, name, value, before))
            vars(module)[name] = value

    def _enable_head(self, head: nn.Module) -> None:
        copied = MethodType(head_copied, head)
        self._change(head, forward=MethodType(head_forward, head), __deepcopy__=copied)

    def _enable_new_head(self) -> None:
        """Enable a head that took the place of the first: resized, or PEFT's modules_to_save."""
        head: Any = self._model.get_output_embeddings()  # type: ignore[operator]
        original = getattr(head, "original_module", None)
        heads = [head] if original is None else [original, *head.modules_to_save.values()]
        for each in heads:
            if each is None or vars(each).get(STATE) is self:
                continue
            try:
                self._enable_head(checks.deferrable_head(self._model, each))
            except TypeError as error:
                self._warn(checks.new_head(error))

    def _forward_before(self, head: nn.Module) -> Callable[..., Tensor] | None:
        """Return the forward that the head itself had, as accelerate gives it one."""
        for module, name, _, before in self._changes:
            if module is head and name == "forward":
                return before.get("forward")
        return None

    def _keep_gathered(self, head: Any) -> None:
        """Let FSDP2 keep a head's weight until backward, which would gather it again at once."""
        head.set_reshard_after_forward(False, recurse=False)
        self._kept.append(head)

    def disable(self) -> None:
        """Set everything back. Does nothing the second time.

        A forward that others put around the model's since stays, and calls the model's.
        """
        for module, name, value, before in self._changes:
            if vars(module).get(name) == value:
                del vars(module)[name]
                vars(module).update(before)
        for head in self._kept:
            head.set_reshard_after_forward(True, recurse=False)
        self._changes, self._kept = [], []

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
        parts = [f"head {type(head).__name__}{shape} defers its logits {self._wanted}"]
        if vars(head).get(STATE) is not self:
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

    def _prepare(self, call: Call) -> bool:
        """Return whether a forward that begins may defer."""
        training, compiling = self._model.training, torch.compiler.is_compiling()
        deferring = self._wanted.wants(call, training, compiling)
        if deferring and not call.has("labels") and torch.is_grad_enabled():
            deferring = can_follow(self._model)
        if not compiling:
            if deferring:
                self._enable_new_head()
            elif training and torch.is_grad_enabled() and not self._wanted.without_labels:
                self._warn(self._no_labels)
        return deferring

    def _note_factors(self, outputs: Any) -> None:
        """Keep what the model did to its logits, for `repr`."""
        if not torch.compiler.is_compiling():
            values = outputs if isinstance(outputs, tuple) else (getattr(outputs, "logits", None),)
            for value in values:
                if isinstance(value, DeferredLogits):
                    self._factors = value.factors


def _model_forward(model: nn.Module) -> Callable[..., Any]:
    """Return a forward of the model that knows whether its head may defer.

    It is a method, so that a deep copy of the model runs on itself.
    """
    method = model.forward
    original = getattr(method, "__func__", None)

    @functools.wraps(type(model).forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        state: Enabled | None = self.__dict__.get(STATE)
        run = method if original is None else functools.partial(original, self)
        if state is None:
            return run(*args, **kwargs)
        call = Call(state._positions, args, kwargs)
        before, deferring = state._deferring, state._prepare(call)
        state._deferring, state._returning = deferring, not call.has("labels")
        try:
            outputs = state._run(run, args, kwargs)
        finally:
            state._deferring = before
        if deferring:
            state._note_factors(outputs)
        evaluating = not (self.training or torch.is_grad_enabled() or torch.compiler.is_compiling())
        return as_tensors(outputs) if deferring and evaluating and call.has("labels") else outputs

    # Trainers read the signature; but accelerate unwraps by __wrapped__, and would unwrap this too.
    forward.__signature__ = inspect.signature(type(model).forward)  # type: ignore[attr-defined]
    del forward.__wrapped__  # type: ignore[attr-defined]
    return forward
