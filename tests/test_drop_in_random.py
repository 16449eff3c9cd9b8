"""Random calls as torch takes them, against torch in fp64: shapes, dimensions, weights, smoothing, probabilities,
reductions, ignore_index, dtypes, strides."""

import pytest
import torch
import torch.nn.functional as F
from helpers import ULP, gradient
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from chunked_ce import binary_cross_entropy_with_logits, cross_entropy

SETTINGS = dict(
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
COUNTED = {"calls": 0}
pytestmark = pytest.mark.filterwarnings("ignore:(input|target) of shape")


@st.composite
def calls(draw):
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    dtype = draw(st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]))
    classes = draw(st.one_of(st.integers(1, 12), st.sampled_from([63, 301])))
    shape = draw(
        st.sampled_from(
            [(), (0,), (1,), (3,), (2, 3), (3, 2, 2), (1, 4, 1), (2, 0), (2, 1, 2, 2), (5, 1)]
        )
    )
    shape = (*shape[:1], classes, *shape[1:]) if shape else (classes,)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    x = (x * draw(st.sampled_from([0.0, 1.0, 6.0]))).to(dtype)
    if x.dim() > 1 and draw(st.booleans()):  # the same numbers, with other strides
        x = x.movedim(1, -1).contiguous().movedim(-1, 1)
    elif x.dim() > 2 and draw(st.booleans()):
        x = x.transpose(0, 2).contiguous().transpose(0, 2)
    rows = shape[:1] + shape[2:] if len(shape) > 1 else ()
    kind = draw(st.sampled_from(["indices", "probabilities", "labels"]))
    options = dict(reduction=draw(st.sampled_from(["mean", "sum", "none"])))
    weight = torch.rand(classes, generator=generator, dtype=torch.float64)
    if options["reduction"] != "mean" and draw(st.booleans()):
        weight[0] = 0  # a mean whose weights sum to 0 is nothing to compare
    if kind == "labels":
        target = torch.rand(shape, generator=generator)
        target = target if draw(st.booleans()) else target.round()
        per_class = (classes, *[1] * (len(shape) - 2)) if len(shape) > 1 else (classes,)
        for name in ("weight", "pos_weight"):
            given_weight = torch.rand(per_class, generator=generator)
            options[name] = draw(st.sampled_from([None, given_weight]))
        return x, target, options
    options["label_smoothing"] = draw(st.sampled_from([0.0, 0.1, 1.0]))
    options["weight"] = draw(st.sampled_from([None, weight]))
    if kind == "probabilities":
        target = torch.rand(shape, generator=generator)
        if draw(st.booleans()):
            target = target / target.sum(1 if len(shape) > 1 else 0, keepdim=True)
    else:
        target = torch.randint(0, classes, rows, generator=generator)
        options["ignore_index"] = draw(st.sampled_from([-100, 0, classes - 1, 10**6]))
        if options["ignore_index"] in (-100, 10**6):
            masked = torch.rand(rows, generator=generator) < draw(st.sampled_from([0.0, 0.4]))
            target = torch.where(masked, options["ignore_index"], target)
    return x, target, options


def functions(target, options):
    binary = "pos_weight" in options
    ours = binary_cross_entropy_with_logits if binary else cross_entropy
    theirs = F.binary_cross_entropy_with_logits if binary else F.cross_entropy
    exact = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    wide = target.double() if target.is_floating_point() else target
    return (lambda x, **kw: ours(x, target, **options, **kw)), (lambda x: theirs(x, wide, **exact))


def check(backend, device, call):
    x, target, options = call
    COUNTED["calls"] += 1
    x, target = x.to(device), target.to(device)
    options = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    ours, theirs = functions(target, options)
    loss, truth = ours(x, backend=backend), theirs(x.double())
    assert loss.shape == truth.shape
    rtol = 1e-10 if x.dtype == torch.float64 else 2e-6
    torch.testing.assert_close(loss.double(), truth, rtol=rtol, atol=rtol, equal_nan=True)

    def up(value):
        return (value * torch.linspace(-1, 3.7, max(1, value.numel())).to(value)[: value.numel()].view(value.shape)).sum()  # fmt: skip

    got = gradient(lambda x: ours(x, backend=backend), x, upstream=up)
    exact = gradient(theirs, x.double(), upstream=up).nan_to_num(0.0)  # the mean of nothing
    noise = {torch.float64: 1e-12, torch.float16: 1e-7}.get(x.dtype, 4e-7)
    size = max(1.0, float(exact.abs().max()) if exact.numel() else 0.0)
    torch.testing.assert_close(got.double(), exact, rtol=ULP[x.dtype], atol=noise * size)


@settings(max_examples=150, **SETTINGS)
@given(calls())
def test_torch_backend(call):
    check("torch", "cpu", call)


@settings(max_examples=25, **SETTINGS)
@given(call=calls())
def test_kernels(device, call):
    pytest.importorskip("triton")
    check("triton", device, call)


@pytest.mark.long
def test_2000_calls(capsys):
    before = COUNTED["calls"]
    settings(max_examples=2000, **SETTINGS)(given(calls())(lambda c: check("torch", "cpu", c)))()
    with capsys.disabled():
        print(f"\n{COUNTED['calls'] - before} random calls against torch in fp64, no difference")
    assert COUNTED["calls"] - before >= 1000  # hypothesis may find fewer distinct ones


@pytest.mark.long
@settings(max_examples=120, **SETTINGS)
@given(call=calls())
def test_kernels_at_length(device, call):
    pytest.importorskip("triton")
    check("triton", device, call)
