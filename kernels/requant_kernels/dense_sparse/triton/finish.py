# Triton's language, typed by its own compiler; the arguments of a kernel are positional.
# mypy: ignore-errors
# ruff: noqa: PLR0917
"""What becomes of a program's sums: the output, or a share of it that is added up to the others of a tile (shares.py),
or by ``reduce_kernel`` where crowded rows have overflow."""

import triton
import triton.language as tl

from requant_kernels.dense_sparse.triton import layer
from requant_kernels.shares import added_up, all_arrived, await_all, leave

WHOLE, HERE, LATER = (tl.constexpr(split) for split in (layer.WHOLE, layer.HERE, layer.LATER))


@triton.jit
def _write(y, out_ptr, bias_ptr, m, n, live, M, N, BIAS: tl.constexpr, DT: tl.constexpr):
    if BIAS:
        y += tl.load(bias_ptr + n, mask=live, other=0.0).to(tl.float32)[:, None]
    tl.store(out_ptr + m[None, :].to(tl.int64) * N + n[:, None], y.to(DT), mask=(m < M)[None, :] & live[:, None])


@triton.jit
def _add_up(
    shares, out_ptr, bias_ptr, m, first, begin, end, M, N, share, splits,
    ROWS: tl.constexpr, BIAS: tl.constexpr, DT: tl.constexpr,
):  # fmt: skip
    """The shares of rows [begin, end) of a tile, which begins at row ``first`` of the output."""
    TOKENS: tl.constexpr = m.shape[0]
    SOME: tl.constexpr = min(ROWS, 32)
    AT_ONCE: tl.constexpr = min(8, 16384 // (SOME * TOKENS))
    for start in range(begin, end, SOME):
        # No more than 4 rows a lane, of what is stored: with 8 the largest tiles spill.
        row = tl.max_contiguous(start + tl.arange(0, SOME), 4)
        n = first + row
        live = (row < end) & (n < N)
        at = shares + row[:, None] * TOKENS + tl.arange(0, TOKENS)[None, :]
        total = added_up(at, share, splits, live[:, None], AT_ONCE)
        _write(total, out_ptr, bias_ptr, m, n, live, M, N, BIAS, DT)


@triton.jit
def finish(
    sums, out_ptr, shares_ptr, arrived_ptr, bias_ptr, m, first, M, N, split, splits, tile, tiles,
    SPLIT: tl.constexpr, BIAS: tl.constexpr, DT: tl.constexpr, TOGETHER: tl.constexpr,
):  # fmt: skip
    """Sums, fp32 [R, TOKENS] each, go to out DT [M, N], with the bias: sums[i] of tokens m[i % len(m)], rows from
    ``first`` on, and those below them after every ``len(m)``.

    With SPLIT they are one of ``splits`` shares, fp32 [splits, tiles, len(m), all rows of a tile, TOKENS], of tile
    ``tile``, which are added up HERE, by the last program or by all TOGETHER, or LATER. arrived int32 [tiles].
    """
    R: tl.constexpr = sums[0].shape[0]
    TOKENS: tl.constexpr = sums[0].shape[1]
    SIDES: tl.constexpr = len(m)
    ROWS: tl.constexpr = len(sums) // SIDES * R
    SIDE: tl.constexpr = ROWS * TOKENS
    if SPLIT == WHOLE:
        for i in tl.static_range(len(sums)):
            n = first + i // SIDES * R + tl.arange(0, R)
            _write(sums[i], out_ptr, bias_ptr, m[i % SIDES], n, n < N, M, N, BIAS, DT)
    else:
        share = tiles.to(tl.int64) * (SIDES * SIDE)
        shares = shares_ptr + tile.to(tl.int64) * (SIDES * SIDE)
        at = shares + split * share + tl.arange(0, R)[:, None] * TOKENS + tl.arange(0, TOKENS)[None, :]
        for i in tl.static_range(len(sums)):
            tl.store(at + (i % SIDES * SIDE + i // SIDES * (R * TOKENS)), sums[i])
        if SPLIT == HERE:
            if TOGETHER:
                await_all(arrived_ptr + tile, splits)
                rows = tl.cdiv(ROWS // 16, splits) * 16
                begin = split * rows
                end = tl.minimum(ROWS, begin + rows)
                for i in tl.static_range(SIDES):
                    of = shares + i * SIDE
                    _add_up(of, out_ptr, bias_ptr, m[i], first, begin, end, M, N, share, splits, ROWS, BIAS, DT)
                leave(arrived_ptr + tile, splits)
            elif all_arrived(arrived_ptr + tile, splits):
                for i in tl.static_range(SIDES):
                    of = shares + i * SIDE
                    _add_up(of, out_ptr, bias_ptr, m[i], first, 0, ROWS, M, N, share, splits, ROWS, BIAS, DT)
                tl.store(arrived_ptr + tile, 0)
