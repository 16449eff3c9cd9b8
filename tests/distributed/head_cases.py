"""Heads in pieces on the ranks, against the whole head: part of what run_cases.py runs.

Every check compares the loss and all gradients with the whole head followed by torch's own loss,
counts the gathers of the head, and looks for a tensor of all logits.
"""

from functools import partial

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from helpers import AdaptedHead
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.utils._python_dispatch import TorchDispatchMode

from chunked_ce import linear_cross_entropy, linear_token_stats

N, D, V, CHUNK = 24, 16, 101, 5


HEADS = {"linear": lambda: nn.Linear(D, V), "adapted": partial(AdaptedHead, D, V)}


class Seen(TorchDispatchMode):
    """Count gathers, and keep the most rows of logits that an operator made."""

    def __init__(self):
        super().__init__()
        self.gathers = self.rows = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.gathers += "allgather" in function.__name__ or "all_gather_into" in function.__name__
        for t in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(t, torch.Tensor) and not isinstance(t, DTensor):
                if t.dim() == 2 and t.shape[1] == V and t.shape[0] != D:
                    self.rows = max(self.rows, t.shape[0])
        return out

    def assert_chunks(self, name):
        """The operators for a linear layer show their logits to no mode: they have tests of theirs."""
        assert self.rows == 0 if name == "linear" else 0 < self.rows <= CHUNK


def batch(rank=0):
    torch.manual_seed(100 + rank)
    x, target = torch.randn(N, D), torch.randint(0, V, (N,))
    target[::4] = -100
    return x, target


class Model(nn.Module):
    """A layer and a head, whose loss is taken within the forward, as log-probabilities or not."""

    def __init__(self, name, seen):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head, self.seen = nn.Linear(D, D), HEADS[name](), seen

    def forward(self, x, target, statistics=False):
        with self.seen:
            return loss_of(self.body(x).tanh(), self.head, target, statistics)


def loss_of(hidden, head, target, statistics):
    """Return the loss; of statistics, whose backward calls the head again."""
    if not statistics:
        return linear_cross_entropy(hidden, head, target, token_chunk_size=CHUNK)
    stats = linear_token_stats(hidden, head, target, token_chunk_size=CHUNK)
    return -stats.logprob.sum() / (target != -100).sum()


def stock(model, x, target):
    x = x.clone().requires_grad_()
    loss = F.cross_entropy(model.head(model.body(x).tanh()), target)
    wanted = {n: p for n, p in model.named_parameters() if p.requires_grad}
    of_input, *grads = torch.autograd.grad(loss, [x, *wanted.values()])
    return loss.detach(), of_input, dict(zip(wanted, grads, strict=True))


def assert_gradients(model, expected):
    for name, p in model.named_parameters():
        assert (p.grad is None) == (name not in expected), name
        if p.grad is not None:
            grad = p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad
            torch.testing.assert_close(grad, expected[name], rtol=1e-5, atol=1e-6)


def fsdp2(name, statistics, own_group):
    """Ranks have tokens of their own, and FSDP2 averages their gradients. Two steps."""
    rank, world = dist.get_rank(), dist.get_world_size()
    seen = Seen()
    exact = [stock(Model(name, seen), *batch(r)) for r in range(world)]
    mean = {n: sum(grads[n] for *_, grads in exact) / world for n in exact[0][2]}
    model = Model(name, seen)
    if own_group:
        fully_shard(model.head)
    fully_shard(model)
    for _ in range(2):
        model.zero_grad()
        seen.gathers = seen.rows = 0
        x, target = batch(rank)
        loss = model(x.requires_grad_(), target, statistics)
        assert seen.gathers == (1 if own_group else 0)  # the model's group is gathered before
        assert all(isinstance(p, DTensor) == own_group for p in model.head.parameters())
        loss.backward()
        seen.assert_chunks(name)
        torch.testing.assert_close(loss.detach(), exact[rank][0], rtol=1e-6, atol=0)
        torch.testing.assert_close(x.grad, exact[rank][1], rtol=1e-5, atol=1e-7)
        assert_gradients(model, mean)
    with torch.no_grad():
        torch.testing.assert_close(model(*batch(rank)), exact[rank][0], rtol=1e-6, atol=0)


def dtensors(name, statistics, placement):
    """Ranks have the same tokens, and a piece of the head each."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    seen = Seen()
    loss, of_input, expected = stock(Model(name, seen), *batch())
    model = Model(name, seen)

    def place(_, module, mesh):
        for n, p in list(module.named_parameters(recurse=False)):
            where = Shard(0) if n == "bias" and placement == Shard(1) else placement
            placed = distribute_tensor(p.detach(), mesh, [where])
            module.register_parameter(n, nn.Parameter(placed, p.requires_grad))

    distribute_module(model.head, mesh, place)
    x, target = batch()
    hidden = model.body(x.requires_grad_()).tanh()
    hidden = DTensor.from_local(hidden, mesh, [Replicate()])
    with seen:
        ours = loss_of(hidden, model.head, target, statistics)
    gathers = 0 if placement.is_replicate() else len(list(model.head.parameters()))
    assert seen.gathers == gathers
    seen.assert_chunks(name)
    ours.backward()
    torch.testing.assert_close(ours.detach(), loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(x.grad, of_input, rtol=1e-5, atol=1e-7)
    assert_gradients(model, expected)
    for p in model.head.parameters():
        assert p.grad is None or p.grad.placements == p.placements


def bad_input():
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    x, target = batch()
    head = nn.Linear(D, V)
    fully_shard(head, mesh=mesh)
    x.requires_grad_()
    with pytest.raises(TypeError, match="pass that module itself"):  # freed after each call
        linear_cross_entropy(x, lambda h: head(h), target)
    with pytest.raises(TypeError, match="pass that module itself"):
        linear_cross_entropy(x.detach(), nn.Sequential(head), target)
    head.register_forward_hook(lambda module, args, out: out * 2)
    with pytest.raises(TypeError, match="other forward hooks"):
        linear_cross_entropy(x, head, target)
    model = nn.Sequential(nn.Linear(D, V))
    fully_shard(model, mesh=mesh)
    with pytest.raises(TypeError, match="in the forward of the module that owns the head"):
        linear_cross_entropy(x, model[0], target)
    mine = DTensor.from_local(x, mesh, [Shard(0)])
    with pytest.raises(ValueError, match=r"expected Replicate\(\) beside a head of DTensors"):
        linear_cross_entropy(mine, model[0], target)


def column_parallel():
    """Hooks convert what goes in and out, and gather each chunk's logits: as the head does."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model = Model("linear", Seen())
    loss, of_input, expected = stock(model, *batch())
    parallelize_module(model.head, mesh, ColwiseParallel(output_layouts=Replicate()))
    x, target = batch()
    ours = loss_of(model.body(x.requires_grad_()).tanh(), model.head, target, False)
    (3 * ours).backward()
    torch.testing.assert_close(ours.detach(), loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(x.grad, 3 * of_input, rtol=1e-5, atol=1e-7)
    assert_gradients(model, {n: 3 * g for n, g in expected.items()})


CASES = {"head: bad input": bad_input, "head: column parallel": column_parallel}
for statistics in (False, True):
    for name in HEADS:
        for own_group in (True, False):
            CASES[f"head: FSDP2, {name}, {statistics}, {own_group}"] = partial(
                fsdp2, name, statistics, own_group
            )
        for placement in (Shard(0), Shard(1), Replicate()):
            CASES[f"head: {placement}, {name}, {statistics}"] = partial(
                dtensors, name, statistics, placement
            )
