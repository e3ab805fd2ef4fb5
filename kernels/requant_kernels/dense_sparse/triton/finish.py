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
TOGETHER = tl.constexpr(4)  # shares that are on their way at the same time


@triton.jit
def _write(y, out_ptr, bias_ptr, m, n, M, N, BIAS: tl.constexpr, DT: tl.constexpr):
    if BIAS:
        y += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
    tl.store(out_ptr + m[None, :].to(tl.int64) * N + n[:, None], y.to(DT), mask=(m < M)[None, :] & (n < N)[:, None])


@triton.jit
def finish(
    y, out_ptr, shares_ptr, arrived_ptr, bias_ptr, m, n, M, N, split, splits, width,
    SPLIT: tl.constexpr, BIAS: tl.constexpr, DT: tl.constexpr,
):  # fmt: skip
    """y fp32 [R, TOKENS] of rows ``n`` and tokens ``m`` goes to out DT [M, N], with the bias.

    With SPLIT it is one of ``splits`` shares, fp32 [splits, M, width]: whichever program comes last, by arrived int32*,
    which it leaves at zero again, adds them up (HERE), or ``reduce_kernel`` does (LATER).
    """
    if SPLIT == WHOLE:
        _write(y, out_ptr, bias_ptr, m, n, M, N, BIAS, DT)
    else:
        live = (m < M)[None, :]
        at = shares_ptr + m.to(tl.int64)[None, :] * width + n[:, None]
        share = M.to(tl.int64) * width
        tl.store(at + split * share, y, mask=live)
    if SPLIT == HERE:
        tl.debug_barrier()  # all threads have stored; the counter then releases that to whoever comes after
        if tl.atomic_add(arrived_ptr, 1, sem="acq_rel") == splits - 1:
            total = tl.zeros_like(y)
            for start in range(0, splits, TOGETHER):
                for s in tl.static_range(TOGETHER):
                    there = live & (tl.full((1, 1), start + s, tl.int32) < splits)
                    # past the L1, which knows nothing of other processors' stores
                    total += tl.load(at + (start + s) * share, mask=there, other=0.0, cache_modifier=".cg")
            tl.store(arrived_ptr, 0)
            _write(total, out_ptr, bias_ptr, m, n, M, N, BIAS, DT)
