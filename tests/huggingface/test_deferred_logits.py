"""Deferred logits are the logits, whatever is done to them; a loss reads off what was recorded."""

import numpy as np
import oracle
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import chunked_ce
from chunked_ce.huggingface import DeferredLogits, causal_lm_loss
from chunked_ce.huggingface.deferred import Head


def deferred(shape=(2, 5), dtype=torch.float32, vocab=29):
    x = torch.randn(*shape, 6, dtype=dtype, requires_grad=True)
    w = torch.randn(vocab, 6, dtype=dtype, requires_grad=True)
    b = torch.randn(vocab, dtype=dtype, requires_grad=True)
    return DeferredLogits(Head.capture(x, w, b, lambda: None), x), (x, w, b)


RECORDED = {
    "factor": lambda z: z * 0.3,
    "factor from the left": lambda z: 3 * z,
    "divided": lambda z: z / 1.7,
    "softcap": lambda z: torch.tanh(z / 4.0) * 4.0,
    "softcap by a module": lambda z: nn.Tanh()(z / 4.0) * 4.0,
    "softcap of a negative": lambda z: (z * -0.5).tanh() * -3.0,
    "by functions": lambda z: torch.mul(torch.tanh(torch.div(z, 2)), 2),
    "cast": lambda z: z.float().contiguous().to(torch.float32).to(z.device),
    "last tokens": lambda z: z[:, -3:, :],
    "without the last": lambda z: z[..., :-1, :] * 2.0,
    "a row": lambda z: z[0],
    "one token": lambda z: z[:, -1],
    "slices of slices": lambda z: z[:, 1:][:1, ..., :],
    "a last ellipsis": lambda z: z[:, 1:, :, ...],
    "a number of numpy": lambda z: np.float64(2) * z,
    "first classes": lambda z: z[..., :7],
    "first classes of a row": lambda z: (z[0, 1:, 0:28] * 2)[..., :7],
    "first classes and a last ellipsis": lambda z: z[:, :, :5, ...],
    "more classes than there are": lambda z: z[:, :, :40],
    "flat tokens": lambda z: z[:, 1:].reshape(-1, 29).view(2, 4, -1)[..., 1:, :],
    "by a function": lambda z: torch.reshape(z, (5, 2, 29)),
    "a row of a loop": lambda z: list(z)[1] / 2.0,
    "a part": lambda z: torch.split(z.view(10, 29), 4)[2],
    "to a device": lambda z: z.to("cpu", non_blocking=True).to(torch.device("cpu")),
}
COMPUTED = {
    "sum": lambda z: z.sum(),
    "capped twice": lambda z: torch.tanh(torch.tanh(z) * 2.0),
    "plus": lambda z: z + 1.0,
    "minus from the left": lambda z: 1.0 - z,
    "times a tensor": lambda z: torch.full((29,), 2.0) * z,
    "times itself": lambda z: z * z,
    "times 0": lambda z: z * 0.0,
    "times True": lambda z: z * True,
    "rounded": lambda z: z.div(0.3, rounding_mode="floor"),
    "last classes": lambda z: z[..., 3:],
    "every other class": lambda z: z[..., ::2],
    "no class": lambda z: z[..., :0],
    "to a device and a dtype": lambda z: z.to("cpu", torch.float64),
    "a class and a last ellipsis": lambda z: z[0, 1, 2, ...],
    "by classes and two ellipses": lambda z: z[..., :, :5, ...],
    "a keyword of a recorded function": lambda z: torch.mul(z, other=2.0),
    "a smaller number of numpy": lambda z: np.float32(2) * z,
    "by a mask": lambda z: z[torch.tensor([[True] * 3 + [False] * 2] * 2)],
    "in bfloat16": lambda z: z.to(torch.bfloat16),
    "to another's dtype": lambda z: z.to(torch.ones(1, dtype=torch.float64)),
    "softmax": lambda z: F.log_softmax(z, dim=-1),
    "masked": lambda z: torch.where(z > 0, z, 0.0),
    "negated": lambda z: -z,
    "concatenated": lambda z: torch.cat([z, z]),
    "by keyword": lambda z: torch.add(input=z, other=1.0),
    "view of another width": lambda z: z.view(-1, 145),
    "sections": lambda z: z.split([1, 4], dim=1)[1],
    "iterated": lambda z: sum(row.sum() for row in z),
    "power": lambda z: z**2,
    "product": lambda z: z @ torch.ones(29, 2),
    "T": lambda z: z.mT,
}


@pytest.mark.parametrize("use", [*RECORDED, *COMPUTED])
def test_uses_of_deferred_logits(use):
    operation = {**RECORDED, **COMPUTED}[use]
    logits, leaves = deferred()
    result = operation(logits)
    assert isinstance(result, DeferredLogits) == (use in RECORDED)
    expected = operation(F.linear(*leaves))
    assert result.shape == expected.shape and result.dtype == expected.dtype
    assert result.device == expected.device and result.ndim == result.dim() == expected.dim()
    real = result.tensor() if use in RECORDED else result
    assert torch.equal(real, expected)
    wanted = torch.autograd.grad(expected.float().square().sum(), leaves)
    for a, e in zip(torch.autograd.grad(real.float().square().sum(), leaves), wanted, strict=True):
        torch.testing.assert_close(a, e)


@pytest.mark.parametrize("use", [u for u in RECORDED if u != "one token"])
def test_loss_of_recorded_uses(use):
    logits, leaves = deferred(dtype=torch.float64)
    given = RECORDED[use](logits)
    assert given.linear() is not None
    target = torch.randint(0, given.shape[-1], given.shape[:-1])
    ours = causal_lm_loss(given, None, shift_labels=target)
    assert given._real is None and logits._real is None, "computed"
    exact = RECORDED[use](F.linear(*leaves)).double()
    expected = oracle.cross_entropy(exact, target)
    tolerance = 1e-6 if use == "cast" else 1e-12  # .float() rounds the expected one
    torch.testing.assert_close(ours, expected, rtol=tolerance, atol=0)
    for a, e in zip(
        torch.autograd.grad(3.7 * ours, leaves),
        torch.autograd.grad(3.7 * expected, leaves),
        strict=True,
    ):
        torch.testing.assert_close(a, e, rtol=1e-5, atol=tolerance)


def test_recorded_move_to_a_device():
    logits, _ = deferred()
    moved = logits.to("meta")
    assert moved.device.type == "meta" and logits.device.type == "cpu"
    loss = causal_lm_loss(moved, torch.randint(0, 29, (2, 5)))
    assert loss.device.type == "meta" and logits._real is None
    assert moved.tensor().device.type == "meta"


def test_vocab_size_of_sliced_classes():
    logits, _ = deferred()
    target = torch.randint(0, 7, (2, 5))
    with pytest.raises(ValueError, match="vocab_size is 8, .* has 7 columns"):
        causal_lm_loss(logits[..., :7], target, vocab_size=8)
    fewer = causal_lm_loss(logits[..., :9], target, vocab_size=7)
    assert torch.equal(fewer, causal_lm_loss(logits[..., :7], target))


def add_in_place(z):
    z += 1.0


def set_a_class(z):
    z[..., 3] = -5.0


def scale_in_place(z):
    z.mul_(2.0)


def divide_in_place(z):
    z /= 3.0


@pytest.mark.parametrize("change", [add_in_place, set_a_class, scale_in_place, divide_in_place])
@pytest.mark.parametrize("of", ["itself", "a slice taken before", "what it is a slice of"])
def test_loss_after_change_in_place(change, of):
    """As with tensors, whose slices share their memory."""
    results = []
    for make in (deferred, lambda: (lambda z: (F.linear(*z[1]), z[1]))(deferred())):
        torch.manual_seed(3)
        logits, _ = make()
        part = logits[:, :4]
        whole, changed = (logits, logits) if of == "itself" else (logits, part)
        if of == "what it is a slice of":
            whole, changed = part, logits
        change(changed)
        target = torch.full(whole.shape[:-1], 3)
        results.append(causal_lm_loss(whole, None, shift_labels=target))
    torch.testing.assert_close(*results)


def test_view_of_bits():
    logits, leaves = deferred()
    assert torch.equal(logits.view(torch.int32), F.linear(*leaves).view(torch.int32))


def test_unknown_attribute():
    logits, _ = deferred()
    assert not hasattr(logits, "__array_interface__") and not hasattr(logits, "no_such_name")
    assert (
        "shape=[2, 5, 29]" in repr(logits) and logits.size() == (2, 5, 29) and logits.size(-1) == 29
    )
    assert len({logits}) == 1 and logits.float() is logits and logits._real is None
    assert len(logits) == 2 and logits.detach().numpy().shape == (2, 5, 29)


def test_tensor_first_without_gradients():
    logits, (x, w, b) = deferred()
    with torch.no_grad():
        logits.sum()
    logits.sum().backward()
    assert x.grad is not None and w.grad is not None and b.grad is not None


def test_loss_outside_autocast_of_head():
    """Some models compute the loss with autocast off; bf16 hidden states meet an fp32 weight."""
    x, w = torch.randn(2, 5, 6).bfloat16(), torch.randn(29, 6)
    with torch.autocast("cpu", torch.bfloat16):
        logits = DeferredLogits(Head.capture(x, w, None, lambda: None), x)
    target = torch.randint(0, 29, (2, 5))
    expected = oracle.cross_entropy(F.linear(x, w.bfloat16()), target)
    ours = causal_lm_loss(logits, None, shift_labels=target)
    torch.testing.assert_close(ours.double(), expected, rtol=1e-2, atol=0)


def test_use_with_out_argument():
    logits, leaves = deferred()
    real, buffer = F.linear(*leaves).detach(), torch.empty(2, 5, 29)
    with torch.no_grad():
        assert torch.equal(torch.mul(logits, 2, out=buffer), real * 2)
        assert torch.equal(torch.tanh(logits, out=buffer), real.tanh())
        for copy in (torch.as_tensor, torch.tensor, torch.asarray, torch.from_dlpack):
            assert torch.equal(copy(deferred_again(leaves)), real)
    with pytest.raises(BufferError, match="require gradient"):
        torch.as_tensor(deferred_again(leaves))


def deferred_again(leaves):
    return DeferredLogits(Head.capture(*leaves, lambda: None), leaves[0])


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx, input):
        ctx.save_for_backward(input)
        return input * input

    @staticmethod
    def backward(ctx, grad):
        return 2 * ctx.saved_tensors[0] * grad


def test_tensor_in_autograd_function():
    logits, leaves = deferred()
    ours = torch.autograd.grad(Square.apply(logits.tensor()).sum(), leaves)
    theirs = torch.autograd.grad(F.linear(*leaves).square().sum(), leaves)
    for a, e in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, e)


@pytest.mark.parametrize(
    "function",
    [
        lambda z, target: chunked_ce.cross_entropy(z, target, dim=-1),
        chunked_ce.token_stats,
        chunked_ce.perplexity,
        lambda z, target: chunked_ce.Perplexity().update(z, target),
    ],
)
def test_chunked_ce_functions_refuse_deferred_logits(function):
    logits, _ = deferred()
    target = torch.randint(0, 29, (2, 5))
    with pytest.raises(TypeError, match=r"got DeferredLogits: pass input\.tensor\(\)$"):
        function(logits, target)
    assert logits._real is None, "computed"
    function(logits.tensor(), target)


WANTS_A_GRADIENT = {
    "retain_grad": lambda z: z.retain_grad(),
    "register_hook": lambda z: z.register_hook(lambda grad: None),
    "requires_grad_": lambda z: z.requires_grad_(),
}


@pytest.mark.parametrize("of", ["itself", "what it was made of"])
@pytest.mark.parametrize("name", WANTS_A_GRADIENT)
def test_gradient_hook_after_loss(name, of):
    logits, _ = deferred()
    scaled = torch.tanh(logits * 0.3)
    causal_lm_loss(scaled, torch.randint(0, 29, (2, 5)))
    with pytest.raises(RuntimeError, match=f"{name} would see no gradient of the loss.*without"):
        WANTS_A_GRADIENT[name](scaled if of == "itself" else logits)
    assert scaled._real is None, "computed"
    WANTS_A_GRADIENT[name](scaled.tensor())


def test_gradient_hook_before_loss():
    logits, leaves = deferred(dtype=torch.float64)
    logits.retain_grad()
    target = torch.randint(0, 29, (2, 5))
    causal_lm_loss(logits, None, shift_labels=target).backward()
    real = F.linear(*leaves).detach().requires_grad_()
    oracle.cross_entropy(real, target).backward()
    torch.testing.assert_close(logits.grad, real.grad)


@pytest.mark.parametrize("which", ["hidden states", "weight", "bias"])
def test_data_replaced(which):
    """The version stays, the address does not."""
    logits, leaves = deferred()
    given = dict(zip(("hidden states", "weight", "bias"), leaves, strict=True))[which]
    before = given._version
    given.data = given.data + 1.0
    assert given._version == before
    with pytest.raises(RuntimeError, match="had changed or been freed: read it before"):
        logits.tensor()
