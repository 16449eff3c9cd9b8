"""evaluate_perplexity with the head deferred: where logits are stored, and what is computed."""

import subprocess
import sys
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from language_models import PADDED_VOCAB as PADDED
from language_models import TINY_VOCAB as VOCAB
from language_models import Tiny, windows_nll
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from chunked_ce import evaluate_perplexity, loglikelihood
from chunked_ce.huggingface.head_product import HeadProduct
from chunked_ce.ops import chunks

CONTEXT = 32


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


def expected_nll(model, ids):
    return windows_nll(model, ids, CONTEXT)


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
def test_nll_and_logits_stored(name, monkeypatch):
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


def test_logits_stored_by_some_windows():
    model, (ids,) = Tiny(lambda z: z if z.shape[1] < 20 else z + 1.0), documents(100)
    report = evaluate_perplexity(model, ids, context_length=CONTEXT)
    assert report.logits_stored
    assert report.nll_sum == pytest.approx(expected_nll(model, ids), rel=1e-6)


def test_logits_used_by_the_model():
    """They are a tensor, equal to that of a call in which nothing is deferred."""
    model, uses = Tiny(), []
    model.transform = lambda z: uses.append(z + 0.0) or z
    expected = model(torch.arange(3, 9)[None])
    HeadProduct().defer(model.head.weight, lambda: model(torch.arange(3, 9)[None]))
    assert type(uses[1]) is torch.Tensor and torch.equal(uses[1], expected)


def modes():
    return torch.overrides._get_current_function_mode_stack()


def test_a_signal_within_torchs_own_handling_of_modes():
    """Torch takes the mode off its stack in a generator, which a signal may leave unfinished."""
    model, (ids,), unfinished = Tiny(), documents(3 * CONTEXT), []

    def interrupt(z):
        if signals and len(z.shape) == 3 and z.shape[1] == CONTEXT:
            unfinished.append(torch.overrides._pop_mode_temporarily())
            unfinished[-1].__enter__()
            raise KeyboardInterrupt
        return z

    signals, model.transform = [], interrupt
    whole = evaluate_perplexity(model, ids, context_length=CONTEXT)
    for outer in (nullcontext(), torch.device("cpu"), HeadProduct()):
        with outer:
            before = modes()
            signals.append(1)
            with pytest.raises(KeyboardInterrupt):
                evaluate_perplexity(model, ids, context_length=CONTEXT)
            assert modes() == before
            signals.clear()
            unfinished.clear()  # which puts it back
            (left,) = set(modes()) - set(before)
            seen = len(left.seen)
            again = evaluate_perplexity(model, ids, context_length=CONTEXT)
            assert again.nll_sum == whole.nll_sum and len(left.seen) == seen
            torch.overrides._pop_mode()
            assert modes() == before


def test_head_hooks():
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
def test_enabled_model(causal_lm, evaluation):
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
