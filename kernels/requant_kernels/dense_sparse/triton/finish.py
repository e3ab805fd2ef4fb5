# Triton's language, typed by its own compiler; the arguments of a kernel are positional.
# mypy: ignore-errors
# ruff: noqa: PLR0917
"""What becomes of a program's sums: the output, or a share of it that the last program of a tile adds up (shares.py),
or ``reduce_kernel`` where crowded rows have overflow."""

import triton
import triton.language as tl

from requant_kernels.dense_sparse.triton import layer
from requant_kernels.shares import added_up, all_arrived

WHOLE, HERE, LATER = (tl.constexpr(split) for split in (layer.WHOLE, layer.HERE, layer.LATER))


@triton.jit
def _write(y, out_ptr, bias_ptr, m, n, M, N, BIAS: tl.constexpr, DT: tl.constexpr):
    if BIAS:
        y += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
    tl.store(out_ptr + m[None, :].to(tl.int64) * N + n[:, None], y.to(DT), mask=(m < M)[None, :] & (n < N)[:, None])


@triton.jit
def finish(
    y, out_ptr, shares_ptr, arrived_ptr, bias_ptr, m, n, M, N, split, splits, tile, tiles,
    SPLIT: tl.constexpr, BIAS: tl.constexpr, DT: tl.constexpr,
):  # fmt: skip
    """y fp32 [R, TOKENS] of rows ``n`` and tokens ``m`` goes to out DT [M, N], with the bias.

    With SPLIT it is one of ``splits`` shares, fp32 [splits, tiles, R, TOKENS], of tile ``tile``, which are added up
    HERE, by the last program, or LATER. arrived int32 [tiles].
    """
    R: tl.constexpr = y.shape[0]
    TOKENS: tl.constexpr = y.shape[1]
    if SPLIT == WHOLE:
        _write(y, out_ptr, bias_ptr, m, n, M, N, BIAS, DT)
    else:
        share = tiles.to(tl.int64) * (R * TOKENS)
        at = shares_ptr + tile.to(tl.int64) * (R * TOKENS)
        at += tl.arange(0, R)[:, None] * TOKENS + tl.arange(0, TOKENS)[None, :]
        tl.store(at + split * share, y)
        if SPLIT == HERE:
            last = all_arrived(arrived_ptr + tile, splits)
            if last:
                total = added_up(at, share, arrived_ptr + tile, splits)
                _write(total, out_ptr, bias_ptr, m, n, M, N, BIAS, DT)
