"""TRL's log-probabilities and entropies of an enabled model, and trainers that use them."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from test_trainer import tokenizer

from bench.huggingface import LENGTH, VOCAB, LogitsMade, batch, build, largest_difference
from chunked_ce.huggingface import enable

PROMPT, TEMPERATURE = 9, 0.8


@pytest.fixture(scope="module", autouse=True)
def trl():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = pytest.importorskip("trl")
        import trl.trainer.utils  # noqa: F401
    return module


def use(model, enabled):
    if enabled:
        enable(model, without_labels=True)
    return model


def completions(model, trl, **options):
    """Return log-probabilities and entropies of the tokens after the prompt, as for GRPO."""
    ids = batch()["input_ids"]
    keep = LENGTH - PROMPT
    logits = model(ids, logits_to_keep=keep + 1, use_cache=False).logits
    return trl.trainer.utils.selective_log_softmax_and_entropy(
        logits[:, :-1, :], ids[:, -keep:], temperature=TEMPERATURE, **options
    )


def policy(name, dtype, enabled, seed=0):
    """Return a model whose next tokens are not all alike."""
    model = build(name, dtype)
    with torch.no_grad():
        weight = model.get_output_embeddings().weight
        weight += 0.3 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed))
    return use(model, enabled)


def grpo_step(name, trl, enabled, dtype):
    """Return (loss, gradients, tensors of the logits' size) of a clipped policy gradient."""
    model, reference = policy(name, dtype, enabled), policy(name, dtype, enabled, seed=1).eval()
    advantages = torch.tensor([[0.7], [-1.1], [0.4]])
    with LogitsMade(rows=1) as made:
        with torch.no_grad():
            expected, _ = completions(reference, trl)
        logps, entropies = completions(model, trl)
        ratio = (logps - logps.detach()).exp() * torch.linspace(0.7, 1.3, LENGTH - PROMPT)
        gap = expected - logps
        loss = -torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
        loss = (loss + 0.04 * (gap.exp() - gap - 1) - 0.01 * entropies).mean()
        loss.backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters()}, made.count


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["Llama", "Qwen3", "Gemma2", "Granite"])
def test_policy_gradient(trl, name, dtype):
    """It is no further from float64's than the stock model's is."""
    exact, gradients, _ = grpo_step(name, trl, False, torch.float64)
    expected, theirs, stock = grpo_step(name, trl, False, dtype)
    loss, ours, made = grpo_step(name, trl, True, dtype)
    eps = torch.finfo(dtype).eps
    assert loss.dtype == expected.dtype
    assert abs(loss - exact) <= abs(expected - exact) + 8 * eps * abs(exact)
    error, of_stock = (
        largest_difference({n: g.double() for n, g in grads.items()}, gradients)
        for grads in (ours, theirs)
    )
    assert error <= 1.25 * of_stock + 2 * eps
    assert made == 0 and stock > 10


@pytest.mark.parametrize("enabled", [True, False])
def test_what_is_saved_for_backward(trl, enabled):
    model, saved = use(build("Llama"), enabled), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        results = completions(model, trl)
    assert all(r.requires_grad for r in results) and saved
    assert any(t.shape[-1:] == (VOCAB,) for t in saved) == (not enabled)


def test_entropy_without_gradients(trl):
    model = use(build("Llama"), True)
    logps, entropies = completions(model, trl, entropy_requires_grad=False)
    assert logps.requires_grad and not entropies.requires_grad


def preference_step(trl, enabled):
    """Return the loss and gradients of DPO: pairs of a chosen and a rejected completion."""
    select = trl.trainer.utils.selective_log_softmax
    model = policy("Llama", torch.float32, enabled)
    reference = policy("Llama", torch.float32, enabled, seed=1).eval()
    ids = torch.cat([batch(seed)["input_ids"] for seed in (1, 2)])
    mask = (torch.arange(LENGTH - 1) >= PROMPT).float()

    def logps(m):
        logits = m(ids, attention_mask=torch.ones_like(ids)).logits[:, :-1]
        return (select(logits, ids[:, 1:]) * mask).sum(-1)

    with LogitsMade(rows=1) as made:
        with torch.no_grad():
            chosen_ref, rejected_ref = logps(reference).chunk(2)
        chosen, rejected = logps(model).chunk(2)
        margin = (chosen - chosen_ref) - (rejected - rejected_ref)
        loss = -F.logsigmoid(0.1 * margin).mean()
        loss.backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters()}, made.count


def test_preference_step(trl):
    loss, grads, made = preference_step(trl, enabled=True)
    expected, wanted, stock = preference_step(trl, enabled=False)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    assert largest_difference(grads, wanted) <= 1e-5 and made == 0 and stock > 4


def train(trainer_class, arguments, folder, trl, enabled, columns):
    """Return (parameters after 2 steps, losses, tensors of the logits' size) of a real trainer."""
    datasets = pytest.importorskip("datasets")
    from tokenizers import pre_tokenizers

    tokens = tokenizer()
    tokens.backend_tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words = torch.randint(3, VOCAB, (4, 15), generator=torch.Generator().manual_seed(3)).tolist()
    text = [[f"w{i}" for i in row] for row in words]
    rows = [
        {c: " ".join(row[4 * i : 4 * i + 4]) for i, c in enumerate(("prompt", *columns))}
        for row in text
    ]
    options = dict(
        output_dir=str(folder), use_cpu=True, bf16=False, max_steps=2, learning_rate=0.1, optim="sgd",
        per_device_train_batch_size=2, max_grad_norm=0.0, report_to="none", save_strategy="no",
        disable_tqdm=True, dataloader_pin_memory=False, gradient_checkpointing=False, logging_steps=1,
    )  # fmt: skip
    model = policy("Llama", torch.float32, enabled)
    reference = (
        {} if "reference" in columns else {"ref_model": policy("Llama", torch.float32, enabled, 1)}
    )
    trainer = trainer_class(
        model=model, args=arguments(**options), processing_class=tokens,
        train_dataset=datasets.Dataset.from_list(rows), **reference,
    )  # fmt: skip
    with LogitsMade(rows=1) as made:
        trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    return dict(model.named_parameters()), losses, made.count


def assert_same_training(ours, theirs):
    parameters, losses, _ = ours
    expected, logged, _ = theirs
    assert losses == pytest.approx(logged, abs=1e-4) and len(losses) == 2
    for name, p in parameters.items():
        torch.testing.assert_close(p, expected[name], rtol=0, atol=1e-6)


def test_dpo_trainer(trl, tmp_path):
    """Its own head is left alone, and its loss of an enabled model's logits is the same."""
    select = trl.trainer.utils.selective_log_softmax

    class OfLogits(trl.DPOTrainer):
        def _compute_loss(self, model, inputs, return_outputs):
            ids, mask = inputs["input_ids"], inputs["completion_mask"][:, 1:]

            def logps(m):
                logits = m(ids, attention_mask=inputs["attention_mask"], use_cache=False).logits
                return (select(logits[:, :-1], ids[:, 1:]) * mask).sum(-1)

            with torch.no_grad():
                reference = logps(self.ref_model)
            chosen, rejected = (logps(model) - reference).chunk(2)
            return -F.logsigmoid(self.beta * (chosen - rejected)).mean()

    rest = (trl.DPOConfig, tmp_path, trl)
    columns = ("chosen", "rejected")
    stock = train(trl.DPOTrainer, *rest, False, columns)
    before = dict(policy("Llama", torch.float32, False).named_parameters())
    assert max((p - before[n]).abs().max() for n, p in stock[0].items()) > 1e-3
    assert_same_training(train(trl.DPOTrainer, *rest, True, columns), stock)
    with_logits = train(OfLogits, *rest, False, columns)
    without = train(OfLogits, *rest, True, columns)
    assert_same_training(with_logits, stock)
    assert_same_training(without, stock)
    assert with_logits[2] > 0 and without[2] == 0


def test_trainer_that_logs_its_logits(trl, tmp_path):
    """They are computed for the log, and the loss is the same."""
    tpo = pytest.importorskip("trl.experimental.tpo")
    rest = (tpo.TPOTrainer, tpo.TPOConfig, tmp_path, trl)
    columns = ("chosen", "rejected", "reference")
    ours, theirs = (train(*rest, enabled, columns) for enabled in (True, False))
    assert_same_training(ours, theirs)
    assert 0 < ours[2] < theirs[2]


def test_no_kernel_of_trl_reads_deferred_logits(trl):
    """On a GPU it would take them for a tensor, and autograd would not see it."""
    takes = getattr(trl.trainer.utils, "_supports_trl_loss_kernel", None)
    if takes is None:
        pytest.skip("this TRL asks otherwise")
    logits = use(build("Llama"), True)(batch()["input_ids"]).logits
    logits.device = torch.device("cuda")
    assert not takes(logits) and logits._real is None
