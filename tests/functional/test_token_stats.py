"""Tests of token_stats against the fp64 oracle: values, gradients, strides, dtypes, special values."""

import math

import oracle
import pytest
import torch
from helpers import ULP, assert_gradient, batch, gradient

from chunked_ce import cross_entropy, token_stats

ALL = dict(entropy=True, mean_logprob=True, rank=True, argmax=True)
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
HEADS = [{}, {"softcap": 5.0}, {"logit_scale": 0.3}, {"softcap": 8.0, "logit_scale": 1.7}]


def assert_stats(ours, truth, rtol=2e-6):
    for name, value in truth.items():
        got = getattr(ours, name)
        assert got.shape == value.shape
        if name in ("rank", "argmax"):
            assert got.dtype == torch.int64
            assert torch.equal(got, value), name
        else:
            assert got.dtype == (torch.float64 if rtol < 1e-9 else torch.float32)
            torch.testing.assert_close(
                got.double(),
                value,
                rtol=rtol,
                atol=rtol,
                equal_nan=True,
                msg=lambda m, n=name: f"{n}: {m}",
            )


# 1: alone with its target; 3: less than a load of 16 bytes; 100: several tiles; 301: longer than a block
@pytest.mark.parametrize("vocab", [1, 2, 3, 17, 64, 100, 301])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values(backend, device, dtype, vocab):
    x, target = batch(5, vocab, dtype, device)
    rtol = 1e-11 if dtype == torch.float64 else 2e-6
    assert_stats(
        token_stats(x, target, backend=backend, **ALL), oracle.token_stats(x, target), rtol
    )


@pytest.mark.parametrize("head", HEADS, ids=str)
@pytest.mark.parametrize("vocab_size", [None, 70])
def test_head_and_padded_vocabulary(backend, device, head, vocab_size):
    x, target = batch(6, 100, device=device)
    target = target.clamp(max=69)
    x[:, 70:] += 50  # must not be seen
    if vocab_size is None:
        x[:, 70:] -= 50
    options = dict(head, vocab_size=vocab_size)
    truth = oracle.token_stats(x, target, **options)
    assert_stats(token_stats(x, target, backend=backend, **ALL, **options), truth)
    for name in ("lse", "logprob", "entropy", "mean_logprob"):
        upstream = torch.randn(6, device=device)
        wanted = {} if name in ("lse", "logprob") else {name: True}
        ours = gradient(
            lambda x, name=name, wanted=wanted: getattr(
                token_stats(x, target, backend=backend, **wanted, **options), name
            ),
            x,
            upstream=upstream,
        )
        exact = gradient(
            lambda x, name=name: oracle.token_stats(x, target, **options)[name],
            x.double(),
            upstream=upstream,
        )
        assert_gradient(
            ours, exact, torch.float32, upstream.abs().max() if "softcap" in head else None
        )
        assert (ours[target == -100] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab", [1, 3, 100, 301])
def test_gradient_of_everything_at_once(backend, device, dtype, vocab):
    x, target = batch(5, vocab, dtype, device)
    g = torch.randn(4, 5, device=device, dtype=torch.float64)

    def ours(x):
        s = token_stats(x, target, backend=backend, entropy=True, mean_logprob=True)
        return (g.to(s.lse) * torch.stack([s.lse, s.logprob, s.entropy, s.mean_logprob])).sum()

    def truth(x):
        s = oracle.token_stats(x, target)
        return (g * torch.stack([s["lse"], s["logprob"], s["entropy"], s["mean_logprob"]])).sum()

    assert_gradient(gradient(ours, x), gradient(truth, x.double()), dtype)


def views():
    x, target = batch((3, 5), 100)
    odd = torch.randn(3, 5, 107)
    yield "last token dropped", x[:, :-1], target[:, :-1]
    yield "padded columns dropped", odd[..., :100], target
    yield "columns from 3", odd[..., 3:103], target
    yield "leading dimensions transposed", x.transpose(0, 1), target.t()
    yield "classes strided", torch.randn(3, 100, 5).transpose(1, 2), target
    yield "every other class", torch.randn(3, 5, 200)[..., ::2], target
    yield "expanded", torch.randn(5, 100).expand(3, 5, 100), target
    yield "every other label", x[:, :3], target.repeat_interleave(2, 1)[:, :6:2]
    yield (
        "four dimensions",
        torch.randn(2, 3, 2, 4, 100)[:, ::2, :, 1:3],
        target[:2, :4].view(2, 2, 2, 1).repeat(1, 1, 1, 2),
    )
    yield "one row of three dimensions", x[:1, :1], target[:1, :1]


@pytest.mark.parametrize("case", list(views()), ids=lambda c: c[0])
def test_strides(backend, device, case):
    """Compare a view with its contiguous copy."""
    _, x, target = case
    x = x.to(device)
    target = target.to(device)
    assert_stats(token_stats(x, target, backend=backend, **ALL), oracle.token_stats(x, target))
    leaf = x.detach().requires_grad_()
    out = token_stats(leaf, target, backend=backend).logprob
    upstream = torch.randn(out.shape, device=device)
    out.backward(upstream)
    truth = gradient(
        lambda x: oracle.token_stats(x, target)["logprob"],
        x.double().contiguous(),
        upstream=upstream,
    )
    assert_gradient(leaf.grad, truth, torch.float32)


@pytest.mark.parametrize(
    "dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64], ids=str
)
def test_target_dtypes(backend, device, dtype):
    x, target = batch(4, 50, device=device, ignored=0)
    expected = token_stats(x, target, backend=backend, rank=True)
    for got, want in zip(
        token_stats(x, target.to(dtype), backend=backend, rank=True), expected, strict=True
    ):
        assert (got is None and want is None) or torch.equal(got, want)


@pytest.mark.parametrize("ignore_index", [-100, -1, 0, 7, 255])
def test_ignore_index_any_value(backend, device, ignore_index):
    x, target = batch(6, 50, device=device, ignored=0)
    target[2] = target[4] = ignore_index
    ours = token_stats(x, target, ignore_index=ignore_index, backend=backend, **ALL)
    assert_stats(ours, oracle.token_stats(x, target, ignore_index))


def test_unbatched_and_empty(backend, device):
    x, target = batch(3, 40, device=device, ignored=0)
    one = token_stats(x[1], target[1], backend=backend, **ALL)
    assert one.lse.shape == ()
    assert_stats(one, {k: v[1] for k, v in oracle.token_stats(x, target).items()})
    for shape in [(0, 7), (0, 3, 7), (3, 0, 7)]:
        leaf = torch.randn(shape, device=device, requires_grad=True)
        stats = token_stats(
            leaf, torch.zeros(shape[:-1], dtype=torch.long, device=device), backend=backend, **ALL
        )
        assert all(s.shape == shape[:-1] for s in stats)
        stats.logprob.sum().backward()
        assert leaf.grad.shape == shape


# --- DESIGN section 4, row by row -----------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("offset", [0.0, 1e4, -1e4])
def test_accuracy_under_a_common_offset(backend, device, dtype, offset):
    """Compare with fp64 on the rounded inputs: a large common offset must cancel."""
    x, target = batch(6, 100, device=device)
    x = (x.double() + offset).to(dtype)
    ours = token_stats(x, target, backend=backend, mean_logprob=True)
    truth = oracle.token_stats(x, target)
    rtol = 1e-11 if dtype == torch.float64 else 1e-6
    for name in ("logprob", "mean_logprob"):
        torch.testing.assert_close(getattr(ours, name).double(), truth[name], rtol=rtol, atol=0)
    g = torch.randn(6, device=device)
    exact = gradient(lambda x: oracle.token_stats(x, target)["logprob"], x.double(), upstream=g)
    got = gradient(lambda x: token_stats(x, target, backend=backend).logprob, x, upstream=g)
    assert_gradient(got, exact, dtype)
    if dtype == torch.float64:  # at the offset the truth itself loses the digits
        return
    exact = gradient(lambda x: oracle.token_stats(x, target)["entropy"], x.double(), upstream=g)
    got = gradient(
        lambda x: token_stats(x, target, backend=backend, entropy=True).entropy, x, upstream=g
    )
    assert_gradient(got, exact, dtype, largest=g.abs().max())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradient_of_entropy_under_a_common_offset(backend, device, dtype):
    """Use logits near 1e4, where lse is rounded by 0.0005. No gradient may show that."""
    x, target = batch(6, 100, device=device)
    x = (x.double() + 1e4).to(dtype)
    g = torch.randn(6, device=device)
    centred = x.double() - 1e4  # exact, and the truth's gradient with it
    exact = gradient(lambda x: oracle.token_stats(x, target)["entropy"], centred, upstream=g)
    got = gradient(lambda x: token_stats(x, target, entropy=True, backend=backend).entropy, x, upstream=g)  # fmt: skip
    assert_gradient(got, exact, dtype, 20.0 if dtype == torch.float64 else 1.0)


@pytest.mark.parametrize("gap", [1, 10, 18.42, 40, 80, 200])
def test_confident_token_digits(backend, device, gap):
    """Check that a loss of 1e-8, and its gradient at the target, are not rounded to 0 as in torch."""
    x = torch.zeros(2, 2, device=device)
    x[:, 1] = gap
    target = torch.ones(2, dtype=torch.long, device=device)
    ours = -token_stats(x, target, backend=backend).logprob
    truth = math.log1p(math.exp(-float(x[0, 1])))
    if truth > 1e-37:
        assert ours[0].item() == pytest.approx(truth, rel=1e-6)
        grad = gradient(lambda x: -token_stats(x, target, backend=backend).logprob.sum(), x)
        assert grad[0, 1].item() == pytest.approx(-math.exp(-gap) / (1 + math.exp(-gap)), rel=2e-6)
    else:
        assert 0 <= ours[0].item() < 1e-37


def test_ignored_row_not_read(backend, device):
    x, target = batch(5, 100, device=device, ignored=0)
    target[1] = target[3] = -100
    x[1], x[3] = float("nan"), float("inf")
    leaf = x.clone().requires_grad_()
    stats = token_stats(leaf, target, backend=backend, **ALL)
    for name, value in stats._asdict().items():
        assert (value[[1, 3]] == (-1 if name in ("rank", "argmax") else 0)).all(), name
    sum(s.sum() for s in stats[:4]).backward()
    assert (leaf.grad[[1, 3]] == 0).all() and leaf.grad.isfinite().all()


@pytest.mark.parametrize("ignored", [True, False])
def test_every_output_written(backend, device, ignored):
    """Fill torch.empty with NaN, so that an output that is not written shows."""
    torch.use_deterministic_algorithms(True)
    try:
        x, target = batch(5, 101, device=device, ignored=0.5 if ignored else 0)
        leaf = x.clone().requires_grad_()
        stats = token_stats(leaf, target, backend=backend, vocab_size=None, **ALL)
        assert all(s.isfinite().all() for s in stats)
        stats.logprob.sum().backward()
        assert leaf.grad.isfinite().all()
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(
    "where", ["first tile", "last tile", "all but one", "half", "all but target"]
)
def test_minus_infinity_elsewhere(backend, device, where):
    """Check that a class with logit -inf contributes 0 and has gradient 0."""
    x, target = batch(4, 100, device=device, ignored=0)
    target.fill_(50)
    inf = float("-inf")
    if where == "first tile":
        x[:, :50] = inf
    elif where == "last tile":
        x[:, 64:] = inf
    elif where == "half":
        x[:, 1::2] = inf
    else:
        x[:, :50] = x[:, 51:] = inf
        if where == "all but one":
            x[:, 7] = 1.0
    truth = oracle.token_stats(x, target)
    truth["mean_logprob"] = torch.full_like(truth["mean_logprob"], inf)
    assert_stats(token_stats(x, target, backend=backend, **ALL), truth)
    g = torch.randn(4, device=device)
    for name in ("logprob", "lse"):
        got = gradient(
            lambda x, n=name: getattr(token_stats(x, target, backend=backend), n), x, upstream=g
        )
        exact = gradient(lambda x, n=name: oracle.token_stats(x, target)[n], x.double(), upstream=g)
        assert_gradient(got, exact, torch.float32)
        assert (got[x == inf] == 0).all()
    entropy = gradient(
        lambda x: token_stats(x, target, backend=backend, entropy=True).entropy, x, upstream=g
    )
    assert entropy.isfinite().all() and (entropy[x == inf] == 0).all()


@pytest.mark.parametrize("softcap", [None, 10.0])
def test_non_finite_rows(backend, device, softcap):
    x, _ = batch(6, 100, device=device, ignored=0)
    inf, nan = float("inf"), float("nan")
    target = torch.full((6,), 40, device=device)
    x[0, 40] = -inf  # the target: loss +inf
    x[1, :] = -inf  # nothing: NaN
    x[2, 70] = inf  # NaN, as torch
    x[3, 40] = inf
    x[4, 3] = nan
    logprob = token_stats(x, target, backend=backend, softcap=softcap).logprob
    assert logprob[5].isfinite()
    if softcap is None:
        assert logprob[0] == -inf
        assert logprob[1:5].isnan().all()
        grad = gradient(lambda x: token_stats(x, target, backend=backend).logprob.sum(), x)
        assert grad[1:5].isnan().any(1).all()
        assert grad[0].isfinite().all() and grad[0, 40] == 1
    else:  # the cap makes infinities finite
        truth = oracle.token_stats(x, target, softcap=softcap)["logprob"]
        torch.testing.assert_close(logprob.double(), truth, rtol=1e-6, atol=0, equal_nan=True)


def test_rank_of_nan_target(backend, device):
    x = torch.randn(3, 100, device=device)
    target = torch.tensor([0, 40, 99], device=device)
    x[0, 0] = x[2, 99] = float("nan")
    x[1, 40] = float("inf")  # as torch has it: NaN less its lse
    assert token_stats(x, target, backend=backend, rank=True).rank.tolist() == [99, 99, 99]


@pytest.mark.parametrize("value", [-1e4, 0.0, 1e4, 1e9, 3e38])
def test_all_logits_equal(backend, device, value):
    if backend == "triton" and value > 1e9:
        pytest.skip("beyond the kernels' range")
    x = torch.full((3, 100), value, device=device)
    target = torch.tensor([0, 40, 99], device=device)
    ours = token_stats(x, target, backend=backend, **ALL)
    torch.testing.assert_close(ours.logprob.cpu(), torch.full((3,), -math.log(100)))
    assert ours.rank.tolist() == [0, 40, 99] and ours.argmax.tolist() == [0, 0, 0]


def test_far_apart_logits(backend, device):
    """Use losses beyond 88, where exp(z - z_target) overflows in fp32."""
    x, target = batch(8, 100, device=device, ignored=0.3, scale=300.0)
    assert_stats(token_stats(x, target, backend=backend, **ALL), oracle.token_stats(x, target))
    g = torch.randn(8, device=device)
    got = gradient(lambda x: token_stats(x, target, backend=backend).logprob, x, upstream=g)
    exact = gradient(lambda x: oracle.token_stats(x, target)["logprob"], x.double(), upstream=g)
    assert_gradient(got, exact, torch.float32)


def test_rank_and_argmax_ties(backend, device):
    x = torch.tensor([[1.0, 3.0, 3.0, 2.0, 3.0]], device=device).repeat(5, 30)
    target = torch.tensor([1, 2, 4, 0, 149], device=device)
    ours = token_stats(x, target, backend=backend, rank=True, argmax=True)
    truth = oracle.token_stats(x, target)
    assert torch.equal(ours.rank, truth["rank"]) and torch.equal(ours.argmax, truth["argmax"])


def test_out_of_range_target_poisons_own_row(device):
    """Check that only that row's loss and gradient are NaN, with no access outside the row."""
    pytest.importorskip("triton")
    x, target = batch(6, 100, device=device, ignored=0)
    target[1], target[3], target[4] = 100, -1, 10**9
    leaf = x.clone().requires_grad_()
    stats = token_stats(leaf, target, backend="triton", **ALL)
    logprob = stats.logprob
    logprob.sum().backward()
    bad = torch.tensor([False, True, False, True, True, False])
    assert torch.equal(stats.rank.cpu() == -1, bad)
    assert torch.equal(stats.argmax.cpu(), x.argmax(1).cpu())
    assert torch.equal(logprob.isnan().cpu(), bad)
    assert torch.equal(leaf.grad.isnan().any(1).cpu(), bad)
    assert leaf.grad[bad.to(device)].isnan().all()


def test_out_of_range_target_error(device, monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setenv("CHUNKED_CE_CHECK_TARGETS", "1")
    x, target = batch(6, 100, device=device, ignored=0)
    target[3] = 100
    with pytest.raises(IndexError, match=r"target 100 in row 3 .* 0 to 99 .*ignore_index=-100"):
        token_stats(x, target, backend="triton")


def test_accelerators_without_triton(monkeypatch):
    """Run the torch backend's path for other devices on the CPU. It reads no value on the host."""
    from chunked_ce.backends import torch as backend_torch

    monkeypatch.setattr(backend_torch, "_on_host", lambda x: False)
    x, target = batch(6, 100)
    target[2] = 100  # out of range
    backend = "torch"
    ours = token_stats(x, target, backend=backend, **ALL)
    assert ours.logprob[2].isnan()
    keep = torch.arange(6) != 2
    truth = {k: v[keep] for k, v in oracle.token_stats(x, target.clamp(max=99)).items()}
    assert_stats(type(ours)(*(s[keep] for s in ours)), truth)
    grad = gradient(lambda x: token_stats(x, target, backend=backend).logprob.sum(), x)
    assert grad[2].isnan().all() and grad[keep].isfinite().all()
    assert (grad[target == -100] == 0).all()
    one_class = token_stats(torch.randn(2, 1), torch.tensor([0, -100]), backend=backend)
    assert one_class.logprob.tolist() == [0, 0]


def test_half_of_a_vocabulary_far_below():
    x, target = batch(40, 256)
    x[:, ::2] = -1e4
    target = torch.where(target >= 0, target | 1, target)
    assert_stats(token_stats(x, target, backend="torch", **ALL), oracle.token_stats(x, target))
    got = gradient(lambda x: token_stats(x, target, backend="torch").logprob.sum(), x)
    exact = gradient(lambda x: oracle.token_stats(x, target)["logprob"].sum(), x.double())
    assert_gradient(got, exact, torch.float32)
    assert (got[:, ::2] == 0).all()


@pytest.mark.parametrize(
    ("dtype", "depths"),
    [(torch.float32, [0, -50, -80, -200]), (torch.float64, [0, -200, -500, -700, -800])],
    ids=str,
)
def test_small_probabilities_keep_their_digits(backend, device, dtype, depths):
    """Check probabilities down to the smallest normal number."""
    x = torch.tensor([depths] * 3, dtype=dtype, device=device)
    target = torch.tensor([0, 1, 2], device=device)
    grad = gradient(lambda x: token_stats(x, target, backend=backend).lse.sum(), x)
    rtol = 1e-11 if dtype == torch.float64 else 2e-5  # an ulp of an exponent of 80
    torch.testing.assert_close(grad, x.double().softmax(-1).to(dtype), rtol=rtol, atol=0)


# --- repeatability ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("vocab", [100, 1000])
def test_bit_identity_twice_and_alone(backend, device, dtype, vocab):
    """Compare two runs, and a row alone with the same row among others."""
    rows = 9 if backend == "triton" else 64  # the interpreter is slow
    if backend == "triton":  # every row starts on 16 bytes, as a row alone does
        vocab = min(vocab, 300) // 8 * 8
    x, target = batch(rows, vocab, dtype, device)

    def both(x, target):
        leaf = x.clone().requires_grad_()
        stats = token_stats(leaf, target, backend=backend, entropy=True, mean_logprob=True)
        sum(s.sum() for s in stats[:4]).backward()
        return [s.detach() for s in stats[:4]] + [leaf.grad]

    first, second = both(x, target), both(x, target)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    for row in (5, rows - 1):
        alone = both(x[row : row + 1], target[row : row + 1])
        assert all(torch.equal(a[row], b[0]) for a, b in zip(first, alone, strict=True))


@pytest.mark.real_sizes
@pytest.mark.parametrize("vocab", [(1 << 19) - 1, (1 << 19) + 1, (1 << 20) + 1])
def test_bit_identity_long_row_alone(vocab):
    x, target = batch(2, vocab, ignored=0)
    for entropy in (False, True):
        both = token_stats(x, target, backend="torch", entropy=entropy)
        torch.testing.assert_close(both.lse.double(), x.double().logsumexp(1), rtol=1e-6, atol=0)
        for row in (0, 1):
            alone = token_stats(x[row], target[row], backend="torch", entropy=entropy)
            assert torch.equal(alone.lse, both.lse[row])
            if entropy:
                assert torch.equal(alone.entropy, both.entropy[row])
            else:
                one = slice(row, row + 1)
                loss = cross_entropy(x[one], target[one], backend="torch")
                assert torch.equal(loss, -both.logprob[row])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bit_identity_programs_per_row(device, dtype, monkeypatch):
    pytest.importorskip("triton")
    from chunked_ce.backends import gpu

    x, target = batch(3, 603, dtype, device)  # five segments
    results = []
    for processors in (1, 2, 100):
        monkeypatch.setattr(gpu, "processors", lambda device, n=processors: n)
        results.append(token_stats(x, target, backend="triton", **ALL))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.real_sizes
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("vocab", [50257, 600_000])
def test_full_size_row(dtype, vocab):
    x, target = batch(17, vocab, dtype)
    many = token_stats(x, target, mean_logprob=True)
    for row in (1, 16):
        one = token_stats(x[row : row + 1], target[row : row + 1], mean_logprob=True)
        assert all(torch.equal(a[row], b[0]) for a, b in zip(many[:2], one[:2], strict=True))
        assert torch.equal(many.mean_logprob[row], one.mean_logprob[0])


@pytest.mark.real_sizes
@pytest.mark.parametrize(
    "vocab", [1, 2, 3, 17, 1000, 32000, 32001, 50257, 65537, 151936, 1_200_000]
)
def test_vocabularies(backend, device, vocab):
    """Check vocabularies of many sizes, up to 1.2 M classes. Nothing leaks from padding."""
    if backend == "triton" and vocab == 151936:
        pytest.skip("the interpreter is slow, and 1.2 M classes need the same parts")
    x, target = batch(1 if vocab > 1_000_000 else 2, vocab, device=device, ignored=0)
    ours = token_stats(x, target, backend=backend, softcap=30.0, entropy=True)
    truth = oracle.token_stats(x, target, softcap=30.0)
    for name in ("lse", "logprob", "entropy"):
        torch.testing.assert_close(getattr(ours, name).double(), truth[name], rtol=1e-6, atol=1e-6)
    assert (ours.logprob <= 0).all()


def test_gradcheck_kernels(backend, device):
    rows, vocab = (3, 23) if backend == "torch" else (1, 18)  # two tiles; a launch for each number
    x, target = batch(rows, vocab, torch.float64, device)
    x.requires_grad_()

    def function(x):
        return token_stats(
            x,
            target,
            backend=backend,
            entropy=True,
            mean_logprob=True,
            softcap=4.0,
            logit_scale=0.7,
        )[:4]

    assert torch.autograd.gradcheck(function, x)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_low_precision_gradient_either_sign(backend, device, dtype):
    """Use both signs of the factor of p. A positive one may be folded into the exponent."""
    x, target = batch(6, 100, dtype, device, ignored=0)
    target = target.clamp(max=89)
    g = torch.tensor([1.0, -1.0, 2.0, -0.5, 0.1, -3.0], device=device)
    cases = [("lse", {}), ("lse", dict(vocab_size=90)), ("lse", dict(softcap=5.0))]
    cases += [("lse", dict(logit_scale=0.5)), ("entropy", {}), ("mean_logprob", {})]
    for name, options in cases:
        wanted = {} if name == "lse" else {name: True}

        def ours(x, name=name, options=options | wanted):
            return getattr(token_stats(x, target, backend=backend, **options), name)

        def truth(x, name=name, options=options):
            return oracle.token_stats(x, target, **options)[name]

        exact = gradient(truth, x.double(), upstream=g)
        largest = g.abs().max() if "softcap" in options else None
        assert_gradient(gradient(ours, x, upstream=g), exact, dtype, largest)


def test_low_precision_gradient_rounding(backend, device):
    """Check that bf16 gradients are the fp32 ones rounded once. Nothing accumulates in bf16."""
    x, target = batch(4, 100, torch.bfloat16, device)
    low = gradient(lambda x: token_stats(x, target, backend=backend).logprob.sum(), x)
    full = gradient(lambda x: token_stats(x, target, backend=backend).logprob.sum(), x.float())
    if backend == "torch":
        assert torch.equal(low, full.bfloat16())
    torch.testing.assert_close(low.float(), full, rtol=ULP[torch.bfloat16], atol=0)


def test_fp64_far_from_zero(backend, device):
    """Use logits near 1e4, where lse is rounded to 2e-12. The gradients must not show that."""
    x = torch.full((1, 2), 1e4, dtype=torch.float64, device=device)
    target = torch.tensor([1], device=device)
    loss = lambda x: token_stats(x, target, backend=backend, mean_logprob=True)  # noqa: E731
    expected = torch.tensor([[0.5, 0.5]], dtype=torch.float64, device=device)
    got = gradient(lambda x: loss(x).lse.sum(), x)
    torch.testing.assert_close(got, expected, rtol=1e-15, atol=0.0)
    assert gradient(lambda x: loss(x).mean_logprob.sum(), x).abs().max() < 1e-15
