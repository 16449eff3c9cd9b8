"""The arguments of the kernels as tuples: where tensors lie, and what is compiled in.

Triton compiles a kernel anew for each kind of argument: a pointer on 16 bytes or not, an integer
that is 1, a multiple of 16, or neither. Another number of rows or of classes must compile nothing
new. Two rules see to that, and this file is where they stand:

- An integer that is an argument by itself has its name in NOT_SPECIALIZED.
- Triton looks at every field of a tuple, also where `do_not_specialize` names the tuple (found with
  3.6, 3.7, 3.8 and 3.9). So integers in a tuple are passed as 4 n + 3, which is neither 1 nor a
  multiple of 16: `encode` here and `rows.decode`. Pointers in a tuple are specialised on 16 bytes,
  as they should be.

A float in a tuple becomes fp32, so floats are arguments by themselves, of the type "fp64". No field
is None: with Triton 3.6 such a tuple cannot be used inside a loop. Where an option says that a
tensor is absent, another stands in for it and is not touched.
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
    """Rows of a tensor [rows, V]. All but the pointer as `encode` gives it."""

    ptr: Any  # on 16 bytes
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
    """Sums over the segments of rows, from the kernel that sums to the one that merges."""

    floats_ptr: Any  # [2 or 6, rows, segments]
    integers_ptr: Any  # [2, rows, segments], touched only for RANK and ARGMAX


class Outputs(NamedTuple):
    """Pointers to the statistics, all [rows]; the last five are written only when asked for."""

    lse: Any
    logprob: Any
    lse_low: Any
    entropy: Any
    mean_logprob: Any
    rank: Any
    argmax: Any
    weight_sum: Any


class Saved(NamedTuple):
    """Pointers to what the gradient needs of the statistics, all [rows]."""

    lse: Any
    logprob: Any
    lse_low: Any


class Coefficients(NamedTuple):
    """Pointers to the gradient's numbers, all [rows], read only where HAS_* says so."""

    a: Any
    b: Any
    c: Any
    u: Any


class TileShape(NamedTuple):
    """Compile-time: groups of a tile, and logits of a group."""

    GROUPS: int
    WIDTH: int


class Options(NamedTuple):
    """Compile-time: what a kernel of the softmax family has to do."""

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
    PROB_ALIGNED: bool = False  # rows start at the same place in 16 bytes as the logits'
    CONTIGUOUS: bool = False
    GRAD_CONTIGUOUS: bool = False
    GRAD_ALIGNED: bool = False
    PADDED: bool = False  # vocab_size is less than the columns in memory
    HAS_TOKEN_WEIGHT: bool = False
    HAS_DIVISOR: bool = False
    ON_CHIP: bool = False  # a tile holds a row, whose logits have no transform


class BinaryOptions(NamedTuple):
    """Compile-time: what the binary kernel has to do."""

    GRADIENT: bool  # times the upstream gradient; else the loss
    HAS_Y: bool  # labels; else 0
    HAS_W: bool  # weights; else 1
    HAS_V: bool  # weights of positive labels; else 1
    HAS_OUT: bool  # each logit's value is written; else their sum
    HAS_LEFT_OUT: bool  # labels that the sum leaves out
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
    CONTIGUOUS: bool
    Y_CONTIGUOUS: bool
    Y_ALIGNED: bool
    GRAD_CONTIGUOUS: bool = False
    GRAD_ALIGNED: bool = False
