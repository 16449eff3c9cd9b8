"""transformers: any causal language model's loss in chunks, with its logits or without them.

causal_lm_loss   `model.loss_function = causal_lm_loss`: the loss of logits that the model computed
enable           the logits are not computed at all: hidden states go to `linear_cross_entropy`
distill          the loss is the divergence from another model, without the logits of either
DeferredLogits   what the model's output head returns then

No model is known by name: what one does to its logits before the loss is recorded as it happens.
"""

from .deferred import DeferredLogits
from .distill import Distilled, distill
from .enable import Enabled, enable
from .loss import causal_lm_loss

__all__ = ["DeferredLogits", "Distilled", "Enabled", "causal_lm_loss", "distill", "enable"]
