"""The truth: eager torch in fp64, the whole softmax stored."""

import torch
import torch.nn.functional as F
from torch import Tensor


def logits(x: Tensor, softcap=None, logit_scale=1.0, vocab_size=None) -> Tensor:
    z = x.double()[..., :vocab_size] * logit_scale
    return z if softcap is None else softcap * torch.tanh(z / softcap)


def token_stats(x: Tensor, target: Tensor, ignore_index=-100, **head) -> dict[str, Tensor]:
    """Return every statistic [...] in fp64. Ignored rows are 0 (-1 for rank and argmax)."""
    z = logits(x, **head)
    ignored = target == ignore_index
    t = target.long().masked_fill(ignored, 0)[..., None]
    z = torch.where(ignored[..., None], 0.0, z)
    logp = z.log_softmax(-1)
    p_logp = torch.where(logp == -torch.inf, 0.0, logp.exp() * logp)
    z_t = z.gather(-1, t)
    lower = torch.arange(z.shape[-1], device=z.device) < t
    stats = {
        "lse": z.logsumexp(-1),
        "logprob": logp.gather(-1, t)[..., 0],
        "entropy": -p_logp.sum(-1),
        "mean_logprob": logp.mean(-1),
        "rank": ((z > z_t) | ((z == z_t) & lower)).sum(-1),
        "argmax": z.argmax(-1),
    }
    fill = {"rank": -1, "argmax": -1}
    return {k: torch.where(ignored, fill.get(k, 0), v) for k, v in stats.items()}


def cross_entropy(
    x: Tensor,
    target: Tensor,
    *,
    ignore_index=-100,
    reduction="mean",
    label_smoothing=0.0,
    z_loss_weight=0.0,
    token_weight=None,
    num_items=None,
    **head,
) -> Tensor:
    z = logits(x, **head)
    z = torch.where((target == ignore_index)[..., None], 0.0, z)
    flat, valid = z.reshape(-1, z.shape[-1]), target != ignore_index
    loss = F.cross_entropy(
        flat,
        target.reshape(-1).long(),
        ignore_index=ignore_index,
        reduction="none",
        label_smoothing=label_smoothing,
    ).view(target.shape)
    loss = loss + z_loss_weight * torch.where(valid, z.logsumexp(-1).square(), 0.0)
    weight = valid.double() if token_weight is None else token_weight.double() * valid
    loss = loss * weight
    if reduction == "none":
        return loss
    total = loss.sum()
    if reduction == "sum":
        return total
    return total / (weight.sum() if num_items is None else num_items)
