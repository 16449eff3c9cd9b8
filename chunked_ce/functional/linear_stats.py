"""The lm_head and the statistics of its logits in one, with any upstream gradient."""

from __future__ import annotations

from typing import NoReturn

import torch
from torch import Tensor

from .. import checks
from ..core.row_stats import TokenStats
from ..ops import transforms
from ..ops.library import Classes
from . import sharded_heads
from .head_loss import LinearHead, as_weight, operands_and_options, outputs_of_head
from .heads import is_called_apart
from .shift import ROWS, next_tokens


@checks.hides_unknown
def linear_token_stats(
    input: Tensor,
    linear_weight: LinearHead,
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
    logits_dtype: torch.dtype | None = None,
    chunk_bytes: int | None = None,
    token_chunk_size: int | None = None,
    drop_ignored: bool | None = None,
    backend: str = "auto",
    **unknown: NoReturn,
) -> TokenStats:
    """Return statistics of each row of `input @ linear_weight.T + linear_bias`, without its logits.

    As :func:`chunked_ce.token_stats`, which defines them. Differentiable in `input`,
    `linear_weight` and `linear_bias` with any upstream gradient: backward computes each chunk's
    logits again, 8 N D V FLOPs in all. For log-probabilities of long sequences and for policy
    gradients.

    Args:
        input: hidden states [..., D]; float16, bfloat16, float32 or float64.
        linear_weight: weight of the head [V, D], as `torch.nn.Linear` keeps it, of `input`'s dtype
            unless autocast is on. Or a head: a module or function of hidden states [N, D] that
            returns logits [N, V].
        target: class indices [...], any integer dtype.
        linear_bias: bias of the head, [V], or None.
        ignore_index: target value of rows to leave out.
        shift: True where `target` [..., T] holds the tokens themselves: position i predicts the
            token at i + 1, and the last position is ignored. Only the target moves; nothing is
            copied. The classes of `input` must come last, and `target` must hold class indices.
        position_ids: position of each token in its document, of `target`'s shape, any integer
            dtype. A 0 begins a document, whose first token no position predicts. Only with
            `shift=True`.
        cu_seqlens: the same as offsets [num_docs + 1] into the flattened tokens, int32 or int64,
            from 0 to their number. Only with `shift=True`, and not beside `position_ids`.
        vocab_size: number of classes that exist; rows of the head at or past it are not read. None:
            all exist.
        softcap: logits are capped to ±softcap as `softcap * tanh(z / softcap)` (Gemma 2); None: no
            cap.
        logit_scale: factor of the logits before the cap, 1 / temperature.
        entropy: also compute the entropy of each row, -Σ p_j log p_j in nats.
        mean_logprob: also compute the mean over the vocabulary of z_j - lse.
        rank: also count the classes that beat the target; on a tie the lower index wins.
        argmax: also find the winning class.
        weight: weight w_j of each class in `mean_logprob`, [V]: it is then (1/V) Σ w_j (z_j - lse).
        acc_dtype: dtype in which the chunks' gradients of `linear_weight` are added; they are
            rounded once, at the end.
        logits_dtype: torch.float32 keeps the logits of half-precision operands in float32, and on a
            CPU their gradient too. None: the operands' dtype.
        chunk_bytes: bytes of logits held at a time.
        token_chunk_size: the same as a number of tokens; give one of the two. By default 4096
            tokens, or all if their logits take at most 1 GiB; on a CPU 128 MiB of logits, or all if
            they take at most 256 MiB.
        drop_ignored: True leaves ignored tokens out of the matrix products. Finding them makes a
            GPU wait. None: True on a CPU, False elsewhere.
        backend: "auto" chooses; "cpu" (kernels in C), "torch" (any device) or "triton" (GPU) are
            used or raise.

    Returns:
        TokenStats of shape [...]: float32 (float64 for float64 input), int64 for rank and argmax;
        None for what was not asked for.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape, device or range.
            Arguments are checked before anything is computed.
        IndexError: a target out of range, on the CPU. Elsewhere that row's result and gradient are
            NaN; `CHUNKED_CE_CHECK_TARGETS=1` in the environment raises there too, and makes the GPU
            wait.

    Example:
        >>> import torch, chunked_ce
        >>> hidden, head = torch.ones(2, 4), torch.eye(5, 4)  # logits 1 1 1 1 0
        >>> stats = chunked_ce.linear_token_stats(hidden, head, torch.tensor([0, 4]), entropy=True)
        >>> [round(p, 4) for p in stats.logprob.exp().tolist()]
        [0.2289, 0.0842]
        >>> tuple(stats.entropy.shape)
        (2,)
    """
    if unknown:
        checks.unknown_keywords(linear_token_stats, unknown)
    if callable(linear_weight) and is_called_apart(linear_weight):
        return sharded_heads.call(linear_token_stats, locals())
    head, linear_weight, linear_bias = as_weight(linear_weight, linear_bias, input, logits_dtype)
    if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        return transforms.call(linear_token_stats, locals(), ROWS if cu_seqlens is None else ())
    checks.target_indices(target)
    checks.linear_input(input, linear_weight, linear_bias, target, dims=False)
    wanted = checks.flags(entropy=entropy, mean_logprob=mean_logprob, rank=rank, argmax=argmax)
    ignore_index = checks.ignore_index(ignore_index)
    if shift is not False or position_ids is not None or cu_seqlens is not None:
        target = next_tokens(target, ignore_index, shift, position_ids, cu_seqlens, input)
    input, linear_weight, linear_bias, shared = operands_and_options(
        input, linear_weight, linear_bias, head, ignore_index, vocab_size, softcap, logit_scale,
        backend, chunk_bytes, token_chunk_size, drop_ignored, acc_dtype, logits_dtype,
    )  # fmt: skip
    weight = checks.class_weight(weight, linear_weight[..., 0], shared[1])
    return outputs_of_head(
        head, input, linear_weight, linear_bias, target, Classes(weight if mean_logprob else None),
        shared, wanted,
    ).to_token_stats(wanted)  # fmt: skip
