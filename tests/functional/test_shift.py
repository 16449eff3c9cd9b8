"""shift=True: position i predicts the token at i + 1. Checked against labels shifted by hand, in fp64."""

import pytest
import torch
import torch.nn.functional as F
from helpers import gradient

from chunked_ce import (
    CrossEntropyLoss,
    LinearCrossEntropyLoss,
    cross_entropy,
    linear_cross_entropy,
    linear_token_stats,
    token_stats,
)

V, D = 11, 5
LENGTHS = [3, 1, 4, 0, 2]  # of packed documents: 10 tokens, one document of one token, one empty
POSITIONS = torch.cat([torch.arange(n) for n in LENGTHS])
OFFSETS = torch.tensor([0, 3, 4, 8, 8, 10])
T = len(POSITIONS)


def hidden(*rows: int) -> torch.Tensor:
    return torch.randn(*rows, D, dtype=torch.float64)


def logits(*rows: int) -> torch.Tensor:
    return torch.randn(*rows, V, dtype=torch.float64)


def tokens(*rows: int) -> torch.Tensor:
    return torch.randint(0, V, rows)


HEAD = torch.randn(V, D, dtype=torch.float64)


def by_hand(target: torch.Tensor, ignore_index: int = -100, starts=()) -> torch.Tensor:
    """Labels written one by one."""
    rows = target.reshape(-1, target.shape[-1]).tolist()
    shifted = [
        [
            row[i + 1] if i + 1 < len(row) and i + 1 not in starts else ignore_index
            for i in range(len(row))
        ]
        for row in rows
    ]
    return torch.tensor(shifted).view(target.shape)


def eager(x, labels, reduction="mean", ignore_index=-100):
    out = F.cross_entropy(
        x.reshape(-1, V), labels.reshape(-1), reduction=reduction, ignore_index=ignore_index
    )
    return out.view(labels.shape) if reduction == "none" else out


PACKED = {
    "whole": ({}, ()),
    "position_ids": (dict(position_ids=POSITIONS), (0, 3, 4, 8)),
    "cu_seqlens": (dict(cu_seqlens=OFFSETS), (0, 3, 4, 8)),
    "cu_seqlens, int32": (dict(cu_seqlens=OFFSETS.int()), (0, 3, 4, 8)),
}


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(("documents", "starts"), PACKED.values(), ids=PACKED)
def test_shift_documents(documents, starts, reduction):
    x, h, target = logits(T), hidden(T), tokens(T)
    labels, up = by_hand(target, starts=starts), torch.randn(T, dtype=torch.float64)
    upstream = up if reduction == "none" else None
    options = dict(shift=True, reduction=reduction, **documents)
    for function, leaf, truth in (
        (lambda x: cross_entropy(x, target, dim=-1, **options), x, lambda x: eager(x, labels, reduction)),
        (lambda h: linear_cross_entropy(h, HEAD, target, **options), h, lambda h: eager(h @ HEAD.T, labels, reduction)),
        (lambda w: linear_cross_entropy(h, w, target, **options), HEAD, lambda w: eager(h @ w.T, labels, reduction)),
    ):  # fmt: skip
        torch.testing.assert_close(function(leaf), truth(leaf))
        ours, theirs = (gradient(f, leaf, upstream=upstream) for f in (function, truth))
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("rows", [(7,), (3, 7), (2, 3, 7), (2, 1), (1,), (2, 0)])
def test_shift_shapes(rows):
    x, h, target = logits(*rows), hidden(*rows), tokens(*rows)
    kept = target.clone()
    labels = by_hand(target) if target.numel() else target
    plain = dict(dim=-1, reduction="none")
    ours = cross_entropy(x, target, shift=True, **plain)
    assert ours.shape == rows and not ours[..., -1:].any()
    assert torch.equal(ours, cross_entropy(x, labels, **plain))
    ours = linear_cross_entropy(h, HEAD, target, shift=True, reduction="none")
    assert torch.equal(ours, linear_cross_entropy(h, HEAD, labels, reduction="none"))
    wanted = dict(entropy=True, mean_logprob=True, rank=True, argmax=True)
    for stats, leaf, head in ((token_stats, x, ()), (linear_token_stats, h, (HEAD,))):
        ours = stats(leaf, *head, target, shift=True, **wanted)
        for a, b in zip(ours, stats(leaf, *head, labels, **wanted), strict=True):
            assert torch.equal(a, b)
    assert torch.equal(target, kept)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int32, torch.int64])
@pytest.mark.parametrize("ignore_index", [-100, -1, 0, 3, 300])
def test_shift_ignore_index(dtype, ignore_index):
    """uint8 has room for none of -100, -1 and 300."""
    x, target = logits(4, 6), tokens(4, 6).to(dtype)
    labels = by_hand(target, ignore_index)
    ours = cross_entropy(x, target, dim=-1, shift=True, ignore_index=ignore_index)
    torch.testing.assert_close(ours, eager(x, labels, ignore_index=ignore_index))


def test_shift_batch_of_packed_rows():
    """Offsets count through the rows; a row's end is an end all the same."""
    x, target = logits(2, 5), tokens(2, 5)
    labels = torch.stack([by_hand(target[0], starts=(3,)), by_hand(target[1], starts=(2,))])
    position_ids = torch.tensor([[0, 1, 2, 0, 1], [3, 4, 0, 1, 2]])
    for documents in (
        dict(position_ids=position_ids),
        dict(cu_seqlens=torch.tensor([0, 3, 7, 10])),
        dict(cu_seqlens=torch.tensor([0, 3, 5, 7, 10])),
    ):
        ours = cross_entropy(x, target, dim=-1, shift=True, **documents)
        torch.testing.assert_close(ours, eager(x, labels))


def test_shift_with_options():
    x, target, weight = logits(2, T), tokens(2, T), torch.rand(2, T, dtype=torch.float64)
    options = dict(
        dim=-1, token_weight=weight, label_smoothing=0.1, z_loss_weight=1e-2, softcap=5.0,
        weight=torch.rand(V, dtype=torch.float64), grad_in_forward=True, num_items=3,
    )  # fmt: skip
    labels = by_hand(target)
    ours = gradient(lambda x: cross_entropy(x, target, shift=True, **options), x)
    assert torch.equal(ours, gradient(lambda x: cross_entropy(x, labels, **options), x))


def test_shift_copies_no_logits():
    """The operator reads the very memory it was given."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            tensors = [t for t in (out if isinstance(out, tuple) else (out,)) if torch.is_tensor(t)]
            fresh = [t.numel() for t in tensors if t.untyped_storage().data_ptr() not in known]
            self.numel = max([self.numel, *fresh])
            return out

    x, target = logits(2, 50), tokens(2, 50)
    known = {x.untyped_storage().data_ptr()}
    with torch.no_grad(), Largest() as seen:
        cross_entropy(x, target, dim=-1, shift=True)
    assert 0 < seen.numel <= 2 * 51


def test_shift_modules():
    x, h, target = logits(T), hidden(T), tokens(T)
    labels = by_hand(target, starts=(3, 4, 8))
    loss = CrossEntropyLoss(shift=True, dim=-1)
    torch.testing.assert_close(loss(x, target, position_ids=POSITIONS), eager(x, labels))
    assert "shift=True" in repr(loss)
    head = LinearCrossEntropyLoss(D, V, dtype=torch.float64, shift=True)
    ours = head(h, target, cu_seqlens=OFFSETS)
    torch.testing.assert_close(ours, eager(head.linear(h), labels))


@pytest.mark.parametrize(("documents", "starts"), PACKED.values(), ids=PACKED)
def test_shift_compiles_fullgraph(documents, starts):
    def step(x, h, head, target, documents):
        a = cross_entropy(x, target, dim=-1, shift=True, **documents)
        return a + linear_cross_entropy(h, head, target, shift=True, **documents)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    x, h, target = logits(T).requires_grad_(), hidden(T), tokens(T)
    labels = by_hand(target, starts=starts)
    loss = compiled(x, h, HEAD, target, documents)
    torch.testing.assert_close(loss, eager(x, labels) + eager(h @ HEAD.T, labels))
    (ours,) = torch.autograd.grad(loss, x)
    torch.testing.assert_close(ours, gradient(lambda x: eager(x, labels), x))


def test_shift_vmap():
    """A batch of sequences, each with its documents."""
    x, target = logits(3, 2, T), tokens(3, 2, T)
    ours = torch.func.vmap(lambda x, t: token_stats(x, t, shift=True).logprob)(x, target)
    assert torch.equal(ours, token_stats(x, target, shift=True).logprob)
    ids = POSITIONS.expand(2, T)
    ours = torch.func.vmap(lambda x, t: token_stats(x, t, shift=True, position_ids=ids).logprob)(
        x, target
    )
    packed = token_stats(x, target, shift=True, position_ids=POSITIONS.expand(3, 2, T))
    assert torch.equal(ours, packed.logprob)
    one = torch.func.vmap(lambda x, t: token_stats(x, t, shift=True, cu_seqlens=OFFSETS).logprob)(
        x[:, 0], target[:, 0]
    )
    assert torch.equal(one, packed.logprob[:, 0])


X, TARGET = torch.randn(2, 4, V), torch.zeros(2, 4, dtype=torch.long)
BAD = {
    "int": (dict(shift=1), TypeError, "shift must be True or False, got int"),
    "documents without shift": (dict(position_ids=TARGET), ValueError, "position_ids says .* but shift is False: pass shift=True"),
    "offsets without shift": (dict(cu_seqlens=TARGET[0]), ValueError, "cu_seqlens says .* shift is False"),
    "both": (dict(shift=True, position_ids=TARGET, cu_seqlens=torch.tensor([0, 8])), ValueError, "say the same: give one of them"),
    "positions of another shape": (dict(shift=True, position_ids=TARGET[:1]), ValueError, r"position_ids have shape \[1, 4\], expected target's, \[2, 4\].*expand_as"),
    "float positions": (dict(shift=True, position_ids=TARGET.float()), TypeError, "position_ids has dtype torch.float32"),
    "positions in a list": (dict(shift=True, position_ids=[0, 1]), TypeError, "position_ids must be a Tensor of target's shape, got list"),
    "offsets from 1": (dict(shift=True, cu_seqlens=torch.tensor([1, 8])), ValueError, r"cu_seqlens is \[1, 8\] and covers other tokens, expected offsets that begin with 0, never fall and end with 8"),
    "offsets to 7": (dict(shift=True, cu_seqlens=torch.tensor([0, 7])), ValueError, "end with 8"),
    "offsets that fall": (dict(shift=True, cu_seqlens=torch.tensor([0, 5, 3, 8])), ValueError, "falls from 5 to 3"),
    "offsets of two dimensions": (dict(shift=True, cu_seqlens=torch.tensor([[0, 8]])), ValueError, r"cu_seqlens has shape \[1, 2\], expected \[num_docs \+ 1\]"),
    "no offsets": (dict(shift=True, cu_seqlens=torch.tensor([], dtype=torch.long)), ValueError, r"shape \[0\]"),
    "int16 offsets": (dict(shift=True, cu_seqlens=torch.tensor([0, 8], dtype=torch.int16)), TypeError, "cu_seqlens has dtype torch.int16, expected one of int32, int64"),
    "offsets on meta": (dict(shift=True, cu_seqlens=torch.zeros(2, dtype=torch.long, device="meta")), ValueError, "cu_seqlens is on meta"),
}  # fmt: skip


@pytest.mark.parametrize(("options", "error", "message"), BAD.values(), ids=BAD)
def test_shift_refuses(options, error, message):
    head, h = HEAD.float(), torch.randn(2, 4, D)
    for call in (
        lambda: cross_entropy(X, TARGET, dim=-1, **options),
        lambda: token_stats(X, TARGET, **options),
        lambda: linear_cross_entropy(h, head, TARGET, **options),
        lambda: linear_token_stats(h, head, TARGET, **options),
    ):
        with pytest.raises(error, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: cross_entropy(X, TARGET, shift=True), "pass dim=-1"),
        (lambda: cross_entropy(X.movedim(-1, 1), TARGET, shift=True), r"dim=1 for input.*pass dim=-1"),
        (lambda: cross_entropy(X[0], X[0].softmax(-1), shift=True), "shift=True takes class indices"),
        (lambda: cross_entropy(X, (TARGET[..., None], torch.ones(2, 4, 1)), dim=-1, shift=True), "shift=True takes class indices"),
        (lambda: cross_entropy(X[0, 0], TARGET[0, 0], shift=True), r"target has shape \[\]"),
        (lambda: linear_cross_entropy(torch.randn(4, D), torch.randn(V, 2, D), TARGET.T, shift=True), r"target has shape \[4, 2\]"),
    ],
)  # fmt: skip
def test_shift_refuses_targets(call, message):
    with pytest.raises(ValueError, match=message):
        call()
