"""Two models of transformers, student and teacher: the loss and gradients of both models' logits."""

import copy
import doctest
import inspect
import warnings

import oracle
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from bench.huggingface import VOCAB, LogitsMade, batch, build, largest_difference
from chunked_ce.huggingface import DeferredLogits, distill, enable

PAIRS = [
    ("Llama", "GPT2"),
    ("Gemma2", "Llama"),  # the student has a softcap
    ("Qwen3", "Gemma2"),  # the teacher has one
    ("Granite", "Cohere"),  # a factor each
    ("Mamba", "Phi"),  # a cast, a bias
]


def teacher_of(name, width=40):
    """A teacher that is wider than the student, and not near it."""
    if name in ("Llama", "GPT2"):
        torch.manual_seed(3)
        sizes = dict(vocab_size=VOCAB)
        if name == "GPT2":
            config = GPT2Config(n_embd=width, n_layer=1, n_head=2, n_positions=32, **sizes)
            model = GPT2LMHeadModel(config)
        else:
            sizes |= dict(hidden_size=width, intermediate_size=16, num_hidden_layers=1)
            model = LlamaForCausalLM(LlamaConfig(num_attention_heads=2, **sizes))
    else:
        model = build(name)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=generator))
    return model


def expected(student, teacher, inputs, cross_entropy_weight=0.0, **options):
    """The loss of both models' own logits, shifted, in float64."""
    student.zero_grad()
    ids, labels = inputs["input_ids"], inputs["labels"]
    with torch.no_grad():
        y = teacher.eval()(input_ids=ids).logits
    z = student(input_ids=ids).logits[:, :-1]
    options["target"] = labels[:, 1:]
    loss = oracle.kl_div(z, y[:, :-1], **options)
    if cross_entropy_weight:
        tokens = {k: options[k] for k in ("target", "num_items", "vocab_size") if k in options}
        loss = loss + cross_entropy_weight * oracle.cross_entropy(z, **tokens)
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in student.named_parameters()}


def check(student, teacher, inputs=None, call=None, tolerance=2e-5, **options):
    inputs = inputs or batch()
    truth, gradients = expected(student, teacher, inputs, **options)
    student.zero_grad()
    with distill(student, teacher, **options) as handle, LogitsMade() as made:
        outputs = student(**inputs, **(call or {}))
        outputs.loss.backward()
    torch.testing.assert_close(outputs.loss.double(), truth, rtol=2e-6, atol=1e-7)
    ours = {n: p.grad for n, p in student.named_parameters()}
    assert largest_difference(ours, gradients) < tolerance
    assert all(p.grad is None for p in teacher.parameters())
    return made.count, outputs, handle


@pytest.mark.parametrize("kind", ["forward", "reverse", "jsd"])
@pytest.mark.parametrize("names", PAIRS, ids="-".join)
def test_loss_and_gradients_without_logits(names, kind):
    student, teacher = build(names[0]), teacher_of(names[1])
    made, outputs, _ = check(
        student, teacher, kind=kind, beta=0.3, temperature=1.5, cross_entropy_weight=0.4
    )
    assert made == 0 and isinstance(outputs.logits, DeferredLogits)


def test_gradient_checkpointing():
    student, teacher = build("Llama"), teacher_of("GPT2")
    truth, gradients = expected(student, teacher, batch())
    student.zero_grad()
    student.gradient_checkpointing_enable()
    with distill(student, teacher):
        loss = student(**batch()).loss
        loss.backward()
    torch.testing.assert_close(loss.double(), truth, rtol=2e-6, atol=0)
    ours = {n: p.grad for n, p in student.named_parameters()}
    assert largest_difference(ours, gradients) < 2e-5


def test_example_of_the_docstring():
    test = doctest.DocTestParser().get_doctest(inspect.getdoc(distill), {}, "distill", None, 0)
    assert test.examples and doctest.DocTestRunner().run(test).failed == 0


def test_padded_vocabularies():
    student, teacher = build("Llama"), teacher_of("GPT2")
    student.resize_token_embeddings(VOCAB + 5)
    teacher.resize_token_embeddings(VOCAB + 45)
    with pytest.raises(
        ValueError, match=rf"{VOCAB + 5} tokens, but teacher has {VOCAB + 45}.*pass"
    ):
        distill(student, teacher)
    check(student, teacher, vocab_size=VOCAB, kind="jsd", cross_entropy_weight=0.5)
    with pytest.raises(
        ValueError, match=f"vocab_size is 999, expected a number from 1 to {VOCAB + 5}"
    ):
        distill(student, teacher, vocab_size=999)


def test_a_head_wider_than_the_configuration_is_padding():
    student, teacher = build("Llama"), teacher_of("GPT2")
    teacher.resize_token_embeddings(VOCAB + 45)
    teacher.config.vocab_size = VOCAB
    truth, _ = expected(student, teacher, batch(), vocab_size=VOCAB)
    with distill(student, teacher):
        torch.testing.assert_close(student(**batch()).loss.double(), truth, rtol=2e-6, atol=0)


class Tokenizer:
    def __init__(self, **tokens):
        self.tokens = tokens

    def get_vocab(self):
        return dict(self.tokens)


def test_tokenizers():
    student, teacher = build("Llama"), teacher_of("GPT2")
    ours = Tokenizer(**{f"t{i}": i for i in range(200)})
    theirs = Tokenizer(**(ours.tokens | dict(t7=8, t8=7, more=200)))
    handle = distill(student, teacher, tokenizers=(ours, copy.copy(ours)))
    assert "200 tokens" in repr(handle)
    handle.disable()
    with pytest.raises(ValueError, match="differ in 3 tokens: 't7' is 7 .* is 8 in the teacher's"):
        distill(student, teacher, tokenizers=(ours, theirs))
    theirs = Tokenizer(**(ours.tokens | dict(more=200)))
    with pytest.raises(ValueError, match="differ in 1 tokens: 'more' is missing in the student's"):
        distill(student, teacher, tokenizers=(ours, theirs))
    with pytest.raises(TypeError, match="tokenizers must be a pair of tokenizers"):
        distill(student, teacher, tokenizers=ours)


def test_num_items_positions_and_ignored_tokens():
    student, teacher = build("Llama"), teacher_of("Llama")
    inputs = batch()
    truth, _ = expected(student, teacher, inputs, num_items=50)
    with distill(student, teacher):
        loss = student(**inputs, num_items_in_batch=torch.tensor(50)).loss
        torch.testing.assert_close(loss.double(), truth, rtol=2e-6, atol=0)
        # shift_labels, as sequence parallelism gives them, and arguments by place
        shifted = torch.nn.functional.pad(inputs["labels"], (0, 1), value=-100)[:, 1:]
        again = student(**inputs, shift_labels=shifted, num_items_in_batch=50).loss
        assert torch.equal(loss, again)
        mask = torch.ones_like(inputs["input_ids"])
        first = student(inputs["input_ids"], mask, labels=inputs["labels"]).loss
        assert torch.equal(first, student(**inputs).loss)
        ignored = student(inputs["input_ids"], labels=torch.full_like(inputs["labels"], -100)).loss
        assert ignored.isnan()  # as the model's own
        last = inputs["labels"].clone()
        last[:, :-3] = -100
        ends = dict(shift_labels=shifted[:, -4:], labels=shifted[:, -4:], logits_to_keep=4)
        few = student(inputs["input_ids"], **ends).loss
        torch.testing.assert_close(few, student(inputs["input_ids"], labels=last).loss)


def test_evaluation_generation_and_disable():
    student, teacher = build("Llama"), teacher_of("GPT2").train()
    own = student(**batch()).loss
    before = dict(vars(student))
    handle = distill(student, teacher, kind="reverse")
    assert not teacher.training and "not seen" not in repr(handle)
    assert "distilled from GPT2LMHeadModel: kind reverse, temperature 1" in repr(handle)
    student.eval()
    torch.testing.assert_close(student(**batch()).loss, own)  # the cross-entropy
    assert student.generate(batch()["input_ids"][:1, :4], max_new_tokens=2).shape == (1, 6)
    handle.disable()
    handle.disable()
    assert teacher.training and vars(student).keys() == before.keys()
    assert repr(handle) == "<LlamaForCausalLM: distill was undone>"
    with distill(student, teacher, evaluation=True), torch.no_grad():
        loss = student(**batch()).loss
    truth, _ = expected(student, teacher, batch())
    torch.testing.assert_close(loss.double(), truth, rtol=2e-6, atol=0)


def test_a_copy_of_the_student_keeps_the_teacher():
    student, teacher = build("Llama"), teacher_of("GPT2")
    with distill(student, teacher) as handle:
        twin = copy.deepcopy(student)
        assert vars(twin)["_chunked_ce"]._teacher is teacher
        assert torch.equal(twin(**batch()).loss, student(**batch()).loss)
        assert not any("teacher" in name for name in student.state_dict())
        with pytest.raises(ValueError, match="enabled already"):
            enable(student)
    assert handle is not None


def test_autocast_and_a_teacher_in_bfloat16():
    student, teacher = build("Llama"), teacher_of("GPT2").bfloat16()
    check(student, teacher, tolerance=1e-3)
    with distill(student, teacher), torch.autocast("cpu", dtype=torch.bfloat16):
        loss = student(**batch()).loss
    truth, _ = expected(student, teacher, batch())
    torch.testing.assert_close(loss.double(), truth, rtol=2e-2, atol=1e-3)


@pytest.mark.parametrize("part", ["student", "teacher"])
def test_a_head_that_is_no_linear_layer_has_its_logits_computed(part):
    from peft import LoraConfig, get_peft_model

    student, teacher = build("Llama"), teacher_of("GPT2")
    lora = LoraConfig(target_modules=["lm_head"], lora_dropout=0.0, init_lora_weights=False)
    if part == "student":
        student = get_peft_model(student, lora).train()
    else:
        teacher = get_peft_model(teacher, lora)
    truth, gradients = expected(student, teacher, batch(), temperature=2.0)
    student.zero_grad()
    with distill(student, teacher, temperature=2.0):
        with pytest.warns(UserWarning, match=f"logits of the {part} are computed whole"):
            loss = student(**batch()).loss
        loss.backward()
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # said once
            student(**batch())
    torch.testing.assert_close(loss.double(), truth, rtol=2e-6, atol=1e-7)
    trained = {n: p.grad for n, p in student.named_parameters() if p.requires_grad}
    assert trained and largest_difference(trained, {n: gradients[n] for n in trained}) < 2e-5


@pytest.mark.long
@pytest.mark.framework
def test_compiled_student():
    student, teacher = build("Llama"), teacher_of("Llama")
    truth, gradients = expected(student, teacher, batch())
    student.zero_grad()
    try:
        with distill(student, teacher):
            compiled = torch.compile(student, backend="aot_eager", fullgraph=True)
            loss = compiled(**batch()).loss
            loss.backward()
    finally:
        torch._dynamo.reset()
    torch.testing.assert_close(loss.double(), truth, rtol=2e-6, atol=0)
    ours = {n: p.grad for n, p in student.named_parameters()}
    assert largest_difference(ours, gradients) < 2e-5


def test_trainer(tmp_path):
    """Accumulated over 4 batches of 2, against 8 at once; the loss falls; evaluation is plain."""
    from transformers import Trainer, TrainingArguments

    teacher, found = teacher_of("GPT2"), []
    rows = [{k: v[0] for k, v in batch(seed).items()} for seed in range(8)]
    for per_device in (8, 2):
        student = build("Llama")
        args = TrainingArguments(
            str(tmp_path), max_steps=3, per_device_train_batch_size=per_device, learning_rate=0.05,
            gradient_accumulation_steps=8 // per_device, optim="sgd", use_cpu=True, logging_steps=1,
            lr_scheduler_type="constant", report_to="none", save_strategy="no", disable_tqdm=True,
            max_grad_norm=0.0,
        )  # fmt: skip
        distill(student, teacher, kind="jsd", temperature=2.0)
        trainer = Trainer(model=student, args=args, train_dataset=rows, eval_dataset=rows[:2])
        trainer.train()
        evaluated = trainer.evaluate()["eval_loss"]
        losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
        assert len(losses) == 3 and losses[2] < losses[0] < evaluated
        found.append(([p.detach().clone() for p in student.parameters()], losses))
    for a, b in zip(found[0][0], found[1][0], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
    assert found[0][1] == pytest.approx(found[1][1], abs=2e-4)  # four digits are logged


def test_same_numbers_as_trl():
    """Its GKD trainer's loss, whose "batchmean" divides by the tokens that count."""
    gkd = pytest.importorskip("trl.experimental.gkd")
    theirs = gkd.GKDTrainer.generalized_jsd_loss
    student, teacher, inputs = build("Qwen2"), teacher_of("GPT2"), batch()
    ids, labels = inputs["input_ids"], inputs["labels"]
    for beta, kind in ((0.0, "forward"), (0.3, "jsd"), (1.0, "reverse")):
        for options in (dict(temperature=1.0), dict(temperature=2.0, num_items_in_batch=30)):
            student.zero_grad()
            with torch.no_grad():
                y = teacher.eval()(input_ids=ids).logits[:, :-1]
            z = student(input_ids=ids).logits[:, :-1]
            loss = theirs(z, y, labels=labels[:, 1:], beta=beta, **options)
            loss.backward()
            gradients = {n: p.grad for n, p in student.named_parameters()}
            for name in (kind, "jsd"):
                student.zero_grad()
                items = options.get("num_items_in_batch")
                with distill(
                    student, teacher, kind=name, beta=beta, temperature=options["temperature"]
                ):
                    ours = student(**inputs, num_items_in_batch=items).loss
                ours.backward()
                torch.testing.assert_close(ours, loss, rtol=2e-5, atol=1e-7)
                mine = {n: p.grad for n, p in student.named_parameters()}
                assert largest_difference(mine, gradients) < 2e-4  # theirs cancels in float32


@pytest.mark.filterwarnings("ignore:.*trains without labels")
def test_bad_input():
    student, teacher = build("Llama"), teacher_of("GPT2")
    for given, options, error in (
        ((student, student), {}, "student and teacher are one model"),
        ((student, torch.nn.Linear(3, 3)), {}, "teacher must be a causal language model"),
        ((student, None), {}, "teacher must be a causal language model .* got NoneType"),
        ((torch.nn.Linear(3, 3), teacher), {}, "Linear is no model of transformers"),
        ((student, torch.nn.DataParallel(teacher)), {}, "pass the model itself, teacher.module"),
        ((student, torch.compile(teacher)), {}, "teacher is compiled"),
        ((student, teacher), dict(temperature=0.0), "temperature is 0.0"),
        ((student, teacher), dict(beta=1.1), "beta is 1.1"),
        ((student, teacher), dict(kind="js"), "expected one of forward, reverse, jsd"),
        ((student, teacher), dict(cross_entropy_weight="1"), "cross_entropy_weight must be"),
        ((student, teacher), dict(ce_weight=1.0), "did you mean cross_entropy_weight"),
        ((student, teacher), dict(vocab_size="9"), "vocab_size must be an int or None"),
    ):
        with pytest.raises((TypeError, ValueError), match=error):
            distill(*given, **options)
    assert "_chunked_ce" not in vars(student) and teacher.training
    ids = batch()["input_ids"]
    with distill(student, teacher):
        with pytest.raises(ValueError, match="inputs_embeds, which are of its own size"):
            student(inputs_embeds=student.get_input_embeddings()(ids), labels=ids)
        with pytest.raises(ValueError, match=r"teacher is on meta.*call teacher.to\('cpu'\)"):
            teacher.to("meta")
            student(input_ids=ids, labels=ids)
        with pytest.warns(UserWarning, match="the teacher is not asked: pass labels"):
            vars(student)["_chunked_ce"]._warned.clear()
            student(input_ids=ids)
