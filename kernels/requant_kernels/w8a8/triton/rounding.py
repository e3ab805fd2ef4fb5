# Triton's language, typed by its own compiler; the arguments of a kernel are positional.
# mypy: ignore-errors
# ruff: noqa: PLR0917
"""Many tokens are rounded once, before the product: one program a token."""

import triton
import triton.language as tl

from requant_kernels.w8a8.triton.steps import encode, find_step, inverse_of, load_step


@triton.jit
def round_kernel(
    x_ptr, codes_ptr, scale_ptr, zero_ptr, static_scale_ptr, static_zero_ptr, K,
    DYNAMIC: tl.constexpr, SYMMETRIC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """x [M, K] -> codes int8 [M, K], scale fp32 [M], zero int32 [M]. Grid (M)."""
    m = tl.program_id(0)
    x_ptr += m.to(tl.int64) * K
    codes_ptr += m.to(tl.int64) * K
    k = tl.arange(0, BLOCK)
    if DYNAMIC:
        low = tl.zeros((BLOCK,), tl.float32)
        high = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, K, BLOCK):
            x = tl.load(x_ptr + start + k, mask=start + k < K, other=0.0).to(tl.float32)
            low = tl.minimum(low, x)
            high = tl.maximum(high, x)
        scale, zero = find_step(tl.min(low, 0), tl.max(high, 0), SYMMETRIC)
    else:
        scale, zero = load_step(static_scale_ptr, static_zero_ptr, SYMMETRIC)
    inverse = inverse_of(scale)
    for start in range(0, K, BLOCK):  # the second reading comes from the cache
        x = tl.load(x_ptr + start + k, mask=start + k < K, other=0.0).to(tl.float32)
        tl.store(codes_ptr + start + k, encode(x, inverse, zero), mask=start + k < K)
    tl.store(scale_ptr + m, scale)
    tl.store(zero_ptr + m, zero.to(tl.int32))
