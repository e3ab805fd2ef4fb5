# Triton's language, typed by its own compiler; the arguments of a kernel are positional.
# mypy: ignore-errors
# ruff: noqa: PLR0915, PLR0917
"""Few tokens: bound by memory. The warps of a program split the columns among them, programs split rows (and columns).

Each group of warps multiplies its own blocks of columns by its own slice of x (a batched product on the tensor cores)
and walks its own share of the sparse entries; the partial sums meet once, in the program's shared memory.
"""

import triton
import triton.language as tl

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
from requant_kernels.dense_sparse.triton.gather import onehot_rows


@triton.jit
def _sparse(
    x_ptr, entries_ptr, segments_ptr, bounds_ptr, first_list, part, parts, M, K,
    TOKENS: tl.constexpr, S: tl.constexpr, KW: tl.constexpr, DT: tl.constexpr,
):  # fmt: skip
    """Products of x with the entries of S lists, shared out among ``parts`` * KW: fp32 [S * KW, 16, TOKENS]."""
    t = tl.arange(0, S * KW)
    m = tl.arange(0, TOKENS)
    bounds = bounds_ptr + 2 * (first_list + t // KW)
    chunk = tl.load(bounds) + part * KW + t % KW
    end = tl.load(bounds + 1)
    acc = tl.zeros((S * KW, 16, TOKENS), tl.float32)
    for _ in range(tl.cdiv(tl.max(end - chunk), parts * KW)):
        rows, columns, used = onehot_rows(entries_ptr, segments_ptr, chunk, end, DT)
        x = tl.load(
            x_ptr + m[None, None, :] * K + columns[:, :, None],
            mask=used[:, :, None] & (m < M)[None, None, :],
            other=0.0,
        )
        acc = tl.dot(rows, x, acc)
        chunk += parts * KW
    return acc


@triton.jit(do_not_specialize=["M", "blocks", "strips"], do_not_specialize_on_alignment=["bias_ptr"])
def few_kernel(
    x_ptr, out_ptr, bias_ptr, codes_ptr, scales_ptr, entries_ptr, segments_ptr, bounds_ptr,
    M, N, K, blocks, strips, width, scale_step,
    BITS: tl.constexpr, GROUP: tl.constexpr, KIND: tl.constexpr, SPARSE: tl.constexpr, BIAS: tl.constexpr,
    PARTIAL: tl.constexpr, TOKENS: tl.constexpr, S: tl.constexpr, KW: tl.constexpr,
):  # fmt: skip
    """y [M, N] = x [M, K] (dense + sparse)^T + bias for M <= TOKENS; with PARTIAL this program's share of it, fp32.

    Grid (lists / S, splits of the columns). Lists beyond ``strips`` are the overflow of crowded strips (layout.py):
    they have no dense part, and their sums go to columns of ``out`` beyond N, which ``reduce_kernel`` adds back.
    out: DT [M, N], or fp32 [splits, M, 16 * lists] with PARTIAL. scales: int32 words [.., width], or the levels.
    """
    DT: tl.constexpr = x_ptr.dtype.element_ty
    SPAN: tl.constexpr = min(GROUP, 128)
    WORDS: tl.constexpr = 256 // GROUP if KIND == ASYMMETRIC else max(1, 128 // GROUP)
    # A product of each group of warps, or of each strip where they are one group: Triton 3.6 spreads the warps of a
    # batched product over the batch alone, and would have all of them compute all rows of a batch of one.
    BATCH: tl.constexpr = S if KW == 1 else KW
    ROWS: tl.constexpr = 16 if KW == 1 else 16 * S
    first = tl.program_id(0) * S
    split = tl.program_id(1)
    splits = tl.num_programs(1)
    t = tl.arange(0, S * KW)
    kw = tl.arange(0, KW)
    m = tl.arange(0, TOKENS)
    n = first * 16 + tl.arange(0, 16 * S)

    share = tl.cdiv(tl.cdiv(blocks, splits), KW) * KW
    lo = split * share
    hi = tl.where(first < strips, tl.minimum(blocks, lo + share), lo)
    limit = tl.minimum(K, hi * 256)
    strip = tl.where(first < strips, first, 0)  # overflow lists decode nothing, but must not prefetch out of bounds
    words_at = codes_ptr + ((strip + t // KW).to(tl.int64) * blocks + lo + t % KW)[:, None] * (BITS * 128)
    words_at += tl.arange(0, 128)[None, :]
    scales_at = scales_ptr + strip * 16 + tl.arange(0, 16 * S)[None, :]
    levels = ()
    scales = ()
    if KIND == CODEBOOK:
        levels = load_levels(scales_ptr + strip * 16, width, BITS, S)
    else:
        scales = load_rows(scales_at + (tl.minimum(lo + kw, blocks - 1) * scale_step)[:, None], width, WORDS)

    acc = tl.zeros((BATCH, ROWS, TOKENS), tl.float32)
    for block in range(lo, hi, KW):
        words = load_words(words_at, BITS, S, KW)
        words_at += KW * BITS * 128
        now = scales
        if KIND != CODEBOOK:  # fetched an iteration ahead, because no asynchronous copy covers these loads
            ahead = tl.minimum(block + KW + kw, blocks - 1) * scale_step
            scales = load_rows(scales_at + ahead[:, None], width, WORDS)
        for part in tl.static_range(256 // SPAN):
            k = (block + kw)[:, None, None] * 256 + part * SPAN + tl.arange(0, SPAN)[None, None, :]
            x = tl.load(x_ptr + m[None, :, None] * K + k, mask=(m < M)[None, :, None] & (k < limit), other=0.0)
            x = tl.broadcast_to(tl.permute(x, (0, 2, 1)), (BATCH, SPAN, TOKENS))
            w = tile(words, levels, part * (SPAN // 16), SPAN // 16, S, KW, BITS, KIND, DT)
            if KIND == CODEBOOK:
                acc = tl.dot(tl.reshape(w, (BATCH, ROWS, SPAN)), x, acc)
            else:
                w = centred(w, now, part * SPAN // GROUP, BITS, KIND, DT)
                step = tl.reshape(group_scale(now, part * SPAN // GROUP, KIND, DT), (BATCH, ROWS, 1))
                acc += tl.dot(tl.reshape(w, (BATCH, ROWS, SPAN)), x) * step.to(tl.float32)
    if SPARSE:
        sums = _sparse(x_ptr, entries_ptr, segments_ptr, bounds_ptr, first, split, splits, M, K, TOKENS, S, KW, DT)
        if KW > 1:
            sums = tl.permute(tl.reshape(sums, (S, KW, 16, TOKENS)), (1, 0, 2, 3))
        acc += tl.reshape(sums, (BATCH, ROWS, TOKENS))
    y = tl.reshape(acc, (16 * S, TOKENS)) if KW == 1 else tl.sum(acc, 0)

    live = (m < M)[None, :]
    if PARTIAL:
        row = (split * M + m).to(tl.int64) * (tl.num_programs(0) * 16 * S)
        tl.store(out_ptr + row[None, :] + n[:, None], y, mask=live)
    else:
        live = live & (n < N)[:, None]
        if BIAS:
            y += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
        tl.store(out_ptr + m[None, :] * N + n[:, None], y.to(DT), mask=live)
