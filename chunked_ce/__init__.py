"""Cross-entropy over large vocabularies, computed in chunks: the softmax is never stored."""

import sys

from .checks import explain_loss
from .core.row_stats import TokenStats
from .evaluation import documents as _documents
from .evaluation.evaluate import evaluate_perplexity
from .evaluation.likelihood import Loglikelihood, loglikelihood
from .evaluation.meter import Perplexity, perplexity
from .evaluation.report import EvaluationInterrupted, EvaluationReport, PerplexityReport
from .functional.binary import binary_cross_entropy_with_logits
from .functional.linear import linear_cross_entropy
from .functional.linear_stats import linear_token_stats
from .functional.logits import cross_entropy
from .functional.logits_stats import token_stats
from .modules import BCEWithLogitsLoss, CrossEntropyLoss, LinearCrossEntropyLoss

__version__ = "0.1.0"

sys.modules[f"{__name__}.documents"] = _documents  # where it was imported from before

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
