"""The statistics of each row of logits, with any upstream gradient."""

from __future__ import annotations

from typing import NoReturn

import torch
from torch import Tensor

from .. import checks
from ..core.row_stats import TokenStats
from ..ops import transforms
from ..ops.library import Classes
from ..ops.logits import token_stats as token_stats_operator
from .logits import shared_arguments
from .shift import ROWS, next_tokens


@checks.hides_unknown
def token_stats(
    input: Tensor,
    target: Tensor,
    *,
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
    inplace_backward: bool = False,
    backend: str = "auto",
    **unknown: NoReturn,
) -> TokenStats:
    """Return statistics of each row of logits, from one pass over the vocabulary.

    The softmax is not stored. With `z_j = softcap * tanh(logit_scale * x_j / softcap)` and target
    `t`:

        lse           log Σ exp z_j                                                    always
        logprob       z_t - lse                                                        always
        entropy       -Σ p_j log p_j, in nats                                          on request
        mean_logprob  (1/V) Σ (z_j - lse)                                              on request
        rank          how many classes beat the target; on a tie the lower index wins  on request
        argmax        the winning class                                                on request

    The floating statistics are differentiable in `input`, with any upstream gradient. Rows whose
    target is `ignore_index` have statistics 0 (-1 for rank and argmax) and gradient exactly 0,
    whatever their logits hold.

    Args:
        input: logits [..., V]; float16, bfloat16, float32 or float64, any strides.
        target: class indices [...], any integer dtype.
        ignore_index: target value of rows to leave out.
        shift: True where `target` [..., T] holds the tokens themselves: position i predicts the
            token at i + 1, and the last position is ignored. Only the target moves; nothing is
            copied. The classes of `input` must come last, and `target` must hold class indices.
        position_ids: position of each token in its document, of `target`'s shape, any integer
            dtype. A 0 begins a document, whose first token no position predicts. Only with
            `shift=True`.
        cu_seqlens: the same as offsets [num_docs + 1] into the flattened tokens, int32 or int64,
            from 0 to their number. Only with `shift=True`, and not beside `position_ids`.
        vocab_size: number of classes that exist; columns at or past it (padding) are not read.
            None: all exist.
        softcap: logits are capped to ±softcap as `softcap * tanh(z / softcap)` (Gemma 2); None: no
            cap.
        logit_scale: factor of the logits before the cap, 1 / temperature.
        entropy: also compute the entropy of each row, -Σ p_j log p_j in nats.
        mean_logprob: also compute the mean over the vocabulary of z_j - lse.
        rank: also count the classes that beat the target; on a tie the lower index wins.
        argmax: also find the winning class.
        weight: weight w_j of each class in `mean_logprob`, [V]: it is then (1/V) Σ w_j (z_j - lse).
        inplace_backward: backward writes the gradient over `input`, which saves N·V elements. The
            logits are gone afterwards, and autograd raises if another backward still needs them.
            Under torch.compile and torch.func it changes nothing.
        backend: "auto" chooses; "cpu" (kernels in C), "torch" (any device) or "triton" (GPU) are
            used or raise.

    Returns:
        TokenStats of shape [...]: float32 (float64 for float64 logits), int64 for rank and argmax;
        None for what was not asked for.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape, device or range.
            Arguments are checked before anything is computed.
        IndexError: a target out of range, on the CPU. Elsewhere that row's result and gradient are
            NaN; `CHUNKED_CE_CHECK_TARGETS=1` in the environment raises there too, and makes the GPU
            wait.

    Example:
        >>> import torch, chunked_ce
        >>> logits = torch.tensor([[2.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
        >>> stats = chunked_ce.token_stats(logits, torch.tensor([0, 1]), rank=True, argmax=True)
        >>> stats.rank.tolist(), stats.argmax.tolist()
        ([0, 2], [0, 2])
        >>> [round(p, 4) for p in stats.logprob.exp().tolist()]  # the targets' probabilities
        [0.787, 0.2119]
    """
    if unknown:
        checks.unknown_keywords(token_stats, unknown)
    if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        return transforms.call(token_stats, locals(), ROWS if cu_seqlens is None else ())
    checks.logits(input)
    checks.class_dimension(input, -1)
    checks.target_indices(target)
    checks.one_target_per_row(input, target)
    wanted = checks.flags(entropy=entropy, mean_logprob=mean_logprob, rank=rank, argmax=argmax)
    ignore_index = checks.ignore_index(ignore_index)
    if shift is not False or position_ids is not None or cu_seqlens is not None:
        target = next_tokens(target, ignore_index, shift, position_ids, cu_seqlens, input)
    shared = shared_arguments(input, vocab_size, softcap, logit_scale, inplace_backward, backend)
    weight = checks.class_weight(weight, input, shared.vocab_size)
    *options, inplace_backward = (ignore_index, *shared)
    outputs = token_stats_operator(
        input, target, *Classes(weight if mean_logprob else None), *options, *wanted,
        inplace_backward,
    )  # fmt: skip
    return outputs.to_token_stats(wanted)
