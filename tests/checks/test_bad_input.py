"""Every mistake gets a sentence: the argument, what came, what was expected, what to do. Before anything is computed."""

import subprocess
import sys

import pytest
import torch

import chunked_ce
from chunked_ce import cross_entropy, token_stats

X, T = torch.randn(4, 10), torch.tensor([0, 3, -100, 9])
HALF = torch.randn(2, 3, 10)


def ce(*args, **kwargs):
    return lambda: cross_entropy(*args, **kwargs)


def stats(*args, **kwargs):
    return lambda: token_stats(*args, **kwargs)


BOTH = [
    ("input is no tensor", ([1.0], T), {}, TypeError, "input must be a Tensor of logits, got list"),
    ("input of integers", (X.long(), T), {}, TypeError, "input has dtype torch.int64, expected one of float16"),
    ("complex input", (X.cfloat(), T), {}, TypeError, "input has dtype torch.complex64"),
    ("no dimension", (torch.tensor(1.0), torch.tensor(0)), {}, ValueError, "0-dimensional"),
    ("no class", (torch.randn(4, 0), T), {}, ValueError, "has no classes"),
    ("target is no tensor", (X, 3), {}, TypeError, "target must be a Tensor of class indices, got int"),
    ("target of floats", (X, T.float()), {}, TypeError, "target has dtype torch.float32.*target.long"),
    ("target of bools", (X, T > 0), {}, TypeError, "target has dtype torch.bool.*target.long"),
    ("too few targets", (X, T[:3]), {}, ValueError, r"target has shape \[3\].*input of shape \[4, 10\].*\[4\]"),
    ("target elsewhere", (X, T.to("meta")), {}, ValueError, "target is on meta, but input is on cpu"),
    ("class too large", (X, T.clamp(min=0) + 1), {}, IndexError, r"target 10 in row 3 .* 0 to 9 .*ignore_index=-100"),
    ("class below 0", (X, -T - 1), {}, IndexError, r"target -1 in row 0 is out of range"),
    ("class past vocab_size", (X, T), dict(vocab_size=5), IndexError, r"target 9 in row 3 .* 0 to 4"),
    ("ignore_index of float", (X, T), dict(ignore_index=-100.0), TypeError, r"ignore_index must be an int \(-100 ignores no class\), got float"),
    ("ignore_index of None", (X, T), dict(ignore_index=None), TypeError, "ignore_index must be an int .*, got NoneType"),
    ("vocab_size above V", (X, T), dict(vocab_size=11), ValueError, r"vocab_size is 11.*10 columns.*1 to 10"),
    ("vocab_size 0", (X, T), dict(vocab_size=0), ValueError, "vocab_size is 0"),
    ("vocab_size of float", (X, T), dict(vocab_size=5.0), TypeError, "vocab_size must be an int or None"),
    ("softcap 0", (X, T), dict(softcap=0), ValueError, r"softcap is 0.0, expected a number above 0, or None"),
    ("softcap below 0", (X, T), dict(softcap=-30.0), ValueError, "softcap is -30.0"),
    ("softcap of str", (X, T), dict(softcap="30"), TypeError, "softcap must be a number, got str"),
    ("softcap nan", (X, T), dict(softcap=float("nan")), ValueError, "softcap is nan, expected a finite number"),
    ("logit_scale inf", (X, T), dict(logit_scale=float("inf")), ValueError, "logit_scale is inf"),
    ("logit_scale of None", (X, T), dict(logit_scale=None), TypeError, "logit_scale must be a number, got NoneType"),
    ("sparse input", (X.to_sparse(), T), {}, TypeError, "input is a torch.sparse_coo tensor, expected a dense one"),
    ("sparse target", (X, T.to_sparse()), {}, TypeError, "target is a torch.sparse_coo tensor"),
    ("softcap beyond fp32", (X, T), dict(softcap=1e39), ValueError, "softcap is 1e.39, expected a finite number"),
    ("softcap of 400 digits", (X, T), dict(softcap=10**400), ValueError, "softcap is 1000"),
    ("ignore_index of 70 bits", (X, T), dict(ignore_index=2**70), ValueError, "ignore_index is .* of 64 bits"),
    ("array of backends", (X, T), dict(backend=X), ValueError, "backend is tensor"),
    ("inplace of str", (X, T), dict(inplace_backward="yes"), TypeError, "inplace_backward must be True or False"),
    ("unknown backend", (X, T), dict(backend="cuda"), ValueError, "backend is 'cuda', expected one of auto, cpu"),
]  # fmt: skip
CROSS_ENTROPY = [
    ("classes last", (HALF, T[:6].repeat(2)[:6].view(2, 3)), {}, ValueError, r"dim=1 \(torch's default is 1\): pass dim=-1"),
    ("target is a list", (X, [0, 1, 2, 3]), {}, TypeError, r"target must be a Tensor of class indices, got list: pass torch.tensor\(target\)"),
    ("dim too large", (X, T), dict(dim=2), ValueError, "dim is 2, but input of shape .4, 10. has dimensions -2 to 1"),
    ("dim of str", (X, T), dict(dim="V"), TypeError, "dim must be an int, got str"),
    ("dim of one row", (X[0], T[0]), dict(dim=2), ValueError, "dim is 2, but an input of shape .10."),
    ("unknown reduction", (X, T), dict(reduction="avg"), ValueError, "reduction is 'avg', expected one of mean, sum, none"),
    ("num_items of 70 bits", (X, T), dict(num_items=2**70), ValueError, "num_items is .* of 64 bits"),
    ("no reduction", (X, T), dict(reduction=None), ValueError, "reduction is None"),
    ("smoothing below 0", (X, T), dict(label_smoothing=-0.1), ValueError, "label_smoothing is -0.1, expected .* 0 to 1"),
    ("smoothing above 1", (X, T), dict(label_smoothing=1.5), ValueError, "label_smoothing is 1.5"),
    ("smoothing of bool", (X, T), dict(label_smoothing=True), TypeError, "label_smoothing must be a number, got bool"),
    ("z-loss below 0", (X, T), dict(z_loss_weight=-1e-4), ValueError, "z_loss_weight is -0.0001"),
    ("grad_in_forward of int", (X, T), dict(grad_in_forward=1), TypeError, "grad_in_forward must be True or False"),
    ("token_weight of list", (X, T), dict(token_weight=[1.0] * 4), TypeError, "token_weight must be a Tensor, got list"),
    ("token_weight of ints", (X, T), dict(token_weight=T), TypeError, "token_weight has dtype torch.int64"),
    ("one weight per class", (X, T), dict(token_weight=torch.ones(10)), ValueError, r"shape \[10\].*one weight per class, see weight"),
    ("token_weight elsewhere", (X, T), dict(token_weight=torch.ones(4, device="meta")), ValueError, "token_weight is on meta"),
    ("num_items 0", (X, T), dict(num_items=0), ValueError, "num_items is 0, expected at least 1"),
    ("num_items of float", (X, T), dict(num_items=3.0), TypeError, "num_items must be an int or a 0-dimensional tensor"),
    ("num_items of one dimension", (X, T), dict(num_items=torch.ones(1)), ValueError, r"num_items has shape \[1\]"),
    ("num_items on meta", (X, T), dict(num_items=torch.tensor(4, device="meta")), ValueError, "num_items is on meta, where it has no value"),
    ("num_items of bool", (X, T), dict(num_items=torch.tensor(True)), TypeError, "num_items has dtype torch.bool"),
    ("num_items with sum", (X, T), dict(num_items=3, reduction="sum"), ValueError, "reduction is 'sum': leave it None"),
]  # fmt: skip
STATS = [
    (f"{name} of int", (X, T), {name: 1}, TypeError, f"{name} must be True or False, got int")
    for name in ("entropy", "mean_logprob", "rank", "argmax")
]
CASES = [(f"{f.__name__}: {c[0]}", f, *c[1:]) for f in (ce, stats) for c in BOTH]
CASES += [(f"ce: {c[0]}", ce, *c[1:]) for c in CROSS_ENTROPY] + [
    (f"stats: {c[0]}", stats, *c[1:]) for c in STATS
]


@pytest.mark.parametrize(
    ("make", "args", "kwargs", "error", "message"),
    [c[1:] for c in CASES],
    ids=[c[0] for c in CASES],
)
def test_message(make, args, kwargs, error, message, monkeypatch):
    from chunked_ce.backends import torch as backend_torch

    monkeypatch.setattr(
        backend_torch, "_sum_rows", lambda *a: pytest.fail("computed before the check")
    )
    before = [
        a.clone()
        if isinstance(a, torch.Tensor) and a.device.type == "cpu" and not a.is_sparse
        else None
        for a in args
    ]
    with pytest.raises(error, match=message) as caught:
        make(*args, **kwargs)()
    text = str(caught.value)
    assert "\n" not in text and len(text) < 400
    for now, then in zip(args, before, strict=True):
        assert then is None or torch.equal(now, then), "nothing of the user's is changed"


def test_numpys_integers_are_ints():
    numpy = pytest.importorskip("numpy")
    options = dict(ignore_index=numpy.int64(3), vocab_size=numpy.int32(10))
    assert torch.equal(
        cross_entropy(X, T.abs() % 10, **options), cross_entropy(X, T.abs() % 10, ignore_index=3)
    )


def test_expanded_logits_cannot_take_a_gradient_in_place():
    x = (torch.randn(10, requires_grad=True) * 1).expand(4, 10)
    with pytest.raises(ValueError, match="one memory location per logit.*expanded"):
        cross_entropy(x, T, inplace_backward=True)


def run(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={"PATH": "/usr/bin:/bin"}
    )
    return done.stdout + done.stderr


def test_triton_on_the_cpu_is_refused_not_replaced():
    code = """
import torch, chunked_ce
try: chunked_ce.cross_entropy(torch.randn(2, 5), torch.tensor([0, 1]), backend="triton")
except ValueError as e: print(e)
"""
    pytest.importorskip("triton")
    assert "backend='triton' needs tensors on a GPU, but input is on cpu" in run(code)


def test_works_without_triton_and_without_transformers():
    """PITFALLS, loss 27: no Triton, no C compiler."""
    code = """
import sys
for name in ("triton", "transformers", "matplotlib", "tqdm"): sys.modules[name] = None
import torch, chunked_ce
x = torch.randn(4, 9, requires_grad=True)
chunked_ce.cross_entropy(x, torch.tensor([0, 1, 2, -100])).backward()
print(float(x.grad.abs().sum()) > 0)
"""
    assert run(code).strip() == "True"


def test_asking_for_triton_without_it():
    code = """
import importlib.util, torch
real = importlib.util.find_spec
importlib.util.find_spec = lambda name, *a: None if name == "triton" else real(name, *a)
import chunked_ce
try: chunked_ce.cross_entropy(torch.randn(2, 5), torch.tensor([0, 1]), backend="triton")
except ValueError as e: print(e)
"""
    assert (
        "needs the triton package, which is not installed: pip install 'chunked-ce[triton]'"
        in run(code)
    )


def test_public_names():
    assert set(chunked_ce.__all__) <= set(dir(chunked_ce))
    for name in chunked_ce.__all__:
        assert getattr(chunked_ce, name).__doc__
