"""Operations of the products and bytes of the loss, of each way to compute head and loss.

The products take 6 N D V operations, 8 where the logits are computed again in backward. The loss
reads and writes the logits (L bytes), and chunks add up the weight's gradient (W32 in float32):

    eager                          log-softmax 2 L, its gradient 4 L            6 L
    eager, float32 loss            these in float32, and a copy each way        8 L32 + 2 L
    torch.compile, cross_entropy   two reads, one write                         3 L
    linear_cross_entropy           one read, one write                          2 L
      float16                      a read for the statistics as well            3 L
      each of several chunks       the sum is read and written in the product   2 W32

The logits' traffic in the products themselves is part of the products' time.
"""

from __future__ import annotations

import torch

from . import memory
from .head import HeadShape


def product_flops(head: HeadShape, tokens: int, products: int = 3) -> int:
    """Return the operations of so many products of the logits' size."""
    return 2 * products * tokens * head.hidden_size * head.vocab_size


def logits_traffic(head: HeadShape, tokens: int, passes: int) -> int:
    """Return the bytes of so many reads and writes of all logits."""
    return passes * tokens * head.vocab_size * head.dtype.itemsize


def three_passes(head: HeadShape, tokens: int) -> int:
    """Return the bytes of a read in forward, and of a read and a write in backward."""
    return logits_traffic(head, tokens, 3)


def eager_traffic(head: HeadShape, tokens: int) -> int:
    return logits_traffic(head, tokens, 6 + _head_passes(head))


def eager_in_float32_traffic(head: HeadShape, tokens: int) -> int:
    in_float32 = 8 * 4 * tokens * head.vocab_size
    return in_float32 + logits_traffic(head, tokens, 2 + _head_passes(head))


def _head_passes(head: HeadShape) -> int:
    """Return the reads and writes of a scale, and of a softcap: divide, tanh, multiply."""
    return 4 * (head.logit_scale != 1.0) + 13 * (head.softcap is not None)


def linear_products(head: HeadShape) -> int:
    """Return how many products: float16 computes the logits again in backward."""
    return 4 if head.dtype == torch.float16 else 3


def linear_traffic(
    chunk_bytes: int | None, wide_sums: bool, head: HeadShape, tokens: int, device: str
) -> int:
    """Return the bytes of the logits' passes, and of adding up the weight's gradient."""
    passes = 3 if head.dtype == torch.float16 else 2
    count, _ = memory.chunks(chunk_bytes, head, tokens, device)
    numbers = head.vocab_size * head.hidden_size
    if count == 1:
        sums = 0
    elif wide_sums and head.dtype.itemsize < 4:
        # Written by the first chunk, read and written by others, rounded at the end.
        sums = numbers * (4 + 8 * (count - 1) + 4 + head.dtype.itemsize)
    else:
        sums = 2 * head.weight_bytes * (count - 1)  # the product adds to what is there
    return logits_traffic(head, tokens, passes) + sums
