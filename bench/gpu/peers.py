"""Whom stage `speed` compares, from logits and from hidden states."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import chunked_ce

from .. import providers
from ..providers import COMPILED, CUT, CUT_FILTER, EAGER, FLASH, LIGER, LINEAR, LOGITS, OURS, QUACK
from .cases import BACKEND
from .context import Context

Loss = Callable[..., Tensor]
TWO_PASSES = ("token_stats", "cross_entropy")


class Peer(NamedTuple):
    name: str
    load: Callable[[], Loss]  # raises where the peer cannot be imported
    overwrites: bool = False  # the logits, by the gradient
    passes: int = 3  # times that N x V logits are moved by forward and backward
    rests_on: tuple[str, ...] = ()  # kernels of stage `check`; one that is wrong is not timed


def from_logits(context: Context) -> list[Peer]:
    """Losses of (logits [N, V], target [N])."""
    return [
        Peer(EAGER, lambda: F.cross_entropy, passes=6),
        Peer(f"{EAGER} fp32", lambda: lambda x, t: F.cross_entropy(x.float(), t), passes=14),
        _compiled(context, LOGITS),
        *(_ours(*schedule) for schedule in (
            (), ("inplace_backward",), ("grad_in_forward",),
            ("grad_in_forward", "inplace_backward"),
        )),
        Peer(f"{LIGER} in place", partial(providers.loss_of, LOGITS, LIGER, "cuda"), True),
        Peer(FLASH, partial(providers.loss_of, LOGITS, FLASH, "cuda")),
        Peer(QUACK, partial(providers.loss_of, LOGITS, QUACK, "cuda")),
    ]  # fmt: skip


def _compiled(context: Context, form: str) -> Peer:
    if context.dry:  # the compiler's time is not the point there
        return Peer(COMPILED, lambda: providers.loss_of(form, EAGER, "cpu"))
    return Peer(COMPILED, partial(providers.loss_of, form, COMPILED, "cuda"))


def _ours(*schedule: str) -> Peer:
    options = dict.fromkeys(schedule, True)
    loss = partial(chunked_ce.cross_entropy, backend=BACKEND, **options)  # type: ignore[arg-type]
    one_read = "grad_in_forward" in schedule
    kernel = " ".join(["cross_entropy", *schedule])
    return Peer(
        " ".join([OURS, *schedule]), lambda: loss, "inplace_backward" in schedule,
        2 if one_read else 3, (kernel,) if one_read else (*TWO_PASSES, kernel),
    )  # fmt: skip


def from_hidden_states(context: Context) -> list[Peer]:
    """Losses of (input [N, D], weight [V, D], target [N])."""
    ours = partial(chunked_ce.linear_cross_entropy, backend=BACKEND)
    rests_on = (*TWO_PASSES, "linear_cross_entropy")
    one_pass = _ours("grad_in_forward", "inplace_backward")
    peers = [
        Peer(EAGER, partial(providers.loss_of, LINEAR, EAGER)),
        _compiled(context, LINEAR),
        Peer(OURS, lambda: ours, rests_on=rests_on),
        Peer(f"{OURS} sums in bfloat16", lambda: partial(ours, acc_dtype=torch.bfloat16),
             rests_on=rests_on),
        Peer(f"{OURS} 1 GiB chunks", lambda: partial(ours, chunk_bytes=1 << 30), rests_on=rests_on),
        Peer(f"head, {one_pass.name}", lambda: providers.behind_its_head(one_pass.load()),
             rests_on=one_pass.rests_on),
    ]  # fmt: skip
    others = (LIGER, CUT, CUT_FILTER, QUACK)
    return peers + [Peer(p, partial(providers.loss_of, LINEAR, p, "cuda")) for p in others]
