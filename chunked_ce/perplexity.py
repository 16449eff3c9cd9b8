"""Perplexity: exp(sum of NLL / number of tokens).

Never a mean of batch losses or of perplexities.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from . import checks
from .functional import cross_entropy
from .stats import is_scored


@dataclass(frozen=True)
class PerplexityReport:
    """What was scored, and the measures that follow from it.

    Units: nats for `nll_sum` and `mean_nll`, bits for the `bits_per_*`. Bits per byte, unlike
    perplexity, can be compared across tokenizers; `bytes` are the UTF-8 bytes of the scored text,
    None where not given.
    """

    nll_sum: float
    tokens: int
    bytes: int | None = None
    words: int | None = None

    @property
    def mean_nll(self) -> float:
        """Nats per token; NaN when nothing was scored."""
        return self.nll_sum / self.tokens if self.tokens else math.nan

    @property
    def perplexity(self) -> float:
        """exp(mean_nll), per token; inf where that overflows (mean_nll still says how far)."""
        return _exp(self.mean_nll)

    @property
    def bits_per_token(self) -> float:
        return self.mean_nll / math.log(2)

    @property
    def bits_per_byte(self) -> float | None:
        return self.nll_sum / math.log(2) / self.bytes if self.bytes else None

    @property
    def word_perplexity(self) -> float | None:
        """exp(nll_sum / words)."""
        return _exp(self.nll_sum / self.words) if self.words else None

    def to_dict(self) -> dict[str, Any]:
        """The counts and every measure, ready for JSON but for inf and NaN."""
        return asdict(self) | {
            "mean_nll": self.mean_nll,
            "perplexity": self.perplexity,
            "bits_per_token": self.bits_per_token,
            "bits_per_byte": self.bits_per_byte,
            "word_perplexity": self.word_perplexity,
        }

    def __str__(self) -> str:
        parts = [
            f"perplexity {self.perplexity:.4g} per token over {self.tokens} tokens",
            f"mean NLL {self.mean_nll:.4f} nats",
            f"{self.bits_per_token:.4f} bits per token",
        ]
        if self.bits_per_byte is not None:
            parts.append(f"{self.bits_per_byte:.4f} bits per byte over {self.bytes} bytes")
        if self.word_perplexity is not None:
            parts.append(f"perplexity {self.word_perplexity:.4g} per word over {self.words} words")
        return ", ".join(parts)


def _exp(x: float) -> float:
    try:
        return math.exp(x)
    except OverflowError:
        return math.inf


@torch.no_grad()
def perplexity(input: Tensor, target: Tensor, *, ignore_index: int = -100, dim: int = -1) -> Tensor:
    """Perplexity per token of one batch.

    exp(sum of NLL / number of targets that are not `ignore_index`).
    For a corpus use :class:`Perplexity`: the mean of batch perplexities is not its perplexity.

    Args:
        input: logits [..., V], classes in dimension `dim`.
        target: class indices [...]; already shifted, so that `target[..., i]` is what
            `input[..., i, :]` predicts.
        ignore_index: target value of tokens that are not scored.
        dim: the class dimension.

    Returns:
        0-d float64 tensor; NaN when no token is scored, inf where exp overflows.

    Raises:
        TypeError, ValueError, IndexError: as :func:`cross_entropy`.
    """
    nll_sum, tokens = _score(input, target, ignore_index, dim)
    return (nll_sum / tokens).exp()


def _score(input: Tensor, target: Tensor, ignore_index: int, dim: int) -> tuple[Tensor, Tensor]:
    """(sum of NLL in float64, number of scored tokens), on the device."""
    nll = cross_entropy(input, target, ignore_index=ignore_index, dim=dim, reduction="none")
    return nll.sum(dtype=torch.float64), is_scored(target, ignore_index).sum()


class Perplexity:
    """Streaming perplexity: float64 sum of NLL and int64 count of tokens.

    Both are kept on the device of the first batch. `update` never makes the host wait; `compute`
    and `report` read the result. The result does not depend on how the tokens were split into
    batches, but for rounding in the last bits of a float64.

    Args:
        ignore_index: target value of tokens that are not scored.
    """

    def __init__(self, *, ignore_index: int = -100) -> None:
        self.ignore_index = checks.ignore_index(ignore_index)
        self.reset()

    def reset(self) -> None:
        """Forgets everything scored so far."""
        self.nll_sum = torch.zeros((), dtype=torch.float64)
        self.tokens = torch.zeros((), dtype=torch.int64)
        self.bytes: int | None = 0
        self.words: int | None = 0

    @torch.no_grad()
    def update(
        self,
        input: Tensor,
        target: Tensor,
        *,
        dim: int = -1,
        n_bytes: int | None = None,
        words: int | None = None,
    ) -> None:
        """Scores a batch.

        Args:
            input: logits [..., V].
            target: class indices [...], already shifted; `ignore_index` where nothing is scored.
            dim: the class dimension.
            n_bytes, words: UTF-8 bytes and words of the scored text. Once one update leaves them
                out, the measures per byte or per word are None: numerator and denominator must
                cover the same text.

        Raises:
            TypeError, ValueError, IndexError: as :func:`cross_entropy`.
        """
        n_bytes = checks.text_count("n_bytes", n_bytes)
        words = checks.text_count("words", words)
        nll_sum, tokens = _score(input, target, self.ignore_index, dim)
        self.update_nll(nll_sum, tokens, n_bytes, words)

    @torch.no_grad()
    def update_nll(
        self,
        nll_sum: float | Tensor,
        tokens: int | Tensor,
        n_bytes: int | None = None,
        words: int | None = None,
    ) -> None:
        """Adds what was scored elsewhere.

        The sum of NLL in nats (not a mean) and the number of tokens in it.
        """
        n_bytes = checks.text_count("n_bytes", n_bytes)
        words = checks.text_count("words", words)
        nll_sum, tokens = checks.nll_and_tokens(nll_sum, tokens)
        self.nll_sum = _add(self.nll_sum, nll_sum)
        self.tokens = _add(self.tokens, tokens)
        self.bytes, self.words = (
            _add_counts(self.bytes, n_bytes),
            _add_counts(self.words, words),
        )

    def compute(self) -> Tensor:
        """Perplexity per token, a 0-d float64 tensor; NaN when nothing was scored."""
        return (self.nll_sum / self.tokens).exp()

    def report(self) -> PerplexityReport:
        """Everything measured so far. Reads the device, so the host waits for it."""
        tokens = int(self.tokens)
        return PerplexityReport(
            float(self.nll_sum),
            tokens,
            self.bytes if tokens else None,
            self.words if tokens else None,
        )

    def __add__(self, other: Perplexity) -> Perplexity:
        """What was scored by either; `ignore_index` of the left one."""
        if not isinstance(other, Perplexity):
            return NotImplemented
        both = Perplexity(ignore_index=self.ignore_index)
        both.nll_sum = _add(self.nll_sum, other.nll_sum)
        both.tokens = _add(self.tokens, other.tokens)
        both.bytes = _add_counts(self.bytes, other.bytes)
        both.words = _add_counts(self.words, other.words)
        return both

    def __repr__(self) -> str:
        return f"Perplexity({self.report()})"


def _add(sum: Tensor, value: Tensor) -> Tensor:
    """On the device of `value`, once there is one that is not the CPU."""
    device = sum.device if value.device.type == "cpu" else value.device
    return sum.to(device, non_blocking=True) + value.to(device, sum.dtype, non_blocking=True)


def _add_counts(sum: int | None, value: int | None) -> int | None:
    return None if sum is None or value is None else sum + value
