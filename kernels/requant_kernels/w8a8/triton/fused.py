# Triton's language, typed by its own compiler; the arguments of a kernel are positional.
# mypy: ignore-errors
# ruff: noqa: PLR0917
"""Few tokens: the weight is read once and everything else is small, so each program rounds all tokens for itself."""

import triton
import triton.language as tl

from requant_kernels.w8a8.triton.steps import encode, find_step, finish, inverse_of, load_step


@triton.jit(do_not_specialize=["M"], do_not_specialize_on_alignment=["bias_ptr"])
def fused_kernel(
    x_ptr, static_scale_ptr, static_zero_ptr, weight_ptr, weight_scale_ptr, weight_sums_ptr, bias_ptr,
    out_ptr, shares_ptr, arrived_ptr, M, N, K,
    DYNAMIC: tl.constexpr, SYMMETRIC: tl.constexpr, BIAS: tl.constexpr, SPLIT: tl.constexpr, EVEN: tl.constexpr,
    TOKENS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """y [M, N] for M <= TOKENS; ``finish`` says what SPLIT does. Grid (row tiles, splits). EVEN: COLUMNS divides K."""
    m = tl.arange(0, TOKENS)
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    k = tl.arange(0, COLUMNS)
    split = tl.program_id(1)
    x_at = x_ptr + m[:, None] * K + k[None, :]
    live_m = (m < M)[:, None]

    if DYNAMIC:
        low = tl.zeros((TOKENS, COLUMNS), tl.float32)
        high = tl.zeros((TOKENS, COLUMNS), tl.float32)
        for first in range(0, K, COLUMNS):
            x = tl.load(x_at + first, mask=live_m & (first + k < K)[None, :], other=0.0).to(tl.float32)
            low = tl.minimum(low, x)
            high = tl.maximum(high, x)
        scale, zero = find_step(tl.min(low, 1), tl.max(high, 1), SYMMETRIC)
    else:
        one, origin = load_step(static_scale_ptr, static_zero_ptr, SYMMETRIC)
        scale = tl.zeros((TOKENS,), tl.float32) + one
        zero = tl.zeros((TOKENS,), tl.float32) + origin
    inverse = inverse_of(scale)

    share = tl.cdiv(tl.cdiv(K, COLUMNS), tl.num_programs(1)) * COLUMNS
    start = split * share
    stop = tl.minimum(K, start + share)
    weight_at = weight_ptr + tl.minimum(n, N - 1).to(tl.int64)[None, :] * K + k[:, None]
    sums = tl.zeros((TOKENS, ROWS), tl.int32)
    for first in range(start, stop, COLUMNS):
        x = tl.load(x_at + first, mask=live_m & (first + k < K)[None, :], other=0.0).to(tl.float32)
        if EVEN:
            weight = tl.load(weight_at + first)
        else:
            weight = tl.load(weight_at + first, mask=(first + k < K)[:, None], other=0)
        sums = tl.dot(encode(x, inverse[:, None], zero[:, None]), weight, sums, out_dtype=tl.int32)

    live = live_m & (n < N)[None, :]
    out_at = out_ptr + (m[:, None] * N + n[None, :])
    finish(
        sums, scale, zero.to(tl.int32), weight_scale_ptr, weight_sums_ptr, bias_ptr, out_at, live, shares_ptr,
        arrived_ptr, n, N, split, tl.num_programs(1), tl.program_id(0), tl.num_programs(0), SYMMETRIC, BIAS, SPLIT,
    )  # fmt: skip
