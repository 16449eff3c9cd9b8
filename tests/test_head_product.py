"""evaluate_perplexity runs the model's own forward with its head deferred, and leaves it as it was."""

import random
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from chunked_ce import EvaluationInterrupted, evaluate_perplexity, loglikelihood
from chunked_ce.huggingface.head_product import HeadProduct
from chunked_ce.ops import chunks

VOCAB, PADDED, CONTEXT = 150, 160, 32


class Tiny(nn.Module):
    """A model of one file: no transformers, no configuration, the head as `transform` uses it."""

    def __init__(self, transform=lambda z: z, head=None):
        super().__init__()
        torch.manual_seed(0)
        self.table, self.mlp = nn.Embedding(PADDED, 16), nn.Linear(16, 16)
        self.head = nn.Linear(16, PADDED) if head is None else head
        self.transform, self.calls, self.strike = transform, 0, None

    def forward(self, ids):
        if self.strike:  # (at which call, what)
            self.calls += 1
            if self.calls == self.strike[0]:
                raise self.strike[1]
        return self.transform(self.head(self.mlp(self.table(ids)).tanh() * 4))


class Functional(nn.Linear):
    """The head's weight, called as a function."""

    def forward(self, x):
        return F.linear(x, self.weight, bias=self.bias)


class Transposed(nn.Linear):
    def forward(self, x):
        return x @ self.weight.t() + self.bias


class Subclass(torch.Tensor):
    """As a quantised weight is one."""


class Quantised(nn.Linear):
    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.weight = nn.Parameter(self.weight.detach().as_subclass(Subclass))


def documents(*lengths):
    torch.manual_seed(1)
    return [torch.randint(3, VOCAB, (n,)) for n in lengths]


@torch.no_grad()
def expected_nll(model, ids):
    """Windows of CONTEXT, stock cross-entropy in fp64."""
    total = 0.0
    for start in range(0, len(ids) - 1, CONTEXT):
        target = ids[start + 1 : start + CONTEXT + 1]
        logits = model(ids[None, start : start + len(target)])[0].double()
        total += F.cross_entropy(logits, target, reduction="sum").item()
    return total


DEFERRED = {
    "plain": lambda: Tiny(),
    "scale": lambda: Tiny(lambda z: z * 0.3),
    "divisor": lambda: Tiny(lambda z: z / 1.7),
    "cap": lambda: Tiny(lambda z: 5.0 * torch.tanh(z / 5.0)),
    "scale and cap": lambda: Tiny(lambda z: torch.tanh(z * 0.5 / 5.0) * 5.0),
    "padded vocabulary": lambda: Tiny(lambda z: z[:, :, :VOCAB]),
    "padded and capped": lambda: Tiny(lambda z: torch.tanh(z[..., :VOCAB] / 4) * 4),
    "cast": lambda: Tiny(lambda z: z.float().contiguous()),
    "tokens": lambda: Tiny(lambda z: z[:, -z.shape[1] :, :]),
    "weight as a function": lambda: Tiny(head=Functional(16, PADDED)),
    "in a tuple": lambda: Tiny(lambda z: (z, None)),
    "in a dict": lambda: Tiny(lambda z: {"logits": z}),
}
STORED = {
    "added to": lambda: Tiny(lambda z: z + torch.arange(PADDED) / 50),
    "changed in place": lambda: Tiny(lambda z: z.clamp_(max=1.0)),
    "log_softmax": lambda: Tiny(lambda z: z.log_softmax(-1)),
    "capped twice": lambda: Tiny(lambda z: torch.tanh(torch.tanh(z))),
    "product with a transposed weight": lambda: Tiny(head=Transposed(16, PADDED)),
    "weight of a subclass": lambda: Tiny(head=Quantised(16, PADDED)),
    "parametrised": lambda: Tiny(head=nn.utils.parametrizations.weight_norm(nn.Linear(16, PADDED))),
    "depends on the type": lambda: Tiny(lambda z: z * 2 if type(z) is torch.Tensor else z),
    "table": lambda: nn.Embedding(PADDED, PADDED),
}


class Largest(TorchDispatchMode):
    """The most elements that a result has."""

    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        sizes = [t.numel() for t in tree_leaves(result) if isinstance(t, torch.Tensor)]
        self.numel = max([self.numel, *sizes])
        return result


@pytest.mark.parametrize("name", [*DEFERRED, *STORED])
def test_nll_and_whether_logits_are_stored(name, monkeypatch):
    model, (ids,) = {**DEFERRED, **STORED}[name](), documents(8 * CONTEXT + 1)
    monkeypatch.setattr(chunks, "_CPU_CHUNK_BYTES", 16 * 4 * PADDED)
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 16 * 4 * PADDED)
    with Largest() as largest:
        report = evaluate_perplexity(model, ids, context_length=CONTEXT, rank=True)
    logits = model(ids[None, :CONTEXT])
    plain = (lambda x: model(x)[0]) if isinstance(logits, tuple) else model
    plain = (lambda x: model(x)["logits"]) if isinstance(logits, dict) else plain
    assert report.nll_sum == pytest.approx(expected_nll(plain, ids), rel=1e-6)
    assert report.logits_stored == (name in STORED)
    assert (largest.numel < 8 * CONTEXT * VOCAB / 2) == (name in DEFERRED)


def test_report_tells_of_logits_that_only_some_windows_need():
    model, (ids,) = Tiny(lambda z: z if z.shape[1] < 20 else z + 1.0), documents(100)
    report = evaluate_perplexity(model, ids, context_length=CONTEXT)
    assert report.logits_stored
    assert report.nll_sum == pytest.approx(expected_nll(model, ids), rel=1e-6)


# The model stays as it was


def state(model):
    """Every attribute of every module, containers by content."""
    return [
        {k: dict(v) if isinstance(v, dict) else v for k, v in vars(m).items() if k != "calls"}
        for m in model.modules()
    ]


def check_unchanged(model, before):
    model.strike = None
    after = state(model)
    for a, b in zip(after, before, strict=True):
        assert a.keys() == b.keys() and all(a[k] is b[k] or a[k] == b[k] for k in a)
    assert type(model(torch.arange(3, 9)[None])) is torch.Tensor
    assert type(F.linear(torch.ones(2, 16), model.head.weight)) is torch.Tensor


@pytest.mark.parametrize("call", [1, 2, 3, 4])
@pytest.mark.parametrize("error", [ValueError("of the model"), KeyboardInterrupt()])
def test_model_is_unchanged_after_an_exception(call, error):
    """Calls 1 and 2 try the model; a failure of the second is no reason to give up."""
    model = Tiny(lambda z: z * 0.5).train()
    model.mlp.eval()
    before, model.strike = state(model), (call, error)
    before[0]["strike"] = None
    run = lambda: evaluate_perplexity(model, documents(200), context_length=CONTEXT, batch_size=1)  # noqa: E731
    if call == 2 and isinstance(error, ValueError):
        assert run().logits_stored
    else:
        with pytest.raises(type(error)):
            run()
    check_unchanged(model, before)
    whole = evaluate_perplexity(model, documents(200), context_length=CONTEXT)
    assert not whole.logits_stored


@pytest.mark.struck
def test_model_is_unchanged_wherever_a_signal_strikes():
    def stop(*_):
        raise KeyboardInterrupt

    model, ids = Tiny(lambda z: z * 0.5), documents(20 * CONTEXT)
    previous, draw, struck = signal.signal(signal.SIGALRM, stop), random.Random(0), 0
    start = time.monotonic()
    evaluate_perplexity(model, ids, context_length=CONTEXT, batch_size=1)
    taken, before = time.monotonic() - start, state(model)
    try:
        for _ in range(20):
            try:
                signal.setitimer(signal.ITIMER_REAL, draw.uniform(0.05, 0.9) * taken)
                evaluate_perplexity(model, ids, context_length=CONTEXT, batch_size=1)
            except KeyboardInterrupt as interruption:  # EvaluationInterrupted is one
                struck += 1
                assert not isinstance(interruption, EvaluationInterrupted) or interruption.report
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
            check_unchanged(model, before)
    finally:
        signal.signal(signal.SIGALRM, previous)
    assert struck


def test_logits_that_the_call_itself_uses():
    """They are a tensor, equal to that of a call in which nothing is deferred."""
    model, uses = Tiny(), []
    model.transform = lambda z: uses.append(z + 0.0) or z
    expected = model(torch.arange(3, 9)[None])
    HeadProduct().defer(model.head.weight, lambda: model(torch.arange(3, 9)[None]))
    assert type(uses[1]) is torch.Tensor and torch.equal(uses[1], expected)


@pytest.mark.parametrize("shared", [False, True], ids=["two models", "one model"])
def test_two_threads(shared):
    """A thread's deferral is no other thread's."""
    first = Tiny(lambda z: z * 0.5).eval()
    models = [first, first if shared else Tiny(lambda z: z.tanh() * 3).eval()]
    ids = documents(30 * CONTEXT)
    expected = [evaluate_perplexity(m, ids, context_length=CONTEXT, batch_size=1) for m in models]
    barrier, reports, kinds = threading.Barrier(3), [None, None], []

    def evaluate(i):
        barrier.wait()
        reports[i] = evaluate_perplexity(models[i], ids, context_length=CONTEXT, batch_size=1)

    threads = [threading.Thread(target=evaluate, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    barrier.wait()
    while any(thread.is_alive() for thread in threads):
        kinds.append(type(first(ids[0][None, :9])))
    assert reports == expected and set(kinds) == {torch.Tensor}


def test_hooks_see_the_head():
    seen, (ids,) = [], documents(70)
    watched, read, changed = Tiny(), Tiny(), Tiny()
    watched.head.register_forward_hook(lambda head, args, logits: seen.append(logits.shape))
    read.head.register_forward_hook(lambda head, args, logits: seen.append(logits.amax(-1).shape))
    changed.head.register_forward_hook(lambda head, args, logits: logits + head.bias)
    for model, stored in ((watched, False), (read, True), (changed, True)):
        report = evaluate_perplexity(model, ids, context_length=CONTEXT)
        assert report.logits_stored == stored
        assert report.nll_sum == pytest.approx(expected_nll(model, ids), rel=1e-6)
    assert (3, CONTEXT, PADDED) in seen


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_of_the_caller(dtype):
    model, (ids,) = Tiny(lambda z: z.float() * 0.5), documents(CONTEXT)
    exact = expected_nll(model, ids)
    with torch.autocast("cpu", dtype):
        report = evaluate_perplexity(model, ids, context_length=CONTEXT)
        own = expected_nll(model, ids)
    assert not report.logits_stored
    assert report.nll_sum == pytest.approx(own, rel=1e-6) and own != exact


def test_inference_mode_and_loglikelihood():
    model, (ids,) = Tiny(lambda z: z * 0.5), documents(CONTEXT)
    with torch.inference_mode():
        report = evaluate_perplexity(model, ids, context_length=CONTEXT)
    assert not report.logits_stored
    ((logprob, _),) = loglikelihood(model, [(ids[:1], ids[1:])], context_length=CONTEXT)
    assert -logprob == pytest.approx(report.nll_sum, rel=1e-12)


@pytest.mark.framework
def test_compiled_model():
    from torch._dynamo.testing import CompileCounter

    model, ids = Tiny(lambda z: z * 0.5), documents(20 * CONTEXT + 1)
    expected = evaluate_perplexity(model, ids, context_length=CONTEXT, batch_size=2)
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    report = evaluate_perplexity(compiled, ids, context_length=CONTEXT, batch_size=2)
    torch._dynamo.reset()
    assert report == expected and not report.logits_stored
    assert counter.frame_count <= 4, "a batch is no reason to compile again"


def test_plain_model_without_transformers():
    code = """
import sys
sys.modules["transformers"] = None
import torch, chunked_ce
model = torch.nn.Sequential(torch.nn.Embedding(50, 8), torch.nn.Linear(8, 50))
print(chunked_ce.evaluate_perplexity(model, torch.arange(3, 40), context_length=9).logits_stored)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stderr


# transformers and PEFT


@pytest.fixture
def causal_lm():
    pytest.importorskip("transformers")
    from language_models import causal_lm

    return causal_lm


@pytest.mark.parametrize("evaluation", [False, True])
def test_enabled_model_stays_enabled(causal_lm, evaluation):
    from chunked_ce.huggingface import DeferredLogits, enable

    model, ids = causal_lm("Gemma2", query_pre_attn_scalar=8), documents(70)
    expected = evaluate_perplexity(model, ids)
    handle = enable(model, evaluation=evaluation)
    report = evaluate_perplexity(model, ids)
    assert report == expected and not report.logits_stored
    given = dict(input_ids=ids[0][None, :9], labels=ids[0][None, :9])
    assert isinstance(model.train()(**given).logits, DeferredLogits)
    handle.disable()
    assert type(model(**given).logits) is torch.Tensor


@pytest.mark.parametrize("target", ["q_proj", "lm_head"])
def test_adapter(causal_lm, target):
    """One on the head adds to its product."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    config = peft.LoraConfig(r=2, init_lora_weights=False, target_modules=[target])
    model, (ids,) = peft.get_peft_model(causal_lm("Llama"), config).eval(), documents(70)
    report = evaluate_perplexity(model, ids)
    assert report.logits_stored == (target == "lm_head")
    expected = expected_nll(lambda x: model(input_ids=x).logits, ids)
    assert report.nll_sum == pytest.approx(expected, rel=1e-6)


def test_dispatched_by_accelerate(causal_lm):
    """Its hooks replace each module's forward and move what the model returns."""
    accelerate = pytest.importorskip("accelerate")
    places = {"model": "cpu", "lm_head": "cpu"}
    model = accelerate.dispatch_model(causal_lm("Llama"), device_map=places, force_hooks=True)
    ids = documents(70)
    report, expected = evaluate_perplexity(model, ids), evaluate_perplexity(causal_lm("Llama"), ids)
    assert not report.logits_stored
    assert report.nll_sum == pytest.approx(expected.nll_sum, rel=1e-9)
