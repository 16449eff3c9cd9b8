"""Tuples of kernel arguments: addresses of tensors and compile-time options.

Triton compiles a kernel anew for each kind of argument. A pointer may be aligned to 16 bytes or
not. An integer may be 1, a multiple of 16, or neither. Another number of rows or classes must not
compile anything. Two rules ensure that:

- An integer argument has its name in NOT_SPECIALIZED.
- An integer in a tuple is passed as 4 n + 3, which is neither 1 nor a multiple of 16; see `encode`
  and `rows.decode`. Triton specializes on every field of a tuple, even if `do_not_specialize` names
  the tuple (seen with 3.6 to 3.9). Pointers in a tuple are specialized on alignment, as intended.

A float in a tuple would become fp32. So floats are separate arguments of type "fp64". No field is
None, because Triton 3.6 cannot use such a tuple inside a loop. For an absent tensor the caller
passes another tensor, and an option tells the kernel not to touch it.
"""

from typing import Any, NamedTuple

NOT_SPECIALIZED = [
    "rows",
    "segments",
    "segments_per_program",
    "inner_rows",
    "columns",
    "columns_in_memory",
    "vocab_size",
    "ignore_index",
]


def encode(*numbers: int) -> tuple[int, ...]:
    """Return 4 n + 3 for each number: the same kind of argument whatever the number is."""
    return tuple([number << 2 | 3 for number in numbers])


class Address(NamedTuple):
    """Address of the rows of a tensor [rows, V]. All fields but the pointer are encoded."""

    ptr: Any  # aligned to 16 bytes
    offset: Any  # of the first logit
    stride_outer: Any
    stride_inner: Any
    stride_v: Any


class Weights(NamedTuple):
    """Class weights w_ptr [V], and probabilities [rows, V] with the fields of an Address."""

    w_ptr: Any
    ptr: Any
    offset: Any
    stride_outer: Any
    stride_inner: Any
    stride_v: Any


class Parts(NamedTuple):
    """Sums over the segments of rows: output of `token_stats`, input of `merge_parts`."""

    floats_ptr: Any  # [2 or 6, rows, segments]
    integers_ptr: Any  # [2, rows, segments], touched only for RANK and ARGMAX


class Outputs(NamedTuple):
    """Pointers to the statistics, all [rows]. The last five are written only on request."""

    lse: Any
    logprob: Any
    lse_low: Any
    entropy: Any
    mean_logprob: Any
    rank: Any
    argmax: Any
    weight_sum: Any


class RowOutputs(NamedTuple):
    """Pointers to what the one-pass kernel writes of a row, all [rows]."""

    loss: Any
    lse: Any  # this and the next only if HAS_STATS is set
    logprob: Any


class Saved(NamedTuple):
    """Pointers to the statistics that the gradient needs, all [rows]."""

    lse: Any
    logprob: Any
    lse_low: Any


class Coefficients(NamedTuple):
    """Pointers to a, b, c, u of the gradient, all [rows]. Each is read only if its HAS_* is set."""

    a: Any
    b: Any
    c: Any
    u: Any


class TileShape(NamedTuple):
    """Shape of a tile at compile time: number of groups, and logits per group."""

    GROUPS: int
    WIDTH: int


class Options(NamedTuple):
    """Compile-time options of the softmax kernels."""

    HAS_SOFTCAP: bool = False
    HAS_SCALE: bool = False
    ENTROPY: bool = False
    MEAN_LOGPROB: bool = False
    RANK: bool = False
    ARGMAX: bool = False
    HAS_A: bool = False
    HAS_B: bool = False
    HAS_C: bool = False
    HAS_U: bool = False
    HAS_WEIGHT: bool = False  # class weights
    HAS_PROB: bool = False  # probabilities
    PROB_CONTIGUOUS: bool = False  # the stride of classes is 1
    PROB_ALIGNED: bool = False  # its rows have the alignment of the logits' rows
    CONTIGUOUS: bool = False
    GRAD_CONTIGUOUS: bool = False
    GRAD_ALIGNED: bool = False
    PADDED: bool = False  # vocab_size is less than the columns in memory
    HAS_TOKEN_WEIGHT: bool = False
    HAS_DIVISOR: bool = False
    HAS_STATS: bool = False  # write lse and logprob
    ON_CHIP: bool = False  # a tile holds a whole row; the head has no transforms


class BinaryOptions(NamedTuple):
    """Compile-time options of the binary kernel."""

    GRADIENT: bool  # compute the gradient times its upstream gradient; else the loss
    HAS_Y: bool  # there are labels; else all are 0
    HAS_W: bool  # there are weights; else all are 1
    HAS_V: bool  # there are weights of positive labels; else all are 1
    HAS_OUT: bool  # write one value per logit; else their sum
    HAS_LEFT_OUT: bool  # leave some labels out of the sum
    CONTIGUOUS: bool
    Y_CONTIGUOUS: bool
    Y_ALIGNED: bool
    W_CONTIGUOUS: bool
    V_CONTIGUOUS: bool
    UPSTREAM_CONTIGUOUS: bool
    OUT_CONTIGUOUS: bool
    OUT_ALIGNED: bool


class PairOptions(NamedTuple):
    """Compile-time: what the kernels of pairs of rows have to do."""

    KIND: int  # of divergence
    HAS_IGNORED: bool
    HAS_NORMS: bool  # all but the loss and `student_kl` is given, of more classes than these
    PADDED: bool  # columns at or past vocab_size exist in memory
    CONTIGUOUS: bool
    Y_CONTIGUOUS: bool
    Y_ALIGNED: bool
    GRAD_CONTIGUOUS: bool = False
    GRAD_ALIGNED: bool = False
