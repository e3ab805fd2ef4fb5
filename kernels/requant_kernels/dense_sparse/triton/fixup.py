# Triton's language, typed by its own compiler; the arguments of a kernel are positional.
# mypy: ignore-errors
# ruff: noqa: PLR0917
"""After one token: the sums of a layer whose crowded rows have overflow (lists.py)."""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit(do_not_specialize=["strips", "splits", "row_tiles"], do_not_specialize_on_alignment=["bias_ptr"])
def reduce_kernel(
    shares_ptr, out_ptr, bias_ptr, overflow_ptr, N, strips, splits, row_tiles,
    BIAS: tl.constexpr, SPLITS: tl.constexpr, COLUMNS: tl.constexpr, R: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """out DT [1, N] = sums over ``splits`` <= SPLITS of shares fp32 [splits, row_tiles, R], plus bias.

    Lists [strips + overflow[s], strips + overflow[s + 1]) belong to strip s too and are added in that order. Grid
    (ceil(N / COLUMNS),). Every sum has one order: the same input gives the same bits.
    """
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    n = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    live = n < N
    split = tl.arange(0, SPLITS)
    at = shares_ptr + split[:, None] * (row_tiles * R)
    taken = (split < splits)[:, None] & live[None, :]
    y = tl.sum(tl.load(at + n[None, :], mask=taken, other=0.0), 0)
    more = tl.load(overflow_ptr + n // 16, mask=live, other=0)
    end = tl.load(overflow_ptr + n // 16 + 1, mask=live, other=0)
    for _ in range(tl.max(end - more)):
        there = taken & (more < end)[None, :]
        column = (strips + more) * 16 + n % 16
        y += tl.sum(tl.load(at + column[None, :], mask=there, other=0.0), 0)
        more += 1
    if BIAS:
        y += tl.load(bias_ptr + n, mask=live, other=0.0).to(tl.float32)
    tl.store(out_ptr + n, y.to(out_ptr.dtype.element_ty), mask=live)
