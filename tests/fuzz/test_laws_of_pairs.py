"""What holds between two calls about pairs of rows, called heads and documents, whatever the truth is."""

import math
from dataclasses import dataclass
from typing import Any

import cases
import pytest
import torch
from helpers import ULP
from hypothesis import strategies as st
from torch import Tensor

from chunked_ce import cross_entropy, kl_div, linear_cross_entropy, linear_kl_div, token_stats


@dataclass
class Pair:
    x: Tensor  # [N, V], multiples of 1/8
    y: Tensor
    options: dict[str, Any]
    block: int
    g: torch.Generator


@st.composite
def pairs(draw):
    g, tokens, vocab = cases.generator(draw), draw(st.integers(1, 9)), draw(cases.VOCABS)
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    x, y = (torch.randint(-80, 81, (2, tokens, vocab), generator=g) / 8).to(dtype)
    options = dict(
        kind=draw(st.sampled_from(["forward", "reverse", "jsd"])),
        beta=draw(st.sampled_from([0.5, 0.2, 0.9])),
        temperature=draw(st.sampled_from([1.0, 2.0, 0.5])),
        backend=draw(st.sampled_from(["auto", "torch"])),
        reduction="none",
    )
    return Pair(x, y, options, draw(cases.BLOCKS), g)


def run(pair: Pair, x: Tensor, y: Tensor, **changed: Any) -> tuple[Tensor, Tensor]:
    """(each row's divergence, the gradient of their sum)."""
    leaf = x.detach().clone().requires_grad_()
    with cases.block_size(changed.pop("block", pair.block)):
        loss = kl_div(leaf, y, **pair.options | changed)
        loss.sum().backward()
    return loss.detach(), leaf.grad


def assert_same(one: tuple[Tensor, ...], other: tuple[Tensor, ...]) -> None:
    for a, b in zip(one, other, strict=True):
        rtol = 4 * ULP[a.dtype]
        torch.testing.assert_close(a, b, rtol=rtol, atol=rtol * (1 + float(b.abs().max())))


def check_signs(pair: Pair) -> None:
    """Never below 0; 0 of a row and itself, with a gradient of 0; a gradient adds up to 0."""
    loss, grad = run(pair, pair.x, pair.y)
    assert (loss >= 0).all()
    noise = 20 * ULP[grad.dtype] * (1 + grad.abs().sum(-1))
    assert (grad.sum(-1).abs() <= noise).all()
    for t in run(pair, pair.x, pair.x.clone()):
        assert (t == 0).all()


def check_swapped(pair: Pair) -> None:
    """Student and teacher in each other's place."""
    kinds = dict(forward="reverse", reverse="forward", jsd="jsd")
    swapped = dict(kind=kinds[pair.options["kind"]], beta=1 - pair.options["beta"])
    loss, _ = run(pair, pair.x, pair.y)
    assert_same((loss,), run(pair, pair.y, pair.x, **swapped)[:1])


def check_offsets(pair: Pair) -> None:
    """Logits are read up to a constant of their row, of either model; these sums are exact."""
    a, b = torch.randint(-(2**16), 2**16, (2, len(pair.x), 1), generator=pair.g).to(pair.x)
    assert_same(run(pair, pair.x + a, pair.y + b), run(pair, pair.x, pair.y))


def check_permutation(pair: Pair) -> None:
    order = torch.randperm(pair.x.shape[-1], generator=pair.g)
    loss, grad = run(pair, pair.x[:, order], pair.y[:, order])
    assert_same((loss, grad[:, order.argsort()]), run(pair, pair.x, pair.y))


def check_temperature(pair: Pair) -> None:
    """Both models' logits divided, which is exact."""
    t = pair.options["temperature"]
    loss, grad = run(pair, pair.x / t, pair.y / t, temperature=1.0)
    assert_same((loss, grad / t), run(pair, pair.x, pair.y))


def check_blocks_and_padding(pair: Pair) -> None:
    """However the work is cut; columns that do not exist; classes that both rule out."""
    whole = run(pair, pair.x, pair.y, block=1 << 20)
    for block in (5, 64):
        assert_same(run(pair, pair.x, pair.y, block=block), whole)
    vocab = pair.x.shape[-1]
    for value, options in ((math.nan, dict(vocab_size=vocab)), (-math.inf, {})):
        x, y = (torch.nn.functional.pad(t, (0, 3), value=value) for t in (pair.x, pair.y))
        loss, grad = run(pair, x, y, **options)
        assert (grad[:, vocab:] == 0).all()
        assert_same((loss, grad[:, :vocab]), whole)


def check_rows(pair: Pair) -> None:
    """A row's divergence and gradient, bit by bit, are the same among whatever others."""
    whole = run(pair, pair.x, pair.y)
    cut = int(torch.randint(0, len(pair.x) + 1, (), generator=pair.g))
    for part in (slice(0, cut), slice(cut, None)):
        for a, b in zip(run(pair, pair.x[part], pair.y[part]), whole, strict=True):
            assert torch.equal(a, b[part])


def check_cross_entropy(pair: Pair) -> None:
    """KL(q‖p) is the cross-entropy with q as the target, less the entropy of q."""
    q = pair.y.double().softmax(-1)
    leaf = pair.x.double().requires_grad_()
    soft = cross_entropy(leaf, q, reduction="none")
    soft.sum().backward()
    labels = torch.zeros(len(q), dtype=torch.int64)
    soft = soft.detach() - token_stats(pair.y.double(), labels, entropy=True).entropy
    loss, grad = run(pair, pair.x, pair.y, kind="forward", temperature=1.0)
    assert_same((loss, grad), (soft.to(loss), leaf.grad.to(loss)))


def check_heads(pair: Pair) -> None:
    """A head that is the identity; chunks of any size."""
    eye = torch.eye(pair.x.shape[-1], dtype=pair.x.dtype)
    for size in (1, 4):
        x = pair.x.clone().requires_grad_()
        loss = linear_kl_div(x, eye, pair.y, eye, token_chunk_size=size, **pair.options)
        loss.sum().backward()
        assert_same((loss.detach(), x.grad), run(pair, pair.x, pair.y))


def check_called_head(pair: Pair) -> None:
    """A head that is called says the same as its weight: loss, and both gradients."""
    dim = min(8, pair.x.shape[-1])
    hidden, weight = pair.x[:, :dim] / 8, pair.y[:1].T.expand(-1, dim) / 8 + pair.x[:1].T / 16
    target = torch.randint(0, len(weight), (len(hidden),), generator=pair.g)
    target = target.masked_fill(torch.rand(len(hidden), generator=pair.g) < 0.3, -100)
    options = dict(
        reduction=("mean", "sum", "none")[int(pair.g.initial_seed()) % 3],
        label_smoothing=0.1, z_loss_weight=1e-3, softcap=5.0 * pair.options["temperature"],
        logit_scale=pair.options["beta"], token_chunk_size=3,
    )  # fmt: skip
    found = []
    for called in (False, True):
        h, w = (t.clone().requires_grad_() for t in (hidden, weight))
        head = (lambda x, w=w: x @ w.T) if called else w
        loss = linear_cross_entropy(h, head, target, **options)
        loss.sum().backward()
        found.append((loss.detach().nan_to_num(), h.grad, w.grad))
    assert_same(*found)


def check_documents(pair: Pair) -> None:
    """Packed documents, told apart by offsets or by positions, are as documents alone."""
    ids = torch.randint(0, pair.x.shape[-1], (len(pair.x),), generator=pair.g)
    starts = torch.rand(len(ids), generator=pair.g) < 0.3
    starts[0] = True
    offsets = torch.cat([starts.nonzero()[:, 0], torch.tensor([len(ids)])])
    lengths = offsets.diff().tolist()
    positions = torch.cat([torch.arange(n) for n in lengths])
    alone = [
        cross_entropy(x, t, dim=-1, shift=True, reduction="none")
        for x, t in zip(pair.x.split(lengths), ids.split(lengths), strict=True)
    ]
    for packed in (dict(cu_seqlens=offsets), dict(position_ids=positions)):
        loss = cross_entropy(pair.x, ids, dim=-1, shift=True, reduction="none", **packed)
        assert torch.equal(loss, torch.cat(alone))


LAWS = (
    check_signs, check_swapped, check_offsets, check_permutation, check_temperature,
    check_blocks_and_padding, check_rows, check_cross_entropy, check_heads, check_called_head,
    check_documents,
)  # fmt: skip


@pytest.mark.cases(5)
@pytest.mark.parametrize("check", LAWS, ids=lambda check: check.__name__.removeprefix("check_"))
def test_law_of_pairs(explore, check):
    explore(pairs(), check)
