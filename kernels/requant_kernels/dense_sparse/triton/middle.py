# Triton's language, typed by its own compiler; the arguments of a kernel are positional.
# mypy: ignore-errors
# ruff: noqa: PLR0912, PLR0915, PLR0917
"""More tokens: tiles of rows x tokens on the tensor cores, weights decoded straight into the A operand's registers, and
entries put in among them (patch.py)."""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from requant_kernels.dense_sparse.triton.decode import (
    ASYMMETRIC,
    CODEBOOK,
    SHIFTED,
    centred,
    group_scale,
    load_levels,
    load_rows,
    load_words,
    shifted_exponent,
    side_by_side,
    tile,
)
from requant_kernels.dense_sparse.triton.finish import finish
from requant_kernels.dense_sparse.triton.patch import IN_SIGHT, load_windows, locate_rows, multiply_leftovers, patch


@triton.jit(
    do_not_specialize=["M", "blocks", "strips", "exponent", "depth"], do_not_specialize_on_alignment=["bias_ptr"]
)
def middle_kernel(
    x_ptr, xt_ptr, out_ptr, shares_ptr, arrived_ptr, bias_ptr, codes_ptr, scales_ptr, slots_ptr,
    rows_ptr, further_ptr, starts_ptr, columns_ptr, words_ptr, offsets_ptr, pairs_ptr, experts_ptr,
    M, N, K, blocks, strips, width, scale_step, exponent, depth,
    BITS: tl.constexpr, GROUP: tl.constexpr, KIND: tl.constexpr, WINDOW: tl.constexpr, LISTS: tl.constexpr,
    TRANSPOSED: tl.constexpr, COLUMNS: tl.constexpr, EVEN: tl.constexpr, BIAS: tl.constexpr, SPLIT: tl.constexpr,
    TOKENS: tl.constexpr, S: tl.constexpr, PDL: tl.constexpr, TOP: tl.constexpr,
):  # fmt: skip
    """y [M, N] = x [M, K] (dense + sparse)^T + bias. Grid (ceil(M / TOKENS), lists / S, splits of the columns); of
    routed experts, with TOP, as ``few_kernel`` says, (blocks of tokens, lists / S of one expert, splits).

    Unlike ``few_kernel`` weights are scaled, and rounded to x's dtype, before the product: one accumulator a tile.
    starts: ``Windows``, of WINDOW slots, 0 for none; with LISTS there are ``Leftovers``, for which x is read from xt,
    x^T [tiles of tokens, K, TOKENS] (fixup.py), if TRANSPOSED. EVEN: K is a multiple of 256.
    A product takes COLUMNS, 128 or 256: of 256 (wgmma) the compiler makes two, and decodes weights for one while the
    other runs.
    """
    if PDL:
        gdc_launch_dependents()
    DT: tl.constexpr = x_ptr.dtype.element_ty
    SPAN: tl.constexpr = min(GROUP, 128)
    WORDS: tl.constexpr = 256 // GROUP if KIND == ASYMMETRIC else max(1, 128 // GROUP)
    R: tl.constexpr = 16 * S
    MODE: tl.constexpr = SHIFTED if KIND == ASYMMETRIC and (tl.float16 == DT or BITS < 8) else KIND
    # Entries are put into each part before parts are joined, so that they come with the product by its step. Of wide
    # windows, and narrow parts, the compiler would exchange them between threads for every part.
    JOINED: tl.constexpr = WINDOW > IN_SIGHT and SPAN < 128
    # Words wait in registers for an iteration; those of 8 bits, or of 4 beside a codebook, would be too many.
    AHEAD: tl.constexpr = BITS < 8 and KIND != CODEBOOK
    # So do steps where the compiler would copy them 4 bytes at a time, 64 of them a thread: without entries. Of lower
    # tiles it would exchange the weights between threads then.
    LATE: tl.constexpr = KIND != CODEBOOK and WINDOW == 0 and S >= 8
    first = tl.program_id(1) * S
    split = tl.program_id(2)
    splits = tl.num_programs(2)
    place = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    m = place
    from_m = tl.minimum(m, M - 1)  # beyond the last token it again: not stored
    to_n = first * 16 + tl.arange(0, R)
    if TOP:
        if PDL:
            gdc_wait()
        expert = tl.load(experts_ptr + tl.program_id(0))
        if expert < 0:
            return
        m = tl.load(pairs_ptr + place)
        from_m = tl.minimum(m, M - 1) // TOP
        first += expert * tl.num_programs(1) * S
    n = first * 16 + tl.arange(0, R)

    share = tl.cdiv(blocks, splits)
    lo = split * share
    hi = tl.where(first < strips, tl.minimum(blocks, lo + share), lo)
    words_at = codes_ptr + ((first + tl.arange(0, S)).to(tl.int64) * blocks + lo)[:, None] * (BITS * 128)
    words_at += tl.arange(0, 128)[None, :]
    levels = ()
    if KIND == CODEBOOK:
        levels = load_levels(scales_ptr + tl.where(first < strips, first, 0) * 16, width, BITS, S)

    if WINDOW:
        of = (n // 16)[:, None]
        rows = tl.load((rows_ptr + n)[:, None], mask=tl.full((R, 1), lo, tl.int32) < hi, other=0)
        further = tl.load(further_ptr + of, mask=tl.full((R, 1), lo, tl.int32) < hi, other=0)
        places = locate_rows(of, rows, further, depth, strips, blocks)
        starts_at = (starts_ptr + n)[:, None]
        starts = tl.load(starts_at + lo * width, mask=tl.full((R, 1), lo, tl.int32) < hi, other=0)
    if LISTS:
        left = tl.load(offsets_ptr + first)
        left_end = tl.load(offsets_ptr + first + S)
    words = ()
    if AHEAD:
        words = load_words(words_at, tl.full((S, 1), lo, tl.int32) < hi, BITS, S, 1)
    if PDL and not TOP:
        gdc_wait()  # what was read so far is the layer's; x may be the output of the kernel before

    strip = tl.where(first < strips, first, 0)  # overflow lists decode nothing, but must not prefetch out of bounds
    scales_at = scales_ptr + strip * 16 + tl.arange(0, R)[None, :]
    ahead = ()
    if LATE:
        ahead = load_rows(scales_at + tl.minimum(lo, blocks - 1) * scale_step, width, WORDS)
    x_at = x_ptr + from_m[:, None] * K
    acc = tl.zeros((R, TOKENS), tl.float32)
    for block in range(lo, hi):
        if AHEAD:
            now = words
            words_at += BITS * 128
            words = load_words(words_at, tl.full((S, 1), block + 1, tl.int32) < hi, BITS, S, 1)
        else:
            now = load_words(words_at, tl.full((S, 1), block, tl.int32) < hi, BITS, S, 1)
            words_at += BITS * 128
        scales = ahead
        if KIND != CODEBOOK and not LATE:
            scales = load_rows(scales_at + block * scale_step, width, WORDS)
        if LATE:
            ahead = load_rows(scales_at + tl.minimum(block + 1, blocks - 1) * scale_step, width, WORDS)
        if WINDOW:
            slots = load_windows(slots_ptr, places, starts, block, depth, WINDOW)
            # wanted by the addresses of the next iteration, whose copies then have as long as those of x
            starts = tl.load(starts_at + (block + 1) * width, mask=tl.full((R, 1), block + 1, tl.int32) < hi, other=0)
        for start in tl.static_range(0, 256, COLUMNS):
            k = block * 256 + start + tl.arange(0, COLUMNS)
            if EVEN:  # noqa: SIM108 (of the two only one is compiled)
                x = tl.load(x_at + k[None, :])
            else:
                x = tl.load(x_at + k[None, :], mask=(k < K)[None, :], other=0.0)
            parts = ()
            for part in tl.static_range(start // SPAN, (start + COLUMNS) // SPAN):
                above = exponent
                if MODE == SHIFTED:
                    above = shifted_exponent(scales, part * SPAN // GROUP, BITS, S, DT)
                w = tile(now, levels, above, part * (SPAN // 16), SPAN // 16, S, 1, BITS, MODE, DT, False)
                if KIND != CODEBOOK:
                    w = centred(w, scales, part * SPAN // GROUP, BITS, MODE, DT)
                    w = w * group_scale(scales, part * SPAN // GROUP, MODE, DT)[:, :, None]
                w = tl.reshape(w, (R, SPAN))
                if WINDOW and not JOINED:
                    w = (w + patch(slots, block, part * SPAN, SPAN, DT)).to(DT)
                parts = parts + (w[None, :, :],)  # noqa: RUF005 (triton knows no *)
            w = tl.reshape(side_by_side(parts, 0, COLUMNS // SPAN), (R, COLUMNS))
            if JOINED:
                w = (w + patch(slots, block, start, COLUMNS, DT)).to(DT)
            acc = tl.dot(w, tl.trans(x), acc)

    if LISTS:
        if TRANSPOSED:
            x_at = xt_ptr + tl.program_id(0).to(tl.int64) * K * TOKENS + tl.arange(0, TOKENS)[:, None]
        stride = TOKENS if TRANSPOSED else 1
        acc = multiply_leftovers(acc, left, left_end, x_at, stride, columns_ptr, words_ptr, n, split, splits, DT)

    number = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
    finish(
        acc, out_ptr, shares_ptr, arrived_ptr, bias_ptr, m, to_n, M, N, split, splits, number,
        tl.num_programs(0) * tl.num_programs(1), SPLIT, BIAS, DT,
    )  # fmt: skip
