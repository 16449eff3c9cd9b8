"""How rows are cut into blocks: every logit once, none too large, as many rows for each thread."""

import random

import pytest
import torch

from chunked_ce.backends.row_blocks import blocks


@pytest.fixture
def threads():
    usual = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(usual)


@pytest.mark.parametrize("number", [1, 2, 3, 16])
def test_every_logit_once(number, threads):
    threads(number)
    draw = random.Random(number)
    for _ in range(200):
        leading = torch.Size(draw.randint(1, 9) for _ in range(draw.randint(1, 3)))
        columns, elements = draw.randint(1, 60), draw.randint(1, 200)
        together = draw.choice([None, *range(1, len(leading) + 1)])
        seen, rows = torch.zeros(*leading, columns), torch.zeros(leading.numel(), 1)
        for block in blocks(leading, columns, elements, together):
            part = block.of(seen)
            assert part.numel() <= max(elements * 4 // 3, min(columns, 2 * elements))
            part += 1
            block.of_rows(rows).add_(block.stop - block.start)
        assert (seen == 1).all() and (rows == columns).all()


@pytest.mark.parametrize(
    ("rows", "columns", "number", "expected"),
    [
        (64, 50257, 2, [8] * 8),  # not six of ten and one of four
        (12, 50257, 2, [12]),
        (14, 50257, 2, [10, 4]),
        (20, 151936, 2, [4] * 5),  # not 3
        (20, 151936, 8, [3, 3, 3, 3, 3, 3, 2]),
        (35, 75000, 4, [8, 8, 8, 8, 3]),  # not 6, for some of the threads a row more
        (35, 64000, 6, [6] * 5 + [5]),
        (3, 300000, 2, [1, 1, 1]),
    ],
)
def test_rows_of_a_block(rows, columns, number, expected, threads):
    threads(number)
    cut = list(blocks(torch.Size([rows]), columns, 1 << 19))
    assert [rows if b.where is None else b.rows.stop - b.rows.start for b in cut] == expected
