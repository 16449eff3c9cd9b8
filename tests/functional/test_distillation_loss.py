"""The modules hold the functions' options, each of which arrives."""

import inspect
import pickle

import pytest
import torch

import chunked_ce
from chunked_ce import DistillationLoss, LinearDistillationLoss, kl_div, linear_kl_div

X, Y = torch.randn(2, 3, 12), torch.randn(2, 3, 12)
HEADS = (torch.randn(2, 3, 4), torch.randn(12, 4), torch.randn(2, 3, 5), torch.randn(12, 5))
TARGET = torch.tensor([[1, 2, 7], [3, 7, 11]])
SHARED = dict(kind="jsd", beta=0.2, temperature=1.5, ignore_index=7, vocab_size=12, backend="torch")
TRANSFORMS = dict(softcap=2.0, logit_scale=0.5, teacher_softcap=3.0, teacher_logit_scale=0.7)
LINEAR = SHARED | TRANSFORMS | dict(
    cross_entropy_weight=0.3, acc_dtype=torch.float64, chunk_bytes=999, token_chunk_size=None
)  # fmt: skip
OF_CALLS = {"target", "token_weight", "num_items", "linear_bias", "teacher_bias"}


def options_of(function):
    kinds = inspect.signature(function).parameters.values()
    return {p.name for p in kinds if p.kind is p.KEYWORD_ONLY} - OF_CALLS


def test_every_option_is_in_the_tests_and_in_the_module():
    assert options_of(kl_div) == SHARED.keys() | {"reduction"}
    assert options_of(linear_kl_div) == LINEAR.keys() | {"reduction"}
    assert options_of(DistillationLoss) == options_of(kl_div)
    every = {name: None for name in options_of(linear_kl_div) - LINEAR.keys()}
    LinearDistillationLoss(**LINEAR, **dict.fromkeys(every, "sum"))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_same_as_the_functions(reduction):
    tokens = dict(token_weight=torch.rand(2, 3))
    if reduction == "mean":
        tokens["num_items"] = 9
    loss = DistillationLoss(reduction=reduction, **SHARED)
    expected = kl_div(X, Y, target=TARGET, reduction=reduction, **SHARED, **tokens)
    assert torch.equal(loss(X, Y, TARGET, **tokens), expected)
    loss = LinearDistillationLoss(reduction=reduction, **LINEAR)
    tokens |= dict(linear_bias=torch.randn(12), teacher_bias=torch.randn(12))
    expected = linear_kl_div(*HEADS, target=TARGET, reduction=reduction, **LINEAR, **tokens)
    assert torch.equal(loss(*HEADS, TARGET, **tokens), expected)


def test_each_option_changes_the_loss_of_the_module():
    options = SHARED | dict(kind="reverse", beta=0.5, vocab_size=9)
    for name in ("kind", "temperature", "ignore_index", "vocab_size"):
        alone = DistillationLoss(**{name: options[name]})
        assert alone(X, Y, TARGET) != DistillationLoss()(X, Y, TARGET), name


def test_repr_and_pickle():
    assert repr(DistillationLoss()) == "DistillationLoss()"
    assert repr(DistillationLoss(kind="jsd", beta=0.2)) == "DistillationLoss(kind='jsd', beta=0.2)"
    loss = LinearDistillationLoss(temperature=2.0)
    assert repr(loss) == "LinearDistillationLoss(temperature=2.0)"
    twin = pickle.loads(pickle.dumps(loss))
    assert torch.equal(twin(*HEADS), loss(*HEADS)) and not twin.state_dict()


@pytest.mark.parametrize("module", [DistillationLoss, LinearDistillationLoss])
@pytest.mark.parametrize(
    "options, error",
    [
        (dict(kind="kl"), "kind is 'kl', expected one of forward, reverse, jsd"),
        (dict(beta=2), "beta is 2.0, expected a number from 0 to 1"),
        (dict(temperature=0), "temperature is 0.0, expected a number above 0"),
        (dict(reduction="batchmean"), "reduction is 'batchmean'"),
        (dict(backend="cuda"), "backend is 'cuda'"),
        (dict(ignore_index=1.5), "ignore_index must be an int"),
        (dict(shift=True), "has no argument shift: it does not shift"),
        (dict(label_smoothing=0.1), "Loss has no argument label_smoothing"),
    ],
)
def test_mistakes_are_found_when_the_module_is_made(module, options, error):
    with pytest.raises((TypeError, ValueError), match=error):
        module(**options)


def test_mistakes_of_the_linear_form():
    for options, error in (
        (dict(ce_weight=1.0), "did you mean cross_entropy_weight"),
        (dict(cross_entropy_weight="1"), "cross_entropy_weight must be a number"),
        (dict(teacher_softcap=0.0), "teacher_softcap is 0.0"),
    ):
        with pytest.raises((TypeError, ValueError), match=error):
            chunked_ce.LinearDistillationLoss(**options)
