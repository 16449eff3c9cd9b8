"""The mistakes that tutorials warn about, and torch's errors beside ours: at least as early, and more said."""

import math
import warnings

import pytest
import torch
import torch.nn.functional as F

import chunked_ce
from chunked_ce import (
    binary_cross_entropy_with_logits,
    checks,
    cross_entropy,
    explain_loss,
    linear_cross_entropy,
)

X, T = torch.randn(4, 6), torch.tensor([0, 1, 2, 5])
P = X.softmax(-1)
ONE_HOT = F.one_hot(T, 6)
BTV, BT = torch.randn(2, 3, 6), torch.zeros(2, 3, dtype=torch.long)
Y = (torch.rand(4, 6) < 0.5).float()

# (call, torch's message, ours)
CROSS_ENTROPY = {
    "weights of another length": ((X, T, torch.ones(5)), {}, "weight tensor should be defined either for all 6 classes", r"weight has shape \[5\], expected one weight per class, \[6\]"),
    "weights of another dtype": ((X, T, torch.ones(6).long()), {}, "expected scalar type Float but found Long", "weight has dtype torch.int64, expected one of float16.*weight.float"),
    "another batch size": ((X, T[:3]), {}, r"Expected input batch_size \(4\) to match target batch_size \(3\)", r"target has shape \[3\], but input of shape \[4, 6\].*one class index for each of \[4\]"),
    "class out of range": ((X, T + 1), {}, "Target 6 is out of bounds", "target 6 in row 3 is out of range: expected a class from 0 to 5"),
    "negative class": ((X, T - 1), {}, "Target -1 is out of bounds", "target -1 in row 0 is out of range"),
    "float indices [N]": ((X, T.float()), {}, "expected scalar type Long but found Float|not implemented|expected", r"target has dtype torch.float32 and shape \[4\], like class indices: use target.long"),
    "integer one-hot [N, V]": ((X, ONE_HOT), {}, "multi-target not supported|Expected floating point type", r"has input's shape \[4, 6\].*one-hot rows pass target.argmax\(1\)"),
    "probabilities of another shape": ((X, P[:, :5]), {}, "multi-target not supported|size mismatch|same shape", r"shape \[4, 5\], but these have input's shape, \[4, 6\]"),
    "bool target": ((X, T > 0), {}, "not implemented|to be Long or Byte, but got Bool|but found Bool", "target has dtype torch.bool.*target.long"),
    "smoothing above 1": ((X, T), dict(label_smoothing=1.5), "label_smoothing must be between 0.0 and 1.0", "label_smoothing is 1.5, expected a number from 0 to 1"),
    "unknown reduction": ((X, T), dict(reduction="avg"), "avg is not a valid value for reduction", "reduction is 'avg', expected one of mean, sum, none"),
    "segmentation of another size": ((torch.randn(2, 6, 4, 4), torch.zeros(2, 3, 4).long()), {}, "size mismatch|spatial|batch", r"target has shape \[2, 3, 4\].*classes in dimension 1.*\[2, 4, 4\]"),
    "integer logits": ((ONE_HOT, T), {}, "not implemented for 'Long'", "input has dtype torch.int64, expected one of float16"),
    "[B, T, V] with the classes last": ((BTV, BT), {}, "Expected target size|size mismatch|batch", r"classes in the last dimension, but dim=1 \(torch's default is 1\): pass dim=-1"),
}  # fmt: skip
BINARY = {
    "another shape": ((X, Y[:, :5]), {}, r"Target size .* must be the same as input size", r"target has shape \[4, 5\], but labels .* the shape of input, \[4, 6\]"),
    "integer multi-hot": ((X, Y.long()), {}, "can't be cast to the desired output type Long", "like a multi-hot matrix, but integers are taken for class indices.*target.float"),
    "bool labels": ((X, Y > 0), {}, "Subtraction, the `-` operator, with|can't be cast", "target has dtype torch.bool.*target.float"),
    "weights of another length": ((X, Y, torch.ones(5)), {}, "must match the size", r"weight has shape \[5\], which does not broadcast to input of shape \[4, 6\]"),
    "positive weights of another length": ((X, Y), dict(pos_weight=torch.ones(5)), "must match the size", r"pos_weight has shape \[5\], which does not broadcast"),
    "unknown reduction": ((X, Y), dict(reduction="avg"), "avg is not a valid value for reduction", "reduction is 'avg'"),
    "integer logits": ((ONE_HOT, Y), {}, "can't be cast|not implemented", "input has dtype torch.int64"),
}  # fmt: skip
TABLE = [
    (name, *functions, *case)
    for functions, cases in (
        ((cross_entropy, F.cross_entropy), CROSS_ENTROPY),
        ((binary_cross_entropy_with_logits, F.binary_cross_entropy_with_logits), BINARY),
    )
    for name, case in cases.items()
]


@pytest.mark.parametrize(
    ("ours", "theirs", "args", "kwargs", "said_by_torch", "said_by_us"),
    [row[1:] for row in TABLE],
    ids=[f"{row[1].__name__}: {row[0]}" for row in TABLE],
)
def test_what_torch_refuses_is_refused_and_explained(
    ours, theirs, args, kwargs, said_by_torch, said_by_us
):
    with pytest.raises((RuntimeError, ValueError, IndexError, TypeError, NotImplementedError), match=said_by_torch):  # fmt: skip
        theirs(*args, **kwargs)
    with pytest.raises((ValueError, IndexError, TypeError), match=said_by_us) as caught:
        ours(*args, **kwargs)
    assert "\n" not in str(caught.value)


OURS = {
    "deprecated": (lambda: cross_entropy(X, T, None, True), TypeError, "size_average is True, but torch has deprecated it.*reduction="),
    "deprecated, binary": (lambda: binary_cross_entropy_with_logits(X, Y, reduce=False), TypeError, "reduce is False"),
    "weights with a gradient": (lambda: cross_entropy(X, T, torch.ones(6, requires_grad=True)), ValueError, "weight requires a gradient.*weight.detach"),
    "weights of two dimensions": (lambda: cross_entropy(X, T, torch.ones(4, 6)), ValueError, "expected one weight per class"),
    "pair of one": (lambda: cross_entropy(X, (T,)), TypeError, "target is a tuple of 1, expected a pair of Tensors"),
    "pair of lists": (lambda: cross_entropy(X, (T[:, None], [1.0])), TypeError, "expected a pair of Tensors"),
    "pair the wrong way round": (lambda: cross_entropy(X, (torch.ones(4, 1), T[:, None])), TypeError, "target has dtype torch.float32, expected class indices"),
    "pair of other rows": (lambda: cross_entropy(X, (T[:3, None], torch.ones(3, 1))), ValueError, r"target indices have shape \[3, 1\], expected K at least 1 for each row.*\[4, K\]"),
    "pair of other lengths": (lambda: cross_entropy(X, (T[:, None], torch.ones(4, 2))), ValueError, "indices have shape .4, 1., but their probabilities .4, 2."),
    "top-k class out of range": (lambda: cross_entropy(X, (T[:, None] + 1, torch.ones(4, 1))), IndexError, "target 6 in row 3"),
    "top-k probabilities with a gradient": (lambda: cross_entropy(X, (T[:, None], torch.ones(4, 1, requires_grad=True))), ValueError, "probabilities.detach"),
    "rest of indices": (lambda: cross_entropy(X, T, spread_rest=True), ValueError, "spread_rest=True says what happens"),
    "indices out of range": (lambda: binary_cross_entropy_with_logits(X, T[:, None] + 1), IndexError, "target 6 in row 3"),
    "indices of other rows": (lambda: binary_cross_entropy_with_logits(X, T), ValueError, r"class indices for input of shape \[4, 6\] have shape \[4, K\]"),
    "labels with a gradient": (lambda: binary_cross_entropy_with_logits(X, Y.clone().requires_grad_()), ValueError, "target.detach"),
    "probabilities of the linear form": (lambda: linear_cross_entropy(X, torch.randn(9, 6), P), ValueError, r"target has dtype torch.float32.*shape \[4, 6\].*\[4, 9\]"),
    "probabilities of several heads": (lambda: linear_cross_entropy(X, torch.randn(9, 2, 6), torch.rand(4, 9, 2)), ValueError, "call it once for each head"),
    "probabilities that learn, in the linear form": (lambda: linear_cross_entropy(X, torch.randn(9, 6), torch.rand(4, 9, requires_grad=True)), ValueError, "target.detach"),
    "top-k with the classes last": (lambda: cross_entropy(BTV, (BT[..., None], torch.ones(2, 3, 1))), ValueError, "pass dim=-1"),
    "integers for one question": (lambda: binary_cross_entropy_with_logits(X[:, :1], T[:, None]), ValueError, "use target.float"),
    "weights in a list": (lambda: cross_entropy(X, T, [1.0] * 6), TypeError, "weight must be a Tensor of class weights, got list"),
    "complex probabilities": (lambda: cross_entropy(X, P.to(torch.complex64)), TypeError, "target has dtype torch.complex64, expected one of float16"),
    "pair of indices": (lambda: cross_entropy(X, (T[:, None], T[:, None])), TypeError, "target probabilities have dtype torch.int64"),
    "spread_rest of int": (lambda: cross_entropy(X, (T[:, None], torch.ones(4, 1)), spread_rest=1), TypeError, "spread_rest must be True or False, got int"),
    "labels in a list": (lambda: binary_cross_entropy_with_logits(X, [0.0]), TypeError, "target must be a Tensor of labels, got list"),
    "labels without dimension": (lambda: binary_cross_entropy_with_logits(X[0, 0], T[0]), ValueError, r"class indices for input of shape \[\]"),
    "labels' weights in a list": (lambda: binary_cross_entropy_with_logits(X, Y, [1.0] * 6), TypeError, "weight must be a Tensor or None, got list"),
    "labels' weights of ints": (lambda: binary_cross_entropy_with_logits(X, Y, pos_weight=T), TypeError, "pos_weight has dtype torch.int64.*pos_weight.float"),
    "labels' weights with a gradient": (lambda: binary_cross_entropy_with_logits(X, Y, torch.ones(6, requires_grad=True)), ValueError, "weight requires a gradient.*weight.detach"),
    "explain several losses": (lambda: explain_loss(torch.ones(2), 10), ValueError, r"loss has shape \[2\]"),
    "explain a list": (lambda: explain_loss(1.0, 10, [0, 1]), TypeError, "target must be a Tensor"),
    "explain without classes": (lambda: explain_loss(1.0, 1), ValueError, "vocab_size is 1"),
}  # fmt: skip


@pytest.mark.parametrize(("call", "error", "message"), OURS.values(), ids=OURS)
def test_what_only_we_take(call, error, message):
    with pytest.raises(error, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


@pytest.fixture
def nothing_said(monkeypatch):
    from chunked_ce.checks import mistakes

    monkeypatch.setattr(mistakes, "_said", set())


@pytest.mark.usefixtures("nothing_said")
def test_probabilities_passed_as_logits_warn_once():
    with pytest.warns(UserWarning, match=r"input of shape \[4, 6\] looks like probabilities.*without softmax"):  # fmt: skip
        cross_entropy(P, T)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cross_entropy(P, T)


@pytest.mark.usefixtures("nothing_said")
@pytest.mark.parametrize("x", [X, X.relu(), P * 2, torch.zeros(4, 6), P.log(), torch.ones(4, 1)])
def test_logits_do_not_warn(x):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cross_entropy(x, T.clamp(max=x.shape[1] - 1))


@pytest.mark.usefixtures("nothing_said")
def test_several_labels_a_row_warn_once():
    labels = torch.tensor([[1.0, 1.0, 1.0, 0, 0, 0]] * 4)
    with pytest.warns(
        UserWarning, match="rows that sum to 3.*binary_cross_entropy_with_logits"
    ) as said:
        chunked_ce.CrossEntropyLoss()(X, labels)
    assert said[0].filename == __file__  # the user's line
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cross_entropy(X, labels)
        cross_entropy(X, P)


@pytest.mark.parametrize(
    ("loss", "vocab", "message"),
    [
        (math.log(50257), 50257, r"10.8 is near ln 50257 = 10.82: the model knows nothing yet"),
        (2.3, 10, r"2.3 is near ln 10 = 2.30: the model knows nothing yet"),
        (2.3, 50257, r"as if it chose among 9.97 classes alike"),
        (0.3, 50257, r"0.3 is far below ln 50257 = 10.82, as if it chose among 1.35 classes.*not shifted.*padding"),
        (40.0, 50257, "above ln 50257 = 10.82, worse than a guess"),
        (float("nan"), 10, "no target is scored.*or a logit is inf or NaN"),
        (float("inf"), 10, "the logit of a target is -inf"),
        (-0.5, 10, "below 0"),
        (torch.tensor(3.0), 1000, r"A loss of 3 is below ln 1000 = 6.91, a guess among all classes: as if"),
    ],
)  # fmt: skip
def test_explain_loss(loss, vocab, message):
    import re

    assert re.search(message, chunked_ce.explain_loss(loss, vocab))


def test_explain_loss_names_the_padding():
    """Labels that hold the padding's id, not -100."""
    target = torch.cat([torch.arange(1, 31), torch.zeros(60, dtype=torch.long)])
    assert "Label 0 is 67% of the targets: if it is the padding" in explain_loss(1.0, 100, target)
    masked = target.masked_fill(target == 0, -100)
    assert "Label" not in explain_loss(1.0, 100, masked)
    assert "Label" not in explain_loss(1.0, 100, target[:1])
    assert checks.explain_loss is explain_loss
