"""transformers' causal models with our loss, with their logits and without them."""

import copy
import subprocess
import sys
from contextlib import nullcontext

import oracle
import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn

from bench.huggingface import MODELS, VOCAB, LogitsMade, batch, build, differences, main, step
from chunked_ce.huggingface import DeferredLogits, causal_lm_loss, enable
from chunked_ce.huggingface.deferred import Head

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
def test_every_architecture_agrees_and_makes_no_logits(name):
    stock, with_logits, deferred = differences(name)
    for ours in (with_logits, deferred):
        assert ours.loss <= 1e-6 and ours.gradient <= 2e-6
    assert with_logits.tensors == stock.tensors - 2 and deferred.tensors == 0


def test_bench_prints_what_it_writes(tmp_path, capsys):
    assert main(["--only", "Llama", "--csv", str(tmp_path / "models.csv")]) == 0
    head, *rows = (tmp_path / "models.csv").read_text().splitlines()
    assert head == "model,way,loss,gradient,tensors" and len(rows) == 3
    printed = capsys.readouterr().out.splitlines()
    for row, line in zip(rows, printed[1:], strict=True):
        assert line.split()[1] == row.split(",")[1] and line.split()[-1] == row.split(",")[-1]


@pytest.mark.parametrize("name", MODELS)
def test_disable_restores_every_attribute(name):
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


# The loss alone, against the oracle in fp64


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
def test_arguments_and_order_are_transformers(kwargs):
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


def test_the_shift_stays_within_a_row():
    logits, labels = loss_case()
    together = causal_lm_loss(logits, labels, num_items_in_batch=10)
    each = sum(causal_lm_loss(logits[i], labels[i], num_items_in_batch=10) for i in range(3))
    torch.testing.assert_close(together, each)
    labels[:, 0] = 5  # nothing predicts a row's first token
    torch.testing.assert_close(causal_lm_loss(logits, labels, num_items_in_batch=10), together)


def test_no_copy_of_the_logits_in_float32_nor_for_the_shift():
    model = build("Llama", torch.bfloat16)
    model.loss_function = causal_lm_loss
    with LogitsMade() as made:
        model(**batch()).loss.backward()
    assert made.count == 2 and made.dtypes == {torch.bfloat16}  # the logits and their gradient


@pytest.mark.parametrize("way", ["loss", "enable"])
def test_no_label_counts(way):
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
def test_unequal_micro_batches_give_the_gradient_of_one(way, as_tensor):
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


# Deferred logits


def deferred(shape=(2, 5), dtype=torch.float32, vocab=29):
    x = torch.randn(*shape, 6, dtype=dtype, requires_grad=True)
    w = torch.randn(vocab, 6, dtype=dtype, requires_grad=True)
    b = torch.randn(vocab, dtype=dtype, requires_grad=True)
    return DeferredLogits(Head.of(x, w, b, lambda: None), x), (x, w, b)


RECORDED = {
    "factor": lambda z: z * 0.3,
    "factor from the left": lambda z: 3 * z,
    "divided": lambda z: z / 1.7,
    "softcap": lambda z: torch.tanh(z / 4.0) * 4.0,
    "softcap by a module": lambda z: nn.Tanh()(z / 4.0) * 4.0,
    "softcap of a negative": lambda z: (z * -0.5).tanh() * -3.0,
    "by functions": lambda z: torch.mul(torch.tanh(torch.div(z, 2)), 2),
    "cast": lambda z: z.float().contiguous().to(torch.float32).to(z.device),
    "last tokens": lambda z: z[:, -3:, :],
    "without the last": lambda z: z[..., :-1, :] * 2.0,
    "a row": lambda z: z[0],
    "one token": lambda z: z[:, -1],
    "slices of slices": lambda z: z[:, 1:][:1, ..., :],
}
COMPUTED = {
    "sum": lambda z: z.sum(),
    "capped twice": lambda z: torch.tanh(torch.tanh(z) * 2.0),
    "plus": lambda z: z + 1.0,
    "minus from the left": lambda z: 1.0 - z,
    "times a tensor": lambda z: torch.full((29,), 2.0) * z,
    "times itself": lambda z: z * z,
    "times 0": lambda z: z * 0.0,
    "times True": lambda z: z * True,
    "rounded": lambda z: z.div(0.3, rounding_mode="floor"),
    "by classes": lambda z: z[..., :7],
    "by a mask": lambda z: z[torch.tensor([[True] * 3 + [False] * 2] * 2)],
    "view": lambda z: z.view(-1, 29),
    "in bfloat16": lambda z: z.to(torch.bfloat16),
    "to another's dtype": lambda z: z.to(torch.ones(1, dtype=torch.float64)),
    "softmax": lambda z: F.log_softmax(z, dim=-1),
    "masked": lambda z: torch.where(z > 0, z, 0.0),
    "negated": lambda z: -z,
    "concatenated": lambda z: torch.cat([z, z]),
    "by keyword": lambda z: torch.add(input=z, other=1.0),
    "iterated": lambda z: sum(row.sum() for row in z),
    "power": lambda z: z**2,
    "product": lambda z: z @ torch.ones(29, 2),
    "T": lambda z: z.mT,
}


@pytest.mark.parametrize("use", [*RECORDED, *COMPUTED])
def test_every_use_is_that_of_the_logits(use):
    operation = {**RECORDED, **COMPUTED}[use]
    logits, leaves = deferred()
    result = operation(logits)
    assert isinstance(result, DeferredLogits) == (use in RECORDED)
    expected = operation(F.linear(*leaves))
    assert result.shape == expected.shape and result.dtype == expected.dtype
    assert result.device == expected.device and result.ndim == result.dim() == expected.dim()
    real = result.tensor() if use in RECORDED else result
    assert torch.equal(real, expected)
    wanted = torch.autograd.grad(expected.float().square().sum(), leaves)
    for a, e in zip(torch.autograd.grad(real.float().square().sum(), leaves), wanted, strict=True):
        torch.testing.assert_close(a, e)


@pytest.mark.parametrize("use", [u for u in RECORDED if u != "one token"])
def test_the_loss_reads_off_what_was_recorded(use):
    logits, leaves = deferred(dtype=torch.float64)
    given = RECORDED[use](logits)
    assert given.linear() is not None
    target = torch.randint(0, 29, given.shape[:-1])
    ours = causal_lm_loss(given, None, shift_labels=target)
    assert given._real is None and logits._real is None, "computed"
    exact = RECORDED[use](F.linear(*leaves)).double()
    expected = oracle.cross_entropy(exact, target)
    tolerance = 1e-6 if use == "cast" else 1e-12  # .float() rounds the expected one
    torch.testing.assert_close(ours, expected, rtol=tolerance, atol=0)
    for a, e in zip(
        torch.autograd.grad(3.7 * ours, leaves),
        torch.autograd.grad(3.7 * expected, leaves),
        strict=True,
    ):
        torch.testing.assert_close(a, e, rtol=1e-5, atol=tolerance)


def add_in_place(z):
    z += 1.0


def set_a_class(z):
    z[..., 3] = -5.0


def scale_in_place(z):
    z.mul_(2.0)


def divide_in_place(z):
    z /= 3.0


@pytest.mark.parametrize("change", [add_in_place, set_a_class, scale_in_place, divide_in_place])
@pytest.mark.parametrize("of", ["itself", "a slice taken before", "what it is a slice of"])
def test_changes_in_place_reach_the_loss(change, of):
    """As with tensors, whose slices share their memory."""
    results = []
    for make in (deferred, lambda: (lambda z: (F.linear(*z[1]), z[1]))(deferred())):
        torch.manual_seed(3)
        logits, _ = make()
        part = logits[:, :4]
        whole, changed = (logits, logits) if of == "itself" else (logits, part)
        if of == "what it is a slice of":
            whole, changed = part, logits
        change(changed)
        target = torch.full(whole.shape[:-1], 3)
        results.append(causal_lm_loss(whole, None, shift_labels=target))
    torch.testing.assert_close(*results)


def test_no_attribute_that_tensors_lack_computes_anything():
    logits, _ = deferred()
    assert not hasattr(logits, "__array_interface__") and not hasattr(logits, "no_such_name")
    assert (
        "shape=[2, 5, 29]" in repr(logits) and logits.size() == (2, 5, 29) and logits.size(-1) == 29
    )
    assert len({logits}) == 1 and logits.float() is logits and logits._real is None
    assert len(logits) == 2 and logits.detach().numpy().shape == (2, 5, 29)


def test_asked_for_without_gradients_then_with():
    logits, (x, w, b) = deferred()
    with torch.no_grad():
        logits.sum()
    logits.sum().backward()
    assert x.grad is not None and w.grad is not None and b.grad is not None


# The model that defers


@pytest.mark.parametrize("name", HEADS)
def test_outputs_logits_are_the_models(name):
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


def test_logits_of_a_weight_that_is_gone():
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


def test_evaluation_and_generation_are_untouched():
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
    names = list(transformers.LlamaForCausalLM.forward.__wrapped__.__code__.co_varnames)
    where = names.index("labels") - 1
    given = batch()
    with enable(model):
        outputs = model(given["input_ids"], *[None] * (where - 1), given["labels"])
        assert isinstance(outputs.logits, DeferredLogits)


def test_a_model_that_needs_its_logits_gets_them_and_a_warning():
    model = build("Llama")
    expected = step(model)[0]
    enable(model)
    model.lm_head.register_forward_hook(lambda head, inputs, logits: logits + 0.0)
    with pytest.warns(UserWarning, match="enable saves nothing here"):
        loss, _, made = step(model)
    torch.testing.assert_close(loss, expected)
    assert made > 0


def test_a_deep_copy_runs_on_itself():
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


def test_what_others_wrap_around_it_stays_when_it_goes():
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


def test_a_head_that_is_replaced_later_is_right():
    model = build("Llama")
    enable(model)
    model.resize_token_embeddings(VOCAB + 5)
    loss = model(**batch()).loss
    truth = oracle.cross_entropy(
        model(input_ids=batch()["input_ids"]).logits, shifted(batch()["labels"])
    )
    torch.testing.assert_close(loss.double(), truth, rtol=1e-6, atol=0)


def compiled_step(name, way, tracer):
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
@pytest.mark.parametrize(("name", "way"), [("Llama", "loss"), ("Gemma2", "enable")])
def test_compile_fullgraph(name, way):
    compiled_step(name, way, "aot_eager")


@pytest.mark.long
@pytest.mark.framework
@pytest.mark.parametrize("name", HEADS[:3])
@pytest.mark.parametrize("way", ["loss", "enable"])
def test_compile_fullgraph_with_inductor(name, way):
    compiled_step(name, way, "inductor")


@pytest.mark.framework
def test_compiled_steps_do_not_compile_again():
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


def test_the_loss_outside_of_the_heads_autocast():
    """Some models compute the loss with autocast off; bf16 hidden states meet an fp32 weight."""
    x, w = torch.randn(2, 5, 6).bfloat16(), torch.randn(29, 6)
    with torch.autocast("cpu", torch.bfloat16):
        logits = DeferredLogits(Head.of(x, w, None, lambda: None), x)
    target = torch.randint(0, 29, (2, 5))
    expected = oracle.cross_entropy(F.linear(x, w.bfloat16()), target)
    ours = causal_lm_loss(logits, None, shift_labels=target)
    torch.testing.assert_close(ours.double(), expected, rtol=1e-2, atol=0)


# PEFT


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
def test_an_adapter_on_the_head_is_refused_or_right(peft, options):
    """PITFALLS, loss 22: never left out in silence."""
    adapted = lora(peft, build("Llama"), **options)
    with pytest.raises(TypeError, match="leave the head out of target_modules"):
        enable(adapted)
    expected, stock, _ = step(adapted)
    model = build("Llama")
    enable(model)
    adapted = lora(peft, model, **options)
    with pytest.warns(UserWarning) if "modules_to_save" not in options else nullcontext():
        loss, grads, _ = step(adapted)
    torch.testing.assert_close(loss, expected)
    for n, g in grads.items():
        assert (g is None) == (stock[n] is None)
        if g is not None:
            torch.testing.assert_close(g, stock[n], rtol=1e-5, atol=1e-6)


# Mistakes

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
def test_bad_arguments_of_the_loss(arguments, options, error, message):
    with pytest.raises(error, match=message) as caught:
        causal_lm_loss(*arguments, **options)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


class Quantised(nn.Linear):
    def forward(self, x):
        return super().forward(x)


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


def dispatched():
    model = build("Llama")
    model.lm_head.forward = model.lm_head.forward
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
        (
            lambda: with_head(Quantised(16, VOCAB)),
            TypeError,
            "test_huggingface's Quantised, expected a plain",
        ),
        (integers, TypeError, "weight has dtype torch.int8.*out of quantisation"),
        (dispatched, TypeError, "forward has been replaced on the instance.*one device"),
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


def test_importing_does_not_import_transformers():
    code = "import sys, chunked_ce.huggingface; print('transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stderr
