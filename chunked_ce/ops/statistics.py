"""The statistics of tokens, from one chunk of logits after another."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from .. import backends
from ..core.head import Head
from .chunks import Index
from .classes import class_logits
from .library import FLAGS, Classes
from .logits import class_weights, make_outputs


def fill_outputs(
    outputs: tuple[Tensor, ...],
    chunks: Iterable[tuple[Index, Tensor]],  # and the logits of each
    target: Tensor,
    classes: Classes,
    flags: tuple[bool, ...],
    options: tuple[int, int, Head, str],  # ignore_index, vocab_size, head, backend
) -> None:
    """Write the statistics of every chunk, and what tokens hold that are in none."""
    ignore_index, vocab_size, head, backend = options
    wanted = dict(zip(FLAGS, flags, strict=True))
    for out in outputs:
        out.fill_(0 if out.is_floating_point() else -1)  # those ignored
    for index, logits in chunks:
        of_chunk, labels = classes.select_rows(index), target[index]
        found = backends.row_statistics(
            backend, logits, labels, ignore_index, vocab_size, head,
            class_weights(of_chunk, vocab_size), **wanted,
        )  # fmt: skip
        at = None
        if of_chunk.indices is not None:
            at = class_logits(logits, labels, of_chunk.indices, ignore_index, vocab_size, head)
        for out, value in zip(outputs, make_outputs(found, at, labels.shape), strict=True):
            if value is not None:
                out[index] = value
        del logits
