"""A vocabulary cut into shards, on as many ranks in one process, against the truth."""

from unittest import mock

import cases
import torch
import truth
from row_statistics import FLOATS, Call, Truth, calls

from chunked_ce import TokenStats
from chunked_ce.core.head import Head
from chunked_ce.distributed import shards
from chunked_ce.distributed.autograd import Options, shard_stats


def check(call: Call, backend: str = "torch") -> None:
    """Every rank of a vocabulary cut anywhere, but for the processes: their all-gather is a stack."""
    vocab = call.vocab
    names = ("entropy", "mean_logprob", "argmax")
    wanted = shards.Wanted(*(call.wanted[name] for name in names))
    ignore_index = call.target_spec.options.get("ignore_index", -100)
    head = Head(call.head.get("softcap"), call.head.get("logit_scale", 1.0))
    call.weight = None
    leaf = call.x.clone().requires_grad_()
    x = cases.seen(leaf, call.view)
    edges = [0, *call.cuts, vocab]
    parts = [shards.Shard(None, a, b - a, vocab) for a, b in zip(edges, edges[1:], strict=False)]
    pieces = [x[..., p.start : p.start + p.columns] for p in parts]
    options = [Options(p, ignore_index, head, backend, wanted) for p in parts]
    with cases.block_size(call.block):
        sent = [
            shards.partial_sums(
                backend,
                piece.detach(),
                p.local(call.target_spec.target, ignore_index),
                p,
                head,
                wanted,
            )
            for piece, p in zip(pieces, parts, strict=True)
        ]
        with mock.patch.object(shards, "all_gather", lambda *_: torch.stack(sent)):
            stats = [
                shard_stats(piece, call.target_spec.target, o)
                for piece, o in zip(pieces, options, strict=True)
            ]
        for name in TokenStats._fields:  # the same bits on every rank
            a, *others = (getattr(s, name) for s in stats)
            assert all(
                (a is None and b is None) or torch.equal(a.nan_to_num(), b.nan_to_num())
                for b in others
            )
        exact = Truth(call, dict(entropy=wanted.entropy, mean_logprob=wanted.mean_logprob))
        exact.assert_stats(stats[0])
        given = dict(zip(FLOATS, call.upstream, strict=True))
        outs = [(getattr(s, n), given[n]) for s in stats for n in exact.stats]
        torch.autograd.backward([o for o, _ in outs], [u.to(o) for o, u in outs])
    expected, tolerance, skip = exact.backward(given, call)
    truth.assert_gradient(leaf.grad, expected, tolerance, call.x.dtype, skip)


@cases.backends(torch=40, triton=1, long=20)
def test_shards(explore, backend):
    explore(calls(**cases.sizes(backend), largest=cases.LARGEST[backend]), check)
