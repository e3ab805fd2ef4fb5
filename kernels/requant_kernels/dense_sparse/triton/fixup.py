# Triton's language, typed by its own compiler; the arguments of a kernel are positional.
# mypy: ignore-errors
# ruff: noqa: PLR0917
"""The two small passes around the matrix kernels: x transposed before, and, where there is overflow, sums added up
after."""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit(do_not_specialize=["M"])
def transpose_kernel(x_ptr, xt_ptr, M, K, TOKENS: tl.constexpr, COLUMNS: tl.constexpr, PDL: tl.constexpr):
    """xt [K, width] = x [M, K]^T, zero in columns from M on; width: the next multiple of TOKENS.
    Grid (ceil(K / COLUMNS), width / TOKENS)."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    m = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    k = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (k < K)[None, :]
    x = tl.load(x_ptr + m[:, None] * K + k[None, :], mask=inside & (m < M)[:, None], other=0.0)
    width = tl.cdiv(M, TOKENS) * TOKENS
    tl.store(xt_ptr + k[:, None] * width + m[None, :], tl.trans(x), mask=tl.trans(inside))


@triton.jit(do_not_specialize=["M", "strips", "splits", "row_tiles"], do_not_specialize_on_alignment=["bias_ptr"])
def reduce_kernel(
    shares_ptr, out_ptr, bias_ptr, overflow_ptr, M, N, strips, splits, row_tiles,
    BIAS: tl.constexpr, SPLITS: tl.constexpr, COLUMNS: tl.constexpr, R: tl.constexpr, TOKENS: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """out DT [M, N] = sums over ``splits`` <= SPLITS of shares fp32 [splits, tiles of tokens, row_tiles, R, TOKENS],
    plus bias.

    Lists [strips + overflow[s], strips + overflow[s + 1]) belong to strip s too and are added in that order. Grid
    (ceil(N / COLUMNS), M). Every sum has one order: the same input gives the same bits.
    """
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    n = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    m = tl.program_id(1)
    live = n < N
    split = tl.arange(0, SPLITS)
    tiles = (split * tl.cdiv(M, TOKENS) + m // TOKENS).to(tl.int64) * row_tiles
    at = shares_ptr + tiles[:, None] * (R * TOKENS) + m % TOKENS  # a tile's rows follow those of the tile before
    taken = (split < splits)[:, None] & live[None, :]
    y = tl.sum(tl.load(at + n[None, :] * TOKENS, mask=taken, other=0.0), 0)
    more = tl.load(overflow_ptr + n // 16, mask=live, other=0)
    end = tl.load(overflow_ptr + n // 16 + 1, mask=live, other=0)
    for _ in range(tl.max(end - more)):
        there = taken & (more < end)[None, :]
        column = (strips + more) * 16 + n % 16
        y += tl.sum(tl.load(at + column[None, :] * TOKENS, mask=there, other=0.0), 0)
        more += 1
    if BIAS:
        y += tl.load(bias_ptr + n, mask=live, other=0.0).to(tl.float32)
    tl.store(out_ptr + m.to(tl.int64) * N + n, y.to(out_ptr.dtype.element_ty), mask=live)
