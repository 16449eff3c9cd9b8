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


def kl_div(
    x: Tensor,
    y: Tensor,
    *,
    kind="forward",
    beta=0.5,
    temperature=1.0,
    target=None,
    ignore_index=-100,
    reduction="mean",
    token_weight=None,
    num_items=None,
    vocab_size=None,
) -> Tensor:
    """GKD's definitions, each class adding probability f(d), which keeps the digits of small ones."""
    log_p, log_q = ((t.double()[..., :vocab_size] / temperature).log_softmax(-1) for t in (x, y))

    def kl(a: Tensor, b: Tensor) -> Tensor:
        d = a - b
        near = d * d / 2 - d**3 / 6 + d**4 / 24 - d**5 / 120
        terms = torch.where(d.abs() < 1e-3, a.exp() * near, a.exp() * (d - 1) + b.exp())
        terms = torch.where(a == -torch.inf, b.exp(), terms)
        return terms.sum(-1)

    share = torch.tensor([1 - beta, beta], dtype=torch.float64, device=x.device).log()
    log_m = torch.logaddexp(log_p + share[0], log_q + share[1])
    loss = {
        "forward": lambda: kl(log_q, log_p),
        "reverse": lambda: kl(log_p, log_q),
        "jsd": lambda: beta * kl(log_q, log_m) + (1 - beta) * kl(log_p, log_m),
    }[kind]()
    valid = torch.ones_like(loss) if target is None else (target != ignore_index).double()
    weight = valid if token_weight is None else token_weight.double() * valid
    loss = torch.where(weight == 0, 0.0, loss) * weight
    if reduction != "mean":
        return loss.sum() if reduction == "sum" else loss
    return loss.sum() / (weight.sum() if num_items is None else num_items)
