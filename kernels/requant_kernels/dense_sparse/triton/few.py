# Triton's language, typed by its own compiler; the arguments of a kernel are positional.
# mypy: ignore-errors
# ruff: noqa: PLR0912, PLR0915, PLR0917
"""Few tokens: bound by memory. The warps of a program split the columns among them, programs split rows (and columns).

Each group of warps multiplies its own blocks of columns by its own slice of x (a batched product on the tensor cores)
and walks its own share of the sparse entries; the partial sums meet once, in the program's shared memory.

Of a layer of routed experts, stacked along the rows, a program takes rows of the one expert that its tokens go to.
"""

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
    midpoint,
    stepped,
    tile,
)
from requant_kernels.dense_sparse.triton.finish import finish
from requant_kernels.dense_sparse.triton.gather import (
    add_lanes,
    add_products,
    deepest,
    fetch_slots,
    gather_parts,
    locate_strips,
    most_chunks,
    multiply_lists,
    no_products,
    parts_of,
    rows_of,
)
from requant_kernels.dense_sparse.triton.operand import load_columns


@triton.jit(
    do_not_specialize=["M", "blocks", "strips", "exponent", "depth"], do_not_specialize_on_alignment=["bias_ptr"]
)
def few_kernel(
    x_ptr, xt_ptr, out_ptr, shares_ptr, arrived_ptr, bias_ptr, codes_ptr, scales_ptr, slots_ptr,
    owners_ptr, further_ptr, entries_ptr, segments_ptr, bounds_ptr, pairs_ptr, experts_ptr,
    M, N, K, blocks, strips, width, scale_step, exponent, depth,
    BITS: tl.constexpr, GROUP: tl.constexpr, KIND: tl.constexpr, SLOTS: tl.constexpr, LISTS: tl.constexpr,
    Q: tl.constexpr, REST: tl.constexpr, TRANSPOSED: tl.constexpr, BIAS: tl.constexpr,
    SPLIT: tl.constexpr, TOKENS: tl.constexpr, S: tl.constexpr, KW: tl.constexpr, PDL: tl.constexpr,
    QUADS: tl.constexpr, PAIRED: tl.constexpr, EVEN: tl.constexpr, TOP: tl.constexpr,
):  # fmt: skip
    """y [M, N] = x [M, K] (dense + sparse)^T + bias for M <= TOKENS; ``finish`` says what SPLIT does.

    With TOP the layer is experts of N rows each, and y has M rows, one for each pair of a token and an expert: row p of
    y is row p // TOP of x times its expert. pairs int32 [blocks of tokens, TOKENS], M where there is none; experts
    int32 [blocks of tokens], negative where a block is not used.

    Grid (lists / S, of one expert with TOP, splits of the columns, blocks of tokens). Lists beyond ``strips`` are the
    overflow of crowded strips (lists.py): they have no dense part, and their sums go to shares beyond N, which
    ``reduce_kernel`` adds back.
    scales: int32 words [.., width], or the levels.
    xt: x^T [K, TOKENS], zero beyond M, of each block of tokens, where it is TRANSPOSED, or x itself; Q steps of slots
    go with each block of columns, and what is left of them, with REST, comes after all blocks. EVEN: 256 * KW divides
    K. PAIRED: x is as ``load_columns`` says.
    """
    if PDL:
        gdc_launch_dependents()
    DT: tl.constexpr = x_ptr.dtype.element_ty
    SPAN: tl.constexpr = min(GROUP, 128)  # columns under one step
    # Steps go after a product. They go before it where products of so few columns would have less of x than 4 bytes a
    # thread, which is not copied ahead; and with 16 tokens where that saves the registers of a program.
    FOLDED: tl.constexpr = KIND != CODEBOOK and (GROUP < 64 or (TOKENS > 8 and GROUP < 128))
    WIDE: tl.constexpr = 64 if BITS == 8 else 128  # more of 8 bits would not fit the registers
    COLUMNS: tl.constexpr = WIDE if FOLDED else SPAN  # of a product
    WORDS: tl.constexpr = 256 // GROUP if KIND == ASYMMETRIC else max(1, 128 // GROUP)
    # A product of each group of warps, or of each strip where they are one group: Triton 3.6 spreads the warps of a
    # batched product over the batch alone, and would have all of them compute all rows of a batch of one.
    BATCH: tl.constexpr = S if KW == 1 else KW
    ROWS: tl.constexpr = 16 if KW == 1 else 16 * S
    AHEAD: tl.constexpr = BITS < 8  # words wait in registers for an iteration; those of 8 bits would be too many
    # Where the steps that some strips alone have stand is to be looked up. From 2 to 8 tokens they go with the blocks,
    # too, because x^T is waited for in any case. Else what blocks leave comes at the end: the first of it is on its way
    # while codes are decoded, as many steps as there are registers for.
    ALL: tl.constexpr = TOKENS > 1 and TOKENS <= 8
    FIRST: tl.constexpr = max(1, 4 // KW) if GROUP >= 128 else 1
    AFTER: tl.constexpr = 4 if TOKENS == 1 else 2  # steps at a time, when the rest is done
    # How much comes at the end is asked for before the blocks, but of 8 bits with 2 to 8 tokens. So is how many chunks
    # of lists there are, of 3 bits and more with one token. Of others ptxas has no register left of those it allows
    # itself.
    SOON: tl.constexpr = REST and (BITS < 8 or not ALL)
    PARTS: tl.constexpr = parts_of(TOKENS, TRANSPOSED)
    FOURS: tl.constexpr = QUADS and SPAN > 16
    # Subtracting the midpoint after the product costs a second product, before it an instruction for every two weights
    # (two of asymmetric ones), but with 16 tokens fewer registers.
    UNCENTRED: tl.constexpr = tl.bfloat16 == DT and BITS < 8 and (TOKENS <= 8 or KIND == ASYMMETRIC)
    tile_at = tl.program_id(0)
    tiles = tl.num_programs(0)
    first = tile_at * S
    n = first * 16 + tl.arange(0, 16 * S)
    m = tl.arange(0, TOKENS)
    from_m = tl.minimum(m, M - 1)  # rows of x; beyond the last token it again: not stored
    gathered_m = m  # rows, or columns, of what entries read
    sources = M  # and how many there are
    if TOP:
        if PDL:
            gdc_wait()
        expert = tl.load(experts_ptr + tl.program_id(2))
        if expert < 0:
            return
        pairs_ptr += tl.program_id(2) * TOKENS
        m = tl.load(pairs_ptr + m)
        from_m = tl.minimum(m, M - 1) // TOP
        if TRANSPOSED:
            xt_ptr += tl.program_id(2).to(tl.int64) * K * TOKENS
        else:
            gathered_m = from_m
            sources = M // TOP
        first += expert * tiles * S
        tile_at += tl.program_id(2) * tiles
        tiles *= tl.num_programs(2)
    split = tl.program_id(1)
    splits = tl.num_programs(1)
    t = tl.arange(0, S * KW)
    kw = tl.arange(0, KW)
    group = tl.arange(0, S * KW * 32) // 32  # of each lane of slots, its ``t``

    share = tl.cdiv(tl.cdiv(blocks, splits), KW) * KW
    lo = split * share
    hi = tl.where(first < strips, tl.minimum(blocks, lo + share), lo)
    last = tl.minimum(K, hi * 256)
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
    words = ()
    if AHEAD:
        words = load_words(words_at, (lo + t % KW < hi)[:, None], BITS, S, KW)
    if SLOTS:
        places = locate_strips(further_ptr, strip + group // KW, first < strips, depth, strips)
        near, far, steps = places
        beside = blocks * Q if ALL else tl.minimum(depth, blocks * Q)  # steps that go with blocks
        inside = (near, far if ALL else near, tl.minimum(steps if ALL else depth, hi * Q))
        slots = fetch_slots(slots_ptr, inside, (lo + group % KW) * Q, depth, 1, Q)
        products = no_products(S * KW, TOKENS, PARTS)
        rows = rows_of(pairs_ptr, TOKENS, PARTS, 0 if TRANSPOSED else TOP)
        owners = tl.load(owners_ptr + (strip + t // KW)[:, None] * 32 + tl.arange(0, 32)[None, :])
    if SOON:
        more = deepest(further_ptr, strip, depth, S) - beside
        if not ALL:
            left = fetch_slots(slots_ptr, places, beside + split * KW + group % KW, depth, splits * KW, FIRST)
    if LISTS and BITS > 2 and TOKENS == 1:
        most = most_chunks(bounds_ptr, first, S)
    if PDL and not TOP:
        gdc_wait()  # what was read so far is the layer's; x may be the output of the kernel before

    acc = tl.zeros((BATCH, ROWS, TOKENS), tl.float32)
    for block in range(lo, hi, KW):
        if AHEAD:
            now_words = words
            words_at += KW * BITS * 128
            words = load_words(words_at, (block + KW + t % KW < hi)[:, None], BITS, S, KW)
        else:
            now_words = load_words(words_at, (block + t % KW < hi)[:, None], BITS, S, KW)
            words_at += KW * BITS * 128
        if SLOTS:  # an iteration ahead as well, and x at the columns of the last ones long before it is multiplied
            now_slots = slots
            slots = fetch_slots(slots_ptr, inside, (block + KW + group % KW) * Q, depth, 1, Q)
            gathered = gather_parts(xt_ptr, now_slots, rows, sources, K, TOKENS, TRANSPOSED, Q)
        now = scales
        if KIND != CODEBOOK:
            ahead = tl.minimum(block + KW + kw, blocks - 1) * scale_step
            scales = load_rows(scales_at + ahead[:, None], width, WORDS)
        for start in tl.static_range(0, 256, COLUMNS):
            x = load_columns(x_ptr, from_m, K, block + kw, last, start, COLUMNS, TOKENS, FOURS, PAIRED, EVEN)
            x = tl.broadcast_to(x, (BATCH, COLUMNS, TOKENS))
            if KIND == CODEBOOK or FOLDED:
                w = stepped(now_words, levels, now, exponent, start, COLUMNS, SPAN, GROUP, S, KW, BITS, KIND, DT, QUADS)
                acc = tl.dot(tl.reshape(w, (BATCH, ROWS, COLUMNS)), x, acc)
            else:
                w = tile(now_words, levels, exponent, start // 16, SPAN // 16, S, KW, BITS, KIND, DT, QUADS)
                step = tl.reshape(group_scale(now, start // GROUP, KIND, DT), (BATCH, ROWS, 1))
                if UNCENTRED:
                    ones = tl.full((BATCH, ROWS, SPAN // 2), 1.0, DT)  # joined as weights are: x in the same registers
                    total = tl.dot(tl.reshape(tl.join(ones, ones), (BATCH, ROWS, SPAN)), x)
                    zero = midpoint(now, start // GROUP, BITS, KIND, DT)
                    if KIND == ASYMMETRIC:
                        zero = tl.reshape(zero, (BATCH, ROWS, 1)).to(tl.float32)
                    acc += (tl.dot(tl.reshape(w, (BATCH, ROWS, SPAN)), x) - zero * total) * step.to(tl.float32)
                else:
                    w = centred(w, now, start // GROUP, BITS, KIND, DT)
                    acc += tl.dot(tl.reshape(w, (BATCH, ROWS, SPAN)), x) * step.to(tl.float32)
        if SLOTS:
            products = add_products(products, gathered, now_slots, Q, PARTS, DT)
    if REST:
        if not SOON:
            more = deepest(further_ptr, strip, depth, S) - beside
        rest = beside + split * KW + group % KW
        if not ALL:
            gathered = gather_parts(xt_ptr, left, rows, sources, K, TOKENS, TRANSPOSED, FIRST)
            products = add_products(products, gathered, left, FIRST, PARTS, DT)
            rest += splits * KW * FIRST
            more -= splits * KW * FIRST
        for _ in tl.range(0, tl.cdiv(more, splits * KW * AFTER), num_stages=1):
            few = fetch_slots(slots_ptr, places, rest, depth, splits * KW, AFTER)
            theirs = gather_parts(xt_ptr, few, rows, sources, K, TOKENS, TRANSPOSED, AFTER)
            products = add_products(products, theirs, few, AFTER, PARTS, DT)
            rest += splits * KW * AFTER
    if SLOTS or LISTS:
        # sums of the strips' rows: those of the dense part, where a group of warps has a strip, or their own
        sums = acc if KW == 1 else tl.zeros((S * KW, 16, TOKENS), tl.float32)
        if SLOTS:
            sums = add_lanes(sums, products, owners, TOKENS, PARTS)
        if LISTS:
            if BITS == 2 or TOKENS > 1:
                most = most_chunks(bounds_ptr, first, S)
            sums = multiply_lists(
                sums, most, xt_ptr, entries_ptr, segments_ptr, bounds_ptr, first + t // KW, split * KW + t % KW,
                splits * KW, gathered_m, sources, K, TOKENS, TRANSPOSED, DT,
            )  # fmt: skip
        if KW > 1:
            sums = tl.permute(tl.reshape(sums, (S, KW, 16, TOKENS)), (1, 0, 2, 3))
            acc += tl.reshape(sums, (BATCH, ROWS, TOKENS))
        else:
            acc = sums
    y = tl.reshape(acc, (16 * S, TOKENS)) if KW == 1 else tl.sum(acc, 0)

    finish(
        y, out_ptr, shares_ptr, arrived_ptr, bias_ptr, m, n, M, N, split, splits, tile_at, tiles, SPLIT, BIAS, DT,
    )  # fmt: skip
