# Triton's language, typed by its own compiler; the arguments of a kernel are positional.
# mypy: ignore-errors
# ruff: noqa: PLR0912, PLR0915, PLR0917
"""More tokens: tiles of rows x tokens on the tensor cores, weights decoded straight into the A operand's registers."""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from requant_kernels.dense_sparse.triton.decode import (
    ASYMMETRIC,
    CODEBOOK,
    centred,
    group_scale,
    load_levels,
    load_rows,
    load_words,
    tile,
)
from requant_kernels.dense_sparse.triton.gather import fetch_step, most_chunks, multiply_lists, multiply_step


@triton.jit(
    do_not_specialize=["M", "blocks", "strips", "exponent", "depth"], do_not_specialize_on_alignment=["bias_ptr"]
)
def middle_kernel(
    x_ptr, xt_ptr, out_ptr, bias_ptr, codes_ptr, scales_ptr, slots_ptr, entries_ptr, segments_ptr, bounds_ptr,
    M, N, K, blocks, strips, width, scale_step, exponent, depth, stride,
    BITS: tl.constexpr, GROUP: tl.constexpr, KIND: tl.constexpr, SLOTS: tl.constexpr, LISTS: tl.constexpr,
    REST: tl.constexpr, BIAS: tl.constexpr,
    PARTIAL: tl.constexpr, TOKENS: tl.constexpr, S: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """y [M, N] = x [M, K] (dense + sparse)^T + bias. Grid (ceil(M / TOKENS), lists / S, splits of the columns).

    Unlike ``few_kernel`` weights are scaled, and rounded to x's dtype, before the product: one accumulator a tile. xt
    is x^T [K, stride], padded to whole tiles of tokens; with it a gathered column is one contiguous copy.
    """
    if PDL:
        gdc_launch_dependents()
    DT: tl.constexpr = x_ptr.dtype.element_ty
    SPAN: tl.constexpr = min(GROUP, 128)
    WORDS: tl.constexpr = 256 // GROUP if KIND == ASYMMETRIC else max(1, 128 // GROUP)
    R: tl.constexpr = 16 * S
    first = tl.program_id(1) * S
    split = tl.program_id(2)
    splits = tl.num_programs(2)
    m = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    n = first * 16 + tl.arange(0, R)

    share = tl.cdiv(blocks, splits)
    lo = split * share
    hi = tl.where(first < strips, tl.minimum(blocks, lo + share), lo)
    words_at = codes_ptr + ((first + tl.arange(0, S)).to(tl.int64) * blocks + lo)[:, None] * (BITS * 128)
    words_at += tl.arange(0, 128)[None, :]
    levels = ()
    if KIND == CODEBOOK:
        levels = load_levels(scales_ptr + tl.where(first < strips, first, 0) * 16, width, BITS, S)

    strip = first + tl.arange(0, S)
    sums = tl.zeros((S, 16, TOKENS), tl.float32)
    if LISTS:
        most = most_chunks(bounds_ptr, first, S)
    if PDL:
        gdc_wait()  # what was read so far is the layer's; x may be the output of the kernel before

    acc = tl.zeros((R, TOKENS), tl.float32)
    for block in range(lo, hi):
        words = load_words(words_at, tl.full((S, 1), block, tl.int32) < hi, BITS, S, 1)
        words_at += BITS * 128
        scales = ()
        if KIND != CODEBOOK:
            scales = load_rows(scales_ptr + block * scale_step + n[None, :], width, WORDS)
        for part in tl.static_range(256 // SPAN):
            k = block * 256 + part * SPAN + tl.arange(0, SPAN)
            x = tl.load(
                x_ptr + m[:, None].to(tl.int64) * K + k[None, :], mask=(m < M)[:, None] & (k < K)[None, :], other=0.0
            )
            w = tile(words, levels, exponent, part * (SPAN // 16), SPAN // 16, S, 1, BITS, KIND, DT, False)
            if KIND != CODEBOOK:
                w = centred(w, scales, part * SPAN // GROUP, BITS, KIND, DT)
                w = w * group_scale(scales, part * SPAN // GROUP, KIND, DT)[:, :, None]
            acc = tl.dot(tl.reshape(w, (R, SPAN)), tl.trans(x), acc)

        if SLOTS:
            slots = fetch_step(slots_ptr, strip, tl.full((S,), block, tl.int32), depth, depth)
            sums = multiply_step(sums, xt_ptr, slots, m, M, K, stride, TOKENS, DT)

    if REST:
        step = tl.full((S,), blocks + split, tl.int32)
        limit = tl.where(first < strips, depth, 0)  # overflow lists have no slots
        for _ in tl.range(0, tl.cdiv(depth - blocks, splits), num_stages=1):
            slots = fetch_step(slots_ptr, strip, step, depth, limit)
            sums = multiply_step(sums, xt_ptr, slots, m, M, K, stride, TOKENS, DT)
            step += splits
    if LISTS:
        sums = multiply_lists(
            sums, most, xt_ptr, entries_ptr, segments_ptr, bounds_ptr, strip, tl.full((S,), split, tl.int32),
            splits, m, M, K, stride, TOKENS, DT,
        )  # fmt: skip
    if SLOTS or LISTS:
        acc += tl.reshape(sums, (R, TOKENS))

    live = (m < M)[None, :]
    if PARTIAL:
        row = (split * M + m).to(tl.int64) * (tl.num_programs(1) * R)
        tl.store(out_ptr + row[None, :] + n[:, None], acc, mask=live)
    else:
        live = live & (n < N)[:, None]
        if BIAS:
            acc += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
        tl.store(out_ptr + m[None, :].to(tl.int64) * N + n[:, None], acc.to(DT), mask=live)
