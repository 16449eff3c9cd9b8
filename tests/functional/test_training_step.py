"""Tests of the losses inside training steps: torch.compile, autocast, loss scales, CUDA graphs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import chunked_ce
from chunked_ce import backends
from chunked_ce.ops import linear as linear_ops
from chunked_ce.ops import logits as ops

pytestmark = pytest.mark.framework
V, D = 50, 8


class Model(nn.Module):
    def __init__(self, fused: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.layer = nn.Embedding(V, D), nn.Linear(D, D)
        self.head, self.fused = nn.Linear(D, V, bias=False), fused

    def forward(self, tokens: Tensor, labels: Tensor, num_items: Tensor | None = None) -> Tensor:
        hidden = self.layer(self.embedding(tokens)).tanh()
        if self.fused:
            return chunked_ce.linear_cross_entropy(
                hidden, self.head.weight, labels, z_loss_weight=1e-3, num_items=num_items
            )
        logits = self.head(hidden)
        return chunked_ce.cross_entropy(
            logits, labels, dim=-1, z_loss_weight=1e-3, num_items=num_items
        )


def batches(sizes: tuple[int, ...]) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    found = []
    for n in sizes:
        tokens, labels = torch.randint(0, V, (2, 2, n), generator=generator)
        labels[:, -1] = -100
        found.append((tokens, labels))
    return found


def train(
    model: Model, sizes: tuple[int, ...], autocast: bool, compiler: Any = None
) -> list[float]:
    """Return the losses of some steps. Forward, loss and backward are one function and one graph."""

    def gradients(tokens: Tensor, labels: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(tokens, labels)
        loss.backward()
        return loss.detach()

    torch._dynamo.reset()
    if compiler is not None:
        gradients = torch.compile(gradients, fullgraph=True, backend=compiler)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    losses = []
    for tokens, labels in batches(sizes):
        losses.append(gradients(tokens, labels).item())
        optimizer.step()
        optimizer.zero_grad()
    return losses


@pytest.fixture
def backward_is_traced() -> Iterator[None]:
    if not hasattr(torch._dynamo.config, "trace_autograd_ops"):
        pytest.skip("this torch has no backward() in a graph")
    with torch._dynamo.config.patch(trace_autograd_ops=True):
        yield


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("fused, autocast", [(True, True), (False, False)])
def test_step_compilation_count(backward_is_traced: None, fused: bool, autocast: bool) -> None:
    """Check that sizes after the second compile nothing."""
    sizes = (5, 5, 7, 9, 12)
    compiler = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    ours = train(Model(fused), sizes, autocast, compiler)
    assert compiler.frame_count <= 2
    tolerance = 1e-3 if autocast else 1e-6  # bfloat16 is rounded where the graph says
    assert ours == pytest.approx(train(Model(fused), sizes, autocast), rel=tolerance)


@pytest.mark.long
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("autocast", [True, False])
def test_step_inductor(backward_is_traced: None, fused: bool, autocast: bool) -> None:
    sizes = (6, 6, 8, 10)
    ours = train(Model(fused), sizes, autocast, "inductor")
    tolerance = 1e-3 if autocast else 1e-6
    assert ours == pytest.approx(train(Model(fused), sizes, autocast), rel=tolerance)


@pytest.mark.parametrize("fused", [True, False])
def test_loss_scale_small_float16_gradients(fused: bool) -> None:
    """Use gradients of a sum over 1e7 tokens, below float16's smallest number 6e-8."""
    ((tokens, labels),) = batches((9,))
    items = torch.tensor(10**7)
    exact = Model(fused).double()
    exact(tokens, labels, items).backward()
    truth = {name: p.grad for name, p in exact.named_parameters()}

    def trained(scale: float) -> tuple[Model, torch.amp.GradScaler, torch.optim.Optimizer]:
        model = Model(fused)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        with torch.autocast("cpu", torch.float16):
            loss = model(tokens, labels, items)
        scaler.scale(loss).backward()
        optimizer = torch.optim.SGD(model.parameters(), 1.0)
        scaler.unscale_(optimizer)
        return model, scaler, optimizer

    scaled = dict(trained(2.0**20)[0].named_parameters())
    unscaled = dict(trained(1.0)[0].named_parameters())
    name = "head.weight"
    largest = truth[name].abs().max()
    for name in truth:
        assert (scaled[name].grad - truth[name]).abs().max() <= 2e-2 * truth[name].abs().max()
    assert (unscaled["head.weight"].grad - truth["head.weight"]).abs().max() > 0.2 * largest

    model, scaler, optimizer = trained(2.0**60)  # overflows: the step is skipped, the scale halved
    before = model.head.weight.detach().clone()
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(model.head.weight, before) and scaler.get_scale() == 2.0**59


# Each makes the host wait for a device, or gives a result whose size depends on values.
SYNCHRONISING = (
    "_local_scalar_dense", "item", "nonzero", "nonzero_numpy", "is_nonzero", "masked_select",
    "unique", "_unique2", "equal", "repeat_interleave",
)  # fmt: skip


class Waits(TorchDispatchMode):
    """Counts the calls that a CUDA graph cannot contain."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        masked = name in ("index", "index_put", "index_put_") and any(
            isinstance(i, Tensor) and i.dtype == torch.bool for i in args[1]
        )
        if name in SYNCHRONISING or masked:
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


def head(device: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    h, w, b = torch.randn(9, D), torch.randn(V, D), torch.randn(V)
    target = torch.randint(0, V, (9,))
    target[2] = -100
    return h.to(device), w.to(device), b.to(device), target.to(device)


def operators(device: str, drop_ignored: bool) -> None:
    """Run the operators' device code, forward and backward, with every option.

    "meta" stands for a GPU. It has no values, so reading one raises.
    """
    h, w, b, target = head(device)
    shared = (-100, V, 30.0, 0.5, "torch")
    x = h @ w.t()
    classes = ops.Classes(weight=w[:, 0], indices=target.clamp(min=0)[:, None])
    lse, logprob, low, entropy, *_ = ops._token_stats(
        x, target, *classes, *shared, True, True, True, True, False
    )
    rows = (*classes, lse, logprob, low, entropy, lse, logprob, entropy, lse[:, None])
    ops._token_grad(x, target, *rows, *shared)
    ops._token_grad_(x, target, *rows, *shared)
    chunks = (4, drop_ignored, torch.float32, h.dtype)
    divisor = lse.sum()
    for wanted in ([True] * 3, [False] * 3):
        linear_ops._linear_loss(
            h, w, b, target, lse, divisor, 0.1, 1e-3, *shared, *chunks, wanted, True, [True] * 3
        )
    linear_ops._linear_stats(h, w, b, target, *classes, *shared, *chunks, True, True, True, True)
    linear_ops._linear_stats_grad(h, w, b, target, *rows, *shared, *chunks, [True] * 3)


def test_loss_no_device_sync() -> None:
    with Waits() as waits:
        operators("meta", drop_ignored=False)
    assert waits.seen == []
    with Waits() as waits:  # a control: asked for, ignored tokens are looked for
        operators("cpu", drop_ignored=True)
    assert "nonzero" in waits.seen and "_local_scalar_dense" in waits.seen
    with pytest.raises(Exception, match="meta"):
        operators("meta", drop_ignored=True)


@pytest.mark.parametrize("fused", [True, False])
def test_step_no_device_sync(fused: bool) -> None:
    """Run from the public functions to the gradients with the operators' shapes alone."""
    model = Model(fused).to("meta")
    ((tokens, labels),) = batches((6,))
    with Waits() as waits:
        loss = model(tokens.to("meta"), labels.to("meta"), torch.tensor(7, device="meta"))
        (2.0 * loss).backward()
    assert waits.seen == [] and model.head.weight.grad.shape == (V, D)


def test_launch_no_device_sync(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the Triton backend in the interpreter, with targets treated as on a GPU."""
    pytest.importorskip("triton")
    checked = backends.check_targets
    monkeypatch.setattr(backends, "check_targets", lambda *a, on_host: checked(*a, on_host=False))
    h, w, b, target = head(device)
    tensors = [t.requires_grad_() for t in (h, w, b)]
    for reduction in ("mean", "none"):
        with Waits() as waits:
            loss = chunked_ce.linear_cross_entropy(
                *tensors[:2], target, linear_bias=tensors[2], reduction=reduction,
                label_smoothing=0.1, drop_ignored=False, token_chunk_size=4, backend="triton",
            )  # fmt: skip
            loss.sum().backward()
        assert waits.seen == []
