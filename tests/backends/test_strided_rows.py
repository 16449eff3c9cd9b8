"""Tests of the addresses of strided rows."""

import pytest
import torch
from helpers import batch

from chunked_ce import cross_entropy

pytest.importorskip("triton")
from chunked_ce.backends.strided_rows import strided_rows


def rows_of(x):
    ((_, (rows,)),) = strided_rows(x)
    return rows


def test_row_alignment():
    """Check that only rows with equal alignment share 16-byte accesses."""
    memory = torch.empty(8, 64, dtype=torch.bfloat16)
    x = memory[:, :37]
    assert rows_of(x).alignment() == rows_of(torch.empty_like(memory)[:, :37]).alignment()
    assert rows_of(x).alignment() != rows_of(x.contiguous()).alignment()  # 37 apart
    assert rows_of(x).alignment() != rows_of(memory[:, 1:38]).alignment()  # from 2 bytes on
    assert rows_of(x[:1]).alignment() == rows_of(x[:1].contiguous()).alignment()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_strided_rows_unaligned_memory(dtype, device):
    """Use memory that starts between 16-byte boundaries, as numpy's may. Nothing precedes it."""
    x, target = batch(3, 37, dtype)
    if device != "cpu":
        pytest.skip("a GPU's memory starts at 256 bytes")
    memory = bytearray(16 + x.numel() * x.element_size())
    start = torch.frombuffer(memory, dtype=torch.uint8).data_ptr()
    odd = torch.frombuffer(
        memory, dtype=dtype, count=x.numel(), offset=(x.element_size() - start) % 16
    )
    odd = odd.view(x.shape).copy_(x)
    assert odd.data_ptr() % 16 == x.element_size() and odd.storage_offset() == 0
    for leaf in (x, odd):
        leaf.requires_grad_()
        cross_entropy(leaf, target, backend="triton").backward()
    torch.testing.assert_close(odd.grad, x.grad)
