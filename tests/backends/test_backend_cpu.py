"""Tests of the C kernels alone: threads, segments, conversions, and loading the library."""

import re
import shutil
import warnings

import oracle
import pytest
import torch

from chunked_ce import checks, cross_entropy, token_stats
from chunked_ce.backends import cpu_library

ALL = dict(entropy=True, mean_logprob=True, rank=True, argmax=True)
pytestmark = pytest.mark.skipif(not cpu_library.IS_AVAILABLE, reason="no C compiler built them")
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def results(x, target):
    x = x.clone().requires_grad_()
    stats = token_stats(x, target, backend="cpu", **ALL)
    loss = cross_entropy(x, target, label_smoothing=0.1, z_loss_weight=1e-3, backend="cpu")
    loss.backward()
    y = x.detach().clone().requires_grad_()
    options = dict(label_smoothing=0.1, z_loss_weight=1e-3, grad_in_forward=True, backend="cpu")
    cross_entropy(y, target, reduction="sum", **options).backward()
    return [t.detach() for t in (*stats, loss, x.grad, y.grad)]


@pytest.mark.parametrize(
    "rows, dtype",
    [(1, torch.float32), (3, torch.float32), (40, torch.float32), (3, torch.float64)],
)
def test_bit_identity_threads_and_rows(threads, rows, dtype):
    x = torch.randn(rows, 100_003, dtype=dtype) * 5
    target = torch.randint(100_003, (rows,))
    target[rows // 2] = -100 if rows > 1 else 7
    threads(1)
    first = results(x, target)
    for count in (2, 3, 7):
        threads(count)
        assert all(map(torch.equal, first, results(x, target)))
    alone = token_stats(x[-1:], target[-1:], backend="cpu", **ALL)
    assert all(torch.equal(a[-1:], b) for a, b in zip(first[:6], alone, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [1, 2, 15, 2048, 2049, 16384, 16385, 40_000])
def test_statistics_and_gradient_block_edges(dtype, vocab):
    x = (torch.randn(6, vocab) * 3).to(dtype)
    target = torch.tensor(
        [0, vocab - 1, min(2047, vocab - 1), min(2048, vocab - 1), -100, vocab // 2]
    )
    stats = token_stats(x, target, backend="cpu", **ALL)._asdict()
    for name, expected in oracle.token_stats(x, target).items():
        close = 1e-12 if dtype == torch.float64 else 1e-6
        torch.testing.assert_close(
            stats[name].double(), expected.double(), rtol=close, atol=close * 5
        )
    truth = x.double().requires_grad_()
    torch.nn.functional.cross_entropy(truth, target, reduction="sum").backward()
    x.requires_grad_()
    cross_entropy(x, target, reduction="sum", backend="cpu").backward()
    # z - lse is rounded: half an ulp of some 25, at the least likely classes
    tolerance = torch.finfo(dtype).eps * (0.51 if dtype.itemsize == 2 else 16)
    subnormal = torch.finfo(dtype).tiny * (torch.finfo(dtype).eps if dtype == torch.float16 else 1)
    torch.testing.assert_close(x.grad.double(), truth.grad, rtol=tolerance, atol=subnormal)
    assert (x.grad[4] == 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_widening_exact(dtype):
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    x = x[~x.isnan()][:, None].contiguous()
    lse = token_stats(x, torch.zeros(len(x), dtype=torch.long), backend="cpu").lse
    finite = x[:, 0].isfinite()
    assert torch.equal(lse[finite], x[finite, 0].float()) and lse[~finite].isnan().any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradient_rounding_nearest_even(dtype):
    """Choose the gradient freely as u: at classes with p = 0 it is u itself."""
    every = torch.arange(0, 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    every = every[every.isfinite()].float()
    between = (every[1:].double() + every[:-1].double()) / 2
    wanted = torch.cat(
        [
            every,
            between.float(),
            -between.float(),
            torch.nextafter(between.float(), torch.tensor(9e9)),
        ]
    )
    from chunked_ce.backends import cpu as backend_cpu
    from chunked_ce.core.gradient import Coefficients
    from chunked_ce.core.head import Head

    n = len(wanted)
    x = torch.tensor([[0.0, -torch.inf]], dtype=dtype).expand(n, 2).contiguous()
    zero, target = torch.zeros(n), torch.zeros(n, dtype=torch.long)
    arguments = (x, target, zero, zero, zero, Coefficients(None, None, None, wanted))
    grad = backend_cpu.logits_gradient(*arguments, -100, 2, Head(None, 1.0), inplace=False)
    assert torch.equal(grad[:, 1], wanted.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("at", [0, 20_000, 39_999])
def test_bad_logit_poisons_own_row(dtype, bad, at):
    x = torch.randn(3, 40_000).to(dtype)
    x[0, at] = x[2, at] = bad
    target = torch.tensor([5, 6, -100])
    stats = token_stats(x, target, backend="cpu", **ALL)
    assert stats.logprob[0].isnan() and stats.lse[0].isnan() and stats.argmax[0] == at
    assert all(s[1].isfinite() for s in stats[:4]) and all(s[2] == 0 for s in stats[:4])
    x.requires_grad_()
    cross_entropy(x, target, reduction="sum", backend="cpu").backward()
    assert x.grad[0].isnan().any() and x.grad[1].isfinite().all() and (x.grad[2] == 0).all()


def test_subnormal_results_zero():
    x = torch.full((1, 3000), -100.0)
    x[0, 0] = 0.0
    x.requires_grad_()
    cross_entropy(x, torch.tensor([0]), backend="cpu").backward()
    assert (x.grad[0, 1:] == 0).all()


def test_library_damaged(tmp_path):
    file = tmp_path / "cpu_base.bin"
    file.write_bytes(b"\x7fELF nothing that runs")
    with pytest.warns(UserWarning, match=f"{re.escape(str(file))} are not used") as warned:
        assert cpu_library.load(file) is None
    assert len(warned) == 1


def test_library_other_version(tmp_path, monkeypatch):
    file = shutil.copy(cpu_library.path(), tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert cpu_library.load(file) is not None
    monkeypatch.setattr(cpu_library, "_LAYOUT", 999)
    with pytest.warns(UserWarning, match="another version"):
        assert cpu_library.load(file) is None


def test_library_missing(monkeypatch):
    x, target = torch.randn(3, 5), torch.tensor([1, 2, 3])
    monkeypatch.setattr(cpu_library, "IS_AVAILABLE", False)
    with pytest.raises(ValueError, match="install a C compiler"):
        cross_entropy(x, target, backend="cpu")
    torch.testing.assert_close(
        cross_entropy(x, target), torch.nn.functional.cross_entropy(x, target)
    )


def test_other_device_error():
    with pytest.raises(ValueError, match="on the CPU, but input is on cuda:1"):
        checks.cpu_cannot_run(torch.device("cuda:1"), built=True)


@pytest.mark.parametrize(
    "capability, files, expected",
    [
        ("AVX512", ["base", "avx2", "avx512"], "avx512"),
        ("AVX2", ["base", "avx2", "avx512"], "avx2"),
        ("DEFAULT", ["base", "avx2", "avx512"], "base"),
        ("AVX512", ["base"], "base"),
        ("AVX512", [], None),
    ],
)
def test_library_choice(capability, files, expected, tmp_path, monkeypatch):
    for name in files:
        (tmp_path / f"cpu_{name}.bin").touch()
    monkeypatch.setattr(cpu_library, "__file__", str(tmp_path / "cpu_library.py"))
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(cpu_library.platform, "machine", lambda: "x86_64")
    found = cpu_library.path()
    assert (found and found.stem) == (expected and f"cpu_{expected}")


def test_instruction_sets_agree():
    """Compare the libraries that this machine can run on one batch."""
    x, target = torch.randn(4, 5000), torch.tensor([0, 17, 4999, -100])
    usable = {"AVX512": ["base", "avx2", "avx512"], "AVX2": ["base", "avx2"]}
    names = usable.get(torch.backends.cpu.get_cpu_capability(), ["base"])
    first = None
    for name in names:
        file = cpu_library.path().with_name(f"cpu_{name}.bin")
        if not file.exists():
            continue
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(cpu_library, "LIBRARY", cpu_library.load(file))
            got = results(x, target)
        first = first or got
        for a, b in zip(got, first, strict=True):
            torch.testing.assert_close(a, b, rtol=2e-6, atol=1e-7)


class Wrapped(torch.Tensor):
    """A wrapper subclass without storage of its own, like the results of asynchronous collectives."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        plain = [a.inner if isinstance(a, Wrapped) else a for a in args]
        return function(*plain, **(kwargs or {}))


def test_wrapper_subclasses():
    x, target, weight = torch.randn(6, 11), torch.randint(0, 11, (6,)), torch.rand(11)
    torch.testing.assert_close(
        cross_entropy(x, Wrapped(target), backend="cpu"), cross_entropy(x, target)
    )
    options = dict(label_smoothing=0.3, backend="cpu")
    torch.testing.assert_close(
        cross_entropy(x, target, Wrapped(weight), **options),
        torch.nn.functional.cross_entropy(x, target, weight, label_smoothing=0.3),
    )


def test_lazy_negative_logits():
    x = torch.fft.fft(torch.randn(6, 11)).conj().imag
    assert x.is_neg()
    target = torch.randint(0, 11, (6,))
    expected = torch.nn.functional.cross_entropy(x, target)
    torch.testing.assert_close(cross_entropy(x, target, backend="cpu"), expected)


def test_result_device():
    x, target = torch.randn(6, 11, requires_grad=True), torch.randint(0, 11, (6,))
    expected = torch.nn.functional.cross_entropy(x, target)
    with torch.device("meta"):
        loss = cross_entropy(x, target, backend="cpu")
        loss.backward()
    torch.testing.assert_close(loss, expected)
    assert x.grad.abs().max() > 0


def test_upstream_gradients_vmap():
    x, target = torch.randn(6, 11, requires_grad=True), torch.randint(0, 11, (6,))

    def jacobian(loss, **options):
        losses = loss(x, target, reduction="none", **options)
        return torch.autograd.grad(losses, x, torch.eye(6), is_grads_batched=True)[0]

    expected = jacobian(torch.nn.functional.cross_entropy)
    torch.testing.assert_close(jacobian(cross_entropy, backend="cpu"), expected)
