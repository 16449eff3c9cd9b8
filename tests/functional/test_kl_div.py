"""kl_div against eager torch in fp64, on every backend."""

import math

import oracle
import pytest
import torch
import torch.nn.functional as F
from helpers import assert_gradient, batch, gradient

import chunked_ce
from chunked_ce import kl_div

KINDS = ("forward", "reverse", "jsd")
FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def pair(rows, vocab, dtype=torch.float32, device="cpu", distance=3.0):
    x, target = batch(rows, vocab, dtype, device)
    y = x.double() + distance * torch.randn(x.shape, dtype=torch.float64).to(x.device)
    return x, y.to(dtype), target


def check(x, y, upstream=None, **options):
    backend = options.pop("backend")
    truth = oracle.kl_div(x, y, **options)
    ours = kl_div(x, y, backend=backend, **options)
    assert ours.dtype == (torch.float64 if x.dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(ours.double(), truth, rtol=1e-6, atol=1e-12)
    of_truth = gradient(lambda x: oracle.kl_div(x, y, **options), x.double(), upstream=upstream)
    of_ours = gradient(lambda x: kl_div(x, y, backend=backend, **options), x, upstream=upstream)
    assert_gradient(of_ours, of_truth, x.dtype, largest_term(x, y, upstream, **options))


def largest_term(x, y, upstream, temperature=1.0, vocab_size=None, num_items=None, **_):
    """Of the gradient before p - q, or d and its mean, cancel; two rows bring their noise."""
    log_p, log_q = ((t.double()[..., :vocab_size] / temperature).log_softmax(-1) for t in (x, y))
    d = (log_q - log_p).nan_to_num(0.0, 0.0, 0.0).abs()
    p = log_p.exp()
    kl = (p * d).sum(-1, keepdim=True)
    terms = torch.maximum(p, log_q.exp()) * torch.maximum(d.masked_fill(p == 0, 0.0) + kl, p)
    return 2 * terms.amax() * (1.0 if upstream is None else upstream.abs().amax()) / temperature


@pytest.mark.parametrize("vocab", [1, 2, 17, 301])  # one class; shorter than a group; ragged tiles
@pytest.mark.parametrize("kind", KINDS)
def test_values_and_gradients(backend, device, kind, vocab):
    interpreted = backend == "triton"  # slow: every dtype in one tile, two in several
    dtypes = {301: FLOATS[:3:2] if interpreted else FLOATS, 17: FLOATS}.get(vocab, FLOATS[:1])
    rows = 2 if interpreted and vocab == 301 else 5
    for dtype in dtypes:
        x, y, _ = pair(rows, vocab, dtype, device)
        upstream = torch.tensor([-2.0, 1e3, 0.0, 0.3, 1.0], device=device)[:rows]
        options = dict(kind=kind, beta=0.3, temperature=1.7, reduction="none")
        check(x, y, upstream, backend=backend, **options)


@pytest.mark.parametrize("kind", KINDS)
def test_nearly_equal_rows_keep_their_digits(backend, device, kind):
    for distance in (1e-1, 1e-2, 1e-3):
        x, y, _ = pair(4, 301, device=device, distance=distance)
        truth = oracle.kl_div(x, y, kind=kind, reduction="none")
        ours = kl_div(x, y, kind=kind, reduction="none", backend=backend)
        torch.testing.assert_close(ours.double(), truth, rtol=1e-5, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_equal_rows_give_exactly_zero(backend, device, kind):
    for dtype in FLOATS if backend != "triton" else FLOATS[:1]:
        x, _, _ = pair(3, 301, dtype, device)
        x[0] += 1e3
        x[1, 7] = -math.inf
        options = dict(kind=kind, beta=0.3, temperature=0.7, reduction="none", backend=backend)
        assert (kl_div(x, x.clone(), **options) == 0).all()
        assert (gradient(lambda x, o=options: kl_div(x, x.detach(), **o).sum(), x) == 0).all()


def test_small_and_large_shares_and_temperatures(backend, device):
    x, y, _ = pair(3, 77, device=device)
    for beta in (0.03, 0.97):
        check(
            x, y, kind="jsd", beta=beta, reduction="none", upstream=torch.ones(3), backend=backend
        )
    for kind in KINDS:  # nearly one class; far smoother than the logits
        for temperature in () if backend == "triton" else (0.05, 10.0):  # the interpreter is slow
            check(x, y, kind=kind, temperature=temperature, backend=backend)


@pytest.mark.parametrize("kind", KINDS)
def test_options(backend, device, kind):
    x, y, target = pair(7, 100, device=device)
    weight = torch.rand(7, device=device)
    every = (
        dict(reduction="sum", target=target),
        dict(reduction="mean", target=target),
        dict(target=target, num_items=40, temperature=0.5),
        dict(target=target, num_items=torch.tensor(11), token_weight=weight),
        dict(target=target.masked_fill(target == 3, 7), ignore_index=7),
        dict(token_weight=weight),
        dict(vocab_size=61, beta=0.9),
    )
    for options in every[-2:] if backend == "triton" else every:  # the interpreter is slow
        check(x, y, torch.tensor(-1.5), kind=kind, backend=backend, **options)


@pytest.mark.parametrize("kind", KINDS)
def test_masked_classes_and_ignored_rows(backend, device, kind):
    x, y, _ = pair(4, 100, device=device)
    x[:, 5:9] = y[:, 5:9] = -math.inf  # of both: they add nothing
    x[1, 20] = -math.inf
    y[2, 30] = -math.inf
    x[3] = math.nan
    target = torch.tensor([1, 2, 3, -100], device=device)
    options = dict(kind=kind, target=target, reduction="none", backend=backend)
    loss = kl_div(x, y, **options)
    truth = oracle.kl_div(x[:3], y[:3], kind=kind, reduction="none")
    torch.testing.assert_close(loss[:3].double(), truth, rtol=1e-6, atol=0)
    assert loss[3] == 0
    assert bool(loss[1].isinf()) == (kind == "forward")
    assert bool(loss[2].isinf()) == (kind == "reverse")
    grad = gradient(lambda x: kl_div(x, y, **options)[[0, 3]].sum(), x)
    assert (grad[3] == 0).all() and (grad[0, 5:9] == 0).all() and grad[0].isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_non_finite_rows_are_nan(backend, device, kind):
    x, y, _ = pair(4, 40, device=device)
    x[0, 3], y[1, 3], x[2], y[3, 7] = math.nan, math.nan, -math.inf, math.inf
    assert kl_div(x, y, kind=kind, reduction="none", backend=backend).isnan().all()


def test_far_apart_rows_do_not_overflow(backend, device):
    x = torch.tensor([[0.0, 200.0, -300.0]], device=device)
    y = torch.tensor([[150.0, 0.0, -90.0]], device=device)
    for kind in KINDS:
        check(x, y, kind=kind, backend=backend)
        check(x + 1e4, y - 1e4, kind=kind, backend=backend)


def test_strides_and_mixed_dtypes(backend, device):
    vocab = 77 if backend == "triton" else 301  # the interpreter is slow
    x, y, _ = pair((2, 3), vocab, device=device)
    wide = torch.randn(2, 5, vocab, device=device)
    for student, teacher in (
        (x[:, :-1], y[:, 1:]),
        (x, y.bfloat16()),
        (x.bfloat16(), y),
        (x, y.double()),
        (x[..., ::2], y[..., ::2]),
        (x, wide[:, 1:4]),
        (x, wide[0, 0].expand(2, 3, vocab)),
        (x.transpose(0, 1), y.transpose(0, 1)),
        (x[..., 1:-3], y[..., :-4]),
    ):
        check(student, teacher, kind="reverse", backend=backend)


def test_vocabularies_padded_differently(backend, device):
    x, _, _ = pair(3, 104, device=device)
    y, _, _ = pair(3, 120, device=device)
    x[:, 100:] = y[:, 100:] = math.nan
    truth = oracle.kl_div(x, y, kind="jsd", vocab_size=100)
    loss = kl_div(x, y, kind="jsd", vocab_size=100, backend=backend)
    torch.testing.assert_close(loss.double(), truth, rtol=1e-6, atol=0)
    grad = gradient(lambda x: kl_div(x, y, vocab_size=100, backend=backend), x)
    assert (grad[:, 100:] == 0).all() and grad.isfinite().all()


def test_one_row_and_no_rows(backend, device):
    x, y, _ = pair(1, 50, device=device)
    check(x[0], y[0], kind="forward", backend=backend)
    empty = torch.zeros(0, 50, device=device, requires_grad=True)
    loss = kl_div(empty, torch.zeros(0, 50, device=device), backend=backend)
    assert loss.isnan()
    loss.backward()
    assert empty.grad.shape == (0, 50)


def test_definitions_of_torch_and_gkd(backend, device):
    x, y, _ = pair(6, 80, device=device)
    theirs = F.kl_div(x.log_softmax(-1), y.log_softmax(-1), log_target=True, reduction="batchmean")
    torch.testing.assert_close(kl_div(x, y, backend=backend), theirs)
    for beta, kind in ((0.0, "forward"), (1.0, "reverse")):
        same = kl_div(x, y, kind=kind, backend=backend)
        torch.testing.assert_close(kl_div(x, y, kind="jsd", beta=beta, backend=backend), same)


def liger(x, y, labels, beta, temperature, weight_hard, weight_soft):
    """Liger's fused linear JSD, as its kernel and its distillation losses define it.

    With P of the teacher and Q of the student: beta KL(P|M) + (1 - beta) KL(Q|M), M = beta P +
    (1 - beta) Q, summed over the tokens that count and divided by their number; the hard loss is
    the cross-entropy at temperature 1, by the same number.
    """
    keep = labels != -100
    log_q, log_p = ((t / temperature).log_softmax(-1)[keep] for t in (x, y))
    m = (beta * log_p.exp() + (1 - beta) * log_q.exp()).log()
    each = beta * log_p.exp() * (log_p - m) + (1 - beta) * log_q.exp() * (log_q - m)
    if beta == 0:
        each = log_p.exp() * (log_p - log_q)
    if beta == 1:
        each = log_q.exp() * (log_q - log_p)
    hard = F.cross_entropy(x[keep], labels[keep], reduction="sum")
    return (weight_soft * each.sum() + weight_hard * hard) / keep.sum()


@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 1.0])
def test_same_numbers_as_liger(backend, device, beta):
    x, y, target = pair(9, 60, device=device)
    theirs = liger(x.double(), y.double(), target, beta, 2.0, 0.3, 0.7)
    weight = torch.eye(60, device=device)  # the logits are the hidden states
    ours = chunked_ce.linear_kl_div(
        x, weight, y, weight, kind="jsd", beta=beta, temperature=2.0, target=target,
        cross_entropy_weight=0.3 / 0.7, backend=backend,
    )  # fmt: skip
    torch.testing.assert_close(0.7 * ours.double(), theirs, rtol=1e-6, atol=0)


@pytest.mark.framework
@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(backend, device, kind):
    x, y, target = pair(2, 5, torch.float64, device)
    options = dict(kind=kind, beta=0.2, temperature=1.3, target=target, reduction="sum")
    loss = lambda x: kl_div(x, y, backend=backend, **options)  # noqa: E731
    assert torch.autograd.gradcheck(loss, x.requires_grad_())
    with pytest.raises(RuntimeError, match="first derivatives only"):
        torch.autograd.grad(loss(x), x, create_graph=True)[0].sum().backward()


@pytest.mark.framework
def test_compile_and_transforms(backend):
    if backend == "triton":
        pytest.skip("the interpreter is slow; no kernel is compiled or transformed")
    x, y, _ = pair(4, 60)
    loss = lambda x: kl_div(x, y, kind="jsd", backend=backend)  # noqa: E731
    truth = gradient(loss, x)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(gradient(compiled, x), truth)
    torch.testing.assert_close(torch.func.grad(loss)(x), truth)
    per_row = torch.func.vmap(lambda x, y: kl_div(x, y, kind="jsd", backend=backend))(x, y)
    torch.testing.assert_close(per_row, kl_div(x, y, kind="jsd", reduction="none", backend=backend))


@pytest.mark.framework
def test_operators(backend):
    if backend == "triton":
        pytest.skip("the interpreter is slow; the operators' code is the same for every backend")
    x, y, target = pair((2, 3), 40)
    operator = torch.ops.chunked_ce.pair_stats
    given = (y, target == -100, "jsd", 0.4, 2.0, 37, backend)
    torch.library.opcheck(operator.default, (x.requires_grad_(), *given))
    stats = [s.detach() for s in operator(x, *given)]
    for outputs in (stats, operator(x.detach().double(), *given)):  # the results share no memory
        assert len({s.untyped_storage().data_ptr() for s in outputs}) == len(outputs)
    arguments = (x.detach(), *given[:2], *stats, torch.randn(2, 3), *given[2:])
    torch.library.opcheck(torch.ops.chunked_ce.pair_grad.default, arguments)


@pytest.mark.framework
def test_threads_change_no_bit():
    x, y, _ = pair(9, 70_001)
    results, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            results.append(kl_div(x, y, kind="jsd", reduction="none"))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0], r) for r in results[1:])


X, Y = torch.zeros(3, 5), torch.zeros(3, 5)


@pytest.mark.parametrize(
    "arguments, options, error",
    [
        ((X, Y), dict(kind="kl"), "kind is 'kl', expected one of forward, reverse, jsd"),
        ((X, Y), dict(beta=1.5), "beta is 1.5, expected a number from 0 to 1"),
        ((X, Y), dict(temperature=0), "temperature is 0.0, expected a number above 0"),
        ((X, Y), dict(temperature=-2.0), "temperature is -2.0"),
        ((X, torch.zeros(3, 7)), {}, "input has 5 columns, but teacher has 7: .* pass vocab_size"),
        ((X, torch.zeros(3, 7)), dict(vocab_size=6), "expected a number from 1 to 5"),
        ((X, Y), dict(vocab_size=0), "vocab_size is 0, expected a number from 1 to 5"),
        ((X[0], torch.tensor(0.0)), {}, r"teacher has shape \[\], but input has shape \[5\]"),
        ((X, torch.zeros(2, 5)), {}, r"teacher has shape \[2, 5\], but input has shape \[3, 5\]"),
        ((X, torch.zeros(3, 5, requires_grad=True)), {}, r"gets none: pass teacher.detach\(\)"),
        ((X, torch.zeros(3, 5, dtype=torch.long)), {}, "teacher has dtype torch.int64"),
        ((X, None), {}, "teacher must be a Tensor of logits, got NoneType"),
        ((X, Y), dict(target=torch.zeros(4, dtype=torch.long)), "one class index per row"),
        ((X, Y), dict(reduction="batchmean"), "reduction is 'batchmean'"),
        ((X, Y), dict(token_weight=torch.ones(5)), "expected one weight per target"),
        ((X, Y), dict(reduction="sum", num_items=3), "num_items is what reduction='mean' divides"),
        ((X, Y), dict(labels=torch.zeros(3)), "no argument labels: did you mean target"),
        ((X[:, :0], Y[:, :0]), {}, "no classes in its last dimension"),
    ],
)
def test_bad_input(arguments, options, error):
    with pytest.raises((TypeError, ValueError), match=error):
        chunked_ce.kl_div(*arguments, **options)
