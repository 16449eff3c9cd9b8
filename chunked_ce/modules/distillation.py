"""The modules of `kl_div` and `linear_kl_div`; torch.nn.KLDivLoss takes probabilities."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from .. import checks
from ..functional.distillation import kl_div, linear_kl_div
from .options import differing_arguments

_DIVERGENCE = dict(kind="forward", beta=0.5, temperature=1.0)
_TOKENS = dict(ignore_index=-100, reduction="mean", vocab_size=None)
_DEFAULTS = _DIVERGENCE | _TOKENS | dict(backend="auto")
_LINEAR_DEFAULTS = (
    _DIVERGENCE
    | dict(cross_entropy_weight=0.0, softcap=None, logit_scale=1.0)
    | dict(teacher_softcap=None, teacher_logit_scale=1.0)
    | _TOKENS
    | dict(acc_dtype=torch.float32, chunk_bytes=None, token_chunk_size=None, backend="auto")
)


class DistillationLoss(nn.Module):
    """Compute the divergence of a student's logits from a teacher's.

    See :func:`chunked_ce.kl_div`, of which it holds the options. `torch.nn.KLDivLoss` is another
    function: it takes log-probabilities and probabilities.

    Args:
        kind: "forward", "reverse" or "jsd".
        beta: the teacher's share of the mixture, from 0 to 1; used by "jsd" alone.
        temperature: what both models' logits are divided by, above 0.
        ignore_index: the target of tokens that count for nothing.
        reduction: "mean", "sum" or "none".
        vocab_size: number of classes; columns at or past it do not exist.
        backend: "auto", "cpu", "torch" or "triton".

    Raises:
        TypeError, ValueError: an unknown option, or an argument of the wrong type or range.

    Example:
        >>> import torch, chunked_ce
        >>> loss = chunked_ce.DistillationLoss(kind="jsd", temperature=2.0)
        >>> student = torch.randn(2, 5, 100, requires_grad=True)
        >>> loss(student, torch.randn(2, 5, 100)).backward()
        >>> loss
        DistillationLoss(kind='jsd', temperature=2.0)
    """

    @checks.hides_unknown
    def __init__(
        self,
        *,
        kind: str = "forward",
        beta: float = 0.5,
        temperature: float = 1.0,
        ignore_index: int = -100,
        reduction: str = "mean",
        vocab_size: int | None = None,
        backend: str = "auto",
        **unknown: NoReturn,
    ) -> None:
        super().__init__()
        checks.known_options("DistillationLoss", unknown, tuple(_DEFAULTS))
        checks.divergence(kind, beta, temperature)
        checks.reduction(reduction)
        checks.backend_name(backend)
        self.kind, self.beta, self.temperature = kind, beta, temperature
        self.ignore_index = checks.ignore_index(ignore_index)
        self.reduction, self.vocab_size, self.backend = reduction, vocab_size, backend

    def forward(
        self,
        input: Tensor,
        teacher: Tensor,
        target: Tensor | None = None,
        *,
        token_weight: Tensor | None = None,
        num_items: int | Tensor | None = None,
    ) -> Tensor:
        """Return the divergence of two models' logits.

        Args:
            input: the student's logits [..., V].
            teacher: the teacher's logits [..., V].
            target: class indices [...], read only to leave out tokens that equal `ignore_index`.
            token_weight: weight of each token's loss [...].
            num_items: what "mean" divides by instead.

        Returns:
            The loss, a 0-d tensor, or one loss per token for "none".
        """
        options = {name: getattr(self, name) for name in _DEFAULTS}
        return kl_div(
            input, teacher, target=target, token_weight=token_weight, num_items=num_items, **options
        )

    def extra_repr(self) -> str:
        """Return the arguments that differ from the defaults."""
        return ", ".join(differing_arguments(self, _DEFAULTS, {}))


class LinearDistillationLoss(nn.Module):
    """Compute the divergence of two models given by hidden states and heads, without their logits.

    See :func:`chunked_ce.linear_kl_div`. It holds the options and no parameter: both heads stay in
    their models.

    Args:
        options: `kind`, `beta`, `temperature`, `cross_entropy_weight`, `softcap`, `logit_scale`,
            `teacher_softcap`, `teacher_logit_scale`, `ignore_index`, `reduction`, `vocab_size`,
            `acc_dtype`, `chunk_bytes`, `token_chunk_size` and `backend`, by name.

    Raises:
        TypeError, ValueError: an unknown option, or an argument of the wrong type or range.

    Example:
        >>> import torch, chunked_ce
        >>> loss = chunked_ce.LinearDistillationLoss(kind="reverse", cross_entropy_weight=0.5)
        >>> hidden, head = torch.randn(2, 5, 16, requires_grad=True), torch.nn.Linear(16, 100)
        >>> teacher_hidden, teacher_head = torch.randn(2, 5, 32), torch.randn(100, 32)
        >>> target = torch.randint(0, 100, (2, 5))
        >>> loss(hidden, head.weight, teacher_hidden, teacher_head, target).backward()
        >>> loss
        LinearDistillationLoss(kind='reverse', cross_entropy_weight=0.5)
    """

    def __init__(self, **options: Any) -> None:
        super().__init__()
        checks.known_options("LinearDistillationLoss", options, tuple(_LINEAR_DEFAULTS))
        given = _LINEAR_DEFAULTS | options
        checks.divergence(given["kind"], given["beta"], given["temperature"])
        checks.cross_entropy_weight(given["cross_entropy_weight"])
        checks.two_transforms(
            given["softcap"], given["logit_scale"],
            given["teacher_softcap"], given["teacher_logit_scale"],
        )  # fmt: skip
        checks.reduction(given["reduction"])
        checks.backend_name(given["backend"])
        checks.ignore_index(given["ignore_index"])
        self.options = options

    def forward(
        self,
        input: Tensor,
        linear_weight: Tensor,
        teacher_input: Tensor,
        teacher_weight: Tensor,
        target: Tensor | None = None,
        *,
        linear_bias: Tensor | None = None,
        teacher_bias: Tensor | None = None,
        token_weight: Tensor | None = None,
        num_items: int | Tensor | None = None,
    ) -> Tensor:
        """Return the divergence; see :func:`chunked_ce.linear_kl_div`.

        Args:
            input: the student's hidden states [..., D].
            linear_weight: the student's head [V, D].
            teacher_input: the teacher's hidden states [..., another D].
            teacher_weight: the teacher's head [V, another D].
            target: class indices [...]; tokens that equal `ignore_index` count for nothing.
            linear_bias: the student's bias [V], or None.
            teacher_bias: the teacher's bias [V], or None.
            token_weight: weight of each token's loss [...].
            num_items: what "mean" divides by instead.

        Returns:
            The loss, a 0-d tensor, or one loss per token for "none".
        """
        return linear_kl_div(
            input, linear_weight, teacher_input, teacher_weight,
            linear_bias=linear_bias, teacher_bias=teacher_bias, target=target,
            token_weight=token_weight, num_items=num_items, **self.options,
        )  # fmt: skip

    def extra_repr(self) -> str:
        """Return the options that were given."""
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())
