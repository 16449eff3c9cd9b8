"""Every function of logits or hidden states against eager torch in float64, on whatever device.

The public functions on small batches, some tokens ignored, with upstream gradients other than 1:
values and gradients, in seconds. What `chunked-ce doctor` runs; the tests go further. Not among
them: what needs several processes (`chunked_ce.distributed`) or a model.
"""

from __future__ import annotations

import torch

from ...backends import choose_backend
from . import losses, others, statistics
from .against_eager import Check

_BINARY: dict[str, Check] = {
    "binary_cross_entropy_with_logits": others.check_binary,
    "binary_cross_entropy_with_logits, indices": others.check_binary_by_index,
}
_PERPLEXITY: dict[str, Check] = {"perplexity, Perplexity": others.check_perplexity}

CHECKS: dict[str, Check] = {
    "token_stats": statistics.check_token_stats,
    **losses.CHECKS,
    "linear_token_stats": statistics.check_linear_token_stats,
    **_BINARY,
    **_PERPLEXITY,
}


def checks_of(device: torch.device, backend: str) -> dict[str, Check]:
    """Those that this backend has: a perplexity chooses for itself."""
    left_out = _PERPLEXITY.keys() if backend != choose_backend("auto", device) else set()
    return {name: check for name, check in CHECKS.items() if name not in left_out}
