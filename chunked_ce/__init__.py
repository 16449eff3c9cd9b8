"""Cross-entropy over large vocabularies, computed in chunks: the softmax is never stored."""

from .functional import cross_entropy, token_stats
from .linear import linear_cross_entropy, linear_token_stats
from .modules import LinearCrossEntropyLoss
from .perplexity import Perplexity, perplexity
from .report import PerplexityReport
from .stats import TokenStats

__version__ = "0.1.0"

__all__ = [
    "LinearCrossEntropyLoss",
    "Perplexity",
    "PerplexityReport",
    "TokenStats",
    "cross_entropy",
    "linear_cross_entropy",
    "linear_token_stats",
    "perplexity",
    "token_stats",
]
