"""Perplexity: exp(sum of NLL / number of tokens).

Never a mean of batch losses or of perplexities.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor

from ..distributed.collectives import all_gather
from . import checks
from .nll_sums import State, batch_sums, perplexity_of
from .report import PerplexityReport


@torch.no_grad()
@checks.names_unknown
def perplexity(
    input: Tensor, target: Tensor, *, ignore_index: int | None = -100, dim: int = -1
) -> Tensor:
    """Compute the perplexity per token of one batch.

    exp(sum of NLL / number of targets that are not `ignore_index`).
    For a corpus use :class:`Perplexity`: the mean of batch perplexities is not its perplexity.

    Args:
        input: logits [..., V], classes in dimension `dim`.
        target: class indices [...]; already shifted, so that `target[..., i]` is what
            `input[..., i, :]` predicts.
        ignore_index: target value of tokens that are not scored; None is -100.
        dim: the class dimension.

    Returns:
        0-d float64 tensor; NaN when no token is scored, inf where exp overflows.

    Raises:
        TypeError, ValueError, IndexError: as :func:`cross_entropy`.

    >>> import torch
    >>> from chunked_ce import perplexity
    >>> f"{perplexity(torch.zeros(3, 16), torch.tensor([1, 2, -100])):.1f}"
    '16.0'
    """
    ignore_index = checks.meter_ignore_index(ignore_index)
    return perplexity_of(batch_sums(input, target, ignore_index, dim, rank=False))


class Perplexity:
    """Streaming perplexity: float64 sum of NLL and int64 count of tokens.

    Both are kept on the device of the first batch. `update` never makes the host wait; `compute`
    and `report` read the result. The result does not depend on how the tokens were split into
    batches, but for rounding in the last bits of a float64.

    It has the methods of `torchmetrics.text.Perplexity`: `update(preds, target)`, `compute()`,
    `reset()`, and a call, which updates and returns the batch's own perplexity. `compute` is of
    what this process scored; `sync` adds what the other ranks scored.

    Args:
        ignore_index: target value of tokens that are not scored; None, torchmetrics' default, is
            -100 as well.

    >>> import torch
    >>> from chunked_ce import Perplexity
    >>> meter = Perplexity()
    >>> for target in torch.arange(16).split(5):
    ...     meter.update(torch.zeros(len(target), 16), target)
    >>> f"{meter.compute():.1f} per token, {meter.report().tokens} tokens"
    '16.0 per token, 16 tokens'
    """

    nll_sum: Tensor
    nll_square_sum: Tensor | None
    reciprocal_rank_sum: Tensor | None
    tokens: Tensor
    top1: Tensor | None
    bytes: int | None
    words: int | None

    _SUMS = ("nll_sum", "nll_square_sum", "reciprocal_rank_sum")
    _COUNTS = ("tokens", "top1", "bytes", "words")
    _ON_HOST = ("bytes", "words")

    @checks.hides_unknown
    def __init__(self, *, ignore_index: int | None = -100, **unknown: NoReturn) -> None:
        checks.known_options("Perplexity", unknown, ("ignore_index",))
        self.ignore_index = checks.meter_ignore_index(ignore_index)
        self.reset()

    def reset(self) -> None:
        """Forget everything scored so far."""
        for name in self._SUMS:
            setattr(self, name, torch.zeros((), dtype=torch.float64))
        for name in self._COUNTS:
            setattr(self, name, 0 if name in self._ON_HOST else torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def update(
        self,
        input: Tensor,
        target: Tensor,
        *,
        dim: int = -1,
        n_bytes: int | None = None,
        words: int | None = None,
        rank: bool = False,
    ) -> None:
        """Score a batch.

        Once one update leaves out bytes, words or ranks, the measures made of them are None:
        numerator and denominator must cover the same text.

        Args:
            input: logits [..., V].
            target: class indices [...], already shifted; `ignore_index` where nothing is scored.
            dim: the class dimension.
            n_bytes, words: UTF-8 bytes and words of the scored text.
            rank: gather ranks too, for top-1 accuracy and mean reciprocal rank.

        Raises:
            TypeError, ValueError, IndexError: as :func:`cross_entropy`.
        """
        self(input, target, dim=dim, n_bytes=n_bytes, words=words, rank=rank)

    @torch.no_grad()
    def __call__(
        self,
        input: Tensor,
        target: Tensor,
        *,
        dim: int = -1,
        n_bytes: int | None = None,
        words: int | None = None,
        rank: bool = False,
    ) -> Tensor:
        """Update, and return the perplexity of this batch alone, a 0-d float64 tensor."""
        n_bytes = checks.text_count("n_bytes", n_bytes)
        words = checks.text_count("words", words)
        sums = batch_sums(input, target, self.ignore_index, dim, rank)
        self._add(sums | {"bytes": n_bytes, "words": words})
        return perplexity_of(sums)

    @torch.no_grad()
    def update_nll(
        self,
        nll_sum: float | Tensor,
        tokens: int | Tensor,
        n_bytes: int | None = None,
        words: int | None = None,
        *,
        nll_square_sum: float | Tensor | None = None,
    ) -> None:
        """Add what was scored elsewhere.

        The sum of NLL in nats (not a mean) and the number of tokens in it; for the standard error
        the sum of each token's NLL squared.
        """
        sums: State = {
            "bytes": checks.text_count("n_bytes", n_bytes),
            "words": checks.text_count("words", words),
            "nll_sum": checks.nats("nll_sum", nll_sum),
            "tokens": checks.token_count(tokens),
        }
        if nll_square_sum is not None:
            sums["nll_square_sum"] = checks.nats("nll_square_sum", nll_square_sum)
        self._add(sums)

    def compute(self) -> Tensor:
        """Return the perplexity per token, a 0-d float64 tensor; NaN when nothing was scored."""
        return (self.nll_sum / self.tokens).exp()

    def report(self) -> PerplexityReport:
        """Return everything measured so far. The host waits for the device."""
        tokens = int(self.tokens)
        if not tokens:
            return PerplexityReport(float(self.nll_sum), 0)
        squares, top1, reciprocal = self.nll_square_sum, self.top1, self.reciprocal_rank_sum
        return PerplexityReport(
            float(self.nll_sum),
            tokens,
            self.bytes,
            self.words,
            None if squares is None else float(squares),
            None if top1 is None else int(top1),
            None if reciprocal is None else float(reciprocal),
        )

    def to(self, device: torch.device | str | int) -> Perplexity:
        """Move the sums to `device`, of this meter itself, and return it.

        Raises:
            ValueError: a device that is not there, or has no float64.
        """
        where = checks.device(device)
        for name, value in self.state_dict().items():
            setattr(self, name, value.to(where) if isinstance(value, Tensor) else value)
        return self

    def clone(self) -> Perplexity:
        """Return a meter of its own that goes on from here."""
        return copy.deepcopy(self)

    def merge(self, other: Perplexity) -> None:
        """Add what `other` scored; `+` does the same and changes neither."""
        self._add(checks.meter(other).state_dict())

    def __add__(self, other: Perplexity) -> Perplexity:
        """Return what was scored by either; `ignore_index` is the left one's."""
        if not isinstance(other, Perplexity):
            return NotImplemented
        both = Perplexity(ignore_index=self.ignore_index)
        both.merge(self)
        both.merge(other)
        return both

    def __radd__(self, other: Any) -> Perplexity:
        """Return 0 + meter, with which `sum(meters)` begins."""
        if not (isinstance(other, int) and other == 0):
            return NotImplemented
        return self + Perplexity()

    def state_dict(self) -> State:
        """Return the sums and counts: 0-d tensors, ints, and None for what is not known."""
        return {name: getattr(self, name) for name in self._SUMS + self._COUNTS}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from where `state_dict` was taken; plain numbers, as in JSON, will do.

        Raises:
            TypeError, ValueError: `state_dict` is no mapping, its keys are others, or a value is
                no sum or count; the meter is then as it was.
        """
        checked = checks.meter_state(state_dict, self._SUMS, self._COUNTS, self._ON_HOST)
        self.reset()
        self._add(checked)

    @torch.no_grad()
    def sync(self, group: Any = None) -> Perplexity:
        """Return what the ranks of a group have scored together, as a new meter.

        One collective, an all_gather of a few numbers, that every rank must call; sums are then
        added in the order of the ranks, so that all ranks get the same bits. This meter stays as it
        is: calling it twice counts nothing twice. Without an initialised process group, a copy.

        Args:
            group: a torch.distributed process group; None for the default one.
        """
        together = Perplexity(ignore_index=self.ignore_index)
        for packed in all_gather(self._packed(), group):
            together._add(self._unpacked(packed))
        return together

    def _packed(self) -> Tensor:
        """Return int64 [known or not..., values...]; a float64 travels as its 64 bits."""
        values = self.state_dict().values()
        known = [int(value is not None) for value in values]
        bits = [
            value.view(torch.int64) if isinstance(value, Tensor) else torch.tensor(value or 0)
            for value in values
        ]
        where = self.nll_sum.device
        return torch.stack([t.to(where) for t in (*map(torch.tensor, known), *bits)])

    def _unpacked(self, packed: Tensor) -> State:
        names = self._SUMS + self._COUNTS
        known, bits = packed.split(len(names))
        state: State = {}
        for name, is_known, value in zip(names, known.tolist(), bits, strict=True):
            if is_known and name in self._ON_HOST:
                state[name] = int(value)
            elif is_known:
                state[name] = value.view(torch.float64) if name in self._SUMS else value
        return state

    def _add(self, state: Mapping[str, Any]) -> None:
        """Add all at once: an interruption finds either the old sums or the new ones."""
        names = self._SUMS + self._COUNTS
        vars(self).update({name: _add(getattr(self, name), state.get(name)) for name in names})

    def __repr__(self) -> str:
        return f"Perplexity({self.report()})"


def _add(sum: Any, value: Any) -> Any:
    """Return a sum, None where either is not known, on the device that is not the CPU."""
    if sum is None or value is None:
        return None
    if not isinstance(sum, Tensor):
        return sum + value
    device = sum.device if value.device.type == "cpu" else value.device
    return sum.to(device, non_blocking=True) + value.to(device, sum.dtype, non_blocking=True)
