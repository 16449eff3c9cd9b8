"""Gradients times the upstream gradient, which is read on the device: usually 1, then nothing is
done."""

import triton
import triton.language as tl

from .streaming import row_start


@triton.jit(do_not_specialize=["columns", "offset", "inner_rows", "stride_outer", "stride_inner"])
def scale_kernel(
    grad_ptr,  # [rows, V], overwritten
    upstream_ptr,  # [rows], or one number: upstream_stride 0
    columns,
    offset,
    inner_rows,
    stride_outer,
    stride_inner,
    stride_v,
    upstream_stride,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    upstream = tl.load(upstream_ptr + row.to(tl.int64) * upstream_stride)
    if upstream != 1.0:
        column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        start = row_start(row, offset, inner_rows, stride_outer, stride_inner)
        address = grad_ptr + start + column.to(tl.int64) * stride_v
        grad = tl.load(address, mask=column < columns, other=0.0).to(upstream.dtype)
        grad = tl.where(grad == 0.0, 0.0, grad * upstream)  # ignored rows stay 0
        tl.store(address, grad.to(grad_ptr.dtype.element_ty), mask=column < columns)
