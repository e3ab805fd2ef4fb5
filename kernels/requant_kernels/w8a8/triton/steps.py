# Triton's language, typed by its own compiler; the arguments of a kernel are positional.
# mypy: ignore-errors
# ruff: noqa: PLR0917
"""Rounding and scaling inside kernels, operation for operation as ``requant_kernels.reference`` defines them."""

import triton
import triton.language as tl

from requant_kernels.shares import added_up, all_arrived


@triton.jit
def load_step(scale_ptr, zero_ptr, SYMMETRIC: tl.constexpr):
    """The stored step of a static layer: scale fp32, zero point fp32."""
    zero = 0.0
    if not SYMMETRIC:
        zero = tl.load(zero_ptr).to(tl.float32)
    return tl.load(scale_ptr), zero


@triton.jit
def inverse_of(scale):
    """1 / scale, and 0 for the scale 0 of a token of zeros; a plain division would be an approximation."""
    return tl.where(scale > 0, tl.math.div_rn(1.0, tl.where(scale > 0, scale, 1.0)), 0.0)


@triton.jit
def find_step(low, high, SYMMETRIC: tl.constexpr):
    """Scale and zero point, fp32, of tokens whose values reach from ``low`` <= 0 to ``high`` >= 0."""
    if SYMMETRIC:
        scale = tl.math.div_rn(tl.maximum(-low, high), 127.0)
        zero = scale * 0.0
    else:
        scale = tl.math.div_rn(high - low, 255.0)
        zero = -128.0 - nearest(low * inverse_of(scale))
    return scale, zero


@triton.jit
def nearest(x):
    """rint of fp32, halves to even, within [-512, 512]: adding 1.5 * 2**23 leaves no room for a fraction.

    The clamp also keeps the compiler from fusing a multiplication before into the addition, which would round once
    where the reference rounds twice.
    """
    return (tl.minimum(tl.maximum(x, -512.0), 512.0) + 12582912.0) - 12582912.0


@triton.jit
def encode(x, inverse, zero):
    """fp32 values, 1 / scale and zero point -> int8 codes."""
    codes = nearest(x * inverse) + zero
    return tl.minimum(tl.maximum(codes, -128.0), 127.0).to(tl.int8)


@triton.jit
def _write(
    sums, scale, zero, weight_scale_ptr, weight_sums_ptr, bias_ptr, out_at, live, n, N,
    SYMMETRIC: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    if not SYMMETRIC:
        sums -= zero[:, None] * tl.load(weight_sums_ptr + n, mask=n < N, other=0)[None, :]
    weight_scale = tl.load(weight_scale_ptr + n, mask=n < N, other=0.0)
    y = sums.to(tl.float32) * (scale[:, None] * weight_scale[None, :])
    if BIAS:
        y += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    tl.store(out_at, y.to(out_at.dtype.element_ty), mask=live)


@triton.jit
def finish(
    sums, scale, zero, weight_scale_ptr, weight_sums_ptr, bias_ptr, out_at, live, shares_ptr, arrived_ptr, n, N,
    split, splits, tile, tiles, SYMMETRIC: tl.constexpr, BIAS: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Sums int32 [tokens, rows n] of products of codes go to ``out_at`` where they are ``live``, with scale fp32 and
    zero point int32 of each token. With SPLIT they are one of ``splits`` shares, int32 [splits, tiles, tokens, rows],
    of tile ``tile``, which its last program adds up (shares.py). arrived int32 [tiles]."""
    if SPLIT:
        TOKENS: tl.constexpr = sums.shape[0]
        ROWS: tl.constexpr = sums.shape[1]
        share = tiles.to(tl.int64) * (TOKENS * ROWS)
        at = shares_ptr + tile.to(tl.int64) * (TOKENS * ROWS)
        at += tl.arange(0, TOKENS)[:, None] * ROWS + tl.arange(0, ROWS)[None, :]
        tl.store(at + split * share, sums)
        if all_arrived(arrived_ptr + tile, splits):
            AT_ONCE: tl.constexpr = 4 if TOKENS * ROWS <= 2048 else 1
            total = added_up(at, share, splits, tl.full((1, 1), True, tl.int1), AT_ONCE)
            tl.store(arrived_ptr + tile, 0)
            _write(total, scale, zero, weight_scale_ptr, weight_sums_ptr, bias_ptr, out_at, live, n, N, SYMMETRIC, BIAS)
    else:
        _write(sums, scale, zero, weight_scale_ptr, weight_sums_ptr, bias_ptr, out_at, live, n, N, SYMMETRIC, BIAS)
