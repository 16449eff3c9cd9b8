"""Random calls against the fp64 oracle: shapes, strides, dtypes, options, upstream gradients."""

import oracle
import pytest
import torch
from helpers import assert_gradient, gradient
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from chunked_ce import cross_entropy

SETTINGS = dict(
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@st.composite
def calls(draw):
    shape = draw(st.lists(st.integers(0, 4), min_size=0, max_size=3))
    vocab = draw(st.one_of(st.integers(1, 40), st.sampled_from([64, 127, 300, 301])))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    scale = draw(st.sampled_from([0.0, 1.0, 5.0, 40.0]))
    dtype = draw(st.sampled_from(DTYPES))
    pad = draw(st.integers(0, 3))
    x = (torch.randn(*shape, vocab + pad, generator=generator, dtype=torch.float64) * scale).to(
        dtype
    )
    view = draw(st.sampled_from(["whole", "offset", "transposed", "expanded"]))
    if view == "offset":
        x = torch.cat([x, x], -1)[..., 3 : 3 + vocab + pad]
        x = x if x.shape[-1] == vocab + pad else torch.zeros(*shape, vocab + pad, dtype=dtype)
    elif view == "transposed" and x.dim() == 3:
        x = x.transpose(0, 1)
    elif view == "expanded" and x.dim() > 1 and x.shape[0]:
        x = x[:1].expand(3, *x.shape[1:])
    target = torch.randint(0, vocab, x.shape[:-1], generator=generator)
    ignored = draw(st.sampled_from([0.0, 0.3, 1.0]))
    target = torch.where(torch.rand(target.shape, generator=generator) < ignored, -100, target)
    options = dict(
        reduction=draw(st.sampled_from(["mean", "sum", "none"])),
        label_smoothing=draw(st.sampled_from([0.0, 0.1, 1.0])),
        z_loss_weight=draw(st.sampled_from([0.0, 1e-3])),
        softcap=draw(st.sampled_from([None, None, 7.0])),
        logit_scale=draw(st.sampled_from([1.0, 1.0, 0.37, -2.0])),
        vocab_size=draw(st.sampled_from([None, vocab])) if pad else None,
    )
    return x, target, options, draw(st.sampled_from([1.0, -3.7]))


def check(backend, device, call):
    x, target, options, factor = call
    x, target = x.to(device), target.to(device)
    loss = cross_entropy(x, target, dim=-1, backend=backend, **options)
    truth = oracle.cross_entropy(x, target, **options)
    rtol = 1e-11 if x.dtype == torch.float64 else 2e-6
    torch.testing.assert_close(loss.double(), truth, rtol=rtol, atol=rtol, equal_nan=True)

    def up(loss):
        return factor * loss.sum()

    ours = gradient(
        lambda x: cross_entropy(x, target, dim=-1, backend=backend, **options), x, upstream=up
    )
    exact = gradient(lambda x: oracle.cross_entropy(x, target, **options), x.double(), upstream=up)
    # At the fp16 floor, and where softcap's 1 - tanh^2 cancels, the size before that derivative counts.
    size = abs(factor * options["logit_scale"]) * (4 if options["softcap"] else 1)
    assert_gradient(ours, exact.nan_to_num(0.0), x.dtype, size)


@settings(max_examples=150, **SETTINGS)
@given(calls())
def test_torch_backend(call):
    check("torch", "cpu", call)


@settings(max_examples=25, **SETTINGS)
@given(call=calls())
def test_kernels(device, call):
    pytest.importorskip("triton")
    check("triton", device, call)


@pytest.mark.long
@settings(max_examples=1500, **SETTINGS)
@given(calls())
def test_torch_backend_at_length(call):
    check("torch", "cpu", call)


@pytest.mark.long
@settings(max_examples=200, **SETTINGS)
@given(call=calls())
def test_kernels_at_length(device, call):
    pytest.importorskip("triton")
    check("triton", device, call)
