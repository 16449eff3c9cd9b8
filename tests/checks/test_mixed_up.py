"""Arguments of another kind, in another place or under another library's name: the mend is in the message."""

import inspect
import warnings

import pytest
import torch
from torch.autograd import forward_ad

from chunked_ce import (
    BCEWithLogitsLoss,
    CrossEntropyLoss,
    DistillationLoss,
    LinearCrossEntropyLoss,
    Perplexity,
    binary_cross_entropy_with_logits,
    cross_entropy,
    distributed,
    evaluate_perplexity,
    kl_div,
    linear_cross_entropy,
    linear_kl_div,
    linear_token_stats,
    loglikelihood,
    perplexity,
    token_stats,
)
from chunked_ce.distributed import (
    vocab_parallel_cross_entropy,
    vocab_parallel_linear_cross_entropy,
    vocab_parallel_token_stats,
)
from chunked_ce.huggingface import distill

N, V, D = 6, 7, 5
X, T = torch.randn(N, V), torch.arange(N)
H, LM_HEAD = torch.randn(N, D), torch.nn.Linear(D, V, bias=False)
W = LM_HEAD.weight.detach()
BTD, BT = torch.randn(2, 3, D), torch.zeros(2, 3, dtype=torch.long)
BTV = torch.randn(2, 3, V)
HOT = (torch.rand(N, V) < 0.5).float()
bce = binary_cross_entropy_with_logits


class Array:
    """What a message needs of numpy's."""


Array.__name__ = "ndarray"
ARRAY = Array()

# (call, error, message)
KINDS = {
    "list of indices": (lambda: cross_entropy(X, T.tolist()), TypeError, r"got list: pass torch.tensor\(target\)"),
    "tuple of indices": (lambda: cross_entropy(X, tuple(T.tolist())), TypeError, r"got tuple: pass torch.tensor\(target\)"),
    "list of indices, linear": (lambda: linear_cross_entropy(H, W, T.tolist()), TypeError, r"got list: pass torch.tensor\(target\)"),
    "list of indices, stats": (lambda: token_stats(X, T.tolist()), TypeError, r"got list: pass torch.tensor\(target\)"),
    "array of indices": (lambda: cross_entropy(X, ARRAY), TypeError, r"got ndarray: pass torch.from_numpy\(target\)"),
    "array of logits": (lambda: cross_entropy(ARRAY, T), TypeError, r"got ndarray: pass torch.from_numpy\(input\)"),
    "list of logits": (lambda: cross_entropy(X.tolist(), T), TypeError, r"got list: pass torch.tensor\(input\)"),
    "array of labels": (lambda: bce(X, ARRAY), TypeError, r"got ndarray: pass torch.from_numpy\(target\)"),
    "list of class weights": (lambda: cross_entropy(X, T, [1.0] * V), TypeError, r"got list: pass torch.tensor\(weight\)"),
    "list of token weights": (lambda: cross_entropy(X, T, token_weight=[1.0] * N), TypeError, r"pass torch.tensor\(token_weight\)"),
    "list of positive weights": (lambda: bce(X, HOT, pos_weight=[1.0] * V), TypeError, r"pass torch.tensor\(pos_weight\)"),
    "module as input": (lambda: cross_entropy(LM_HEAD, T), TypeError, "got Linear: pass the tensor that it computes"),
    "list as bias": (lambda: linear_cross_entropy(H, W, T, linear_bias=[0.0] * V), TypeError, r"pass torch.tensor\(linear_bias\)"),
}  # fmt: skip
PLACES = {
    "swapped": (lambda: cross_entropy(T, X), TypeError, r"as if they were swapped: the arguments are \(input, target\)"),
    "swapped, labels": (lambda: bce(HOT.long(), X), TypeError, "as if they were swapped"),
    "head last": (lambda: linear_cross_entropy(H, T, W), TypeError, r"linear_weight has dtype torch.int64.*\(input, linear_weight, target\)"),
    "head last, stats": (lambda: linear_token_stats(H, T, W), TypeError, r"\(input, linear_weight, target\)|class indices"),
    "head first": (lambda: linear_cross_entropy(W, H, T), ValueError, r"\(input, linear_weight, target\): hidden states, lm_head.weight"),
    "head first, [B, T, D]": (lambda: linear_cross_entropy(W, BTD, BT), ValueError, r"\(input, linear_weight, target\)"),
    "head first, stats": (lambda: linear_token_stats(W, BTD, BT), ValueError, r"\(input, linear_weight, target\)"),
}  # fmt: skip
SHAPES = {
    "[N, 1]": (lambda: cross_entropy(X, T[:, None]), ValueError, r"has shape \[6, 1\].*pass target.squeeze\(-1\)"),
    "[N, 1], linear": (lambda: linear_cross_entropy(H, W, T[:, None]), ValueError, r"pass target.squeeze\(-1\)"),
    "[N, 1], stats": (lambda: token_stats(X, T[:, None]), ValueError, r"pass target.squeeze\(-1\)"),
    "[B, T] beside flat logits": (lambda: cross_entropy(X, BT), ValueError, r"pass target.flatten\(\)"),
    "[B, T] beside flat hidden states": (lambda: linear_cross_entropy(H, W, BT), ValueError, r"pass target.flatten\(\)"),
    "flat beside [B, T, V]": (lambda: cross_entropy(BTV, T, dim=-1), ValueError, r"pass target.view\(2, 3\)"),
    "-1 for padding": (lambda: cross_entropy(X, T - 1), IndexError, "target -1 in row 0.*pass ignore_index=-1"),
    "-1 for padding, linear": (lambda: linear_cross_entropy(H, W, T - 1), IndexError, "pass ignore_index=-1"),
    "a class that is not there": (lambda: cross_entropy(X, T + 2), IndexError, "target 7 in row 5.*pass its class as ignore_index"),
}  # fmt: skip
KEYWORDS = {
    "bias": (lambda: linear_cross_entropy(H, W, T, bias=None), TypeError, "linear_cross_entropy has no argument bias: did you mean linear_bias"),
    "smoothing": (lambda: cross_entropy(X, T, smoothing=0.1), TypeError, "cross_entropy has no argument smoothing: did you mean label_smoothing"),
    "labels": (lambda: cross_entropy(X, T, labels=T), TypeError, "did you mean target"),
    "misspelled": (lambda: linear_token_stats(H, W, T, soft_cap=1.0), TypeError, "linear_token_stats has no argument soft_cap: did you mean softcap"),
    "temperature": (lambda: token_stats(X, T, temperature=2.0), TypeError, "did you mean logit_scale, which is 1 / temperature"),
    "shift of binary labels": (lambda: bce(X, HOT, shift=True), TypeError, "binary_cross_entropy_with_logits has no argument shift: it does not shift"),
    "unlike all": (lambda: token_stats(X, T, qwxz=1), TypeError, "has no argument qwxz: expected of input, target, ignore_index, shift"),
    "module": (lambda: CrossEntropyLoss(smoothing=1), TypeError, "CrossEntropyLoss has no argument smoothing: did you mean label_smoothing"),
    "linear module": (lambda: LinearCrossEntropyLoss(3, 4, linear_bias=True), TypeError, "LinearCrossEntropyLoss has no argument linear_bias: did you mean bias"),
    "distillation": (lambda: kl_div(X, X, loss_mask=T), TypeError, "kl_div has no argument loss_mask: did you mean token_weight"),
    "linear distillation": (lambda: linear_kl_div(H, W, H, W, ce_weight=1.0), TypeError, "linear_kl_div has no argument ce_weight: did you mean cross_entropy_weight"),
    "shards": (lambda: vocab_parallel_cross_entropy(X, T, smoothing=0.1), TypeError, "vocab_parallel_cross_entropy has no argument smoothing: did you mean label_smoothing"),
    "shards of a head": (lambda: vocab_parallel_linear_cross_entropy(H, W, T, bias=None), TypeError, "did you mean linear_bias"),
    "shards' statistics": (lambda: vocab_parallel_token_stats(X, T, tp_group=None), TypeError, "did you mean group"),
    "evaluation": (lambda: evaluate_perplexity(len, [[1, 2]], max_length=8), TypeError, "evaluate_perplexity has no argument max_length: did you mean context_length"),
    "likelihoods": (lambda: loglikelihood(len, [([1], [2])], max_length=8), TypeError, "loglikelihood has no argument max_length: did you mean context_length"),
    "perplexity": (lambda: perplexity(X, T, axis=-1), TypeError, "perplexity has no argument axis: did you mean dim"),
    "meter": (lambda: Perplexity(pad_token_id=0), TypeError, "Perplexity has no argument pad_token_id: did you mean ignore_index"),
    "binary module": (lambda: BCEWithLogitsLoss(positive_weight=1), TypeError, "BCEWithLogitsLoss has no argument positive_weight: did you mean pos_weight"),
}  # fmt: skip
TABLE = KINDS | PLACES | SHAPES | KEYWORDS


@pytest.mark.parametrize(("call", "error", "message"), TABLE.values(), ids=TABLE)
def test_mixed_up_message(call, error, message):
    with pytest.raises(error, match=message) as caught:
        call()
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_module_as_weight():
    """linear_cross_entropy takes it; distillation, which needs the weight itself, says so."""
    same = linear_cross_entropy(H, LM_HEAD.weight, T, linear_bias=LM_HEAD.bias)
    torch.testing.assert_close(linear_cross_entropy(H, LM_HEAD, T), same)
    with pytest.raises(TypeError, match="linear_weight is a module, Linear.*pass lm_head.weight"):
        linear_kl_div(H, LM_HEAD, H, LM_HEAD.weight.detach())


@pytest.mark.parametrize(
    "function",
    [
        *(cross_entropy, token_stats, linear_cross_entropy, linear_token_stats, bce, kl_div),
        *(linear_kl_div, evaluate_perplexity, loglikelihood, perplexity, Perplexity, distill),
        DistillationLoss,
        *(getattr(distributed, name) for name in distributed.__all__),
    ],
)
def test_signature_leaves_unknown_out(function):
    """What help(), documentation and drop-in checks read."""
    parameters = inspect.signature(function).parameters
    assert parameters and "unknown" not in parameters


def test_unknown_keywords_under_transforms():
    grad = torch.func.grad(lambda x: cross_entropy(x, T))(X)
    assert grad.shape == X.shape
    with pytest.raises(TypeError, match="did you mean label_smoothing"):
        torch.func.grad(lambda x: cross_entropy(x, T, smoothing=1))(X)


ROWS = torch.ones(N)
TANGENTS = {
    "class weights": (torch.ones(V), lambda t: cross_entropy(X, T, t)),
    "token weights": (ROWS, lambda t: cross_entropy(X, T, token_weight=t)),
    "class probabilities": (X.softmax(-1), lambda t: cross_entropy(X, t)),
    "top-k probabilities": (ROWS[:, None], lambda t: cross_entropy(X, (T[:, None], t))),
    "num_items": (torch.tensor(4.0), lambda t: cross_entropy(X, T, num_items=t)),
    "bias": (torch.ones(V), lambda t: linear_cross_entropy(H, W, T, linear_bias=t)),
    "head": (W, lambda t: linear_cross_entropy(H, t, T)),
    "class weights of statistics": (torch.ones(V), lambda t: token_stats(X, T, weight=t, mean_logprob=True)),
    "labels": (HOT, lambda t: bce(X, t)),
    "weights of labels": (HOT, lambda t: bce(X, HOT, t)),
    "positive weights": (torch.ones(V), lambda t: bce(X, HOT, pos_weight=t)),
}  # fmt: skip


@pytest.mark.parametrize(("primal", "call"), TANGENTS.values(), ids=TANGENTS)
def test_tangents_are_refused_not_lost(primal, call):
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(primal, torch.ones_like(primal))
        with pytest.raises(NotImplementedError, match="carries a forward-mode tangent"):
            call(dual)
    with pytest.raises(NotImplementedError, match="carries a forward-mode tangent"):
        torch.func.jvp(call, (primal,), (torch.ones_like(primal),))


@pytest.fixture
def nothing_said(monkeypatch):
    from chunked_ce.checks import mistakes

    monkeypatch.setattr(mistakes, "_said", set())


@pytest.mark.usefixtures("nothing_said")
@pytest.mark.parametrize("x", [X, torch.randn(32, 1), torch.randn(32)])
def test_sigmoid_passed_as_logits_warns_once(x):
    y = torch.ones_like(x)
    with pytest.warns(UserWarning, match="looks like probabilities.*without sigmoid") as said:
        bce(x.sigmoid(), y)
    assert said[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bce(x.sigmoid(), y)


@pytest.mark.usefixtures("nothing_said")
@pytest.mark.parametrize(
    "x",
    [X, torch.zeros(N, V), torch.full((N, V), 0.5), HOT, torch.rand(3), torch.rand(()), X * 0.01],
)
def test_binary_logits_do_not_warn(x):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bce(x, torch.ones_like(x))
