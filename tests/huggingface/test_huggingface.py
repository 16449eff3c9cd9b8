"""Models of transformers with our loss: with their logits, and enabled to do without."""

import copy
import functools
import inspect
import pickle
import subprocess
import sys
import warnings

import oracle
import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn

from bench.huggingface import MODELS, VOCAB, LogitsMade, batch, build, differences, main, step
from chunked_ce.huggingface import DeferredLogits, causal_lm_loss, enable

HEADS = ["Llama", "Gemma2", "Granite", "Mamba"]  # nothing, a softcap, a factor, a cast


@pytest.fixture(autouse=True)
def no_compiled_code_of_other_tests():
    yield
    torch._dynamo.reset()


def attributes(model):
    """Every attribute of every module, containers by content."""
    return [
        {k: dict(v) if isinstance(v, dict) else v for k, v in vars(module).items()}
        for module in model.modules()
    ]


@pytest.mark.parametrize("name", MODELS)
def test_architectures(name):
    stock, with_logits, deferred = differences(name)
    for ours in (with_logits, deferred):
        assert ours.loss <= 1e-6 and ours.gradient <= 2e-6
    assert with_logits.tensors == stock.tensors - 2 and deferred.tensors == 0


def test_bench_table(tmp_path, capsys):
    assert main(["--only", "Llama", "--csv", str(tmp_path / "models.csv")]) == 0
    head, *rows = (tmp_path / "models.csv").read_text().splitlines()
    assert head == "model,way,loss,gradient,tensors" and len(rows) == 3
    printed = capsys.readouterr().out.splitlines()
    for row, line in zip(rows, printed[1:], strict=True):
        assert line.split()[1] == row.split(",")[1] and line.split()[-1] == row.split(",")[-1]


@pytest.mark.parametrize("name", MODELS)
def test_disable_restores_attributes(name):
    model = build(name)
    before = attributes(model)
    handle = enable(model)
    assert attributes(model) != before
    step(model)
    handle.disable()
    handle.disable()
    after = attributes(model)
    for b, a in zip(before, after, strict=True):
        assert b.keys() == a.keys() and all(a[k] is b[k] or a[k] == b[k] for k in a)
    assert isinstance(model(**batch()).logits, torch.Tensor)


@pytest.mark.parametrize("name", HEADS)
def test_output_logits(name):
    model = build(name)
    expected = model(**batch())
    handle = enable(model)
    outputs = model(**batch())
    assert isinstance(outputs.logits, DeferredLogits)
    assert torch.equal(outputs.logits.tensor(), expected.logits)
    (outputs.loss + outputs.logits.square().mean()).backward()
    ours = {n: p.grad for n, p in model.named_parameters()}
    handle.disable()
    model.zero_grad()
    (expected.loss + expected.logits.square().mean()).backward()
    for n, p in model.named_parameters():
        torch.testing.assert_close(ours[n], p.grad, rtol=1e-4, atol=1e-6)
    assert isinstance(model(**batch(), return_dict=False)[1], torch.Tensor)


def test_logits_after_weight_changed():
    model = build("Llama")
    enable(model)
    outputs = model(**batch())
    outputs.loss.backward()
    assert outputs.logits.tensor().isfinite().all()
    later = model(**batch())
    torch.optim.SGD(model.parameters(), 0.1).step()
    with pytest.raises(RuntimeError, match="read it before optimizer.step"):
        later.logits.argmax(-1)
    assert outputs.logits[0, 0].isfinite().all(), "computed before"


def test_evaluation_and_generation():
    model = build("Gemma2")
    ids = batch()["input_ids"]
    model.eval()
    expected = model(**batch())
    generated = model.generate(ids[:1, :4], max_new_tokens=5, do_sample=False)
    with enable(model):
        ours = model(**batch())
        assert torch.equal(ours.logits, expected.logits)
        torch.testing.assert_close(ours.loss, expected.loss)
        assert torch.equal(
            model.generate(ids[:1, :4], max_new_tokens=5, do_sample=False), generated
        )
        assert isinstance(model.train()(input_ids=ids).logits, torch.Tensor)
    with enable(model.eval(), evaluation=True), torch.inference_mode():
        with LogitsMade() as made:
            outputs = model(**batch())
        torch.testing.assert_close(outputs.loss, expected.loss)
        assert made.count == 0 and torch.equal(outputs.logits.tensor(), expected.logits)
        assert isinstance(model(input_ids=ids).logits, torch.Tensor)


def test_labels_by_position():
    model = build("Llama")
    names = list(inspect.signature(transformers.LlamaForCausalLM.forward).parameters)
    where = names.index("labels") - 1
    given = batch()
    with enable(model):
        outputs = model(given["input_ids"], *[None] * (where - 1), given["labels"])
        assert isinstance(outputs.logits, DeferredLogits)


def test_model_that_uses_its_logits_warns():
    model = build("Llama")
    expected = step(model)[0]
    enable(model)
    model.lm_head.register_forward_hook(lambda head, inputs, logits: logits + 0.0)
    with pytest.warns(UserWarning, match="enable saves nothing here"):
        loss, _, made = step(model)
    torch.testing.assert_close(loss, expected)
    assert made > 0


def test_deep_copy_of_model():
    model = build("Gemma2")
    handle = enable(model)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for p in twin.parameters():
            p.mul_(1.5)
    loss = twin(**batch()).loss
    loss.backward()
    assert all(p.grad is None for p in model.parameters())
    assert all(p.grad is not None for p in twin.parameters())
    handle.disable()
    assert isinstance(twin(**batch()).logits, DeferredLogits)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.5)
    torch.testing.assert_close(loss, model(**batch()).loss)


def test_data_parallel_refused():
    """On GPUs nn.DataParallel calls it on every module at each forward of two devices or more."""
    model = build("Llama")
    parallel = nn.DataParallel(model)
    handle = enable(model)
    for of in (model, copy.deepcopy(model)):
        with pytest.raises(TypeError, match="replicated by DataParallel.*one process per GPU"):
            [m._replicate_for_data_parallel() for m in nn.DataParallel(of).modules()]
    assert isinstance(model(**batch()).logits, DeferredLogits)
    handle.disable()
    replicas = [m._replicate_for_data_parallel() for m in parallel.modules()]
    assert replicas[1]._is_replica and "forward" not in vars(replicas[1])


def test_pickle_refused(tmp_path):
    """What is saved can be loaded: an enabled model's methods could not."""
    model = build("Llama")
    expected = model(**batch()).loss
    handle = enable(model)
    for save in (pickle.dumps, lambda m: torch.save(m, tmp_path / "model.pt")):
        with pytest.raises(TypeError, match=r"state_dict\(\).*disable\(\) first"):
            save(model)
    loaded = build("Llama")
    loaded.load_state_dict(pickle.loads(pickle.dumps(model.state_dict())))
    handle.disable()
    for restored in (loaded, pickle.loads(pickle.dumps(model))):
        with enable(restored):
            torch.testing.assert_close(restored(**batch()).loss, expected)


def test_disable_keeps_wrapper_of_forward():
    model = build("Llama")
    handle = enable(model)
    inner, calls = model.forward, []
    model.forward = lambda *args, **kwargs: calls.append(1) or inner(*args, **kwargs)
    assert isinstance(model(**batch()).logits, DeferredLogits)
    handle.disable()
    assert isinstance(model(**batch()).logits, torch.Tensor) and len(calls) == 2
    del model.forward
    with enable(model):
        assert isinstance(model(**batch()).logits, DeferredLogits)


def test_replaced_head():
    model = build("Llama")
    enable(model)
    model.resize_token_embeddings(VOCAB + 5)
    outputs = model(**batch())
    assert isinstance(outputs.logits, DeferredLogits)
    loss = outputs.loss
    truth = oracle.cross_entropy(
        model(input_ids=batch()["input_ids"]).logits,
        F.pad(batch()["labels"], (0, 1), value=-100)[:, 1:],
    )
    torch.testing.assert_close(loss.double(), truth, rtol=1e-6, atol=0)


def test_replaced_head_that_cannot_defer_warns_once():
    model = build("Llama")
    enable(model)
    model.lm_head, model._tp_size = nn.Linear(16, VOCAB, bias=False), 2
    with pytest.warns(UserWarning, match="the head was replaced, and .*sharded over devices"):
        assert isinstance(model(**batch()).logits, torch.Tensor)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(**batch())


@pytest.mark.parametrize("width", ["counted", "said"])
def test_head_without_out_features(width):
    """The number of logits is counted on a token, unless the head says it."""
    head = nn.Sequential(nn.Linear(16, VOCAB), nn.Tanh())
    if width == "said":
        head.out_features = VOCAB
    expected, stock, _ = step(with_head(copy.deepcopy(head)))
    model, calls = with_head(head), []
    head[0].register_forward_hook(lambda module, args, out: calls.append(len(out)))
    with enable(model):
        outputs = model(**batch())
        assert isinstance(outputs.logits, DeferredLogits) and outputs.logits.shape[-1] == VOCAB
        assert calls[:-1] == ([1] if width == "counted" else [])  # and the loss's chunk
        outputs.loss.backward()
    torch.testing.assert_close(outputs.loss.detach(), expected)
    for n, p in model.named_parameters():
        torch.testing.assert_close(p.grad, stock[n], rtol=1e-5, atol=1e-6)


def test_head_whose_forward_was_replaced_on_the_instance():
    """As accelerate's, which moves the hidden states to the head and its logits back."""
    model, plain = build("Llama"), build("Llama")
    forward = plain.lm_head.forward
    plain.lm_head.forward = lambda hidden: 2.0 * forward(hidden)
    model.lm_head.forward = functools.partial(
        lambda head, hidden: 2.0 * F.linear(hidden, head.weight), model.lm_head
    )
    before = model.lm_head.forward
    expected, stock, _ = step(plain)
    with enable(model):
        outputs = model(**batch())
        assert isinstance(outputs.logits, DeferredLogits)
        outputs.loss.backward()
    assert model.lm_head.forward is before
    torch.testing.assert_close(outputs.loss.detach(), expected)
    for n, p in model.named_parameters():
        torch.testing.assert_close(p.grad, stock[n], rtol=1e-5, atol=1e-6)


def test_disable_of_replaced_head():
    model = build("Llama")
    handle = enable(model)
    model.resize_token_embeddings(VOCAB + 5)
    model(**batch())
    handle.disable()
    assert not {"forward", "_chunked_ce", "__deepcopy__"} & vars(model.lm_head).keys()
    assert isinstance(model(**batch()).logits, torch.Tensor)


def test_repr():
    model = build("Gemma2")
    handle = enable(model)
    shape = list(model.lm_head.weight.shape)
    assert repr(handle) == (
        f"<Gemma2ForCausalLM enabled: head Linear {shape} defers its logits in training with "
        "labels, softcap and logit scale seen at the first step; disable() undoes it>"
    )
    model(**batch())
    softcap = model.config.final_logit_softcapping
    assert f"softcap {softcap:g}, logit scale 1;" in repr(handle)
    model.lm_head = Rounded(16, VOCAB, bias=False)
    assert f"the head was replaced by Rounded {shape}" in repr(handle)
    handle.disable()
    assert repr(handle) == "<Gemma2ForCausalLM: enable was undone>"
    smooth = enable(build("Granite"), evaluation=True, label_smoothing=0.1)
    assert "in training and evaluation" in repr(smooth) and "smoothing 0.1;" in repr(smooth)


@pytest.mark.parametrize("name", HEADS)
def test_label_smoothing(name):
    model = build(name)
    logits, given = model(input_ids=batch()["input_ids"]).logits, batch()
    labels = F.pad(given["labels"], (0, 1), value=-100)[:, 1:]
    truth = oracle.cross_entropy(logits, labels, label_smoothing=0.2)
    with enable(model, label_smoothing=0.2), LogitsMade() as made:
        outputs = model(**given)
        assert made.count == 0
        torch.testing.assert_close(outputs.loss.double(), truth, rtol=1e-5, atol=0)
        torch.testing.assert_close(model.eval()(**given).loss.double(), truth, rtol=1e-5, atol=0)
    with pytest.raises(ValueError, match="label_smoothing is 2.0"):
        enable(model, label_smoothing=2)


def test_deep_copy_of_head():
    model = build("Llama")
    plain = vars(copy.deepcopy(model.lm_head)).keys()
    enable(model)
    for _ in range(2):
        twin = copy.deepcopy(model.lm_head)
        assert vars(twin).keys() == plain and torch.equal(twin.weight, model.lm_head.weight)
        assert isinstance(model(**batch()).logits, DeferredLogits)
    whole = copy.deepcopy(model)
    assert vars(copy.deepcopy(whole.lm_head)).keys() == plain
    assert isinstance(copy.deepcopy(whole)(**batch()).logits, DeferredLogits)


@pytest.mark.long
@pytest.mark.framework
@pytest.mark.parametrize(
    ("name", "way", "tracer"), [("Llama", "loss", "aot_eager"), ("Gemma2", "enable", "inductor")]
)
def test_compile_fullgraph(name, way, tracer):
    model = build(name)
    expected, gradients, _ = step(model)
    if way == "enable":
        enable(model)
    else:
        model.loss_function = causal_lm_loss
    model.zero_grad()
    compiled = torch.compile(model, backend=tracer, fullgraph=True)
    for _ in range(2):
        outputs = compiled(**batch())
    outputs.loss.backward()
    torch.testing.assert_close(outputs.loss, expected)
    for n, p in model.named_parameters():
        torch.testing.assert_close(p.grad, gradients[n], rtol=1e-5, atol=1e-6)
    assert isinstance(outputs.logits, DeferredLogits) == (way == "enable")
    assert outputs.logits.argmax(-1).shape == batch()["labels"].shape
    assert isinstance(compiled(input_ids=batch()["input_ids"]).logits, torch.Tensor)


@pytest.mark.framework
def test_compile_without_recompilation():
    from torch._dynamo.testing import CompileCounter

    model = build("Gemma2")
    enable(model)
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(3):
        compiled(**batch()).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert counter.frame_count == 1


def test_gradient_checkpointing():
    model = build("Llama")
    expected, gradients, _ = step(model)
    model.gradient_checkpointing_enable()
    enable(model)
    loss, ours, made = step(model)
    torch.testing.assert_close(loss, expected)
    assert made == 0
    for n, g in ours.items():
        torch.testing.assert_close(g, gradients[n], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize(
    ("dtype", "autocast"),
    [(torch.float32, torch.bfloat16), (torch.float32, torch.float16), (torch.bfloat16, None)],
)
def test_half_precision(name, dtype, autocast):
    """No further from fp64 than transformers' own, which rounds the logits too."""
    truth = step(build(name, torch.float64))[1]

    def distance(use):
        model = build(name, dtype)
        use(model)
        with torch.autocast("cpu", autocast, enabled=autocast is not None):
            outputs = model(**batch())
        outputs.loss.backward()
        assert outputs.loss.dtype == torch.float32
        logits = outputs.logits
        kind = logits.dtype
        real = logits.tensor() if isinstance(logits, DeferredLogits) else logits
        assert real.dtype == kind, "asked for outside of autocast, as inside"
        grads = [(p.grad.double(), truth[n]) for n, p in model.named_parameters()]
        return sum((g - t).square().sum() for g, t in grads) ** 0.5, real

    stock, expected = distance(lambda model: None)
    ours, logits = distance(enable)
    assert ours <= 1.1 * stock and torch.equal(logits, expected)


@pytest.fixture
def peft():
    return pytest.importorskip("peft")


def lora(peft, model, **options):
    torch.manual_seed(1)
    config = peft.LoraConfig(r=2, init_lora_weights=False, **options)
    return peft.get_peft_model(model, config)


@pytest.mark.parametrize("order", ["before", "after"])
def test_lora_with_a_frozen_head(peft, order):
    results = []
    for ours in (False, True):
        model = build("Gemma2")
        if ours and order == "before":
            enable(model)
        adapted = lora(peft, model, target_modules=["q_proj", "v_proj"])
        if ours and order == "after":
            enable(adapted)
        results.append(step(adapted))
    (expected, stock, _), (loss, grads, made) = results
    torch.testing.assert_close(loss, expected)
    assert made == 0 and sum(g is not None for g in grads.values()) == 8
    for n, g in grads.items():
        assert (g is None) == (stock[n] is None)
        if g is not None:
            torch.testing.assert_close(g, stock[n], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "options",
    [
        dict(target_modules=["lm_head"]),
        dict(target_modules=["q_proj"], modules_to_save=["lm_head"]),
    ],
)
@pytest.mark.parametrize("order", ["before", "after"])
def test_an_adapter_on_the_head(peft, options, order):
    """PITFALLS, loss 22: never left out in silence."""
    expected, stock, _ = step(lora(peft, build("Llama"), **options))
    model = build("Llama")
    if order == "before":
        enable(model)
    adapted = lora(peft, model, **options)
    if order == "after":
        enable(adapted)
    adapted.train()
    assert isinstance(adapted(**batch()).logits, DeferredLogits)
    loss, grads, _ = step(adapted)
    torch.testing.assert_close(loss, expected)
    assert any(g is not None and "lm_head" in n for n, g in grads.items())
    for n, g in grads.items():
        assert (g is None) == (stock[n] is None)
        if g is not None:
            torch.testing.assert_close(g, stock[n], rtol=1e-5, atol=1e-6)


class Rounded(nn.Linear):
    """As a fake-quantised head is."""

    def forward(self, x):
        weight = self.weight + ((self.weight * 64).round() / 64 - self.weight).detach()
        return F.linear(x, weight, self.bias)


@pytest.mark.parametrize("order", ["before", "after"])
def test_a_head_that_is_called(order):
    torch.manual_seed(3)
    head = Rounded(16, VOCAB)
    expected, stock, _ = step(with_head(copy.deepcopy(head)))
    model = build("Llama") if order == "before" else with_head(head)
    handle = enable(model)
    model.lm_head = head
    loss, grads, _ = step(model)
    torch.testing.assert_close(loss, expected)
    for n, g in grads.items():
        torch.testing.assert_close(g, stock[n], rtol=1e-5, atol=1e-6)
    outputs = model(**batch())
    assert isinstance(outputs.logits, DeferredLogits)
    logits = outputs.logits.tensor()
    handle.disable()
    assert "forward" not in vars(head) and torch.equal(logits, model(**batch()).logits)


def without_head():
    return transformers.LlamaModel(build("Llama").config)


def with_head(head):
    model = build("Llama")
    model.lm_head = head
    return model


def integers():
    head = nn.Linear(16, VOCAB, bias=False)
    head.weight = nn.Parameter(torch.zeros(VOCAB, 16, dtype=torch.int8), requires_grad=False)
    return with_head(head)


def function():
    model = build("Llama")
    model.get_output_embeddings = lambda: torch.tanh
    return model


def sharded(group=False):
    class DTensor(torch.Tensor):
        pass

    class FSDPModule:
        pass

    class FSDPLinear(FSDPModule, nn.Linear):
        pass

    model = build("Llama")
    if group:
        model.lm_head.__class__ = FSDPLinear
    else:
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().as_subclass(DTensor))
    return model


def enabled():
    model = build("Llama")
    enable(model)
    return model


def own_loss():
    model = build("Llama")
    model.loss_function = lambda logits, labels, vocab_size, **_: logits.sum()
    return model


def losses_of_its_own():
    config = transformers.BartConfig(
        vocab_size=VOCAB, d_model=16, decoder_layers=1, decoder_attention_heads=2, decoder_ffn_dim=8,
        is_decoder=True, is_encoder_decoder=False,
    )  # fmt: skip
    return transformers.BartForCausalLM(config)


def unlabelled():
    class Unlabelled(transformers.LlamaForCausalLM):
        def forward(self, input_ids):
            return super().forward(input_ids)

    return Unlabelled(build("Llama").config)


def compiled():
    return torch.compile(build("Llama"))


def parallel():
    return nn.DataParallel(build("Llama"))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: "gpt2", TypeError, "must be a causal language model of transformers, got str"),
        (
            lambda: nn.Linear(2, 3),
            TypeError,
            "Linear is no model of transformers.*linear_cross_entropy",
        ),
        (without_head, ValueError, "LlamaModel has no output head.*AutoModelForCausalLM"),
        (unlabelled, ValueError, "Unlabelled.forward takes no labels, so nothing would change"),
        (losses_of_its_own, ValueError, "BartForCausalLM.forward never calls self.loss_function"),
        (
            own_loss,
            ValueError,
            "model.loss_function is <lambda>, which deferred logits would replace",
        ),
        (function, TypeError, "builtin_function_or_method, expected a module"),
        (integers, TypeError, "weight has dtype torch.int8.*out of quantization"),
        (sharded, TypeError, "sharded over devices.*chunked_ce.distributed"),
        (lambda: sharded(group=True), TypeError, "group of its own under FSDP2.*not on the head"),
        (compiled, TypeError, "model is compiled .*enable it first, then compile it"),
        (parallel, TypeError, r"wrapped in DataParallel: call enable\(model.module\)"),
        (enabled, ValueError, r"enabled already: call disable\(\)"),
    ],
)
def test_models_that_cannot_defer(make, error, message):
    model = make()
    before = attributes(model) if isinstance(model, nn.Module) else None
    with pytest.raises(error, match=message) as caught:
        enable(model)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400
    assert before is None or attributes(model) == before, "nothing of the user's is changed"


def test_import_without_transformers():
    code = "import sys, chunked_ce.huggingface; print('transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stderr
