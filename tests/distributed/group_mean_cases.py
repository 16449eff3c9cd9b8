"""The mean over the tokens of two ranks: part of what run_cases.py runs.

Each rank holds other tokens of the batch. Losses and gradients, added up over the ranks, are those of
one process that holds all tokens.
"""

from functools import partial
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from chunked_ce import CrossEntropyLoss, cross_entropy, linear_cross_entropy

N, D, V = 14, 8, 50
OPTIONS = {
    "plain": {},
    "every term": dict(label_smoothing=0.1, z_loss_weight=1e-2, softcap=5.0),
    "class weights": dict(weight=torch.linspace(0.5, 2, V)),
    "class weights and z-loss": dict(weight=torch.linspace(0.5, 2, V), z_loss_weight=1e-2),
    "statistics": dict(return_stats=["entropy"]),
}


def batch():
    x, w = torch.randn(N, D), torch.randn(V, D)
    target = torch.randint(0, V, (N,))
    target[:5] = -100  # rank 0 has fewer tokens than rank 1
    return x, w, target


def rows():
    """Return the tokens of this rank: an uneven share."""
    return slice(0, 6) if dist.get_rank() == 0 else slice(6, N)


def value(loss):
    return loss[0] if isinstance(loss, tuple) else loss


def check(loss_of, whole_loss_of, *whole):
    """Compare the ranks' sum with one process."""
    leaves = [t.clone().requires_grad_() for t in whole]
    expected = value(whole_loss_of(*leaves))
    expected.backward()
    ours = [t.clone().requires_grad_() for t in whole]
    with mock.patch.object(dist, "all_reduce", wraps=dist.all_reduce) as counted:
        loss = value(loss_of(*ours))
    assert counted.call_count == 1 and counted.call_args.args[0].numel() <= 2
    loss.backward()
    total = loss.detach().clone()
    dist.all_reduce(total)
    torch.testing.assert_close(total, expected.detach(), rtol=1e-5, atol=1e-6)
    for a, e in zip(ours, leaves, strict=True):
        dist.all_reduce(a.grad)
        torch.testing.assert_close(a.grad, e.grad, rtol=1e-4, atol=1e-6)


def of_hidden_states(group, options):
    x, w, target = batch()
    part = rows()
    check(
        lambda x, w: linear_cross_entropy(x[part], w, target[part], group=group, **options),
        lambda x, w: linear_cross_entropy(x, w, target, **options),
        x, w,
    )  # fmt: skip


def of_logits(group, options, **schedule):
    x, w, target = batch()
    part = rows()
    check(
        lambda z: cross_entropy(z[part], target[part], group=group, **options, **schedule),
        lambda z: cross_entropy(z, target, **options),
        x @ w.t(),
    )


def losses(group):
    for options in OPTIONS.values():
        of_hidden_states(group, options)
        of_logits(group, options)
        of_logits(group, options, grad_in_forward=True)


def module(group):
    x, w, target = batch()
    part = rows()
    check(
        lambda z: CrossEntropyLoss(group=group)(z[part], target[part]),
        lambda z: F.cross_entropy(z, target),
        x @ w.t(),
    )


def weights_of_tokens(group):
    x, w, target = batch()
    part, weight = rows(), torch.rand(N)
    check(
        lambda x, w: linear_cross_entropy(
            x[part], w, target[part], token_weight=weight[part], group=group
        ),
        lambda x, w: linear_cross_entropy(x, w, target, token_weight=weight),
        x, w,
    )  # fmt: skip


def called_head(group):
    x, w, target = batch()
    part = rows()

    def head(w):
        return lambda hidden: F.linear(hidden, w).tanh()

    check(
        lambda x, w: linear_cross_entropy(x[part], head(w), target[part], group=group),
        lambda x, w: F.cross_entropy(head(w)(x), target),
        x, w,
    )  # fmt: skip


def parts_of_a_sequence(group):
    """Context parallelism: labels are shifted in the whole sequence, then each rank takes a part."""
    x, w, target = batch()
    labels = torch.cat([target[1:], torch.tensor([-100])])
    part = rows()
    check(
        lambda x, w: linear_cross_entropy(x[part], w, labels[part], group=group),
        lambda x, w: linear_cross_entropy(x, w, target, shift=True),
        x, w,
    )  # fmt: skip


def rank_without_tokens(group):
    x, w, target = batch()
    target[rows() if dist.get_rank() == 0 else slice(0, 0)] = -100
    x.requires_grad_()
    loss = linear_cross_entropy(x[rows()], w, target[rows()], group=group)
    loss.backward()
    if dist.get_rank() == 0:
        assert loss == 0 and not x.grad.any()
    else:
        assert loss > 0


def data_parallel(group):
    """DDP averages gradients: the loss times the number of ranks makes them the sum."""
    x, w, target = batch()
    torch.manual_seed(1)
    alone = nn.Linear(D, V)
    torch.manual_seed(1)
    model = nn.parallel.DistributedDataParallel(nn.Linear(D, V), process_group=group)
    F.cross_entropy(alone(x), target).backward()
    loss = cross_entropy(model(x[rows()]), target[rows()], group=group)
    (loss * dist.get_world_size(group)).backward()
    for a, e in zip(model.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(a.grad, e.grad, rtol=1e-5, atol=1e-7)


def compiled(group):
    x, w, target = batch()
    part = rows()

    def loss(x, w):
        return linear_cross_entropy(x[part] * 1.0, w, target[part], group=group)

    traced = torch.compile(loss, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(traced(x, w), loss(x, w))


FUNCTIONS = (
    losses, module, weights_of_tokens, called_head, parts_of_a_sequence, rank_without_tokens,
    data_parallel, compiled,
)  # fmt: skip


def run(function):
    if dist.get_world_size() == 2:
        function(dist.group.WORLD)


CASES = {f"group: {function.__name__}": partial(run, function) for function in FUNCTIONS}
