# Triton's language, typed by its own compiler; the arguments of a kernel are positional.
# mypy: ignore-errors
# ruff: noqa: PLR0917
"""What becomes of a program's sums: the output, or a share of it that the last program of a tile adds up.

No sum depends on which program is last: it reads all shares back and adds them in their order. Only the count of those
that have arrived is atomic.
"""

import triton
import triton.language as tl

from requant_kernels.dense_sparse.triton import layer

WHOLE, HERE, LATER = (tl.constexpr(split) for split in (layer.WHOLE, layer.HERE, layer.LATER))


@triton.constexpr_function
def at_once(values):
    """How many shares of so many values are on their way at the same time: large ones would not fit the registers."""
    return 4 if values <= 2048 else 1


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

    With SPLIT it is one of ``splits`` shares, fp32 [splits, tiles, R, TOKENS], of tile ``tile``. Whichever program of a
    tile comes last, by arrived int32 [tiles], which it leaves at zero again, adds them up (HERE); or ``reduce_kernel``
    does (LATER).
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
        tl.debug_barrier()  # all threads have stored; the counter then releases that to whoever comes after
        if tl.atomic_add(arrived_ptr + tile, 1, sem="acq_rel") == splits - 1:
            total = tl.zeros_like(y)
            TOGETHER: tl.constexpr = at_once(R * TOKENS)
            for start in range(0, splits, TOGETHER):
                for s in tl.static_range(TOGETHER):
                    there = tl.full((1, 1), start + s, tl.int32) < splits
                    # past the L1, which knows nothing of other processors' stores
                    total += tl.load(at + (start + s) * share, mask=there, other=0.0, cache_modifier=".cg")
            tl.store(arrived_ptr + tile, 0)
            _write(total, out_ptr, bias_ptr, m, n, M, N, BIAS, DT)
