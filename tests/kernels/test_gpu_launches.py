"""Tests of launches on a GPU with its own tables: one pass, in place, half precision, maxnreg."""

import oracle
import pytest
import torch
from helpers import assert_gradient, batch

from chunked_ce import cross_entropy, token_stats

pytest.importorskip("triton")
from chunked_ce.backends import gpu
from chunked_ce.kernels import launch

pytestmark = [
    pytest.mark.real_sizes,
    pytest.mark.needs_gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
HALF = (torch.bfloat16, torch.float16)
# On chip in one CTA; streamed, rows between 16 bytes; streamed, several segments.
VOCABULARIES = (12000, 50257, 128256)
HEADS = {"plain": {}, "softcap": dict(softcap=30.0, logit_scale=0.5)}  # softcap: maxnreg of 128


class Own(torch.autograd.Function):
    """Logits with a history but without a copy, so that they may be overwritten."""

    @staticmethod
    def forward(ctx, like, x, grads):
        ctx.grads = grads
        return x.data

    @staticmethod
    def backward(ctx, grad):
        ctx.grads.append(grad)
        return grad.new_zeros(1), None, None


def loss_and_gradient(x, target, **options):
    grads = []
    like = torch.zeros(1, device=x.device, dtype=x.dtype, requires_grad=True)
    loss = cross_entropy(Own.apply(like, x, grads), target, backend="triton", **options)
    loss.backward()
    return loss.detach(), grads[0]


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("inplace", [False, True], ids=["new memory", "in place"])
@pytest.mark.parametrize("one_pass", [False, True], ids=["two passes", "one pass"])
@pytest.mark.parametrize("dtype", [*HALF, torch.float32], ids=str)
@pytest.mark.parametrize("vocab", VOCABULARIES)
def test_loss_and_gradient(vocab, dtype, one_pass, inplace, head, device):
    x, target = batch(64, vocab, dtype, device)
    truth_x = x.double().requires_grad_()
    truth = oracle.cross_entropy(truth_x, target, **HEADS[head])
    truth.backward()
    loss, grad = loss_and_gradient(
        x, target, grad_in_forward=one_pass, inplace_backward=inplace, **HEADS[head]
    )
    assert (grad.data_ptr() == x.data_ptr()) is inplace
    torch.testing.assert_close(loss.double(), truth.detach(), rtol=2e-6, atol=0)
    assert_gradient(grad, truth_x.grad, dtype, largest=2 * float(truth_x.grad.abs().max()))


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_half_precision_rounding(dtype, device):
    """Check that rounding is to nearest. The interpreter truncates, so this needs a GPU."""
    x, target = batch(16, 50257, dtype, device)
    _, grad = loss_and_gradient(x, target)
    truth_x = x.double().requires_grad_()
    oracle.cross_entropy(truth_x, target).backward()
    normal = truth_x.grad.abs() > torch.finfo(dtype).tiny
    off = ((grad.double() - truth_x.grad).abs() / truth_x.grad.abs())[normal]
    assert float(off.max()) <= 0.51 * torch.finfo(dtype).eps


def test_launches_register_bound(device):
    """Check that statistics launched with maxnreg have the same values."""
    where = torch.device(device, torch.cuda.current_device())
    tile = launch.tile(gpu.architecture(where), 50257, 2, contiguous=True, plain=False)
    assert "maxnreg" in tile.arguments() or not gpu.architecture(where).startswith("sm_")
    x, target = batch(64, 50257, torch.bfloat16, device)
    wanted = dict.fromkeys(("entropy", "mean_logprob", "rank", "argmax"), True)
    ours = token_stats(x, target, backend="triton", **wanted)
    truth = oracle.token_stats(x, target)
    for name in ("lse", "logprob", "entropy", "mean_logprob"):
        torch.testing.assert_close(
            getattr(ours, name).double(), truth[name], rtol=3e-6, atol=3e-6, msg=name
        )
    assert torch.equal(ours.rank, truth["rank"]) and torch.equal(ours.argmax, truth["argmax"])
