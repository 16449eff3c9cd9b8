"""Ctrl-C, and whatever else stops or enters a call in its midst: nothing half-written is used afterwards."""

import random
import signal
import sys

import pytest
import torch
from helpers import batch

from chunked_ce import Perplexity, backends, cross_entropy, linear_cross_entropy, token_stats
from chunked_ce.backends import cpu_library
from chunked_ce.backends import torch as backend_torch

WRITES = dict(inplace_backward=True), dict(grad_in_forward=True, inplace_backward=True)


@pytest.fixture
def interrupt(monkeypatch):
    """interrupt(name, call): Ctrl-C arrives at that call of a function of the torch backend."""

    monkeypatch.setattr(cpu_library, "IS_AVAILABLE", False)

    def at(name, call):
        function, calls = getattr(backend_torch, name), []

        def interrupted(*args, **kwargs):
            calls.append(1)
            if len(calls) == call:
                raise KeyboardInterrupt
            return function(*args, **kwargs)

        monkeypatch.setattr(backend_torch, name, interrupted)

    return at


def linear_case(**options):
    x, w = torch.randn(12, 16), torch.randn(100, 16)
    target = torch.randint(0, 100, (12,))
    x, w = x.requires_grad_(), w.requires_grad_()
    return linear_cross_entropy(x, w, target, token_chunk_size=4, **options), (x, w)


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_a_backward_of_chunks_can_be_run_again(interrupt, reduction):
    """`none` computes its chunks in backward; `sum` scales there what forward computed."""
    expected_loss, leaves = linear_case(reduction=reduction)
    expected = torch.autograd.grad(expected_loss.sum(), leaves)
    torch.manual_seed(0)
    loss, leaves = linear_case(reduction=reduction)
    interrupt("blocks" if reduction == "sum" else "block_gradient", 2)
    with pytest.raises(KeyboardInterrupt):
        torch.autograd.grad((2 * loss).sum(), leaves, retain_graph=True)
    again = torch.autograd.grad(loss.sum(), leaves)
    for ours, truth in zip(again, expected, strict=True):
        assert torch.equal(ours, truth)


def test_logits_half_overwritten_by_a_backward_are_refused(interrupt):
    x, target = batch(20, 100, ignored=0)
    logits = x.clone().requires_grad_() * 1
    loss = cross_entropy(logits, target, inplace_backward=True)
    interrupt("block_gradient", 3)
    with pytest.raises(KeyboardInterrupt):
        loss.backward(retain_graph=True)
    changed = (logits != x).any(1)
    assert changed.any() and not changed.all()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("options", WRITES, ids=["backward", "forward"])
def test_logits_overwritten_by_a_kernel_are_refused(options, backend, device, monkeypatch):
    """Ctrl-C just after the launch. Kernels write behind autograd's back."""
    x, target = batch(4, 100, device=device, ignored=0)
    logits = x.clone().requires_grad_() * 1
    earlier = logits.square().sum()
    name = "loss_and_gradient" if "grad_in_forward" in options else "logits_gradient"
    write = getattr(backends, name)

    def interrupted(*args, **kwargs):
        write(*args, **kwargs)
        raise KeyboardInterrupt

    monkeypatch.setattr(backends, name, interrupted)
    with pytest.raises(KeyboardInterrupt):
        cross_entropy(logits, target, backend=backend, **options).backward()
    assert (logits != x).any()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        earlier.backward()


def test_logits_half_overwritten_by_a_forward_are_refused(interrupt):
    x, target = batch(20, 100, ignored=0)
    logits = x.clone().requires_grad_() * 1
    earlier = logits.square().sum()
    interrupt("block_gradient", 3)
    with pytest.raises(KeyboardInterrupt):
        cross_entropy(logits, target, grad_in_forward=True, inplace_backward=True)
    assert (logits != x).any()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        earlier.backward()


def test_a_gradient_half_scaled_is_refused(interrupt):
    x, target = batch(20, 100)
    logits = x.clone().requires_grad_() * 1
    loss = cross_entropy(logits, target, grad_in_forward=True)
    interrupt("blocks", 1)
    with pytest.raises(KeyboardInterrupt):
        loss.backward(torch.tensor(3.0))
    with pytest.raises(RuntimeError, match="first backward has handed over"):
        loss.backward(torch.tensor(3.0))


def test_a_target_out_of_range_has_changed_nothing():
    x, target = batch(20, 100, ignored=0)
    target[3] = 100
    logits = x.clone().requires_grad_() * 1
    earlier = logits.square().sum()
    with pytest.raises(IndexError, match="row 3"):
        cross_entropy(logits, target, grad_in_forward=True, inplace_backward=True)
    assert torch.equal(logits, x)
    earlier.backward()


class Interrupted(Exception):
    pass


@pytest.mark.struck
@pytest.mark.parametrize("times", [60, pytest.param(1000, marks=pytest.mark.long)])
def test_interruptions_at_any_moment(times, monkeypatch):
    """A timer's signals, wherever they strike; then backward again, where autograd allows it."""
    x, target = batch(60, 100)
    truth = x.clone().requires_grad_()
    cross_entropy(truth, target).backward()

    def stop(*_):
        raise Interrupted

    # Python itself swallows what strikes in a callback (of the garbage collector, of a weak reference).
    report = sys.unraisablehook
    swallowed = lambda it: None if it.exc_type is Interrupted else report(it)  # noqa: E731
    monkeypatch.setattr(sys, "unraisablehook", swallowed)

    before, draw, struck = signal.signal(signal.SIGALRM, stop), random.Random(0), 0
    try:
        while struck < times:
            options = draw.choice(({}, *WRITES))
            logits = x.clone().requires_grad_() * 1
            grad = loss = None
            try:
                signal.setitimer(signal.ITIMER_REAL, draw.uniform(1e-5, 8e-3))
                loss = cross_entropy(logits, target, **options)
                (grad,) = torch.autograd.grad(loss, logits, retain_graph=True)
                signal.setitimer(signal.ITIMER_REAL, 0)
            except Interrupted:
                struck += 1
                signal.setitimer(signal.ITIMER_REAL, 0)
            if grad is None and loss is not None:
                try:
                    (grad,) = torch.autograd.grad(loss, logits)
                except RuntimeError as error:  # refused: written to, or spent
                    assert options and ("inplace" in str(error) or "second backward" in str(error))
            assert grad is None or torch.equal(grad, truth.grad)
            assert options or torch.equal(logits, x)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.struck
def test_a_signal_handler_may_compute_a_loss():
    """As one that validates before the job is taken away; it comes between two blocks of a call."""
    x, target = batch(60, 400)
    other, other_target = batch(50, 300)
    expected = token_stats(x, target, entropy=True)
    leaf = x.clone().requires_grad_()
    cross_entropy(leaf, target).backward()
    calls, draw = [], random.Random(0)

    def validate(*_):
        calls.append(float(cross_entropy(other, other_target)))

    before = signal.signal(signal.SIGALRM, validate)
    try:
        while len(calls) < 15:
            signal.setitimer(signal.ITIMER_REAL, draw.uniform(1e-5, 8e-3))
            stats = token_stats(x, target, entropy=True)
            again = x.clone().requires_grad_()
            cross_entropy(again, target).backward()
            for ours, truth in ((stats.lse, expected.lse), (stats.entropy, expected.entropy)):
                assert torch.equal(ours, truth)
            assert torch.equal(again.grad, leaf.grad)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert len(set(calls)) == 1


def test_a_meter_holds_all_of_a_batch_or_nothing(monkeypatch):
    from importlib import import_module

    perplexity = import_module("chunked_ce.evaluation.meter")  # as an attribute it is the function
    x, target = batch(20, 100)
    meter, whole = Perplexity(), Perplexity()
    meter.update(x, target, n_bytes=5)
    whole.update(x, target, n_bytes=5)
    add, calls = perplexity._add, []

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return add(*args)

    monkeypatch.setattr(perplexity, "_add", interrupted)
    with pytest.raises(KeyboardInterrupt):
        meter.update(x, target, n_bytes=5)
    assert meter.report() == whole.report()
