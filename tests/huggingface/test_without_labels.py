"""Models enabled for trainers that pass no labels: what defers, and what is as it was."""

import warnings

import pytest
import torch

from bench.huggingface import VOCAB, LogitsMade, batch, build
from chunked_ce.huggingface import DeferredLogits, enable


@pytest.mark.parametrize("mode", ["training", "evaluation"])
@pytest.mark.parametrize("grad", [True, False])
def test_calls_without_labels(mode, grad):
    model = build("Gemma2").train(mode == "training")
    ids = batch()["input_ids"]
    with torch.set_grad_enabled(grad):
        expected = model(ids).logits.log_softmax(-1)
        with enable(model, without_labels=True), LogitsMade() as made:
            logits, pair = model(ids).logits, model(ids, return_dict=False)[0]
            few = model(ids, logits_to_keep=3).logits
            ours = [
                z[:, -3:].log_softmax(-1).gather(-1, ids[:, -3:, None]) for z in (logits, pair, few)
            ]
    assert all(isinstance(z, DeferredLogits) for z in (logits, pair, few)) and made.count == 0
    assert few.shape == (*ids[:, :3].shape, VOCAB) and few._real is logits._real is None
    for logprob in ours:
        assert logprob.requires_grad == grad
        torch.testing.assert_close(logprob, expected[:, -3:].gather(-1, ids[:, -3:, None]))


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_generation(use_cache, training):
    model = build("Llama").train(training)
    ids, options = batch()["input_ids"][:, :6], dict(max_new_tokens=5, use_cache=use_cache)
    expected = model.generate(ids, do_sample=False, **options)
    torch.manual_seed(1)
    sampled = model.generate(ids, do_sample=True, temperature=0.9, **options)
    with enable(model, without_labels=True):
        assert torch.equal(model.generate(ids, do_sample=False, **options), expected)
        torch.manual_seed(1)
        assert torch.equal(model.generate(ids, do_sample=True, temperature=0.9, **options), sampled)
        cache = model(ids, use_cache=True).past_key_values
        outputs = model(ids[:, :1], past_key_values=cache)
        assert isinstance(outputs.logits, torch.Tensor)


def test_calls_with_labels_are_as_before():
    model = build("Llama")
    with enable(model, without_labels=True):
        outputs = model(**batch())
        assert isinstance(outputs.logits, DeferredLogits) and outputs.loss.requires_grad
        assert isinstance(model.eval()(**batch()).logits, torch.Tensor)


def test_no_warning_without_labels():
    model = build("Llama")
    handle = enable(model, without_labels=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        logits = model(input_ids=batch()["input_ids"]).logits
        logits.logsumexp(-1).sum().backward()
    assert "in training with labels, and without labels" in repr(handle)
    handle.disable()
    assert isinstance(model(batch()["input_ids"]).logits, torch.Tensor)


def test_warning_names_the_way_without_labels():
    model = build("Llama")
    with enable(model), pytest.warns(UserWarning, match=r"enable\(model, without_labels=True\)"):
        model(input_ids=batch()["input_ids"])


def test_after_the_optimizers_step():
    model = build("Llama")
    enable(model, without_labels=True)
    logits, kept = (model(batch()["input_ids"]).logits for _ in range(2))
    before = kept.logsumexp(-1)
    before.sum().backward()
    torch.optim.SGD(model.parameters(), 0.1).step()
    assert torch.equal(kept.logsumexp(-1), before), "kept"
    with pytest.raises(RuntimeError, match=r"read it before optimizer.step"):
        logits.logsumexp(-1)


def log_probs(logits, ids):
    return logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)


@pytest.mark.parametrize("what", ["model", "loss", "both"])
def test_compiled(what):
    ids = batch()["input_ids"]
    stock, model = build("Llama"), build("Llama")
    log_probs(stock(ids).logits, ids).sum().backward()
    enable(model, without_labels=True)
    call, loss = (lambda i: model(i).logits), log_probs
    if what == "model":
        call = torch.compile(call, backend="eager")
    elif what == "loss":
        loss = torch.compile(loss, backend="eager")
    step = lambda i: loss(call(i), i)  # noqa: E731
    if what == "both":
        step = torch.compile(step, backend="eager", fullgraph=True)
    ours = step(ids)
    ours.sum().backward()
    torch._dynamo.reset()
    torch.testing.assert_close(ours, log_probs(stock(ids).logits, ids))
    for a, e in zip(model.parameters(), stock.parameters(), strict=True):
        torch.testing.assert_close(a.grad, e.grad, rtol=1e-4, atol=1e-6)


def test_an_adapter_on_the_head():
    """A head that is called: once for a chunk, and once more in backward."""
    peft = pytest.importorskip("peft")
    ids, results = batch()["input_ids"], []
    for enabled in (False, True):
        model = build("Llama")
        torch.manual_seed(1)
        config = peft.LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False)
        model = peft.get_peft_model(model, config)
        if enabled:
            enable(model, without_labels=True)
        logits = model(input_ids=ids).logits
        assert isinstance(logits, DeferredLogits) == enabled
        chosen = log_probs(logits, ids)
        chosen.sum().backward()
        assert not enabled or logits._real is None
        results.append((chosen, *(p.grad for p in model.parameters() if p.grad is not None)))
    assert len(results[0]) == 3
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_autocast():
    results, ids = [], batch()["input_ids"]
    for enabled in (False, True):
        model = build("Qwen3")
        if enabled:
            enable(model, without_labels=True)
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(ids).logits
        assert logits.dtype == torch.bfloat16
        chosen = log_probs(logits.float(), ids)  # after autocast, as accelerate casts outputs
        chosen.sum().backward()
        results.append((chosen, *(p.grad for p in model.parameters())))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=1e-3)
