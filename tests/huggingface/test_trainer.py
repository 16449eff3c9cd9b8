"""transformers' Trainer, and TRL's, with our loss: the parameters they arrive at."""

import inspect
import warnings

import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from bench.huggingface import LENGTH, VOCAB, LogitsMade, batch, build
from chunked_ce.huggingface import DeferredLogits, causal_lm_loss, enable

WAYS = ["transformers", "causal_lm_loss", "enable"]
STEPS, PER_STEP = 3, 8


def examples(count=STEPS * PER_STEP):
    """Rows of unequal length, padded: between 2 and all labels count."""
    generator = torch.Generator().manual_seed(5)
    rows = []
    for i in range(count):
        ids = torch.randint(3, VOCAB, (LENGTH,), generator=generator)
        length = 3 + (7 * i) % (LENGTH - 2)
        labels = ids.clone()
        labels[length:] = -100
        mask = (torch.arange(LENGTH) < length).long()
        rows.append(dict(input_ids=ids, attention_mask=mask, labels=labels))
    return rows


def use(way, model, **options):
    if way == "enable":
        enable(model, **options)
    elif way == "causal_lm_loss":
        model.loss_function = causal_lm_loss


def trainer_of(model, folder, **options):
    given = dict(
        output_dir=str(folder), use_cpu=True, max_steps=STEPS, learning_rate=1.0, optim="sgd",
        lr_scheduler_type="constant", max_grad_norm=0.0, report_to="none", save_strategy="no",
        disable_tqdm=True, dataloader_pin_memory=False, logging_steps=1,
    )  # fmt: skip
    if "train_sampling_strategy" in TrainingArguments.__dataclass_fields__:  # transformers 5
        given["train_sampling_strategy"] = "sequential"
    arguments = TrainingArguments(**(given | options))
    return Trainer(model=model, args=arguments, train_dataset=examples(), eval_dataset=examples(10))


def train(way, folder, per_device=PER_STEP, model=None, **options):
    """(parameters after, losses logged, logits made)"""
    model = build("Llama") if model is None else model
    use(way, model)
    trainer = trainer_of(
        model, folder, per_device_train_batch_size=per_device,
        gradient_accumulation_steps=PER_STEP // per_device, **options,
    )  # fmt: skip
    with LogitsMade(rows=per_device) as made:
        trainer.train()
    parameters = {n: p.detach().clone() for n, p in model.named_parameters()}
    return parameters, [row["loss"] for row in trainer.state.log_history if "loss" in row], made


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    return train("transformers", tmp_path_factory.mktemp("reference"))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("per_device", [8, 2])
def test_gradient_accumulation(way, per_device, reference, tmp_path):
    """1 x 8 against 4 x 2; transformers' own as the control."""
    parameters, losses, made = train(way, tmp_path, per_device)
    expected, logged, _ = reference
    for name, p in parameters.items():
        torch.testing.assert_close(p, expected[name], rtol=0, atol=1e-6)
    assert losses == pytest.approx(logged, abs=1e-4) and len(losses) == STEPS
    assert (made.count == 0) == (way == "enable")


def test_reference_changes_parameters(reference):
    before = dict(build("Llama").named_parameters())
    assert all((p - before[n]).abs().max() > 1e-4 for n, p in reference[0].items())


@pytest.mark.parametrize("options", [dict(bf16=True), dict(gradient_checkpointing=True)])
def test_bfloat16_and_checkpointing(options, tmp_path):
    expected, logged, _ = train("transformers", tmp_path, **options)
    for way in WAYS[1:]:
        parameters, losses, made = train(way, tmp_path, **options)
        assert losses == pytest.approx(logged, rel=1e-3)
        tolerance = 1e-2 if "bf16" in options else 1e-6  # of gradients in bf16, 2^-8 of their sums
        for name, p in parameters.items():
            torch.testing.assert_close(p, expected[name], rtol=0, atol=tolerance)
        assert (made.count == 0) == (way == "enable")


def test_unwrapped_by_accelerate(tmp_path):
    model = build("Llama")
    handle = enable(model)
    trainer = trainer_of(model, tmp_path, bf16=True)
    trainer.train()
    outputs = model(**batch())
    assert isinstance(outputs.logits, DeferredLogits) and outputs.logits.dtype == torch.float32
    assert "labels" in inspect.signature(model.forward).parameters
    unwrapped = trainer.accelerator.unwrap_model(trainer.model_wrapped, keep_fp32_wrapper=False)
    assert unwrapped is model and isinstance(model(**batch()).logits, DeferredLogits)
    handle.disable()
    assert isinstance(model(**batch()).logits, torch.Tensor) and "forward" not in vars(model)


def test_lora(tmp_path):
    peft = pytest.importorskip("peft")

    def adapted():
        torch.manual_seed(1)
        config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
        return peft.get_peft_model(build("Llama"), config)

    expected, logged, _ = train("transformers", tmp_path, model=adapted())
    model = adapted()
    enable(model)
    parameters, losses, made = train("already", tmp_path, model=model)
    assert losses == pytest.approx(logged, abs=1e-4) and made.count == 0
    for name, p in parameters.items():
        torch.testing.assert_close(p, expected[name], rtol=0, atol=1e-6)


class MostLogits(TrainerCallback):
    """The logits alive at the end of each evaluation step, in batches."""

    def __init__(self):
        self.steps, self.most = 0, 0

    def on_prediction_step(self, *args, **kwargs):
        import gc

        self.steps += 1
        found = {
            t.untyped_storage().data_ptr()
            for t in gc.get_objects()
            if type(t) is torch.Tensor and t.dim() == 3 and t.shape[-1] == VOCAB
        }
        self.most = max(self.most, len(found))


@pytest.mark.parametrize("way", [way for way in WAYS if way != "transformers"])
def test_memory_of_evaluation(way, tmp_path):
    results = []
    for w in ("transformers", way):
        model, seen = build("Llama"), MostLogits()
        use(w, model)
        trainer = trainer_of(model, tmp_path, per_device_eval_batch_size=2)
        trainer.add_callback(seen)
        results.append(trainer.evaluate()["eval_loss"])
        assert seen.steps == 5 and seen.most <= 1
    assert results[1] == pytest.approx(results[0], rel=1e-6)


def test_evaluation_without_logits(tmp_path):
    model = build("Llama")
    expected = trainer_of(model, tmp_path).evaluate()["eval_loss"]
    enable(model, evaluation=True)
    with LogitsMade(rows=1) as made:
        loss = trainer_of(model, tmp_path).evaluate()["eval_loss"]
    assert loss == pytest.approx(expected, rel=1e-6) and made.count == 0


def test_prediction_with_evaluation_enabled(tmp_path):
    model = build("Gemma2")
    trainer = trainer_of(model, tmp_path, per_device_eval_batch_size=4)
    expected = trainer.predict(examples(10)).predictions
    enable(model, evaluation=True)
    assert torch.equal(*map(torch.from_numpy, (trainer.predict(examples(10))[0], expected)))
    with torch.no_grad(), LogitsMade(rows=1) as made:
        given = batch()
        outputs, pair = model.eval()(**given), model(**given, return_dict=False)
        shapes = [(z.shape, z.size(-1), z.dim(), z.dtype) for z in (outputs.logits, pair[1])]
    assert made.count == 0 and isinstance(outputs.logits, torch.Tensor)
    assert shapes == [((*given["labels"].shape, VOCAB), VOCAB, 3, torch.float32)] * 2
    for logits in (outputs.logits, pair[1]):
        real = logits.tensor()
        assert type(logits.detach()) is torch.Tensor and torch.equal(
            logits.argmax(-1), real.argmax(-1)
        )
        assert torch.equal(torch.cat([logits, logits]), torch.cat([real, real]))
        assert (logits.numpy() == real.numpy()).all()
        causal = causal_lm_loss(logits, given["labels"])
        torch.testing.assert_close(causal, outputs.loss)


@pytest.mark.parametrize("option", ["label_smoothing_factor", "compute_loss_func"])
def test_missing_labels_warn_once(option, tmp_path):
    model = build("Llama")
    enable(model)
    smooth = {"label_smoothing_factor": 0.1} if option == "label_smoothing_factor" else {}
    trainer = trainer_of(model, tmp_path, **smooth)
    if not smooth:
        trainer.compute_loss_func = lambda outputs, labels, **_: outputs.logits.square().mean()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.train()
    messages = [str(w.message) for w in caught if "pass labels" in str(w.message)]
    assert len(messages) == 1 and option in messages[0]
    assert "enable(model, label_smoothing=...)" in messages[0]


def test_label_smoothing_of_trainer(tmp_path):
    expected, logged, made = train("transformers", tmp_path, label_smoothing_factor=0.1)
    assert made.count > 0
    model = build("Llama")
    enable(model, label_smoothing=0.1)
    parameters, losses, made = train("already", tmp_path, model=model)
    assert losses == pytest.approx(logged, abs=1e-4) and made.count == 0
    for name, p in parameters.items():
        torch.testing.assert_close(p, expected[name], rtol=0, atol=1e-6)
    plain, _, _ = train("transformers", tmp_path)
    assert max((p - plain[n]).abs().max() for n, p in parameters.items()) > 1e-3


def test_compute_metrics(tmp_path):
    model = build("Llama")
    enable(model)
    trainer = trainer_of(model, tmp_path)
    shapes = []

    def metrics(predictions):
        shapes.append(predictions.predictions.shape)
        return {}

    trainer.compute_metrics = metrics
    trainer.evaluate()
    assert shapes == [(10, LENGTH, VOCAB)]


@pytest.fixture(scope="module")
def trl():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("trl")


def fine_tune(trl, folder, way, trainer_class):
    datasets = pytest.importorskip("datasets")
    model = build("Llama")
    use(way, model)
    rows = [{"input_ids": row["input_ids"][row["labels"] != -100].tolist()} for row in examples()]
    arguments = trl.SFTConfig(
        output_dir=str(folder), use_cpu=True, bf16=False, max_steps=2, learning_rate=1.0, optim="sgd",
        per_device_train_batch_size=4, gradient_accumulation_steps=2, max_grad_norm=0.0,
        report_to="none", save_strategy="no", disable_tqdm=True, dataloader_pin_memory=False,
        max_length=LENGTH, gradient_checkpointing=False,
        dataset_kwargs={"skip_prepare_dataset": True},
    )  # fmt: skip
    trainer = trainer_class(
        model=model, args=arguments, train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer(),
    )  # fmt: skip
    with LogitsMade(rows=1) as made:
        trainer.train()
    return {n: p.detach().clone() for n, p in model.named_parameters()}, made.count


def tokenizer():
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, VOCAB)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<pad>")),
        pad_token="<pad>", eos_token="</s>", bos_token="<s>",
    )  # fmt: skip


def test_trl_trainer(trl, tmp_path):
    """It has a head of its own, beside which an enabled model is a model; or the model's own loss."""

    class OfTheModel(trl.SFTTrainer):
        def compute_loss(self, *args, **kwargs):
            return Trainer.compute_loss(self, *args, **kwargs)

    expected, _ = fine_tune(trl, tmp_path, "transformers", trl.SFTTrainer)
    before = dict(build("Llama").named_parameters())
    assert max((p - before[n]).abs().max() for n, p in expected.items()) > 0.01
    for trainer, way in ((trl.SFTTrainer, "enable"), *((OfTheModel, way) for way in WAYS)):
        parameters, made = fine_tune(trl, tmp_path, way, trainer)
        assert (made == 0) == (trainer is OfTheModel and way == "enable")
        for name, p in parameters.items():
            torch.testing.assert_close(p, expected[name], rtol=0, atol=1e-6)
