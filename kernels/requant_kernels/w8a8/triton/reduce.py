# Triton's language, typed by its own compiler; the arguments of a kernel are positional.
# mypy: ignore-errors
# ruff: noqa: PLR0917
"""Adds the shares of the columns and scales them: integers, so the same bits in any order."""

import triton
import triton.language as tl

from requant_kernels.w8a8.triton.steps import finish


@triton.jit(do_not_specialize=["M", "splits"], do_not_specialize_on_alignment=["bias_ptr"])
def reduce_kernel(
    shares_ptr, scale_ptr, zero_ptr, weight_scale_ptr, weight_sums_ptr, bias_ptr, out_ptr, M, N, splits,
    SYMMETRIC: tl.constexpr, BIAS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """shares int32 [splits, M, N] -> y [M, N]. Grid (rows / ROWS, M)."""
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    m = tl.program_id(1) + tl.arange(0, 1)
    at = m.to(tl.int64)[:, None] * N + n[None, :]
    live = (n < N)[None, :]
    sums = tl.zeros((1, ROWS), tl.int32)
    for split in range(splits):
        sums += tl.load(shares_ptr + tl.cast(split, tl.int64) * M * N + at, mask=live, other=0)
    scale = tl.load(scale_ptr + m)
    zero = tl.load(zero_ptr + m)
    y = finish(sums, scale, zero, weight_scale_ptr, weight_sums_ptr, bias_ptr, m, n, N, SYMMETRIC, BIAS)
    tl.store(out_ptr + at, y.to(out_ptr.dtype.element_ty), mask=live)
