"""PITFALLS, Perplexity 3: every token is scored once, with the context it was promised."""

import pytest

from chunked_ce.evaluation.windows import Window, batches, sliding_windows


def targets(window: Window) -> range:
    return range(window.stop + 1 - window.scored, window.stop + 1)


# Lengths around every border: 2 (one target), one window exactly, one target more, several windows.
LENGTHS = [2, 5, 8, 9, 10, 17, 40]


@pytest.mark.parametrize("full_last_window", [False, True])
@pytest.mark.parametrize("context", [2, 8])
@pytest.mark.parametrize("stride", [1, 2, 3, 7, 8])
def test_targets_and_contexts(context, stride, full_last_window):
    if stride > context:
        return
    windows = sliding_windows(LENGTHS, context, stride, full_last_window=full_last_window)
    for document, length in enumerate(LENGTHS):
        of_document = [w for w in windows if w.document == document]
        assert [t for w in of_document for t in targets(w)] == list(range(1, length))
        for w in of_document:
            assert 0 <= w.start and 1 <= w.length <= context and w.stop <= length - 1
            for target in targets(w):
                assert target - w.start >= min(target, context - stride + 1)


def test_stride_past_the_text():
    assert sliding_windows([9], 8, 8) == [Window(0, 0, 8, 8)]
    assert sliding_windows([9], 100, 3) == [Window(0, 0, 8, 8)]


def test_context_depends_on_position():
    def starts(length):
        return {t: w.start for w in sliding_windows([length], 8, 3) for t in targets(w)}

    long = starts(100)
    for length in range(2, 60):
        assert starts(length) == {t: long[t] for t in range(1, length)}


def test_full_last_window():
    assert sliding_windows([20], 8, 8)[-1] == Window(0, 16, 19, 3)
    assert sliding_windows([20], 8, 8, full_last_window=True)[-1] == Window(0, 11, 19, 3)


@pytest.mark.parametrize("size", [1, 3, 16])
def test_batches(size):
    windows = sliding_windows(LENGTHS * 9, 8, 3)
    plan = batches(windows, size, sorted_batches=4)
    assert sorted(i for batch in plan for i in batch) == list(range(len(windows)))
    assert max(map(len, plan)) <= size
    for block in range(0, len(plan), 4):
        lengths = [windows[i].length for batch in plan[block : block + 4] for i in batch]
        assert lengths == sorted(lengths, reverse=True)
