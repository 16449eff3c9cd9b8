"""Cross-entropy over large vocabularies, computed in chunks: the softmax is never stored."""

from .binary import binary_cross_entropy_with_logits
from .checks import explain_loss
from .evaluation import evaluate_perplexity
from .functional import cross_entropy, token_stats
from .likelihood import Loglikelihood, loglikelihood
from .linear import linear_cross_entropy, linear_token_stats
from .modules import BCEWithLogitsLoss, CrossEntropyLoss, LinearCrossEntropyLoss
from .perplexity import Perplexity, perplexity
from .report import EvaluationInterrupted, EvaluationReport, PerplexityReport
from .stats import TokenStats

__version__ = "0.1.0"

__all__ = [
    "BCEWithLogitsLoss",
    "CrossEntropyLoss",
    "EvaluationInterrupted",
    "EvaluationReport",
    "LinearCrossEntropyLoss",
    "Loglikelihood",
    "Perplexity",
    "PerplexityReport",
    "TokenStats",
    "binary_cross_entropy_with_logits",
    "cross_entropy",
    "evaluate_perplexity",
    "explain_loss",
    "linear_cross_entropy",
    "linear_token_stats",
    "loglikelihood",
    "perplexity",
    "token_stats",
]
