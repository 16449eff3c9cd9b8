"""evaluate_perplexity leaves the model as it was, whatever stops it, and other threads alone."""

import random
import signal
import threading
import time

import pytest
import torch
import torch.nn.functional as F
from language_models import TINY_VOCAB, Tiny

from chunked_ce import EvaluationInterrupted, evaluate_perplexity

CONTEXT = 32


def documents(*lengths):
    torch.manual_seed(1)
    return [torch.randint(3, TINY_VOCAB, (n,)) for n in lengths]


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
        assert a.keys() == b.keys()
        assert not [(k, b[k], a[k]) for k in a if not (a[k] is b[k] or a[k] == b[k])]
    assert type(model(torch.arange(3, 9)[None])) is torch.Tensor
    assert type(F.linear(torch.ones(2, 16), model.head.weight)) is torch.Tensor


@pytest.mark.parametrize("call", [1, 2, 3, 4])
@pytest.mark.parametrize("error", [ValueError("of the model"), KeyboardInterrupt()])
def test_model_after_exception(call, error):
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
def test_model_after_signal():
    def stop(*_):
        raise KeyboardInterrupt

    model, ids = Tiny(lambda z: z * 0.5), documents(20 * CONTEXT)
    previous, draw, struck = signal.signal(signal.SIGALRM, stop), random.Random(0), 0
    for _ in range(2):  # the first is slower
        start = time.monotonic()
        evaluate_perplexity(model, ids, context_length=CONTEXT, batch_size=1)
        taken = time.monotonic() - start
    before = state(model)
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


def test_a_signal_while_modes_are_set_back():
    class Struck(Tiny):
        def __setattr__(self, name, value):
            if name == "training" and value and signals:
                raise signals.pop()
            super().__setattr__(name, value)

    signals: list[BaseException] = []
    model = Struck().train()
    before = state(model)
    signals.append(KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        evaluate_perplexity(model, documents(40), context_length=CONTEXT)
    check_unchanged(model, before)


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
