# Triton's language, typed by its own compiler; the arguments of a kernel are positional.
# mypy: ignore-errors
# ruff: noqa: PLR0917
"""Codes times codes on the tensor cores, for any number of tokens."""

import triton
import triton.language as tl

from requant_kernels.w8a8.triton.steps import finish


@triton.jit(do_not_specialize=["M"], do_not_specialize_on_alignment=["bias_ptr"])
def product_kernel(
    codes_ptr, scale_ptr, zero_ptr, weight_ptr, weight_scale_ptr, weight_sums_ptr, bias_ptr, out_ptr, shares_ptr,
    arrived_ptr, M, N, K, SYMMETRIC: tl.constexpr, BIAS: tl.constexpr, SPLIT: tl.constexpr, EVEN: tl.constexpr,
    TOKENS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """y [M, N]; ``finish`` says what SPLIT does.

    codes int8 [M, K], weight int8 [N, K]. Grid (token tiles * row tiles, splits). EVEN: COLUMNS divides K.
    """
    tiles_m = tl.cdiv(M, TOKENS)
    tiles_n = tl.cdiv(N, ROWS)
    # GROUP token tiles at a time walk along the rows, so that what they share of the weight is still in the cache
    program = tl.program_id(0)
    group = program // (GROUP * tiles_n)
    height = tl.minimum(tiles_m - group * GROUP, GROUP)
    within = program % (GROUP * tiles_n)
    m = (group * GROUP + within % height) * TOKENS + tl.arange(0, TOKENS)
    n = within // height * ROWS + tl.arange(0, ROWS)
    k = tl.arange(0, COLUMNS)

    split = tl.program_id(1)
    share = tl.cdiv(tl.cdiv(K, COLUMNS), tl.num_programs(1)) * COLUMNS
    start = split * share
    stop = tl.minimum(K, start + share)
    # tokens and rows beyond the last repeat it: their sums are never stored
    codes_at = codes_ptr + tl.minimum(m, M - 1).to(tl.int64)[:, None] * K + k[None, :]
    weight_at = weight_ptr + tl.minimum(n, N - 1).to(tl.int64)[None, :] * K + k[:, None]
    sums = tl.zeros((TOKENS, ROWS), tl.int32)
    for first in range(start, stop, COLUMNS):
        if EVEN:
            codes = tl.load(codes_at + first)
            weight = tl.load(weight_at + first)
        else:
            live = first + k < K
            codes = tl.load(codes_at + first, mask=live[None, :], other=0)
            weight = tl.load(weight_at + first, mask=live[:, None], other=0)
        sums = tl.dot(codes, weight, sums, out_dtype=tl.int32)

    live = (m < M)[:, None] & (n < N)[None, :]
    out_at = out_ptr + (m.to(tl.int64)[:, None] * N + n[None, :])
    scale = tl.load(scale_ptr + m, mask=m < M, other=0.0)
    zero = tl.load(zero_ptr + m, mask=m < M, other=0)
    finish(
        sums, scale, zero, weight_scale_ptr, weight_sums_ptr, bias_ptr, out_at, live, shares_ptr, arrived_ptr, n, N,
        split, tl.num_programs(1), program, tl.num_programs(0), SYMMETRIC, BIAS, SPLIT,
    )  # fmt: skip
