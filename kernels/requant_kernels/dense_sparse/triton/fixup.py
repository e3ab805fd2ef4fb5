# Triton's language, typed by its own compiler; the arguments of a kernel are positional.
# mypy: ignore-errors
# ruff: noqa: PLR0917
"""The two small passes around the matrix kernels: x transposed before, and, where there is overflow, sums added up
after."""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from requant_kernels.dense_sparse.triton.operand import paired


@triton.jit(do_not_specialize=["M"])
def transpose_kernel(
    x_ptr, xt_ptr, paired_ptr, pairs_ptr, experts_ptr, M, K,
    PAIRED: tl.constexpr, TOP: tl.constexpr, TOKENS: tl.constexpr, COLUMNS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """xt [tiles, K, TOKENS]: of each tile of tokens x [M, K]^T, zero beyond M. With TOP a tile is a block of pairs, as
    ``few_kernel`` says; one that is not used stays as it was. Grid (ceil(K / COLUMNS), tiles). PAIRED: there is one
    tile and no TOP, COLUMNS divides K, and paired becomes x as ``load_columns`` wants it."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    tile = tl.program_id(1)
    place = tile * TOKENS + tl.arange(0, TOKENS)
    m = place
    row = m
    if TOP:
        if tl.load(experts_ptr + tile) < 0:
            return
        m = tl.load(pairs_ptr + place)
        row = m // TOP
    k = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (k < K)[None, :]
    x = tl.load(x_ptr + row[:, None] * K + k[None, :], mask=inside & (m < M)[:, None], other=0.0)
    at = xt_ptr + tile.to(tl.int64) * K * TOKENS + k[:, None] * TOKENS + tl.arange(0, TOKENS)[None, :]
    tl.store(at, tl.trans(x), mask=tl.trans(inside))
    if PAIRED:
        source = tl.program_id(0) * COLUMNS + paired(COLUMNS)
        x = tl.load(x_ptr + row[:, None] * K + source[None, :], mask=(m < M)[:, None], other=0.0)
        tl.store(paired_ptr + (k // 32)[None, :] * (TOKENS * 32) + place[:, None] * 32 + (k % 32)[None, :], x)


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
