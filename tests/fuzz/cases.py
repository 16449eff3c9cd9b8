"""What a call may be given: logits in any dtype, shape and memory layout, and every kind of target."""

import contextlib
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor

from chunked_ce.backends import torch_blocks

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
INTEGERS = [torch.int64, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8]
INF, NAN = float("inf"), float("nan")
# Infinite, signed zeros, subnormal, large, near fp16's range
SPECIAL = [INF, -INF, -INF, NAN, 0.0, -0.0, 1e-40, -1e-40, 6e-8, 1e4, -1e4, 65504.0, -65504.0]
# The kernels' documented range is 1e9 after logit_scale
LARGEST = dict(torch=1e15, cpu=1e15, triton=4e8)

SHAPES = st.one_of(
    st.lists(st.integers(0, 4), min_size=0, max_size=3).map(tuple),
    st.sampled_from([(17,), (37,), (5, 1), (2, 0)]),
)
# One class; ragged; a block or a segment of the kernels (conftest's small_tiles: 300, 256), and many of them
VOCABS = st.one_of(st.integers(1, 40), st.sampled_from([63, 128, 257, 300, 301, 1025]))
# For kernels in Triton's interpreter, which takes its time
SMALL_SHAPES = st.sampled_from([(), (0,), (1,), (3,), (2, 2), (2, 1, 2)])
SMALL_VOCABS = st.one_of(st.integers(1, 20), st.sampled_from([128, 257, 300, 301]))
# Elements a block: one that cuts every row, conftest's, all in one
BLOCKS = st.sampled_from([3, 32, 150, 1 << 20])
VIEWS = ["whole", "whole", "offset", "every other class", "classes outermost", "transposed", "expanded", "every other row"]  # fmt: skip


def backends(torch: int, triton: int, long: int):
    """A test for each backend, and how many cases each tries; the kernels at length `long`."""
    plain = pytest.mark.cases(torch)
    marks = dict(torch=plain, cpu=plain, triton=pytest.mark.cases(triton, long=long))
    each = [pytest.param(name, marks=mark) for name, mark in marks.items()]
    return pytest.mark.parametrize("backend", each)


def sizes(backend: str) -> dict[str, Any]:
    if backend == "triton":
        return dict(shapes=SMALL_SHAPES, vocabs=SMALL_VOCABS)
    return dict(shapes=SHAPES, vocabs=VOCABS)


def on(device: str, case: Any) -> Any:
    """A case with its tensors, wherever they are within it, on a device."""
    if isinstance(case, Tensor):
        return case.detach().to(device).requires_grad_(case.requires_grad)
    if isinstance(case, dict):
        return {k: on(device, v) for k, v in case.items()}
    if isinstance(case, list | tuple):
        return type(case)(on(device, v) for v in case)
    if dataclasses.is_dataclass(case):
        fields = {f.name: getattr(case, f.name) for f in dataclasses.fields(case)}
        return dataclasses.replace(case, **on(device, fields))
    return case


@contextlib.contextmanager
def block_size(elements: int) -> Iterator[None]:
    """The torch backend's blocks: pieces of rows, up to three of them together."""
    with (
        mock.patch.object(torch_blocks, "WIDTH", elements),
        mock.patch.object(torch_blocks, "ELEMENTS", 3 * elements),
    ):
        yield


def generator(draw) -> torch.Generator:
    return torch.Generator().manual_seed(draw(st.integers(0, 2**31)))


def values(
    draw, g: torch.Generator, shape: tuple[int, ...], dtype: torch.dtype, largest: float
) -> Tensor:
    """Logits; in one case of four some of them special, of which `largest` is one."""
    scale = draw(st.sampled_from([0.0, 1.0, 1.0, 5.0, 40.0]))
    x = torch.randn(shape, generator=g, dtype=torch.float64) * scale
    x = x + draw(st.sampled_from([0.0, 0.0, 0.0, 100.0, 1e4, -1e4]))
    if draw(st.integers(0, 3)) == 0 and x.numel():
        share = draw(st.sampled_from([0.01, 0.1, 0.9]))
        chosen = torch.tensor(
            draw(st.lists(st.sampled_from([*SPECIAL, largest]), min_size=1, max_size=3)),
            dtype=x.dtype,
        )
        special = chosen[torch.randint(0, len(chosen), shape, generator=g)]
        x = torch.where(torch.rand(shape, generator=g) < share, special, x)
    return x.to(dtype)


def seen(x: Tensor, view: str) -> Tensor:
    """The same numbers in other memory, differentiably; NaN wherever no logit is."""
    rows = x.dim() - 1
    if view == "offset":
        return F.pad(x, (3, 2), value=NAN)[..., 3 : 3 + x.shape[-1]]
    if view == "every other class":
        return torch.stack([x, torch.full_like(x, NAN)], -1).flatten(-2)[..., ::2]
    if view == "classes outermost":
        return x.movedim(-1, 0).clone(memory_format=torch.contiguous_format).movedim(0, -1)
    if view == "transposed" and rows > 1:
        return x.transpose(0, -2).clone(memory_format=torch.contiguous_format).transpose(0, -2)
    if view == "expanded" and rows and x.shape[0]:
        return x[:1].expand(x.shape)
    if view == "every other row" and rows:
        return torch.stack([x, torch.full_like(x, NAN)], 1).flatten(0, 1)[::2]
    return x.clone()


def outside(x: Tensor) -> Tensor:
    """What of the memory that `x` is a view of it does not show."""
    base = x if x._base is None else x._base
    base = base.detach()
    shown = torch.zeros_like(base, dtype=torch.bool)
    shown.as_strided(x.shape, x.stride(), x.storage_offset()).fill_(True)
    return base[~shown].clone()


def strided(draw, t: Tensor) -> Tensor:
    """`t`, or a view that holds it."""
    return t if draw(st.booleans()) or not t.dim() else torch.stack([t, t], -1)[..., 0]


@dataclass
class TargetSpec:
    """A target, and the same as class probabilities in fp64, for the truth."""

    kind: str
    target: Any
    prob: Tensor  # [..., V], before smoothing
    counted: Tensor  # [...] rows that are not ignored
    options: dict[str, Any] = field(default_factory=dict)
    # Where `prob` spreads what may be the rounding of a teacher's: the same without it
    unspread: Tensor | None = None


def index_spec(draw, g: torch.Generator, rows: tuple[int, ...], vocab: int) -> TargetSpec:
    ignore_index = draw(st.sampled_from([-100, -100, -1, 0, vocab - 1, 10**6]))
    dtypes = [d for d in INTEGERS if torch.iinfo(d).max >= vocab]
    dtype = draw(st.sampled_from(dtypes))
    index = torch.randint(0, vocab, rows, generator=g)
    limits = torch.iinfo(dtype)
    if limits.min <= ignore_index <= limits.max:
        ignored = torch.rand(rows, generator=g) < draw(st.sampled_from([0.0, 0.3, 1.0]))
        index = torch.where(ignored, ignore_index, index)
    counted = index != ignore_index
    prob = F.one_hot(index.where(counted, 0), vocab).double()
    options = (
        {} if ignore_index == -100 and draw(st.booleans()) else dict(ignore_index=ignore_index)
    )
    return TargetSpec("indices", strided(draw, index.to(dtype)), prob, counted, options)


def probability_spec(draw, g: torch.Generator, rows: tuple[int, ...], vocab: int) -> TargetSpec:
    prob = torch.rand(*rows, vocab, generator=g, dtype=torch.float64)
    if draw(st.booleans()):
        prob = torch.where(torch.rand(prob.shape, generator=g) < 0.5, 0.0, prob)
    if draw(st.booleans()):
        prob = prob / prob.sum(-1, keepdim=True).clamp(min=1e-3)
    prob = prob.to(draw(st.sampled_from(DTYPES)))
    return TargetSpec("probabilities", prob, prob.double(), torch.ones(rows, dtype=torch.bool))


def top_k_spec(draw, g: torch.Generator, rows: tuple[int, ...], vocab: int) -> TargetSpec:
    ignore_index = draw(st.sampled_from([-100, -100, -1, 0]))
    k = draw(st.integers(1, 5))
    index = torch.randint(0, vocab, (*rows, k), generator=g)
    padding = torch.rand(index.shape, generator=g) < draw(st.sampled_from([0.0, 0.3, 1.0]))
    index = torch.where(padding, ignore_index, index)
    given = index != ignore_index
    q = torch.rand(index.shape, generator=g, dtype=torch.float64)
    q = q / q.sum(-1, keepdim=True) * draw(st.sampled_from([0.5, 0.999, 1.0]))
    spread = draw(st.booleans())
    if not spread and draw(st.booleans()):
        q = q.where(torch.rand(q.shape, generator=g) < 0.5, 0.0)
    q = q.to(draw(st.sampled_from(DTYPES)))
    prob = torch.zeros(*rows, vocab, dtype=torch.float64)
    named = torch.zeros_like(prob).scatter_add_(-1, index.where(given, 0), given.double()) > 0
    prob.scatter_add_(-1, index.where(given, 0), q.double() * given)
    unspread = None
    if spread:
        others = (~named).sum(-1, keepdim=True)
        rest = (1.0 - prob.sum(-1, keepdim=True)).clamp(min=0.0)
        spread_out = torch.where(named, prob, rest / others.clamp(min=1))
        unspread = torch.where(rest <= torch.finfo(q.dtype).eps, prob, spread_out)
        prob = spread_out
    options = dict(ignore_index=ignore_index, spread_rest=spread)
    index = index.to(draw(st.sampled_from(INTEGERS[:4])))
    return TargetSpec("top k", (index, q), prob, given.any(-1), options, unspread)


TARGET_SPECS = dict(indices=index_spec, probabilities=probability_spec) | {"top k": top_k_spec}


def target_specs(draw, g: torch.Generator, rows: tuple[int, ...], vocab: int) -> TargetSpec:
    kind = draw(st.sampled_from(["indices", "indices", "indices", "probabilities", "top k"]))
    return TARGET_SPECS[kind](draw, g, rows, vocab)


def heads(draw) -> dict[str, Any]:
    head = dict(
        softcap=draw(st.sampled_from([None, None, None, 7.0])),
        logit_scale=draw(st.sampled_from([1.0, 1.0, 1.0, 0.37, -2.0, 0.0])),
    )
    return {} if head == dict(softcap=None, logit_scale=1.0) else head


def loss_options(draw, g: torch.Generator, rows: tuple[int, ...], vocab: int) -> dict[str, Any]:
    options: dict[str, Any] = dict(
        reduction=draw(st.sampled_from(["mean", "sum", "none"])),
        label_smoothing=draw(st.sampled_from([0.0, 0.0, 0.1, 1.0])),
        z_loss_weight=draw(st.sampled_from([0.0, 0.0, 1e-3, 1.0])),
    )
    if draw(st.integers(0, 3)) == 0:
        weight = torch.rand(vocab, generator=g, dtype=torch.float64)
        weight = weight.where(weight > 0.2, 0.0) if draw(st.booleans()) else weight
        options["weight"] = weight.to(draw(st.sampled_from(DTYPES)))
    if draw(st.integers(0, 3)) == 0:
        weight = torch.rand(rows, generator=g, dtype=torch.float64)
        weight = weight.where(weight > 0.2, 0.0) if draw(st.booleans()) else weight
        options["token_weight"] = strided(draw, weight.to(draw(st.sampled_from(DTYPES))))
    if options["reduction"] == "mean" and draw(st.integers(0, 3)) == 0:
        options["num_items"] = draw(st.sampled_from([1, 7, torch.tensor(7), torch.tensor(3.5)]))
    return options


def upstreams(draw, g: torch.Generator, shape: tuple[int, ...]) -> Tensor:
    """Gradients of a loss of that shape: a number for all (stride 0), or one for each, strided too."""
    kind = draw(st.sampled_from(["one", "number", "each"]))
    if kind == "one" or not shape:
        return torch.tensor(
            1.0 if kind == "one" else draw(st.sampled_from([-3.7, 0.0, 1e-3]))
        ).expand(shape)
    if kind == "number":
        return torch.tensor(-3.7).expand(shape)
    each = torch.randn(shape, generator=g)
    return strided(draw, each.where(torch.rand(shape, generator=g) < 0.8, 0.0))
