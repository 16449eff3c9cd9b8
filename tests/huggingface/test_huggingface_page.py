"""What the blocks of docs/huggingface.md and README's line for transformers leave behind."""

from pathlib import Path

import pytest
import torch
from helpers import run_block

PAGE = "docs/huggingface.md"


def loss_of(names: dict) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Return the loss of the block's model as transformers computes it, and its gradients."""
    model, ids = names["model"], names["input_ids"]
    kept = [p.grad for p in model.parameters()]
    model.zero_grad()
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    assert all(g is not None for g in kept)
    return loss.detach(), kept


def test_train_without_the_logits(capsys):
    names = run_block(PAGE, "handle.disable()")
    assert capsys.readouterr().out == f"{torch.Size((2, 16, 1000))}\n"
    expected, grads = loss_of(names)
    assert isinstance(names["model"](names["input_ids"]).logits, torch.Tensor), "disabled"
    torch.testing.assert_close(names["outputs"].loss.detach(), expected, rtol=1e-6, atol=0)
    for ours, p in zip(grads, names["model"].parameters(), strict=True):
        torch.testing.assert_close(ours, p.grad, rtol=1e-5, atol=1e-7)


def test_keep_the_logits():
    from transformers.loss.loss_utils import ForCausalLMLoss

    names = run_block(PAGE, "causal_lm_loss")
    names["model"].loss_function = ForCausalLMLoss
    expected, grads = loss_of(names)
    torch.testing.assert_close(names["loss"].detach(), expected, rtol=1e-6, atol=0)
    for ours, p in zip(grads, names["model"].parameters(), strict=True):
        torch.testing.assert_close(ours, p.grad, rtol=1e-5, atol=1e-7)


def test_the_readmes_line():
    from chunked_ce.huggingface import DeferredLogits

    names = run_block("README.md", "chunked_ce.huggingface.enable(model)")
    ids = torch.randint(0, 1000, (2, 16))
    assert isinstance(names["model"](input_ids=ids, labels=ids).logits, DeferredLogits)


def test_trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("accelerate")
    monkeypatch.chdir(tmp_path)
    names = run_block(PAGE, "trainer.train()")
    assert names["trainer"].state.global_step == 2


def test_peft():
    pytest.importorskip("peft")
    names = run_block(PAGE, "get_peft_model")
    assert sum(p.grad is not None for p in names["model"].parameters()) == 8


def test_trl():
    pytest.importorskip("trl")
    names = run_block(PAGE, "ModelsLoss")
    assert issubclass(names["ModelsLoss"], names["SFTTrainer"])


def test_without_labels():
    names = run_block(PAGE, "enable(policy, without_labels=True)")
    assert names["logits"]._real is None and names["logp"]._real is None
    probs = names["logits"].tensor().softmax(-1)
    torch.testing.assert_close(names["entropies"], torch.special.entr(probs).sum(-1))
    chosen = probs.gather(-1, names["input_ids"][:, 1:, None]).squeeze(-1)
    torch.testing.assert_close(names["logprobs"], chosen.log())
    assert all(p.grad is not None for p in names["policy"].parameters())


def test_preferences():
    pytest.importorskip("trl")
    names = run_block(PAGE, "selective_log_softmax(logits")
    assert all(p.grad is not None for p in names["policy"].parameters())
    assert all(p.grad is None for p in names["reference"].parameters())
