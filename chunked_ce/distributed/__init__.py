"""Losses where the vocabulary lies on several ranks (tensor parallelism)."""

from .distillation import vocab_parallel_kl_div, vocab_parallel_linear_kl_div
from .losses import (
    vocab_parallel_cross_entropy,
    vocab_parallel_linear_cross_entropy,
    vocab_parallel_token_stats,
)

__all__ = [
    "vocab_parallel_cross_entropy",
    "vocab_parallel_kl_div",
    "vocab_parallel_linear_cross_entropy",
    "vocab_parallel_linear_kl_div",
    "vocab_parallel_token_stats",
]
