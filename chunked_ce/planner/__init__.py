"""Memory and time of a language model's head and loss in training, predicted from shapes alone.

From hidden states [N, D] and the head's weight [V, D] to the loss and both gradients. With L bytes
of logits, X of hidden states, W of the weight, the tensors alive at the peak are

    eager                 log-softmax, its gradient, the logits' gradient    3 L
    eager, float32 loss   these in float32, and the logits                   3 L32 + L
    torch.compile         the logits, which become their gradient            L + X + W
    cross_entropy         the logits, their gradient                         2 L
      inplace_backward    the gradient over the logits                       L + X + W
    linear_cross_entropy  a chunk of logits, the gradients                   C + X + W
      in several chunks   those, the weight's added up in float32            X + W32 + max(C, W)

The product for the weight's gradient takes L + X + W, which is the peak where it is more. Hidden
states and weight are not counted in a peak, because any way of computing needs them. An allocator
rounds up, and a matrix product needs workspace: both come on top.

>>> from chunked_ce.planner import HeadShape, plan, recommend
>>> head = HeadShape(vocab_size=128256, hidden_size=4096)
>>> recommend(plan(head, tokens=8192)).estimate.name
'linear_cross_entropy'
"""

from .estimates import Estimate, Recommendation, plan, recommend
from .head import HeadShape, head_of_config
from .time import GPUS, Gpu, predicted_seconds

__all__ = [
    "GPUS",
    "Estimate",
    "Gpu",
    "HeadShape",
    "Recommendation",
    "head_of_config",
    "plan",
    "predicted_seconds",
    "recommend",
]
