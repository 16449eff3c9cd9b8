"""Cross-entropy over large vocabularies, computed in chunks: the softmax is never stored."""

from .evaluation import evaluate_perplexity
from .functional import cross_entropy, token_stats
from .likelihood import Loglikelihood, loglikelihood
from .linear import linear_cross_entropy, linear_token_stats
from .modules import LinearCrossEntropyLoss
from .perplexity import Perplexity, perplexity
from .report import EvaluationInterrupted, EvaluationReport, PerplexityReport
from .stats import TokenStats

__version__ = "0.1.0"

__all__ = [
    "EvaluationInterrupted",
    "EvaluationReport",
    "LinearCrossEntropyLoss",
    "Loglikelihood",
    "Perplexity",
    "PerplexityReport",
    "TokenStats",
    "cross_entropy",
    "evaluate_perplexity",
    "linear_cross_entropy",
    "linear_token_stats",
    "loglikelihood",
    "perplexity",
    "token_stats",
]
