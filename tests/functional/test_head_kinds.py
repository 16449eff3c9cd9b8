"""Heads that people have: LoRA, quantised weights, fp8. Each equals the head followed by torch's loss.

bitsandbytes and torchao do not install everywhere. What they do is small: a function of autograd
that dequantises twice, and a tensor subclass that says what `F.linear` does with it.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from chunked_ce import linear_cross_entropy, linear_token_stats

N, D, V, CHUNK = 64, 8, 101, 9


def rounded(weight):
    """Return an int8 weight and the scale of each class."""
    scale = weight.abs().amax(1, keepdim=True) / 127
    return (weight / scale).round().to(torch.int8), scale


class Int8Linear(nn.Module):
    """Weight-only quantisation, dequantised in forward; a trained bias."""

    def __init__(self):
        super().__init__()
        values, scale = rounded(torch.randn(V, D))
        self.register_buffer("values", values)
        self.register_buffer("scale", scale)
        self.bias = nn.Parameter(torch.randn(V))

    def forward(self, x):
        return F.linear(x, self.values.to(x.dtype) * self.scale, self.bias)


class Matmul8Bit(torch.autograd.Function):
    """As bitsandbytes' MatMul4Bit: the gradient of hidden states, and none of the weight."""

    @staticmethod
    def forward(ctx, x, values, scale):
        ctx.save_for_backward(values, scale)
        return x @ (values.to(x.dtype) * scale).t()

    @staticmethod
    def backward(ctx, grad):
        values, scale = ctx.saved_tensors
        return grad @ (values.to(grad.dtype) * scale), None, None


class LikeBitsAndBytes(nn.Linear):
    def __init__(self):
        super().__init__(D, V, bias=False)
        values, scale = rounded(self.weight.detach())
        self.weight = nn.Parameter(values, requires_grad=False)
        self.scale = scale

    def forward(self, x):
        return Matmul8Bit.apply(x, self.weight, self.scale)


class QuantizedTensor(torch.Tensor):
    """As torchao's: a weight without memory of its own, for which F.linear is defined."""

    @staticmethod
    def __new__(cls, values, scale):
        return torch.Tensor._make_wrapper_subclass(cls, values.shape, dtype=scale.dtype)

    def __init__(self, values, scale):
        self.values, self.scale = values, scale

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is F.linear:
            x, weight, *bias = args
            return F.linear(x, weight.values.to(x.dtype) * weight.scale, *bias)
        with torch._C.DisableTorchFunctionSubclass():
            return function(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.detach.default:
            return cls(args[0].values, args[0].scale)
        raise NotImplementedError(function)


def like_torchao():
    head = nn.Linear(D, V)
    weight = QuantizedTensor(*rounded(head.weight.detach()))
    head.weight = nn.Parameter(weight, requires_grad=False)
    return head


def fp8():
    """Return a function that closes over a weight in float8 and its scale, which is trained."""
    weight = torch.randn(V, D)
    scale = (weight.abs().max() / torch.finfo(torch.float8_e4m3fn).max).requires_grad_()
    values = (weight / scale.detach()).to(torch.float8_e4m3fn)

    def head(x):
        return F.linear(x, values.to(x.dtype) * scale)

    head.parameters = lambda: [scale]
    return head


def lora():
    """Return the head of a module that PEFT put an adapter on."""
    peft = pytest.importorskip("peft")
    model = nn.Sequential()
    model.add_module("lm_head", nn.Linear(D, V, bias=False))
    config = peft.LoraConfig(r=4, target_modules=["lm_head"], init_lora_weights=False)
    return peft.get_peft_model(model, config).base_model.model.lm_head


HEADS = {
    "LoRA": lora,
    "int8": Int8Linear,
    "like bitsandbytes": LikeBitsAndBytes,
    "like torchao": like_torchao,
    "fp8": fp8,
}


class Largest(TorchDispatchMode):
    """Keep the most elements that an operator made."""

    most = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(t, torch.Tensor):
                self.most = max(self.most, t.numel())
        return out


def batch():
    x, target = torch.randn(N, D, requires_grad=True), torch.randint(0, V, (N,))
    target[::5] = -100
    return x, target


@pytest.mark.parametrize("reduction", ["mean", "none", "statistics"])
@pytest.mark.parametrize("name", HEADS)
def test_loss_gradients_and_largest_tensor(name, reduction):
    torch.manual_seed(0)
    head, (x, target) = HEADS[name](), batch()
    trained = [p for p in head.parameters() if p.requires_grad]
    assert len(trained) == {"LoRA": 2, "like bitsandbytes": 0}.get(name, 1)
    upstream = 3.7 if reduction == "mean" else torch.linspace(-1, 2, N)
    with Largest() as ours:
        if reduction == "statistics":
            loss = -linear_token_stats(x, head, target, token_chunk_size=CHUNK).logprob
        else:
            options = dict(reduction=reduction, token_chunk_size=CHUNK)
            loss = linear_cross_entropy(x, head, target, **options)
        grads = torch.autograd.grad((loss * upstream).sum(), [x, *trained])
    assert ours.most <= CHUNK * V  # [V, D] is less
    with Largest() as stock:
        kind = "mean" if reduction == "mean" else "none"
        expected = F.cross_entropy(head(x), target, reduction=kind)
        exact = torch.autograd.grad((expected * upstream).sum(), [x, *trained])
    assert stock.most == N * V
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(grads, exact, rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore")  # torch.ao is deprecated, and torch warns of no gradient
def test_dynamically_quantized_layer_of_torch():
    """It quantises hidden states by the largest of a call, so chunks differ by their rounding."""
    if "fbgemm" not in torch.backends.quantized.supported_engines:
        pytest.skip("this torch has no quantised products")
    layer = nn.Sequential(nn.Linear(D, V))
    head = torch.ao.quantization.quantize_dynamic(layer, {nn.Linear}, dtype=torch.qint8)[0]
    x, target = batch()
    whole = F.cross_entropy(head(x.detach()), target)
    one = linear_cross_entropy(x.detach(), head, target, drop_ignored=False)
    torch.testing.assert_close(one, whole)
    chunked = linear_cross_entropy(x.detach(), head, target, token_chunk_size=CHUNK)
    torch.testing.assert_close(chunked, whole, rtol=1e-2, atol=0)
    with pytest.raises(RuntimeError, match="do not depend on it differentiably"):
        linear_cross_entropy(x, head, target)  # stock: no gradient, and a warning


class Counting(nn.Linear):
    """A head with a buffer that each call writes to, or replaces."""

    def __init__(self, inplace):
        super().__init__(D, V)
        self.inplace = inplace
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        if self.inplace:
            self.calls += 1
        else:
            self.calls = self.calls + 1
        return super().forward(x)


def normalized(**options):
    return nn.Sequential(nn.BatchNorm1d(D, **options), nn.Linear(D, V))


@pytest.mark.parametrize(
    ("head", "said"),
    [
        (lambda: normalized(), "the head's BatchNorm1d '0' normalizes over the tokens"),
        (lambda: normalized(track_running_stats=False).eval(), "normalizes over the tokens"),
        (lambda: Counting(True), "a call has changed its buffer 'calls'"),
        (lambda: Counting(False), "a call has changed its buffer 'calls'"),
        (lambda: LikeBitsAndBytes().to("meta"), "the head is on meta, but .* on cpu"),
    ],
)
def test_heads_that_are_refused(head, said):
    x, target = batch()
    with pytest.raises(ValueError, match=said):
        linear_cross_entropy(x, head(), target)


def test_a_frozen_normalization_is_taken():
    head, (x, target) = normalized().eval(), batch()
    loss = linear_cross_entropy(x, head, target, token_chunk_size=CHUNK)
    torch.testing.assert_close(loss, F.cross_entropy(head(x), target))
