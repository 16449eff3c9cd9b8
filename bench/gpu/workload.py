"""What stage `counters` runs under `ncu`: each main kernel once, over the same bytes of logits."""

from __future__ import annotations

import torch

import chunked_ce

from .cases import BACKEND
from .context import Context
from .counters import LOGITS


def run(context: Context) -> int:
    for vocab, options in (
        (128256, {}),
        (128256, dict(grad_in_forward=True)),  # streamed
        (16032, dict(grad_in_forward=True)),  # on chip
    ):
        rows, columns = (2, 300) if context.dry else (LOGITS // vocab, vocab)
        x = torch.randn(rows, columns, device=context.device, dtype=torch.bfloat16)
        target = torch.randint(columns, (rows,), device=context.device)
        loss = chunked_ce.cross_entropy(x.requires_grad_(), target, backend=BACKEND, **options)  # type: ignore[arg-type]
        loss.backward()
        context.synchronize()
        print(f"V={vocab} {options}: loss {float(loss.detach()):.4f}", flush=True)
    return 0
