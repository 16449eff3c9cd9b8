"""Cross-entropy over large vocabularies, computed in chunks: the softmax is never stored.

Names are loaded at their first use, so that `chunked-ce --help` need not wait for torch. Where
torch is imported already, everything is loaded at once, the operators `torch.ops.chunked_ce` too.
"""

import sys
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .checks import explain_loss
    from .core.row_stats import TokenStats
    from .evaluation.comparison import compare_models
    from .evaluation.comparison_report import (
        Comparison,
        ComparisonInterrupted,
        ComparisonReport,
        Measure,
        TokenComparison,
    )
    from .evaluation.evaluate import evaluate_perplexity
    from .evaluation.likelihood import Loglikelihood, loglikelihood
    from .evaluation.meter import Perplexity, perplexity
    from .evaluation.report import EvaluationInterrupted, EvaluationReport, PerplexityReport
    from .functional.binary import binary_cross_entropy_with_logits
    from .functional.distillation import kl_div, linear_kl_div
    from .functional.linear import linear_cross_entropy
    from .functional.linear_stats import linear_token_stats
    from .functional.logits import cross_entropy
    from .functional.logits_stats import token_stats
    from .functional.multi_token import multi_token_cross_entropy
    from .modules import (
        BCEWithLogitsLoss,
        CrossEntropyLoss,
        DistillationLoss,
        LinearCrossEntropyLoss,
        LinearDistillationLoss,
    )

__version__ = "0.1.0"

__all__ = [
    "BCEWithLogitsLoss",
    "Comparison",
    "ComparisonInterrupted",
    "ComparisonReport",
    "CrossEntropyLoss",
    "DistillationLoss",
    "EvaluationInterrupted",
    "EvaluationReport",
    "LinearCrossEntropyLoss",
    "LinearDistillationLoss",
    "Loglikelihood",
    "Measure",
    "Perplexity",
    "PerplexityReport",
    "TokenComparison",
    "TokenStats",
    "binary_cross_entropy_with_logits",
    "compare_models",
    "cross_entropy",
    "evaluate_perplexity",
    "explain_loss",
    "kl_div",
    "linear_cross_entropy",
    "linear_kl_div",
    "linear_token_stats",
    "loglikelihood",
    "multi_token_cross_entropy",
    "perplexity",
    "token_stats",
]

_MODULES = (  # the same as above, which type checkers read
    "checks",
    "core.row_stats",
    "evaluation.comparison",
    "evaluation.comparison_report",
    "evaluation.evaluate",
    "evaluation.likelihood",
    "evaluation.meter",
    "evaluation.report",
    "functional.binary",
    "functional.distillation",
    "functional.linear",
    "functional.linear_stats",
    "functional.logits",
    "functional.logits_stats",
    "functional.multi_token",
    "modules",
)


def _load() -> None:
    """Import every public name into this module."""
    for name in _MODULES:
        found = vars(import_module(f".{name}", __name__))
        globals().update({public: found[public] for public in __all__ if public in found})


if not TYPE_CHECKING:  # a type checker must not take any name for a public one

    def __getattr__(name: str) -> object:
        """Load the library at the first use of a public name, or one module (PEP 562)."""
        if name in __all__:
            _load()
            return globals()[name]
        if not name.startswith("_") and find_spec(f"{__name__}.{name}"):
            return import_module(f".{name}", __name__)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})


class _Moved(ModuleType):
    """The import path that `evaluation.documents` had before it moved."""

    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):  # `inspect` asks every module for some, while torch is imported
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        return getattr(import_module(f"{__package__}.evaluation.documents"), name)


documents = sys.modules[f"{__name__}.documents"] = _Moved(f"{__name__}.documents")
if "torch" in sys.modules:
    _load()
