"""Tests of the drop-in losses: every target, weight and shape that torch's losses take."""

import copy
import io
import itertools
import pickle

import pytest
import torch
import torch.nn.functional as F
from helpers import ULP, gradient
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import chunked_ce
from chunked_ce import (
    BCEWithLogitsLoss,
    CrossEntropyLoss,
    binary_cross_entropy_with_logits,
    cross_entropy,
    linear_cross_entropy,
)
from chunked_ce.ops import linear as linear_ops
from chunked_ce.ops import logits as ops

SHAPES = {  # input, dim
    "[N, C]": ((5, 37), 1),
    "[N, C, d1, d2]": ((2, 11, 3, 5), 1),
    "[C]": ((41,), 1),
    "[B, T, V]": ((2, 3, 100), -1),
}


def torchs(x, target, dim, **options):
    """Return F.cross_entropy in fp64, with the classes in dimension 1."""
    if x.dim() > 1:
        x = x.movedim(dim, 1)
        target = target.movedim(dim, 1) if target.is_floating_point() else target
    weight = options.pop("weight", None)
    weight = None if weight is None else weight.double()
    target = target.double() if target.is_floating_point() else target
    return F.cross_entropy(x.double(), target, weight, **options)


def kinds(shape, dim, device, generator=None):
    """Return every kind of target as a pair (ours, torch's)."""
    classes_last = torch.empty(shape).movedim(dim if len(shape) > 1 else 0, -1).shape
    rows, vocab = classes_last[:-1], classes_last[-1]
    index = torch.randint(0, vocab, rows)
    if index.dim():
        index.view(-1)[0] = -100
    prob = torch.rand(shape)
    top = torch.rand(classes_last).argsort(-1)[..., :4]
    top_prob = torch.rand(*rows, 4) / 4
    top_prob[..., -1] = 0.0
    exact = top_prob.double()
    spread = ((1 - exact.sum(-1)) / (vocab - 4))[..., None].expand(classes_last)
    back = dim if len(shape) > 1 else 0
    return {
        "indices": (index, index, {}),
        "probabilities": (prob, prob, {}),
        "top k": ((top, top_prob), torch.zeros(classes_last).scatter(-1, top, top_prob).movedim(-1, back), {}),
        "top k, rest spread": ((top, top_prob), spread.scatter(-1, top, exact).movedim(-1, back), dict(spread_rest=True)),
    }  # fmt: skip


class Sizes(TorchDispatchMode):
    """Records the elements of every new tensor that is not a view of `source`."""

    def __init__(self, source):
        super().__init__()
        self.source, self.seen = source.untyped_storage().data_ptr(), []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **kwargs or {})
        for t in out if isinstance(out, tuple) else (out,):
            if isinstance(t, torch.Tensor) and t.untyped_storage().data_ptr() != self.source:
                self.seen.append(t.numel())
        return out


def to(device, target):
    return tuple(t.to(device) for t in target) if isinstance(target, tuple) else target.to(device)


def compare(ours, exact, dtype, rtol=None):
    rtol = rtol or (1e-11 if dtype == torch.float64 else 2e-6)
    torch.testing.assert_close(ours.double().cpu(), exact.cpu(), rtol=rtol, atol=rtol)


def compare_gradient(ours, exact, dtype):
    assert ours.dtype == dtype
    largest = float(exact.abs().max())
    torch.testing.assert_close(
        ours.double().cpu(), exact.double().cpu(), rtol=ULP[dtype], atol=largest * (1e-13 if dtype == torch.float64 else 3e-7)
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["indices", "probabilities", "top k", "top k, rest spread"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.filterwarnings("ignore:target of shape")
def test_every_target(backend, device, shape, kind):
    if backend == "triton" and (shape != "[N, C, d1, d2]" or kind in ("indices", "top k")):
        pytest.skip("the interpreter is slow; the kernels' strides have tests of their own")
    shape, dim = SHAPES[shape]
    x = torch.randn(shape, device=device) * 3
    vocab = shape[dim if len(shape) > 1 else 0]
    ours, theirs, more = kinds(shape, dim, device)[kind]
    ours, theirs = to(device, ours), to(device, theirs)
    weight = torch.rand(vocab, device=device)
    weight[1] = 0
    all_options = itertools.product(("mean", "sum", "none"), (0.0, 0.1), (None, weight))
    few = (("mean", 0.1, weight), ("none", 0.0, None))  # the interpreter is slow
    for reduction, smoothing, w in few if backend == "triton" else all_options:
        options = dict(reduction=reduction, label_smoothing=smoothing, weight=w)

        def loss(x, options=options):
            return cross_entropy(x, ours, dim=dim, backend=backend, **options, **more)

        def truth(x, options=options):
            return torchs(x, theirs, dim, **options)

        compare(loss(x), truth(x), x.dtype)

        def up(value):
            return (value * torch.linspace(-1, 2, value.numel()).view(value.shape).to(value)).sum()

        compare_gradient(gradient(loss, x, upstream=up), gradient(truth, x.double(), upstream=up), x.dtype)  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("kind", ["indices", "probabilities", "top k, rest spread"])
@pytest.mark.filterwarnings("ignore:target of shape")
def test_dtypes(backend, device, dtype, kind):
    shape = (4, 90)
    x = (torch.randn(shape, device=device) * 3).to(dtype)
    ours, theirs, more = kinds(shape, 1, device)[kind]
    ours, theirs = to(device, ours), to(device, theirs)
    options = dict(weight=torch.rand(90, device=device), label_smoothing=0.1)

    def loss(x):
        return cross_entropy(x, ours, backend=backend, **options, **more)

    compare(loss(x), torchs(x, theirs, 1, **options), dtype)
    exact = gradient(lambda x: 3.7 * torchs(x, theirs, 1, **options), x.double())
    compare_gradient(gradient(lambda x: 3.7 * loss(x), x), exact, dtype)


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_language_model_options(backend, device, softcap):
    """Class weights scale the cross-entropy, and token weights scale the whole loss.

    The mean divides the z-loss by the token weights, and the cross-entropy by both.
    """
    x, target = torch.randn(6, 50, device=device) * 3, torch.randint(0, 45, (6,), device=device)
    target[2] = -100
    weight, of_tokens = torch.rand(45, device=device), torch.rand(6, device=device)
    prob = torch.randn(6, 50, device=device).softmax(-1)
    for label, labels in (("indices", target), ("probabilities", prob)):

        def loss(x, labels=labels):
            return cross_entropy(
                x, labels, weight, label_smoothing=0.1, z_loss_weight=0.1, softcap=softcap,
                logit_scale=0.7, vocab_size=45, token_weight=of_tokens, backend=backend,
            )  # fmt: skip

        def truth(x, labels=labels):
            z = x.double()[:, :45] * 0.7
            z = z if softcap is None else softcap * torch.tanh(z / softcap)
            if labels.is_floating_point():
                labels = labels.double()[:, :45]
            ce = F.cross_entropy(z, labels, weight.double(), label_smoothing=0.1, reduction="none")
            scored = torch.ones(6) if labels.is_floating_point() else (labels != -100).cpu()
            scored = scored.to(device).double()
            counts = scored if labels.is_floating_point() else scored * weight[labels.clamp(min=0)]
            z_loss = (of_tokens * scored * 0.1 * z.logsumexp(-1).square()).sum()
            z_loss = z_loss / (of_tokens * scored).sum()
            return (of_tokens * scored * ce).sum() / (of_tokens * counts).sum() + z_loss

        compare(loss(x), truth(x), x.dtype), label
        compare_gradient(gradient(loss, x), gradient(truth, x.double()), x.dtype)


@pytest.mark.parametrize("kind", ["top k", "top k, rest spread"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_top_k_under_head(backend, device, dtype, kind):
    x = (torch.randn(5, 60, device=device) * 3).to(dtype)
    ours, theirs, more = kinds((5, 60), 1, device)[kind]
    ours, theirs = to(device, ours), to(device, theirs)

    def loss(x):
        return cross_entropy(x, ours, softcap=5.0, logit_scale=0.7, backend=backend, **more)

    def truth(x):
        return torchs(5 * torch.tanh(x.double() * 0.7 / 5), theirs, 1)

    compare(loss(x), truth(x), dtype)
    compare_gradient(gradient(loss, x), gradient(truth, x.double()), dtype)


@pytest.mark.parametrize("kind", ["indices", "probabilities"])
@pytest.mark.parametrize("step", [1, 2])
def test_weights_several_parts(backend, device, kind, step):
    """Use a row with several segments and several spans of its gradient."""
    wide = torch.randn(4, 305 * step, device=device) * 3
    x = wide[:, step * 3 : step * 304 : step]  # rows that start anywhere
    vocab = x.shape[-1]
    weight = torch.rand(vocab, device=device)
    weight[::7] = 0
    if kind == "indices":
        target = torch.tensor([2, 200, 270, 300], device=device)
    else:
        target = torch.empty(4, vocab * step, device=device)[:, ::step]
        target.copy_(torch.randn(4, vocab).softmax(-1))
    for w in (weight, None) if kind == "probabilities" else (weight,):
        options = dict(weight=w, label_smoothing=0.2)

        def loss(x, options=options):
            return cross_entropy(x, target, backend=backend, **options)

        compare(loss(x), torchs(x, target, 1, **options), x.dtype)
        exact = gradient(lambda x, o=options: torchs(x, target, 1, **o), x.double())
        compare_gradient(gradient(loss, x), exact, x.dtype)


def test_class_weights_one_pass(backend, device):
    """Check grad_in_forward with class weights that scale a token's whole loss."""
    x, target = torch.randn(6, 50, device=device), torch.randint(0, 50, (6,), device=device)
    weight = torch.rand(50, device=device)

    def loss(x, **options):
        return cross_entropy(x, target, weight, backend=backend, **options)

    compare(loss(x.clone().requires_grad_(), grad_in_forward=True).detach(), torchs(x, target, 1, weight=weight), x.dtype)  # fmt: skip
    compare_gradient(
        gradient(lambda x: loss(x, grad_in_forward=True), x), gradient(loss, x).double(), x.dtype
    )


def test_masked_classes_probability_0(backend, device):
    """Check that a -inf class without probability or weight costs nothing; torch gives NaN."""
    x = torch.randn(3, 40, device=device)
    x[:, 7] = -torch.inf
    prob = torch.rand(3, 40, device=device)
    prob[:, 7] = 0
    prob /= prob.sum(-1, keepdim=True)
    keep = [j for j in range(40) if j != 7]

    def loss(x):
        return cross_entropy(x, prob, backend=backend)

    compare(loss(x), torchs(x[:, keep], prob[:, keep], 1), x.dtype)
    grad = gradient(loss, x)
    assert (grad[:, 7] == 0).all() and grad.isfinite().all()
    weight = torch.ones(40, device=device)
    weight[7] = 0
    target = torch.tensor([1, 2, 3], device=device)
    smooth = cross_entropy(x, target, weight, label_smoothing=0.1, reduction="sum", backend=backend)
    logp = x.double().log_softmax(-1)
    exact = -0.9 * logp.gather(1, target[:, None]).sum() - 0.1 / 40 * logp[:, keep].sum()
    compare(smooth, exact, x.dtype)
    target[1] = 7
    smooth = cross_entropy(x, target, weight, label_smoothing=0.1, reduction="sum", backend=backend)
    exact += 0.9 * logp[1, 2]
    compare(smooth, exact, x.dtype)


def test_certain_class_beside_masked(backend, device):
    x = torch.tensor([[float("-inf"), 2.0, float("-inf")]] * 2, device=device)
    prob = torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.5, 0.0]], device=device)
    loss = cross_entropy(x, prob, reduction="none", backend=backend)
    assert torch.equal(loss.cpu(), torch.zeros(2))


def test_spread_rest_masked_classes(backend, device):
    x = torch.tensor([[1.0, 2.0, float("-inf"), 0.5]], device=device)
    indices, prob = (
        torch.tensor([[1, 3]], device=device),
        torch.tensor([[0.75, 0.25]], device=device),
    )
    dense = torch.tensor([[0.0, 0.75, 0.0, 0.25]], device=device)
    for target, spread in [((indices, prob), True), (dense, False)]:
        grad = gradient(lambda x, t=target, s=spread: cross_entropy(x, t, spread_rest=s, backend=backend), x)  # fmt: skip
        exact = x.double().softmax(-1) - dense
        torch.testing.assert_close(grad.double(), exact, rtol=2e-6, atol=1e-7)
        loss = cross_entropy(x, target, spread_rest=spread, backend=backend)
        kept = [0, 1, 3]
        truth = F.cross_entropy(x[:, kept].double(), dense[:, kept].double())
        torch.testing.assert_close(loss.double(), truth, rtol=1e-6, atol=0)


@pytest.mark.parametrize("schedule", [{}, dict(grad_in_forward=True)])
@pytest.mark.parametrize("kind", ["indices", "probabilities", "top k"])
def test_all_smoothed_masked_target(backend, device, kind, schedule):
    """Check that smoothing 1 with a masked class gives inf, not NaN."""
    x = torch.tensor([[1.0, float("-inf"), 0.5]], device=device, requires_grad=True)
    target = torch.tensor([1], device=device)
    if kind == "probabilities":
        target = F.one_hot(target, 3).float()
    elif kind == "top k":
        target = target[:, None], torch.ones(1, 1, device=device)
    loss = cross_entropy(x, target, label_smoothing=1.0, backend=backend, **schedule)
    assert loss == float("inf")


@pytest.mark.parametrize("kind", ["probabilities", "top k"])
def test_confident_rows_keep_digits(backend, device, kind):
    """Check that a one-hot target with logit 20 above the rest has loss 1e-8, like an index."""
    x = torch.zeros(2, 30, device=device)
    x[:, 4] = 21.0
    index = torch.tensor([4, 4], device=device)
    hot = F.one_hot(index, 30).float()
    target = hot if kind == "probabilities" else (index[:, None], torch.ones(2, 1, device=device))
    exact = F.cross_entropy(x.double(), index)
    torch.testing.assert_close(
        cross_entropy(x, target, backend=backend).double(), exact, rtol=2e-6, atol=0
    )
    ours = gradient(lambda x: cross_entropy(x, target, backend=backend), x)
    truth = gradient(lambda x: F.cross_entropy(x, index), x.double())
    torch.testing.assert_close(ours.double(), truth, rtol=2e-5, atol=0)


def test_gradient_of_probabilities(backend, device):
    x = torch.randn(4, 30, device=device, dtype=torch.float64)
    prob = torch.rand(4, 30, device=device, dtype=torch.float64)
    weight = torch.rand(30, device=device, dtype=torch.float64)
    grads = []
    for f in (lambda q: cross_entropy(x, q, weight, label_smoothing=0.1, backend=backend),
              lambda q: F.cross_entropy(x, q, weight, label_smoothing=0.1)):  # fmt: skip
        grads.append(gradient(lambda q, f=f: 3.7 * f(q), prob))
    torch.testing.assert_close(*grads)


def test_gradient_of_probabilities_under_a_common_offset(device):
    """Check that the gradient is log p_j although lse is rounded by 0.0005."""
    x = torch.tensor([[1e4, 1e4 + 1, 1e4 - 2]], device=device)
    prob = torch.full((1, 3), 1 / 3, device=device, requires_grad=True)
    cross_entropy(x, prob).backward()
    exact = -(x.double() - 1e4).log_softmax(-1)
    torch.testing.assert_close(prob.grad.double(), exact, rtol=1e-6, atol=0)


@pytest.mark.parametrize("options", [{}, dict(label_smoothing=0.1), dict(z_loss_weight=1e-3)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=str)
def test_weights_in_another_dtype(backend, device, dtype, options):
    """Check that weights in another dtype change neither the rounding nor the loss's dtype."""
    x, target = torch.randn(4, 7, device=device), torch.tensor([0, 3, -100, 6], device=device)
    weight, of_token = (torch.rand(n, device=device).to(dtype) for n in (7, 4))
    weights = dict(weight=weight, token_weight=of_token, reduction="none", **options)
    loss = cross_entropy(x, target, backend=backend, **weights)
    linear = linear_cross_entropy(
        x, torch.eye(7, device=device), target, backend=backend, **weights
    )
    weights |= dict(weight=weight.double(), token_weight=of_token.double())
    exact = cross_entropy(x.double(), target, backend=backend, **weights)
    assert loss.dtype == linear.dtype == torch.float32
    for ours in (loss, linear):
        torch.testing.assert_close(ours.double(), exact, rtol=1e-6, atol=1e-7)


def test_top_k_padding_and_repetitions(backend, device):
    """Check that padding counts for nothing, a row of padding is ignored, and repetitions add up."""
    x = torch.randn(3, 20, device=device)
    indices = torch.tensor([[3, 5, -100], [-100, -100, -100], [7, 7, 2]], device=device)
    prob = torch.tensor([[0.5, 0.2, 9.0], [1.0, 1.0, 1.0], [0.25, 0.25, 0.1]], device=device)
    kept = torch.tensor([0, 2], device=device)
    for spread in (False, True):
        dense = torch.zeros(2, 20, dtype=torch.float64, device=device)
        if spread:
            dense[0], dense[1] = 0.3 / 18, 0.4 / 18
        dense[0, [3, 5]] = torch.tensor([0.5, 0.2], dtype=torch.float64, device=device)
        dense[1, [7, 2]] = torch.tensor([0.5, 0.1], dtype=torch.float64, device=device)

        def loss(x, spread=spread):
            return cross_entropy(x, (indices, prob), spread_rest=spread, backend=backend)

        exact = gradient(lambda x, d=dense: F.cross_entropy(x[kept], d), x.double())
        compare(loss(x), F.cross_entropy(x[kept].double(), dense), x.dtype)
        ours = gradient(loss, x)
        compare_gradient(ours, exact, x.dtype)
        assert (ours[1] == 0).all()


@pytest.mark.framework
def test_k_dimensional_logits_not_copied(backend, device):
    """Check that [N, C, d1, d2] is read in place, and its gradient has the same memory order."""
    x = torch.randn(2, 30, 5, 4, device=device, requires_grad=True)
    target = torch.randint(0, 30, (2, 5, 4), device=device)

    with Sizes(x) as outside:
        loss = cross_entropy(x, target, backend=backend)
    loss.backward()
    assert max(outside.seen) < x.numel()  # the operator gets a view
    with Sizes(x) as inside:
        ops._token_stats(
            x.detach().movedim(1, -1), target, *ops.Classes(), -100, 30, None, 1.0, backend,
            *[False] * 5,
        )  # fmt: skip
    assert max(inside.seen) < x.numel()
    assert x.grad.stride() == x.stride()


def test_inplace_backward_of_k_dimensional_logits(backend, device):
    weights = torch.randn(2, 30, 5, device=device, requires_grad=True)
    target = torch.randint(0, 30, (2, 5), device=device)
    grads = []
    for inplace in (False, True):
        (g,) = torch.autograd.grad(
            cross_entropy(weights * 2, target, inplace_backward=inplace, backend=backend), weights
        )
        grads.append(g)
    torch.testing.assert_close(*grads)


# --- torch's documentation ------------------------------------------------------------------------


def both(function, ours, theirs, *tensors):
    """Return the values and gradients of function(loss, *tensors) with our loss and torch's."""
    results = []
    for loss in (ours, theirs):
        leaves = [t.detach().clone().requires_grad_(t.requires_grad) for t in tensors]
        out = function(loss, *leaves)
        out.backward()
        results.append([out.detach(), *(t.grad for t in leaves if t.requires_grad)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_examples_of_torch_nn_cross_entropy_loss(device):
    input = torch.randn(3, 5, requires_grad=True, device=device)
    both(lambda loss, x, t: loss(x, t), CrossEntropyLoss(), nn.CrossEntropyLoss(),
         input, torch.empty(3, dtype=torch.long, device=device).random_(5))  # fmt: skip
    both(lambda loss, x, t: loss(x, t), CrossEntropyLoss(), nn.CrossEntropyLoss(),
         input, torch.randn(3, 5, device=device).softmax(dim=1))  # fmt: skip


def test_examples_of_torch_nn_functional_cross_entropy(device):
    input = torch.randn(3, 5, requires_grad=True, device=device)
    both(lambda loss, x, t: loss(x, t), cross_entropy, F.cross_entropy,
         input, torch.randint(5, (3,), dtype=torch.int64, device=device))  # fmt: skip
    both(lambda loss, x, t: loss(x, t), cross_entropy, F.cross_entropy,
         input, torch.randn(3, 5, device=device).softmax(dim=1))  # fmt: skip


def test_examples_of_torch_nn_bce_with_logits_loss(device):
    # "A prediction (logit)", 64 classes, batch size 10, the weights of positives all 1
    target = torch.ones([10, 64], dtype=torch.float32, device=device)
    output = torch.full([10, 64], 1.5, device=device).requires_grad_()
    pos_weight = torch.ones([64], device=device)
    ours = BCEWithLogitsLoss(pos_weight=pos_weight)
    both(lambda loss, x, t: loss(x, t), ours, nn.BCEWithLogitsLoss(pos_weight=pos_weight), output, target)  # fmt: skip
    torch.testing.assert_close(ours(output, target).item(), 0.20141, rtol=0, atol=1e-5)
    input = torch.randn(3, requires_grad=True, device=device)
    target = torch.empty(3, device=device).random_(2)
    both(lambda loss, x, t: loss(x, t), BCEWithLogitsLoss(), nn.BCEWithLogitsLoss(), input, target)


def test_example_of_torch_nn_functional_bce_with_logits(device):
    input = torch.randn(3, requires_grad=True, device=device)
    target = torch.empty(3, device=device).random_(2)
    both(lambda loss, x, t: loss(x, t), binary_cross_entropy_with_logits,
         F.binary_cross_entropy_with_logits, input, target)  # fmt: skip


@pytest.mark.skipif(not hasattr(F, "linear_cross_entropy"), reason="torch before 2.13")
def test_examples_of_torch_nn_functional_linear_cross_entropy(device):
    input = torch.randn(3, 4, requires_grad=True, device=device)
    weight = torch.randn(5, 4, requires_grad=True, device=device)
    bias = torch.randn(5, requires_grad=True, device=device)
    target = torch.randint(5, (3,), device=device)
    both(lambda loss, x, w, b: loss(x, w, target, linear_bias=b), linear_cross_entropy,
         F.linear_cross_entropy, input, weight, bias)  # fmt: skip
    prob = torch.randn(3, 5, device=device).softmax(dim=1)
    both(lambda loss, x, w, b: loss(x, w, prob, linear_bias=b), linear_cross_entropy,
         F.linear_cross_entropy, input, weight, bias)  # fmt: skip


def test_positional_arguments_order(device):
    x, t = torch.randn(4, 6, device=device), torch.tensor([0, 1, 2, 5], device=device)
    weight = torch.rand(6, device=device)
    arguments = (x, t, weight, None, 2, None, "sum", 0.1)
    torch.testing.assert_close(cross_entropy(*arguments), F.cross_entropy(*arguments))
    y = torch.rand(4, 6, device=device)
    arguments = (x, y, weight, None, None, "sum", weight)
    torch.testing.assert_close(
        binary_cross_entropy_with_logits(*arguments), F.binary_cross_entropy_with_logits(*arguments)
    )


# --- modules --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ours", "theirs", "arguments"),
    [
        (CrossEntropyLoss, nn.CrossEntropyLoss, dict(weight=torch.rand(5), ignore_index=1, reduction="sum", label_smoothing=0.2)),
        (BCEWithLogitsLoss, nn.BCEWithLogitsLoss, dict(weight=torch.rand(5), pos_weight=torch.rand(5), reduction="none")),
        (CrossEntropyLoss, nn.CrossEntropyLoss, {}),
        (BCEWithLogitsLoss, nn.BCEWithLogitsLoss, {}),
    ],
)  # fmt: skip
def test_module_signatures(ours, theirs, arguments):
    mine, torchs_module = ours(**arguments), theirs(**arguments)
    assert mine.state_dict().keys() == torchs_module.state_dict().keys()
    torchs_module.load_state_dict(mine.state_dict())
    x = torch.randn(3, 5)
    t = torch.tensor([0, 2, 4]) if ours is CrossEntropyLoss else torch.rand(3, 5)
    expected = torchs_module(x, t)
    file = io.BytesIO()
    torch.save(mine.state_dict(), file)
    file.seek(0)
    again = ours(**arguments)
    again.load_state_dict(torch.load(file, weights_only=True))
    for module in (mine, copy.deepcopy(mine), pickle.loads(pickle.dumps(mine)), again):
        torch.testing.assert_close(module(x, t), expected)
    moved = mine.to(torch.float64)
    assert all(buffer.dtype == torch.float64 for buffer in moved.buffers())
    for name, value in arguments.items():
        assert name in repr(mine) or isinstance(value, torch.Tensor)


def test_module_options(device):
    x, t = torch.randn(2, 3, 5, device=device), torch.randint(0, 5, (2, 3), device=device)
    module = CrossEntropyLoss(dim=-1, z_loss_weight=0.1)
    assert repr(module) == "CrossEntropyLoss(dim=-1, z_loss_weight=0.1)"
    assert torch.equal(module(x, t), cross_entropy(x, t, dim=-1, z_loss_weight=0.1))
    with pytest.raises(TypeError, match="has no argument softcapp: did you mean softcap"):
        CrossEntropyLoss(softcapp=3.0)
    with pytest.raises(TypeError, match="size_average is False, but torch has deprecated it"):
        CrossEntropyLoss(size_average=False)


# --- linear_cross_entropy -------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["indices", "probabilities", "top k", "top k, rest spread"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.filterwarnings("ignore:target of shape")
def test_linear_every_target(backend, device, kind, smoothing):
    rows, hidden, vocab = (2, 4), 8, 45
    x, w = torch.randn(*rows, hidden, device=device), torch.randn(vocab, hidden, device=device)
    weight = torch.rand(vocab, device=device)
    ours, theirs, more = kinds((*rows, vocab), -1, device)[kind]
    ours, theirs = to(device, ours), to(device, theirs)
    for reduction, of_classes in (("mean", None), ("none", weight)):
        options = dict(weight=of_classes, reduction=reduction, label_smoothing=smoothing)
        leaves = [x.clone().requires_grad_(), w.clone().requires_grad_()]
        loss = linear_cross_entropy(
            *leaves, ours, token_chunk_size=3, backend=backend, **options, **more
        )
        exact_leaves = [t.detach().double().requires_grad_() for t in leaves]
        exact = torchs(F.linear(*exact_leaves), theirs, -1, **options)
        compare(loss, exact, x.dtype)
        up = torch.randn(exact.shape, dtype=torch.float64, device=device)
        grads = torch.autograd.grad(loss, leaves, up.to(loss.dtype))
        for a, b in zip(grads, torch.autograd.grad(exact, exact_leaves, up), strict=True):
            compare_gradient(a, b, x.dtype)


def test_top_k_never_dense(device):
    """Check that only the gradient has N x V elements, and none in the linear form."""
    n, d, vocab, k = 64, 8, 5000, 10
    x = torch.randn(n, vocab, device=device)
    indices, prob = torch.randint(0, vocab, (n, k), device=device), torch.rand(n, k, device=device)
    classes = ops.Classes(indices=indices)
    with Sizes(x) as of_logits:
        ops._token_stats(x, indices[:, 0], *classes, -100, vocab, None, 1.0, "torch", *[False] * 5)
    assert max(of_logits.seen) < n * vocab // 4
    hidden, head = torch.randn(n, d, device=device), torch.randn(vocab, d, device=device)
    with Sizes(head) as of_hidden:
        linear_ops._linear_stats(
            hidden, head, None, indices[:, 0], *classes, -100, vocab, None, 1.0, "torch", 8, False,
            torch.float32, torch.float32, *[False] * 4,
        )  # fmt: skip
    assert max(of_hidden.seen) <= 8 * (vocab + 128)
    assert chunked_ce.cross_entropy(x, (indices, prob)).isfinite()


@pytest.mark.framework
@pytest.mark.parametrize("kind", ["indices", "probabilities", "top k, rest spread"])
def test_compile_fullgraph(kind):
    torch._dynamo.reset()
    shape = (4, 30)
    target, _, more = kinds(shape, 1, "cpu")[kind]
    weight = torch.rand(30)

    def step(x):
        return cross_entropy(x, target, weight, label_smoothing=0.1, **more)

    results = []
    x = torch.randn(shape)
    for run in (step, torch.compile(step, backend="aot_eager", fullgraph=True)):
        leaf = x.clone().requires_grad_()
        loss = run(leaf)
        loss.backward()
        results.append((loss.detach(), leaf.grad))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


# --- what a review broke --------------------------------------------------------------------------


def test_second_derivative_learned_probabilities_error(backend, device):
    x = torch.randn(2, 4, device=device, requires_grad=True)
    prob = torch.randn(2, 4, device=device).softmax(-1).requires_grad_()
    with pytest.raises(RuntimeError, match="first derivatives only"):
        torch.autograd.grad(cross_entropy(x, prob, backend=backend), prob, create_graph=True)


@pytest.mark.parametrize("options", [{}, dict(label_smoothing=0.1), dict(z_loss_weight=0.1)])
def test_loss_dtype_float32(device, options):
    x, t = torch.randn(3, 5, device=device), torch.tensor([0, 1, 2], device=device)
    weight = torch.rand(5, device=device)
    for dtype in (torch.float64, torch.bfloat16):
        w = weight.to(dtype)
        assert cross_entropy(x, t, w, **options).dtype == torch.float32
        assert linear_cross_entropy(x, x, t, weight=w[:3], **options).dtype == torch.float32
    low = dict(weight=weight.bfloat16(), token_weight=weight[:3].bfloat16(), reduction="sum")
    high = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in low.items()}
    exact = cross_entropy(x.double(), t, **high, **options)
    torch.testing.assert_close(
        cross_entropy(x, t, **low, **options).double(), exact, rtol=1e-6, atol=0
    )


def test_top_k_rest_rounding(backend, device):
    x = torch.tensor([[0.0, 1.0, -torch.inf]], device=device)
    exact = -(0.6 * x.log_softmax(1)[0, 0] + 0.4 * x.log_softmax(1)[0, 1])
    for last in (0.4, 0.40000001, 0.39999998):
        top = torch.tensor([[0, 1]], device=device), torch.tensor([[0.6, last]], device=device)
        loss = cross_entropy(x, top, spread_rest=True, backend=backend)
        torch.testing.assert_close(loss, exact)
    whole = torch.tensor([[0, 1, 2]], device=device), torch.tensor([[0.5, 0.3, 0]], device=device)
    assert cross_entropy(x, whole, spread_rest=True, backend=backend).isfinite()


def test_top_k_as_many_classes_as_positions(backend, device):
    """[N, C, d1] with C = d1 does not tell where the classes are."""
    x = torch.randn(2, 3, 3, device=device)
    indices, prob = torch.tensor([[0, 2]], device=device), torch.tensor([[0.7, 0.3]], device=device)
    top = indices.expand(2, 3, 2), prob.expand(2, 3, 2)
    dense = torch.tensor([0.7, 0.0, 0.3], device=device)[:, None].expand(2, 3, 3)
    loss = cross_entropy(x, top, backend=backend)
    torch.testing.assert_close(loss, F.cross_entropy(x, dense), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_top_k_rest_small(dtype, backend, device):
    """Check that a small rest of probability is spread, not taken for rounding."""
    x = torch.randn(3, 9, device=device) * 3
    top = torch.tensor([[1, 0], [4, 2], [8, 3]], device=device)
    prob = torch.tensor([[0.3372, 0.6626], [0.97, 0.026], [1 - 2**-12, 2**-14]], device=device).to(dtype)  # fmt: skip
    rest = (1 - prob.double().sum(-1, keepdim=True)).clamp(min=0)
    dense = (rest / 7).expand(3, 9).scatter(-1, top, prob.double())
    loss = cross_entropy(x, (top, prob), spread_rest=True, reduction="none", backend=backend)
    exact = F.cross_entropy(x.double(), dense, reduction="none")
    torch.testing.assert_close(loss.double(), exact, rtol=1e-6, atol=1e-7)


def test_top_k_rest_confident_digits(backend, device):
    x = torch.tensor([[30.0, 0.0, 1.0, -2.0]], device=device)
    prob = torch.tensor([[1 - 2**-20, 2**-22, 2**-23 / 3]], device=device)
    dense = torch.cat([prob.double(), 1 - prob.double().sum(-1, keepdim=True)], -1)
    top = torch.tensor([[0, 1, 2]], device=device), prob
    loss = cross_entropy(x, top, spread_rest=True, backend=backend)
    torch.testing.assert_close(loss.double(), F.cross_entropy(x.double(), dense), rtol=1e-6, atol=0)


def test_top_k_rest_masked_infinite(backend, device):
    x = torch.tensor([[0.0, -torch.inf, 1.0, 2.0]], device=device)
    for q in (0.0, 0.01, 0.4):  # of the masked class: less than its even share, and more
        top = torch.tensor([[0, 1]], device=device), torch.tensor([[0.5, q]], device=device)
        assert cross_entropy(x, top, spread_rest=True, backend=backend) == torch.inf


def test_no_weight_infinite_loss(backend, device):
    inf = torch.inf
    x = torch.tensor([[0.0, -inf, -inf]], device=device)
    hot, weight = torch.tensor([[1.0, 0, 0]], device=device), torch.tensor([1.0, 0, 0], device=device)  # fmt: skip
    first, last = (torch.tensor([i], device=device) for i in (0, 2))
    assert cross_entropy(x, hot, backend=backend) == 0
    assert cross_entropy(x, first, weight, label_smoothing=0.1, backend=backend) == 0
    for options in ({}, dict(label_smoothing=0.1), dict(z_loss_weight=0.1)):
        loss = cross_entropy(x, last, weight, reduction="sum", backend=backend, **options)
        assert loss.isfinite()
    zero_weight = torch.zeros(1, device=device)
    assert cross_entropy(x, last, token_weight=zero_weight, reduction="sum", backend=backend) == 0


def test_top_k_classes_out_of_range(monkeypatch, device):
    """Check the IndexError, also when compiled. On a GPU the row is NaN, with no access outside it."""
    x, prob = torch.randn(2, 6), torch.tensor([[0.3, 0.7]] * 2)
    compiled = torch.compile(
        lambda x, i: cross_entropy(x, (i, prob), vocab_size=4), backend="aot_eager", fullgraph=True
    )
    for wrong in (-5, 4, 9):
        indices = torch.tensor([[2, 1], [wrong, 1]])
        for call in (compiled, lambda x, i: cross_entropy(x, (i, prob), vocab_size=4)):
            with pytest.raises(IndexError, match=f"target {wrong} in row 1 is out of range"):
                call(x, indices)
        monkeypatch.setattr(ops, "check_classes", lambda *a: None)
        loss = cross_entropy(x, (indices, prob), vocab_size=4, reduction="none")
        assert loss[0].isfinite() and loss[1].isnan()
        monkeypatch.undo()


@pytest.mark.framework
def test_top_k_compilation_count():
    torch._dynamo.reset()
    compiles = []

    def count(graph, inputs):
        compiles.append(1)
        return graph

    step = torch.compile(lambda x, p: cross_entropy(x, p), backend=count, fullgraph=True)
    for shape in [(4, 7), (6, 7), (9, 7), (5, 11), (8, 13), (12, 17)]:
        step(torch.randn(shape), torch.rand(shape).softmax(1))
    assert len(compiles) <= 3


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_top_k_broken_row_zero_weight(backend, device, value):
    x = torch.zeros(2, 9, device=device)
    x[0, 3] = value
    top = torch.tensor([[5], [5]], device=device), torch.tensor([[0.5], [0.5]], device=device)
    weight = torch.ones(9, device=device).index_fill_(0, torch.tensor([5], device=device), 0.0)
    loss = cross_entropy(x, top, weight, reduction="none", backend=backend)
    assert loss[0].isnan() and loss[1] == 0


def test_probabilities_ignore_index_error():
    x, h, head = (
        torch.randn(6, 11).double(),
        torch.randn(6, 4).double(),
        torch.randn(11, 4).double(),
    )
    prob = x.softmax(-1)
    for call in (
        lambda: chunked_ce.cross_entropy(x, prob, ignore_index=1),
        lambda: chunked_ce.CrossEntropyLoss(ignore_index=1)(x, prob),
        lambda: chunked_ce.linear_cross_entropy(h, head, prob, ignore_index=1),
        lambda: chunked_ce.linear_cross_entropy(h, head, prob, ignore_index=-100),
        lambda: chunked_ce.LinearCrossEntropyLoss(4, 11, dtype=torch.float64, ignore_index=1)(
            h, prob
        ),
        lambda: chunked_ce.binary_cross_entropy_with_logits(x, prob, ignore_index=1),
        lambda: chunked_ce.BCEWithLogitsLoss(ignore_index=1)(x, prob),
    ):
        with pytest.raises(ValueError, match="ignore_index is .*leave it"):
            call()
    torch.testing.assert_close(
        chunked_ce.cross_entropy(x, prob, ignore_index=-1),
        F.cross_entropy(x, prob, ignore_index=-1),
    )
    chunked_ce.LinearCrossEntropyLoss(4, 11, dtype=torch.float64)(h, prob)


def test_spread_rest_fp64_probabilities(backend, device):
    """Check that 1 - 0.999 is computed in fp64. All other weights are 0, so an error would show."""
    prob = torch.tensor([[0.999], [0.9999]], dtype=torch.float64, device=device)
    classes, x = torch.tensor([[3], [5]], device=device), torch.randn(2, 20, device=device)
    weight = torch.rand(20, device=device).index_fill_(0, classes.flatten(), 0.0)
    loss = cross_entropy(
        x, (classes, prob), weight, reduction="none", spread_rest=True, backend=backend
    )
    dense = ((1 - prob) / 19).expand(2, 20).scatter(1, classes, prob)
    truth = F.cross_entropy(x.double(), dense, weight.double(), reduction="none")
    torch.testing.assert_close(loss.double(), truth, rtol=2e-6, atol=0)
