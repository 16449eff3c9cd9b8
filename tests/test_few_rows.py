"""The loss of few rows, without an operator: the operators' bits, or left to them."""

import math
import threading

import oracle
import pytest
import torch
import torch._dynamo
import torch.utils.flop_counter
from helpers import assert_gradient, gradient
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx

from chunked_ce import backend_torch, cross_entropy, few_rows, from_zero, row_blocks
from chunked_ce.stats import inverse_total, lse_from_zero

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def rows_of(n: int, vocab: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    x = (torch.randn(n, vocab, dtype=torch.float64) * 3).to(dtype)
    return x, torch.randint(0, vocab, (n,))


@pytest.fixture
def taken(monkeypatch):
    """How many losses and how many gradients were computed without an operator."""
    counts = [0, 0]
    for i, (owner, name) in enumerate(((few_rows._Loss, "apply"), (few_rows, "_gradient"))):
        function = getattr(owner, name)

        def counted(*args, i=i, function=function):
            result = function(*args)
            counts[i] += result is not None
            return result

        monkeypatch.setattr(owner, name, counted)
    return counts


def by_operators(x, target, upstream, **options):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(few_rows, "_are_ordinary", lambda *_: False)
        loss = cross_entropy(x, target, **options).detach()
        return loss, gradient(cross_entropy_of(target, **options), x, upstream=upstream)


def cross_entropy_of(target, **options):
    return lambda x: cross_entropy(x, target, **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize(("n", "vocab"), [(1, 1), (1, 100), (2, 300), (7, 50), (33, 17), (5, 299)])
def test_bits_of_the_operators(n, vocab, reduction, dtype, taken):
    """One block and several; a row longer than a block."""
    x, target = rows_of(n, vocab, dtype)
    upstream, options = torch.tensor(-3.7), dict(reduction=reduction)
    expected = by_operators(x, target, upstream, **options)
    ours = gradient(cross_entropy_of(target, **options), x, upstream=upstream)
    assert taken == ([1, 1] if vocab > 1 else [0, 0])  # whose sum over no other class is 0
    loss = cross_entropy(x, target, **options)
    assert loss.dtype == expected[0].dtype and torch.equal(loss, expected[0])
    assert ours.dtype == dtype and torch.equal(ours, expected[1])
    truth = oracle.cross_entropy(x, target, **options)
    torch.testing.assert_close(loss.double(), truth, rtol=1e-6, atol=0)
    exact = gradient(
        lambda x: oracle.cross_entropy(x, target, **options), x.double(), upstream=upstream
    )
    assert_gradient(ours, exact, dtype)


VIEWS = dict(
    columns=lambda x: torch.nn.functional.pad(x, (3, 2), value=float("nan"))[:, 3:-2],
    rows=lambda x: torch.stack([x, x.neg()], 1).flatten(0, 1)[::2],
    expanded=lambda x: x[:1].expand(x.shape),
)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("view", VIEWS)
def test_views(view, dtype, taken):
    x, target = rows_of(7, 50, dtype)
    loss = lambda x: cross_entropy(VIEWS[view](x), target)  # noqa: E731
    ours = gradient(loss, x, upstream=torch.tensor(2.0))
    assert taken == [1, 1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(few_rows, "_are_ordinary", lambda *_: False)
        assert torch.equal(ours, gradient(loss, x, upstream=torch.tensor(2.0)))


def given(x, target, **options):
    return x, target, options


# Arguments, of 7 rows of 50 logits and targets
LEFT = {
    "a row ignored": lambda x, t: given(x, t.where(torch.arange(7) != 3, -100)),
    "ignore_index within the targets": lambda x, t: given(
        x, t.clamp(1, 40).index_fill(0, torch.tensor([2]), 5), ignore_index=5
    ),
    "no reduction": lambda x, t: given(x, t, reduction="none"),
    "label smoothing": lambda x, t: given(x, t, label_smoothing=0.1),
    "z-loss": lambda x, t: given(x, t, z_loss_weight=0.1),
    "softcap": lambda x, t: given(x, t, softcap=5.0),
    "logit_scale": lambda x, t: given(x, t, logit_scale=0.5),
    "vocab_size": lambda x, t: given(x, t.clamp(max=39), vocab_size=40),
    "class weights": lambda x, t: given(x, t, weight=torch.rand(50)),
    "token weights": lambda x, t: given(x, t, token_weight=torch.rand(7)),
    "num_items": lambda x, t: given(x, t, num_items=3),
    "probabilities": lambda x, t: given(x, torch.rand(7, 50).softmax(1)),
    "top k": lambda x, t: given(x, (t[:, None], torch.ones(7, 1))),
    "int32 targets": lambda x, t: given(x, t.int()),
    "three dimensions": lambda x, t: given(x[None], t[None], dim=-1),
    "no row": lambda x, t: given(x[:0], t[:0]),
    "one row": lambda x, t: given(x[0], t[0]),
    "classes apart": lambda x, t: given(x.t().contiguous().t(), t),
    "long rows": lambda x, t: given(torch.randn(7, 301), t),
    "a target below -41": lambda x, t: given(x.scatter(1, t[:1, None], -42.0), t),
    "a target above 41": lambda x, t: given(x.scatter(1, t[:1, None], 42.0), t),
    "a sum beyond 1e17": lambda x, t: given(x.index_fill(1, (t[:1] + 1) % 50, 40.0), t),
    "no other class": lambda x, t: given(torch.full_like(x, -60.0).scatter(1, t[:, None], 0.0), t),
    "masked classes": lambda x, t: given(
        x.index_fill(1, torch.arange(25, 50), float("-inf")), t % 25
    ),
    "NaN": lambda x, t: given(x.index_fill(0, torch.tensor([3]), float("nan")), t),
}


@pytest.mark.parametrize("case", LEFT)
def test_left_to_the_operators(case, taken):
    """And right there. A row that is NaN is NaN."""
    x, target, options = LEFT[case](*rows_of(7, 50))
    ours = gradient(cross_entropy_of(target, **options), x, upstream=lambda loss: loss.sum() * -3.7)
    assert taken == [0, 0]
    dense = isinstance(target, torch.Tensor) and not target.is_floating_point()
    if not dense or "weight" in case or case == "num_items":
        return  # other tests' subject
    if case == "one row":
        x, target, ours = x[None], target[None], ours[None]
    names = ("ignore_index", "reduction", "label_smoothing", "z_loss_weight")
    head = {k: v for k, v in options.items() if k not in (*names, "dim")}
    known = {k: v for k, v in options.items() if k in names}
    exact = gradient(
        lambda x: oracle.cross_entropy(x, target.long(), **known, **head),
        x.double(), upstream=lambda loss: loss.sum() * -3.7,
    )  # fmt: skip
    if case == "NaN":
        assert ours.isnan().any(1).tolist() == [row == 3 for row in range(7)]
    else:
        # Of a target without rivals the truth in fp64 is 1 - 1.
        largest = 1e-10 if case == "no other class" else None
        assert_gradient(ours, exact, torch.float32, largest)


def test_too_many_logits(monkeypatch, taken):
    x, target = rows_of(7, 50)
    monkeypatch.setattr(few_rows, "_ELEMENTS", 350)
    gradient(cross_entropy_of(target), x)
    assert taken == [1, 1]
    monkeypatch.setattr(few_rows, "_ELEMENTS", 349)
    gradient(cross_entropy_of(target), x)
    assert taken == [1, 1]


def test_a_gradient_out_of_range_is_left_to_the_operator(taken):
    """lse below -1, with sums that are in range."""
    x, target = rows_of(7, 50)
    x = x / 30 - 25
    ours = gradient(cross_entropy_of(target), x, upstream=torch.tensor(-3.7))
    assert taken == [1, 0]
    exact = gradient(
        lambda x: oracle.cross_entropy(x, target), x.double(), upstream=torch.tensor(-3.7)
    )
    assert_gradient(ours, exact, torch.float32)


@pytest.mark.parametrize("at_target", [9.0, -3.0])
def test_sure_rows_of_few_classes(at_target, taken):
    """The other classes' sum is below what a gradient wants of the total, and that may not be."""
    x = torch.full((3, 4), -3.0).index_fill(1, torch.tensor([1]), at_target)
    target, upstream = torch.ones(3, dtype=torch.int64), torch.tensor(-3.7)
    ours = gradient(cross_entropy_of(target), x, upstream=upstream)
    assert taken == [1, at_target > 0]
    exact = gradient(lambda x: oracle.cross_entropy(x, target), x.double(), upstream=upstream)
    assert_gradient(ours, exact, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_totals_are_made_again_from_lse(dtype):
    """Or few rows' gradients would differ in a bit from those of the same rows among many."""
    mantissa, exponent = torch.rand(100_000, dtype=dtype), torch.randint(-59, 57, (100_000,))
    total = torch.ldexp(1 + mantissa, exponent)
    assert torch.equal(inverse_total(*lse_from_zero(total)), total.reciprocal())


def test_totals_that_are_divided_by_are_in_the_operators_range():
    """Or those would take another form, of other bits."""
    assert math.log(few_rows._SMALLEST_TOTAL) > from_zero._SMALLEST_LSE
    assert math.log(2 * from_zero.LARGEST_SUM) < from_zero._LARGEST_LSE


@pytest.mark.parametrize("vocab", [1, 2, 7, 8, 9, 31, 32, 33, 999])
@pytest.mark.parametrize("n", [1, 2, 7, 8, 9, 40])
def test_sample(n, vocab):
    """Of logits and nothing beside them."""
    x = torch.randn(n, vocab)
    for logits in (x, torch.nn.functional.pad(x, (5, 2), value=float("nan"))[:, 5:-2], x[-1:]):
        lowest, highest = few_rows._sample(logits)
        assert lowest <= highest and (logits == lowest).any() and (logits == highest).any()


@pytest.mark.parametrize("mask", [slice(1, None, 2), slice(None, None, 2), slice(25129, None)])
@pytest.mark.parametrize("n", [1, 8, 64])
def test_half_of_the_classes_masked_is_seen(n, mask):
    x = torch.randn(n, 50257)
    x[:, mask] = -1e4
    lowest, highest = few_rows._sample(x)
    assert lowest == -1e4 and highest > -10


WRONG = dict(
    reduction=["max", None, b"mean"],
    ignore_index=[None, 1.5, True, 1 << 63, -(1 << 70)],
    dim=[2, True, None],
    label_smoothing=[False, None, "0", 2.0],
    z_loss_weight=[False, None, -1.0],
    logit_scale=[True, None],
    softcap=[0.0, False],
    vocab_size=[51, 0],
    spread_rest=[0, None],
    inplace_backward=[0, None],
    grad_in_forward=[0, None],
    backend=["tritn", None, 3],
    size_average=[True],
    reduce=[False],
    weight=[1.0],
    token_weight=[1.0],
    num_items=[0.5],
)


@pytest.mark.parametrize(("name", "value"), [(n, v) for n, some in WRONG.items() for v in some])
def test_arguments_that_are_wrong(name, value, taken):
    """Few rows are looked at once, many by a check for each argument: the same errors."""
    x, target = rows_of(7, 50)
    with pytest.raises((TypeError, ValueError, IndexError)) as ours:
        cross_entropy(x, target, **{name: value})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(few_rows, "_are_ordinary", lambda *_: False)
        with pytest.raises(ours.type) as expected:
            cross_entropy(x, target, **{name: value})
    assert str(ours.value) == str(expected.value)


def test_targets_out_of_range():
    x, target = rows_of(7, 50)
    for wrong in (-1, 50):
        with pytest.raises(IndexError, match=f"target {wrong} in row 3"):
            cross_entropy(x, target.index_fill(0, torch.tensor([3]), wrong))


def test_whoever_looks_for_operators_finds_them(taken):
    x, target = rows_of(7, 50)
    code = make_fx(lambda x: cross_entropy(x, target))(x).code
    assert "chunked_ce.token_stats" in code
    leaf = x.clone().requires_grad_()
    with torch.utils.flop_counter.FlopCounterMode(display=False):
        cross_entropy(leaf, target).backward()
    assert taken == [0, 0]
    loss = cross_entropy(leaf, target)
    with torch.utils.flop_counter.FlopCounterMode(display=False):
        loss.backward()
    assert taken == [1, 0]


def test_sizes_that_a_tracer_does_not_know():
    """No size decides anything while tracing: neither a graph for each, nor an error."""
    x, target = rows_of(7, 50)
    target[2] = -100

    def of_scored(x, target):
        scored = (target != -100).nonzero()[:, 0]
        return cross_entropy(x[scored], target[scored])

    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        compiled = torch.compile(of_scored, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x, target), cross_entropy(x, target))


def test_forward_mode_tangents_are_refused():
    x, target = rows_of(7, 50)
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward-mode"):
        cross_entropy(forward_ad.make_dual(x, torch.ones_like(x)), target)


def test_nested_tensors_are_refused():
    nested = torch.nested.nested_tensor([torch.randn(5), torch.randn(5)])
    with pytest.raises(TypeError, match="input is a nested tensor"):
        cross_entropy(nested, torch.tensor([1, 2]))
    targets = torch.nested.nested_tensor([torch.tensor(1), torch.tensor(2)])
    with pytest.raises(TypeError, match="target is a nested tensor"):
        cross_entropy(torch.randn(2, 5), targets)


def test_gradients_batched(taken):
    x, target = rows_of(7, 50)
    leaf = x.clone().requires_grad_()
    loss = cross_entropy(leaf, target)
    (grads,) = torch.autograd.grad(loss, leaf, torch.tensor([1.0, -2.0]), is_grads_batched=True)
    assert taken == [1, 0]
    exact = gradient(lambda x: oracle.cross_entropy(x, target), x.double())
    assert_gradient(grads[0], exact, torch.float32)
    assert_gradient(grads[1], -2 * exact, torch.float32)


def test_another_default_device(monkeypatch):
    """The memory to work in is that of the logits' device."""
    monkeypatch.setattr(row_blocks, "_kept", threading.local())
    x, target = rows_of(7, 50)
    with torch.device("meta"):
        ours = gradient(cross_entropy_of(target), x.bfloat16())
    exact = gradient(lambda x: oracle.cross_entropy(x, target), x.bfloat16().double())
    assert_gradient(ours, exact, torch.bfloat16)


def test_backward_twice_and_double_backward(taken):
    x, target = rows_of(7, 50)
    leaf = x.clone().requires_grad_()
    loss = cross_entropy(leaf, target)
    first, second = (torch.autograd.grad(loss, leaf, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second) and taken == [1, 2]
    (grad,) = torch.autograd.grad(loss, leaf, create_graph=True)
    assert torch.equal(grad, first) and taken == [1, 2]
    with pytest.raises(RuntimeError, match="first derivatives only"):
        grad.sum().backward()


def test_logits_changed_before_backward():
    x, target = rows_of(7, 50)
    logits = x.clone().requires_grad_() * 1
    loss = cross_entropy(logits, target)
    with torch.no_grad():
        logits[0, 0] = 3.0
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.fixture
def exponentials(monkeypatch):
    """How many blocks' exponentials were computed."""
    counts, inner = [0], few_rows._exp

    def counted(*args):
        counts[0] += 1
        return inner(*args)

    monkeypatch.setattr(few_rows, "_exp", counted)
    return counts


def in_a_thread(call):
    results = []
    thread = threading.Thread(target=lambda: results.append(call()))
    thread.start()
    thread.join()
    return results[0]


BETWEEN = dict(
    nothing=lambda x, target: None,
    a_smaller_loss=lambda x, target: cross_entropy(x[:2], target[:2]),
    the_same_loss=cross_entropy,
    a_larger_loss=lambda x, target: cross_entropy(torch.randn(60, 50), target[:1].expand(60)),
    of_the_operators=lambda x, target: cross_entropy(x, target, z_loss_weight=0.1),
    of_another_thread=lambda x, target: in_a_thread(lambda: cross_entropy(x, target)),
)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("n", [3, 30])  # rows of a block, and of several
@pytest.mark.parametrize("between", BETWEEN)
def test_exponentials_that_are_still_there(between, n, dtype, exponentials):
    """Those of forward serve backward, unless somebody used their memory."""
    x, target = rows_of(n, 50, dtype)
    expected = gradient(cross_entropy_of(target), x.clone(), upstream=torch.tensor(-3.7))
    leaf = x.clone().requires_grad_()
    loss = cross_entropy(leaf, target)
    BETWEEN[between](x, target)
    exponentials[0] = 0
    (ours,) = torch.autograd.grad(loss, leaf, torch.tensor(-3.7), retain_graph=True)
    untouched = between in ("nothing", "of_another_thread")
    held = untouched and n == 3 and dtype != torch.float64  # whose memory is not kept
    assert exponentials == [0 if held else len(list(few_rows._blocks(x)))]
    (again,) = torch.autograd.grad(loss, leaf, torch.tensor(-3.7))
    assert torch.equal(ours, expected) and torch.equal(again, expected)


def test_logits_that_a_hook_lays_out_anew(exponentials):
    """The same values in another order of memory, as one that stores them might return them."""
    x, target = rows_of(3, 50)
    leaf = x.clone().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: t.mT.contiguous() if t.dim() == 2 else t,
        lambda t: t.mT if t.dim() == 2 else t,
    ):
        cross_entropy(leaf, target).backward()
    assert torch.equal(leaf.grad, gradient(cross_entropy_of(target), x))


def test_two_losses_and_their_gradients(exponentials):
    """Each has its own logits, whichever comes first."""
    (x, target), (y, other) = rows_of(3, 50), rows_of(3, 50)
    expected = [gradient(cross_entropy_of(t), z) for z, t in ((x, target), (y, other))]
    x, y = x.requires_grad_(), y.requires_grad_()
    for last in (x, y):
        losses = {x: cross_entropy(x, target), y: cross_entropy(y, other)}
        order = [x, y] if last is y else [y, x]
        grads = {leaf: torch.autograd.grad(losses[leaf], leaf)[0] for leaf in order}
        assert torch.equal(grads[x], expected[0]) and torch.equal(grads[y], expected[1])


def test_a_backward_in_another_thread(exponentials):
    x, target = rows_of(3, 50)
    expected = gradient(cross_entropy_of(target), x)
    leaf = x.clone().requires_grad_()
    loss = cross_entropy(leaf, target)
    exponentials[0] = 0
    (ours,) = in_a_thread(lambda: torch.autograd.grad(loss, leaf))
    assert torch.equal(ours, expected) and exponentials == [1]


def test_without_gradients(taken):
    x, target = rows_of(7, 50)
    leaf = x.clone().requires_grad_()
    loss = cross_entropy(leaf, target).detach()
    with torch.no_grad():
        assert torch.equal(cross_entropy(leaf, target), loss)
    with torch.inference_mode():
        assert torch.equal(cross_entropy(leaf, target), loss)
    assert (
        torch.equal(cross_entropy(x, target), loss) and not cross_entropy(x, target).requires_grad
    )
    assert taken == [1, 0]


def test_rows_all_out_of_range_are_read_once(monkeypatch):
    """GPT-2's logits are near -80: no sum of exp z itself is worth its pass."""
    passes, inner = [], backend_torch._sum_rows

    def counted(*args, **kwargs):
        passes.append(kwargs["by_maximum"])
        return inner(*args, **kwargs)

    monkeypatch.setattr(backend_torch, "_sum_rows", counted)
    x, target = rows_of(40, 50)
    for shift, expected in (
        (torch.zeros(40), [False]),
        (torch.full((40,), -80.0), [True]),
        (torch.arange(40).lt(30) * -80.0, [False, True]),  # most
    ):
        shifted, scored = x + shift[:, None], target.index_fill(0, torch.tensor([39]), -100)
        passes.clear()
        loss = cross_entropy(shifted, scored)
        assert passes == expected
        torch.testing.assert_close(
            loss.double(), oracle.cross_entropy(shifted, scored), rtol=1e-6, atol=0
        )
