"""What is read off deferred logits over their classes: log-probabilities, entropies, argmax."""

import pytest
import torch
import torch.nn.functional as F

from chunked_ce.huggingface import DeferredLogits, reductions
from chunked_ce.huggingface.deferred import Head
from chunked_ce.huggingface.distribution import DeferredDistribution

ROWS, VOCAB = (2, 5), 29


def deferred(dtype=torch.float64, rows=ROWS):
    torch.manual_seed(3)
    x = torch.randn(*rows, 6, dtype=dtype, requires_grad=True)
    w = torch.randn(VOCAB, 6, dtype=dtype, requires_grad=True)
    b = torch.randn(VOCAB, dtype=dtype, requires_grad=True)
    return DeferredLogits(Head.capture(x, w, b, lambda: None), x), (x, w, b)


def ids_of(rows=ROWS):
    return torch.randint(0, VOCAB, rows, generator=torch.Generator().manual_seed(4))


def entropy(z):
    logp = F.log_softmax(z, dim=-1)
    return -(torch.exp(logp) * logp).sum(-1)


def entropy_of_softmax(z):
    p = F.softmax(z, dim=-1)
    return torch.logsumexp(z, dim=-1) - torch.sum(p * z, dim=-1)


def rows_of_chunks(z, ids):
    flat = z.reshape(-1, z.shape[-1])
    return torch.cat([entropy(chunk) for chunk in flat.split(3, dim=0)]).reshape(ids.shape)


READ_OFF = {
    "log-probability": lambda z, ids: z.log_softmax(-1).gather(-1, ids.unsqueeze(-1)).squeeze(-1),
    "by functions": lambda z, ids: torch.gather(F.log_softmax(z, -1), 2, ids.unsqueeze(-1)),
    "by keywords": lambda z, ids: (
        torch.log_softmax(z, dim=-1).gather(dim=2, index=ids.unsqueeze(2)).squeeze(dim=2)
    ),
    "by take_along_dim": lambda z, ids: torch.take_along_dim(
        z.log_softmax(dim=-1), ids.unsqueeze(-1), dim=2
    ),
    "in another dtype": lambda z, ids: F.log_softmax(z, dim=-1, dtype=torch.float32).gather(
        -1, ids[..., None]
    ),
    "probability": lambda z, ids: z.softmax(-1).gather(-1, ids[..., None]),
    "log-probability sliced later": lambda z, ids: z.log_softmax(-1)[:, :-1].gather(
        -1, ids[:, 1:, None]
    ),
    "logsumexp": lambda z, ids: z.logsumexp(-1),
    "logsumexp kept": lambda z, ids: torch.logsumexp(z, dim=-1, keepdim=True),
    "logit of int32 ids": lambda z, ids: z.gather(-1, ids.unsqueeze(-1).int()),
    "logit": lambda z, ids: z.gather(-1, ids.unsqueeze(-1)),
    "logit minus logsumexp": lambda z, ids: (
        torch.gather(z, dim=-1, index=ids[..., None]).squeeze(-1)
        - torch.stack([torch.logsumexp(row, dim=-1) for row in z])
    ),
    "rows": lambda z, ids: torch.stack(
        [F.log_softmax(r, -1).gather(-1, i) for r, i in zip(z, ids.unsqueeze(-1), strict=True)]
    ),
    "at a temperature": lambda z, ids: (
        (z[:, 1:] / 0.7).log_softmax(-1).gather(-1, ids[:, 1:, None])
    ),
    "of a softcap": lambda z, ids: (
        ((z / 3.0).tanh() * 3.0).log_softmax(-1).gather(-1, ids[..., None])
    ),
    "of the first classes": lambda z, ids: (
        z[..., :20].log_softmax(-1).gather(-1, ids.clamp(max=19)[..., None])
    ),
    "of one token": lambda z, ids: z[1, 2].log_softmax(-1).gather(-1, ids[1, 2:3]),
    "entropy": lambda z, ids: entropy(z),
    "entropy of chunks": rows_of_chunks,
    "entropy of softmax": lambda z, ids: entropy_of_softmax(z),
    "entropy of a slice": lambda z, ids: entropy(z[:, 1:-1].reshape(-1, VOCAB)),
    "entropy of products the other way": lambda z, ids: torch.mul(
        z.log_softmax(-1), z.log_softmax(-1).exp()
    ).sum(dim=-1, keepdim=True),
    "argmax": lambda z, ids: z.argmax(-1) * 1.0 + 0.0 * z.logsumexp(-1),
    "argmax kept": lambda z, ids: (
        torch.argmax(z, dim=2, keepdim=True) + 0.0 * z[..., :1].logsumexp(-1, True)
    ),
}


@pytest.mark.parametrize("idiom", READ_OFF)
def test_idioms_without_logits(idiom):
    logits, leaves = deferred()
    ours = READ_OFF[idiom](logits, ids_of())
    assert logits._real is None, "computed"
    theirs = READ_OFF[idiom](F.linear(*leaves), ids_of())
    assert type(ours) is torch.Tensor and ours.dtype == theirs.dtype
    tolerance = 1e-6 if theirs.dtype == torch.float32 else 1e-12
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
    wanted = torch.autograd.grad(theirs.square().sum(), leaves)
    for a, e in zip(torch.autograd.grad(ours.square().sum(), leaves), wanted, strict=True):
        torch.testing.assert_close(a, e, rtol=tolerance, atol=tolerance)


COMPUTED = {
    "several classes": lambda z, ids: z.log_softmax(-1).gather(
        -1, torch.tensor([[[1, 2]] * 5] * 2)
    ),
    "fewer tokens than there are": lambda z, ids: z.gather(-1, ids[:1, :3, None]),
    "along the tokens": lambda z, ids: z.gather(1, torch.zeros(2, 1, VOCAB, dtype=torch.int64)),
    "softmax over the tokens": lambda z, ids: z.log_softmax(1),
    "log-softmax itself": lambda z, ids: z.log_softmax(-1) * 2.0,
    "sum of probabilities": lambda z, ids: z.softmax(-1).sum(-1),
    "sum of all": lambda z, ids: (z.softmax(-1) * z).sum(),
    "another's logits": lambda z, ids: (z.softmax(-1) * (z * 2.0)).sum(-1),
    "exponential of probabilities": lambda z, ids: z.softmax(-1).exp(),
    "slice of a product": lambda z, ids: (z.softmax(-1) * z)[:, 1:],
    "over all": lambda z, ids: z.logsumexp((0, 1, 2)),
    "argmax of all": lambda z, ids: z.argmax() + 0.0 * z,
    "broadcast indices": lambda z, ids: torch.take_along_dim(z, ids[:1, :, None], dim=-1),
    "columns of probabilities": lambda z, ids: z.softmax(-1)[..., 3:],
    "after the logits were made": lambda z, ids: (z.sum(), entropy(z))[1],
    "a row as rows": lambda z, ids: torch.stack(list(z[0, 0].split(29))),
    "sections": lambda z, ids: z.split([1, 1])[1].log_softmax(-1),
    "a reshape across the classes": lambda z, ids: z.reshape(-1, 2).log_softmax(-1),
    "sparse": lambda z, ids: z.gather(-1, ids[..., None], sparse_grad=False),
}


@pytest.mark.parametrize("use", COMPUTED)
def test_other_uses_compute_the_logits(use):
    logits, leaves = deferred()
    ours, theirs = COMPUTED[use](logits, ids_of()), COMPUTED[use](F.linear(*leaves), ids_of())
    ours = ours.tensor() if isinstance(ours, DeferredDistribution) else ours
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    wanted = torch.autograd.grad(theirs.square().sum(), leaves)
    for a, e in zip(torch.autograd.grad(ours.square().sum(), leaves), wanted, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-12, atol=1e-12)
    assert logits._real is not None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("idiom", ["log-probability", "logsumexp", "logit", "entropy"])
def test_half_precision_is_no_further_from_the_truth(idiom, dtype):
    logits, leaves = deferred(dtype)
    ours, theirs = READ_OFF[idiom](logits, ids_of()), READ_OFF[idiom](F.linear(*leaves), ids_of())
    assert ours.dtype == theirs.dtype == dtype
    exact = READ_OFF[idiom](F.linear(*(t.double() for t in leaves)), ids_of())
    step = torch.finfo(dtype).eps * exact.abs()  # of rounding the result, and of one logit
    assert ((ours - exact).abs() <= (theirs - exact).abs() + 2 * step).all()


def test_dtype_under_autocast():
    logits, leaves = deferred(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        ours = [READ_OFF[i](logits, ids_of()) for i in ("log-probability", "entropy", "logsumexp")]
        real = F.linear(*leaves).float()
        theirs = [READ_OFF[i](real, ids_of()) for i in ("log-probability", "entropy", "logsumexp")]
    assert [t.dtype for t in ours] == [t.dtype for t in theirs]


@pytest.fixture
def passes(monkeypatch):
    """Count the passes over the vocabulary."""
    seen = []
    stats = reductions.linear_token_stats
    monkeypatch.setattr(
        reductions, "linear_token_stats", lambda *a, **k: seen.append(a[2].shape) or stats(*a, **k)
    )
    return seen


def test_one_pass_for_log_probability_and_entropy(passes):
    logits, _ = deferred()
    scaled = logits[:, :-1] / 0.9
    READ_OFF["logit minus logsumexp"](scaled, ids_of()[:, 1:])
    with torch.no_grad():
        assert not rows_of_chunks(scaled, ids_of()[:, 1:]).requires_grad
    assert passes == [(8,)]
    assert rows_of_chunks(scaled, ids_of()[:, 1:]).requires_grad and len(passes) == 1


def test_one_pass_for_all_chunks(passes):
    logits, _ = deferred()
    with torch.no_grad():
        rows_of_chunks(logits, ids_of())
    assert passes == [(10,)]
    assert logits.logsumexp(-1).requires_grad and len(passes) == 2, "gradients are wanted now"
    logits.argmax(-1)
    assert logits[:, 1:].logsumexp(-1).requires_grad and len(passes) == 3


@pytest.mark.parametrize(
    ("ids", "error"),
    [
        (torch.full((2, 5, 1), VOCAB), "index 29 is out of bounds"),
        (torch.full((2, 5, 1), -100), "index -100 is out of bounds"),
        (torch.zeros(2, 5, dtype=torch.int64), "same number of dimensions"),
        (torch.zeros(3, 5, 1, dtype=torch.int64), "Size does not match at dimension 0"),
        (torch.zeros(2, 5, 1), "Expected dtype int"),
    ],
)
@pytest.mark.parametrize("of", ["logits", "log-softmax"])
def test_bad_ids_raise_what_torch_raises(ids, error, of, passes):
    logits, leaves = deferred()
    for z in (F.linear(*leaves), logits):
        with pytest.raises(RuntimeError, match=error):
            (z if of == "logits" else z.log_softmax(-1)).gather(-1, ids)
    assert logits._real is None and not passes, "computed"


def test_no_tokens():
    logits, _ = deferred(rows=(0, 5))
    assert logits.log_softmax(-1).gather(-1, ids_of((0, 5))[..., None]).shape == (0, 5, 1)
    assert entropy(logits).shape == (0, 5) and logits.view(0, VOCAB).shape == (0, VOCAB)


@pytest.mark.parametrize("idiom", ["log-probability", "logsumexp", "entropy"])
def test_after_the_weight_changed(idiom):
    logits, (_, w, _) = deferred()
    with torch.no_grad():
        w.mul_(2.0)
    with pytest.raises(RuntimeError, match=r"read it before optimizer.step"):
        READ_OFF[idiom](logits, ids_of())


def test_after_the_logits_changed():
    logits, leaves = deferred()
    READ_OFF["log-probability"](logits, ids_of())
    logits.mul_(2.0)
    torch.testing.assert_close(entropy(logits), entropy(F.linear(*leaves) * 2.0))


def test_hook_on_logits():
    logits, _ = deferred()
    READ_OFF["log-probability"](logits, ids_of())
    with pytest.raises(RuntimeError, match="would see no gradient"):
        logits.retain_grad()


def test_hook_after_argmax():
    logits, _ = deferred()
    logits.argmax(-1)
    with torch.no_grad():
        entropy(logits)
    logits.retain_grad()
    READ_OFF["log-probability"](logits, ids_of()).sum().backward()
    assert logits.grad is not None


def test_no_memory_for_kernels():
    logits, _ = deferred()
    for lazy in (logits, logits.log_softmax(-1)):
        assert lazy.stride() == (0, 0, 0) and lazy.stride(-1) == 0
        with pytest.raises(RuntimeError, match=r"pass outputs.logits.tensor\(\)"):
            lazy.data_ptr()
    assert logits._real is None


def test_a_tracer_computes_the_logits():
    logits, leaves = deferred()

    @torch.compile(backend="aot_eager")
    def both(z, ids):
        return READ_OFF["logit minus logsumexp"](z, ids), entropy(z)

    for ours, theirs in zip(both(logits, ids_of()), both(F.linear(*leaves), ids_of()), strict=True):
        torch.testing.assert_close(ours, theirs)
