"""Multiply a gradient by its upstream gradient.

The upstream gradient is read on the device. If it is 1, as usual, nothing else is done.
"""

import triton
import triton.language as tl

from .arguments import NOT_SPECIALIZED
from .rows import column_offsets, row_start


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def scale_kernel(
    grad,  # Address, overwritten
    upstream_ptr,  # [rows], or one number with upstream_stride 0
    columns,
    inner_rows,
    upstream_stride,
    CONTIGUOUS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Multiply BLOCK columns of a row by its upstream gradient."""
    row = tl.program_id(0)
    upstream = tl.load(upstream_ptr + row.to(tl.int64) * upstream_stride)
    if upstream != 1.0:
        column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        start = row_start(row, inner_rows, grad)
        address = grad.ptr + start + column_offsets(column, grad.stride_v, CONTIGUOUS)
        value = tl.load(address, mask=column < columns, other=0.0).to(upstream.dtype)
        value = tl.where(value == 0.0, 0.0, value * upstream)  # ignored rows stay 0
        tl.store(address, value.to(grad.ptr.dtype.element_ty), mask=column < columns)
