"""token_stats against the truth."""

import cases
import torch
import truth
from row_statistics import FLOATS, Call, Truth, calls

from chunked_ce import token_stats


def check(call: Call, backend: str = "torch") -> None:
    leaf = call.x.clone().requires_grad_()
    x = cases.seen(leaf, call.view)
    beside = cases.outside(x)
    with cases.block_size(call.block):
        stats = token_stats(
            x, call.target_spec.target, **call.target_spec.options, **call.head, **call.wanted, weight=call.weight,
            vocab_size=call.vocab, inplace_backward=call.inplace, backend=backend,
        )  # fmt: skip
        exact = Truth(call, call.wanted)
        exact.assert_stats(stats)
        given = dict(zip(FLOATS, call.upstream, strict=True))
        wanted = [name for name in FLOATS if getattr(stats, name) is not None]
        assert all((getattr(stats, k) is not None) == v for k, v in call.wanted.items())
        outs = [getattr(stats, name) for name in wanted]
        torch.autograd.backward(outs, [given[n].to(o) for n, o in zip(wanted, outs, strict=True)])
    torch.testing.assert_close(cases.outside(x), beside, rtol=0, atol=0, equal_nan=True)
    expected, tolerance, skip = exact.backward(given, call)
    truth.assert_gradient(leaf.grad, expected, tolerance, call.x.dtype, skip)


@cases.backends(torch=70, triton=3, long=40)
def test_token_stats(explore, backend):
    explore(calls(**cases.sizes(backend), largest=cases.LARGEST[backend]), check)
