"""The loss of a causal language model against the oracle in fp64, and as transformers calls it."""

import oracle
import pytest
import torch
import torch.nn.functional as F

from bench.huggingface import LogitsMade, batch, build, step
from chunked_ce import token_stats
from chunked_ce.huggingface import causal_lm_loss, enable


def loss_case(shape=(3, 7), vocab=29, dtype=torch.float32):
    logits = (torch.randn(*shape, vocab) * 3).to(dtype)
    labels = torch.randint(0, vocab, shape)
    labels[0, -1] = labels[1, 2] = -100
    return logits.requires_grad_(), labels


def shifted(labels, ignore_index=-100):
    return F.pad(labels, (0, 1), value=ignore_index)[..., 1:]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("items", [None, 40, torch.tensor(40), torch.tensor([40.0])])
@pytest.mark.parametrize("upstream", [1.0, 3.7])
def test_loss_and_gradient(dtype, items, upstream):
    logits, labels = loss_case(dtype=dtype)
    exact = logits.detach().double().requires_grad_()
    number = None if items is None else 40
    expected = oracle.cross_entropy(exact, shifted(labels), num_items=number)
    (upstream * expected).backward()
    loss = causal_lm_loss(logits=logits, labels=labels, vocab_size=29, num_items_in_batch=items)
    (upstream * loss).backward()
    assert loss.shape == () and loss.dtype == (torch.float32 if dtype != torch.float64 else dtype)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float64: 1e-12}[dtype]
    torch.testing.assert_close(logits.grad.double(), exact.grad, rtol=tolerance, atol=tolerance / 9)


@pytest.mark.parametrize("kwargs", [{}, dict(num_items_in_batch=11), dict(ignore_index=3)])
def test_signature_of_transformers(kwargs):
    from transformers.loss.loss_utils import ForCausalLMLoss

    logits, labels = loss_case()
    labels = labels.clamp(min=0)
    expected = ForCausalLMLoss(logits, labels, 29, **kwargs, output_attentions=False)
    ours = causal_lm_loss(logits, labels, 29, **kwargs, output_attentions=False)
    torch.testing.assert_close(ours, expected)
    shift = shifted(labels, kwargs.get("ignore_index", -100))
    for given in (labels, None):
        ours = causal_lm_loss(logits, given, 29, **kwargs, shift_labels=shift)
        torch.testing.assert_close(ours, expected)
    flat = causal_lm_loss(logits.view(-1, 29), labels, 29, **kwargs, shift_labels=shift.flatten())
    torch.testing.assert_close(flat, expected)
    torch.testing.assert_close(causal_lm_loss(logits.view(-1, 29), labels, 29, **kwargs), expected)


def test_shift_of_each_row():
    logits, labels = loss_case()
    together = causal_lm_loss(logits, labels, num_items_in_batch=10)
    each = sum(causal_lm_loss(logits[i], labels[i], num_items_in_batch=10) for i in range(3))
    torch.testing.assert_close(together, each)
    labels[:, 0] = 5  # nothing predicts a row's first token
    torch.testing.assert_close(causal_lm_loss(logits, labels, num_items_in_batch=10), together)


def test_memory_without_copies():
    model = build("Llama", torch.bfloat16)
    model.loss_function = causal_lm_loss
    with LogitsMade() as made:
        model(**batch()).loss.backward()
    assert made.count == 2 and made.dtypes == {torch.bfloat16}  # the logits and their gradient


@pytest.mark.parametrize("way", ["loss", "enable"])
def test_all_labels_ignored(way):
    model = build("Gemma2")
    if way == "enable":
        enable(model)
    else:
        model.loss_function = causal_lm_loss
    ids, labels = batch()["input_ids"], torch.full_like(batch()["labels"], -100)
    loss = model(input_ids=ids, labels=labels).loss
    assert loss.isnan()
    loss.backward()
    assert not any(p.grad.any() for p in model.parameters())
    assert model(input_ids=ids, labels=labels, num_items_in_batch=torch.tensor(5)).loss == 0


@pytest.mark.parametrize("way", ["loss", "enable"])
@pytest.mark.parametrize("as_tensor", [True, False])
def test_gradient_of_unequal_micro_batches(way, as_tensor):
    model = build("Llama")
    expected = step(model)[1]
    model.zero_grad()
    if way == "enable":
        enable(model)
    else:
        model.loss_function = causal_lm_loss
    whole = batch()
    count = (whole["labels"][:, 1:] != -100).sum()
    items = count if as_tensor else int(count)
    for rows in (slice(0, 2), slice(2, 3)):
        model(**{k: v[rows] for k, v in whole.items()}, num_items_in_batch=items).loss.backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, expected[name], rtol=1e-5, atol=1e-6)


X, Y = torch.randn(2, 5, 29), torch.zeros(2, 5, dtype=torch.long)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((X, None, 29), {}, ValueError, "labels is None, and so is shift_labels: pass labels"),
        ((X, [1], 29), {}, TypeError, "labels must be a Tensor of class indices, got list"),
        (
            (X, Y[:, 1:], 29),
            {},
            ValueError,
            r"labels has shape \[2, 4\].*want \[2, 5\].*shifted here",
        ),
        (
            (X, Y[:, 1:], 29),
            dict(shift_labels=Y),
            ValueError,
            r"labels has shape \[2, 4\], but shift_labels",
        ),
        (
            (X, None, 29),
            dict(shift_labels=Y[:, 1:]),
            ValueError,
            "have 10 rows: pass one label for each",
        ),
        ((X, Y, 29, 0), {}, ValueError, "num_items_in_batch is 0, expected at least 1"),
        ((X, Y, 29, 3.0), {}, TypeError, "num_items_in_batch must be an int or a tensor"),
        ((X, Y, 29, torch.ones(2)), {}, ValueError, r"num_items_in_batch has shape \[2\]"),
        ((X, Y, 30), {}, ValueError, "vocab_size is 30, but input"),
        ((X, Y + 29, 29), {}, IndexError, "target 29 in row 0"),
        (([1.0], Y, 29), {}, TypeError, "logits must be a Tensor .*, got list"),
    ],
)
def test_bad_arguments(arguments, options, error, message):
    with pytest.raises(error, match=message) as caught:
        causal_lm_loss(*arguments, **options)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


@pytest.mark.parametrize("way", ["loss", "enable"])
def test_return_stats(way):
    """The model's own keyword reaches its loss: the pair of a loss and its pass's statistics."""
    model = build("Llama")
    inputs = batch()
    logits = model(input_ids=inputs["input_ids"]).logits.detach()
    plain = causal_lm_loss(logits, inputs["labels"])
    expected = token_stats(logits, shifted(inputs["labels"]), entropy=True, argmax=True)
    if way == "enable":
        enable(model)
    else:
        model.loss_function = causal_lm_loss
    loss, stats = model(**inputs, return_stats=("entropy", "argmax")).loss
    loss.backward()
    assert model.lm_head.weight.grad is not None
    torch.testing.assert_close(loss.detach(), plain)
    assert stats.rank is None and not stats.lse.requires_grad
    for name in ("lse", "logprob", "entropy"):
        torch.testing.assert_close(getattr(stats, name), getattr(expected, name))
    assert torch.equal(stats.argmax, expected.argmax)
    assert (stats.argmax[..., -1] == -1).all()  # the last position predicts nothing


def test_return_stats_bad_input():
    logits, labels = loss_case()
    with pytest.raises(ValueError, match="return_stats names 'accuracy'"):
        causal_lm_loss(logits, labels, return_stats=["accuracy"])
