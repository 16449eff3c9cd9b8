"""The lm_head and the statistics of its logits in one, with any upstream gradient."""

from __future__ import annotations

from typing import NoReturn

import torch
from torch import Tensor

from .. import checks
from ..core.row_stats import TokenStats
from ..ops import transforms
from ..ops.library import Classes
from .linear import autocast, options_of_head, outputs_of_head
from .shift import ROWS, next_tokens


@checks.hides_unknown
def linear_token_stats(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    ignore_index: int = -100,
    shift: bool = False,
    position_ids: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    vocab_size: int | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    entropy: bool = False,
    mean_logprob: bool = False,
    rank: bool = False,
    argmax: bool = False,
    weight: Tensor | None = None,
    acc_dtype: torch.dtype = torch.float32,
    chunk_bytes: int | None = None,
    token_chunk_size: int | None = None,
    drop_ignored: bool | None = None,
    backend: str = "auto",
    **unknown: NoReturn,
) -> TokenStats:
    """:func:`chunked_ce.token_stats` of `input @ linear_weight.T + linear_bias`, less the logits.

    Differentiable in `input`, `linear_weight` and `linear_bias` with any upstream gradient:
    backward computes each chunk's logits again (8 N D V FLOPs in all). For log-probabilities of
    long sequences and for policy-gradient losses.

    Args:
        input: hidden states [..., D]; float16, bfloat16, float32 or float64.
        linear_weight: [V, D], as `torch.nn.Linear` keeps it; of `input`'s dtype but under autocast.
        target: class indices [...], any integer dtype.
        linear_bias: [V] or None.
        shift: `target` holds the tokens themselves, [..., T]: position i predicts the token at
            i + 1, and the last position is ignored. No copy of `input` is made.
        position_ids: [..., T], with `shift` and packed documents: each 0 begins a document, and no
            position predicts the first token of the next document.
        cu_seqlens: the same as offsets [num_docs + 1] into the flattened tokens, int32 or int64.
        acc_dtype: in which the chunks' gradients of `linear_weight` are added, to be rounded once.
        chunk_bytes: of logits held at a time; by default 256 MiB, on a CPU 128 MiB where that
            does not hold all; or
        token_chunk_size: as a number of tokens.
        drop_ignored: whether ignored tokens are left out of the products. Finding them makes a GPU
            wait, so by default that is done on the CPU alone.
        others: see :func:`chunked_ce.token_stats`.

    Returns:
        TokenStats of shape [...].

    Raises:
        TypeError, ValueError, IndexError: as :func:`chunked_ce.token_stats`, before anything is
            computed.
    """
    if unknown:
        checks.unknown_keywords(linear_token_stats, unknown)
    if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        return transforms.call(linear_token_stats, locals(), ROWS if cu_seqlens is None else ())
    checks.target_indices(target)
    checks.linear_input(input, linear_weight, linear_bias, target, dims=False)
    checks.flags(entropy=entropy, mean_logprob=mean_logprob, rank=rank, argmax=argmax)
    ignore_index = checks.ignore_index(ignore_index)
    if shift is not False or position_ids is not None or cu_seqlens is not None:
        target = next_tokens(target, ignore_index, shift, position_ids, cu_seqlens, input)
    input, linear_weight, linear_bias = autocast(input, linear_weight, linear_bias)
    shared = options_of_head(
        input, linear_weight, ignore_index, vocab_size, softcap, logit_scale, backend,
        chunk_bytes, token_chunk_size, drop_ignored, acc_dtype,
    )  # fmt: skip
    weight = checks.class_weight(weight, linear_weight[..., 0], shared[1])
    wanted = (entropy, mean_logprob, rank, argmax)
    classes = Classes(weight if mean_logprob else None)
    outputs = outputs_of_head(input, linear_weight, linear_bias, target, classes, shared, wanted)
    return outputs.of_user(wanted)
