"""The bytes that the weight's gradient moves, counted on tensors without memory."""

import torch

from bench import weight_traffic
from bench.tensor_bytes import fake_gpu
from chunked_ce.ops import chunks

TOKENS, HIDDEN, VOCAB = 8192, 4096, 128256
CLASSES = VOCAB * HIDDEN


def test_a_sum_in_the_product_moves_half_of_one_beside_it():
    rows = 1024
    # 8 chunks: zeroed, then each product written and read and the sum read and written; rounded.
    assert weight_traffic.apart(TOKENS, HIDDEN, VOCAB, rows) == CLASSES * (4 + 8 * 16 + 6)
    # Written once, then read and written by each further chunk; rounded.
    assert weight_traffic.walked(TOKENS, HIDDEN, VOCAB, rows) == CLASSES * (4 + 7 * 8 + 6)


def test_the_default_moves_a_seventh_and_one_chunk_only_the_gradient():
    default = weight_traffic.walked(TOKENS, HIDDEN, VOCAB)
    assert default == CLASSES * (4 + 8 + 6)  # two chunks of 4096 rows
    old_rows = (256 << 20) // chunks.padded_row_bytes(VOCAB, 2)
    assert default < weight_traffic.apart(TOKENS, HIDDEN, VOCAB, old_rows) / 7
    assert weight_traffic.walked(TOKENS, HIDDEN, VOCAB, TOKENS) == CLASSES * 2


def test_products_that_cannot_add_are_counted_too(monkeypatch):
    with fake_gpu("sm_90"):
        monkeypatch.setattr(chunks, "adds_in_products", lambda x: False)
        sum, x = torch.empty(64, 16, device="meta"), torch.empty(8, 16, device="meta").bfloat16()
        grad = torch.empty(8, 64, dtype=torch.bfloat16, device="meta")
        moved = weight_traffic.counted(
            lambda: chunks.add_product(sum, grad, x, first=False), 64, 16
        )
    assert moved == 64 * 16 * 16


def test_the_command_prints_bytes_and_times(capsys):
    assert weight_traffic.main(["--tokens", "1024", "--hidden", "512", "--vocab", "32000"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "H100" in lines[0] and "H200" in lines[0] and len(lines) == 6
