"""Tests of class weights: the z-loss of a mean, compiled calls with any number of classes, their length."""

import pytest
import torch

import chunked_ce as c

torch.manual_seed(0)
X, Y = torch.randn(6, 11, dtype=torch.float64), torch.randint(0, 11, (6,))
H, HEAD = torch.randn(6, 4, dtype=torch.float64), torch.randn(11, 4, dtype=torch.float64)
W = torch.rand(11, dtype=torch.float64)
FORMS = {
    "logits": (lambda y, **k: c.cross_entropy(X, y, **k), X),
    "one pass": (lambda y, **k: c.cross_entropy(X, y, grad_in_forward=True, **k), X),
    "head": (lambda y, **k: c.linear_cross_entropy(H, HEAD, y, **k), H @ HEAD.T),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("factor", [1.0, 2.0, 0.01])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_class_weights_z_loss_mean(form, factor, smoothing):
    loss, logits = FORMS[form]
    y = torch.where(torch.arange(6) == 2, -100, Y)
    squares, scored = logits.logsumexp(-1).square(), (y != -100).double()
    token_weight = torch.rand(6, dtype=torch.float64)
    weighting = dict(weight=factor * W, label_smoothing=smoothing)
    for options, expected in (
        ({}, (squares * scored).sum() / scored.sum()),
        (dict(num_items=7), (squares * scored).sum() / 7),
        (
            dict(token_weight=token_weight),
            (squares * scored * token_weight).sum() / (scored * token_weight).sum(),
        ),
        (dict(reduction="sum"), (squares * scored).sum()),
    ):
        z = loss(y, z_loss_weight=0.1, **weighting, **options) - loss(y, **weighting, **options)
        torch.testing.assert_close(z, 0.1 * expected)


@pytest.mark.parametrize("name", ["cross_entropy", "smoothed", "statistics", "head", "binary"])
def test_class_weights_compile_dynamic_classes(name):
    def run(x, y, w):
        if name == "statistics":
            return c.token_stats(x, y, mean_logprob=True, weight=w).mean_logprob
        if name == "head":
            return c.linear_cross_entropy(x[:, :4], x.T[:, :4], y % x.shape[1], weight=w)
        if name == "binary":
            return c.binary_cross_entropy_with_logits(x, x.sigmoid().detach(), w, pos_weight=w)
        return c.cross_entropy(x, y, w, label_smoothing=0.1 * (name == "smoothed"))

    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager", dynamic=True)
    for v in (10, 20, 30):
        x, y, w = (
            torch.randn(5 if name != "head" else v, v)[:5].contiguous(),
            torch.randint(0, 5, (5,)),
            torch.rand(v),
        )
        torch.testing.assert_close(compiled(x, y, w), run(x, y, w))


@pytest.mark.parametrize("size", [(10,), (12,), (11, 1)])
def test_head_module_class_weights_length_error(size):
    with pytest.raises(ValueError, match=r"expected one weight per class, \[11\]"):
        c.LinearCrossEntropyLoss(4, 11, weight=torch.ones(size))
