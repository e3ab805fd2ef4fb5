# Triton's language, typed by its own compiler; the arguments of a kernel are positional.
# mypy: ignore-errors
# ruff: noqa: PLR0912, PLR0915, PLR0917
"""One token: bound by memory. The warps of a program split the columns among them, programs split rows (and columns).

Each group of warps multiplies its own blocks of columns by its own slice of x (a batched product on the tensor cores)
and walks its own share of the sparse entries; the partial sums meet once, in the program's shared memory.

Of a layer of routed experts, stacked along the rows, a program takes rows of the one expert that its token goes to.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from requant_kernels.dense_sparse.triton.decode import (
    ASYMMETRIC,
    CODEBOOK,
    beside_midpoint,
    codes,
    group_scale,
    load_levels,
    load_rows,
    load_steps,
    load_words,
    weights,
    words_of,
)
from requant_kernels.dense_sparse.triton.finish import finish
from requant_kernels.dense_sparse.triton.gather import (
    add_lanes,
    add_products,
    deepest,
    fetch_slots,
    gather_all,
    locate_strips,
    most_chunks,
    multiply_lists,
)
from requant_kernels.dense_sparse.triton.operand import load_columns


@triton.jit(do_not_specialize=["M", "blocks", "strips", "depth"], do_not_specialize_on_alignment=["bias_ptr"])
def one_kernel(
    x_ptr, out_ptr, shares_ptr, arrived_ptr, bias_ptr, codes_ptr, scales_ptr, slots_ptr, owners_ptr, further_ptr,
    entries_ptr, segments_ptr, bounds_ptr, pairs_ptr, experts_ptr,
    M, N, K, blocks, width, scale_step, strips, depth,
    BITS: tl.constexpr, GROUP: tl.constexpr, KIND: tl.constexpr, LISTS: tl.constexpr, Q: tl.constexpr,
    REST: tl.constexpr, MORE: tl.constexpr, BIAS: tl.constexpr, SPLIT: tl.constexpr, S: tl.constexpr,
    KW: tl.constexpr, PDL: tl.constexpr, QUADS: tl.constexpr, EVEN: tl.constexpr, TOP: tl.constexpr,
    PTX: tl.constexpr,
):  # fmt: skip
    """y [1, N] = x [1, K] (dense + sparse)^T + bias; ``finish`` says what SPLIT does.

    With TOP the layer is experts of N rows each, and y has M rows, one for each pair of a token and an expert: row p of
    y is row p // TOP of x times its expert. pairs int32 [blocks of one pair, 1], M where there is none; experts int32
    [blocks], negative where a block is not used.

    Grid (lists / S, of one expert with TOP, splits of the columns, blocks). Lists beyond ``strips`` are the overflow of
    crowded strips (lists.py): they have no dense part, and their sums go to shares beyond N, which ``reduce_kernel``
    adds back.
    scales: int32 words [.., width], or the levels. Q steps of slots go with each block of columns. Of what is left a
    group of warps has fetched REST steps before, and multiplies them and, with MORE, all others after the blocks.
    EVEN: 256 * KW divides K.
    """
    if PDL:
        gdc_launch_dependents()
    DT: tl.constexpr = x_ptr.dtype.element_ty
    SPAN: tl.constexpr = min(GROUP, 128)  # columns under one step
    # Steps go after a product. They go before it where products of so few columns would have less of x than 4 bytes a
    # thread, which is not copied ahead.
    FOLDED: tl.constexpr = KIND != CODEBOOK and GROUP < 64
    WIDE: tl.constexpr = 64 if BITS == 8 else 128  # more of 8 bits would not fit the registers
    COLUMNS: tl.constexpr = WIDE if FOLDED else SPAN  # of a product
    WORDS: tl.constexpr = words_of(GROUP, KIND)
    # A product of each group of warps, or of each strip where they are one group: Triton 3.6 spreads the warps of a
    # batched product over the batch alone, and would have all of them compute all rows of a batch of one.
    BATCH: tl.constexpr = S if KW == 1 else KW
    ROWS: tl.constexpr = 16 if KW == 1 else 16 * S
    AHEAD: tl.constexpr = BITS < 8  # words wait in registers for an iteration; those of 8 bits would be too many
    AFTER: tl.constexpr = 4  # steps at a time, when all else is done
    tile_at = tl.program_id(0)
    tiles = tl.num_programs(0)
    first = tile_at * S
    n = first * 16 + tl.arange(0, 16 * S)
    m = tl.arange(0, 1)
    if TOP:
        if PDL:
            gdc_wait()
        expert = tl.load(experts_ptr + tl.program_id(2))
        if expert < 0:
            return
        pair = tl.load(pairs_ptr + tl.program_id(2))
        m += pair
        x_ptr += pair.to(tl.int64) // TOP * K
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
    steps_at = scales_ptr + strip * 16
    levels = ()
    steps = ()
    if KIND == CODEBOOK:
        levels = load_levels(steps_at, width, BITS, S)
    elif FOLDED:
        steps = load_steps(steps_at, lo, blocks, scale_step, width, GROUP, KIND, S, KW, 256)
    else:
        steps_at += tl.arange(0, 16 * S)[None, :]
        steps = load_rows(steps_at + (tl.minimum(lo + kw, blocks - 1) * scale_step)[:, None], width, WORDS)
    words = ()
    if AHEAD:
        words = load_words(words_at, (lo + t % KW < hi)[:, None], BITS, S, KW)
    if Q:
        strip_of = strip + group // KW
        if MORE:
            places = locate_strips(further_ptr, strip_of, first < strips, depth, strips)
        else:
            places = (strip_of * depth, strip_of * depth, tl.where(first < strips, depth, 0))
        near, _, _ = places
        beside = tl.minimum(depth, blocks * Q)  # steps that go with blocks
        inside = (near, near, tl.minimum(depth, hi * Q))
        slots = fetch_slots(slots_ptr, inside, (lo + group % KW) * Q, depth, 1, Q)
        products = tl.zeros((S * KW * 32,), tl.float32)
        owners = tl.load(owners_ptr + (strip + t // KW)[:, None] * 32 + tl.arange(0, 32)[None, :])
    if REST:
        rest = beside + split * KW + group % KW
        left = fetch_slots(slots_ptr, places, rest, depth, splits * KW, REST)
    if MORE:
        more = deepest(further_ptr, strip, depth, S) - beside - splits * KW * REST
    if LISTS and BITS == 8:  # of others ptxas has no register left, of those it allows itself
        most = most_chunks(bounds_ptr, first, S)
    if PDL and not TOP:
        gdc_wait()  # what was read so far is the layer's; x may be the output of the kernel before

    acc = tl.zeros((BATCH, ROWS, 1), tl.float32)
    for block in range(lo, hi, KW):
        if AHEAD:
            now_words = words
            words_at += KW * BITS * 128
            words = load_words(words_at, (block + KW + t % KW < hi)[:, None], BITS, S, KW)
        else:
            now_words = load_words(words_at, (block + t % KW < hi)[:, None], BITS, S, KW)
            words_at += KW * BITS * 128
        if Q:  # an iteration ahead as well, and x at the columns of the last ones long before it is multiplied
            now_slots = slots
            slots = fetch_slots(slots_ptr, inside, (block + KW + group % KW) * Q, depth, 1, Q)
            gathered = gather_all(x_ptr, now_slots, Q)
        now = steps
        if FOLDED:
            steps = load_steps(steps_at, block + KW, blocks, scale_step, width, GROUP, KIND, S, KW, 256)
        elif KIND != CODEBOOK:
            ahead = tl.minimum(block + KW + kw, blocks - 1) * scale_step
            steps = load_rows(steps_at + ahead[:, None], width, WORDS)
        for start in tl.static_range(0, 256, COLUMNS):
            x = load_columns(x_ptr, block + kw, last, start, COLUMNS, QUADS, EVEN)
            x = tl.broadcast_to(x, (BATCH, COLUMNS, 1))
            if KIND == CODEBOOK or FOLDED:
                w = weights(
                    now_words, levels, now, (), start // 16, COLUMNS // 16, S, KW, BITS, GROUP, KIND, DT,
                    QUADS, PTX,
                )  # fmt: skip
                acc = tl.dot(tl.reshape(w, (BATCH, ROWS, COLUMNS)), x, acc)
            else:
                w = codes(now_words, start // 16, SPAN // 16, S, KW, BITS, DT, QUADS, PTX)
                part = tl.dot(tl.reshape(w, (BATCH, ROWS, SPAN)), x)
                if KIND == ASYMMETRIC:  # not the middle was to be subtracted, but the zero point
                    ones = tl.full((BATCH, ROWS, SPAN // 2), 1.0, DT)  # joined as weights are: x in the same registers
                    total = tl.dot(tl.reshape(tl.join(ones, ones), (BATCH, ROWS, SPAN)), x)
                    part += tl.reshape(beside_midpoint(now, start // GROUP, BITS, DT), (BATCH, ROWS, 1)) * total
                acc += part * tl.reshape(group_scale(now, start // GROUP, KIND, DT), (BATCH, ROWS, 1)).to(tl.float32)
        if Q:
            products = add_products(products, gathered, now_slots, Q, DT)
    if LISTS and BITS < 8:
        most = most_chunks(bounds_ptr, first, S)
    if REST:
        products = add_products(products, gather_all(x_ptr, left, REST), left, REST, DT)
    if MORE:
        rest += splits * KW * REST
        for _ in tl.range(0, tl.cdiv(more, splits * KW * AFTER), num_stages=1):
            few = fetch_slots(slots_ptr, places, rest, depth, splits * KW, AFTER)
            products = add_products(products, gather_all(x_ptr, few, AFTER), few, AFTER, DT)
            rest += splits * KW * AFTER
    if Q or LISTS:
        # sums of the strips' rows: those of the dense part, where a group of warps has a strip, or their own
        sums = acc if KW == 1 else tl.zeros((S * KW, 16, 1), tl.float32)
        if Q:
            sums = add_lanes(sums, products, owners)
        if LISTS:
            sums = multiply_lists(
                sums, most, x_ptr, entries_ptr, segments_ptr, bounds_ptr, first + t // KW, split * KW + t % KW,
                splits * KW, DT,
            )  # fmt: skip
        if KW > 1:
            sums = tl.permute(tl.reshape(sums, (S, KW, 16, 1)), (1, 0, 2, 3))
            acc += tl.reshape(sums, (BATCH, ROWS, 1))
        else:
            acc = sums
    y = tl.reshape(acc, (16 * S, 1)) if KW == 1 else tl.sum(acc, 0)

    finish(
        y, out_ptr, shares_ptr, arrived_ptr, bias_ptr, m, n, M, N, split, splits, tile_at, tiles, SPLIT, BIAS, DT,
    )  # fmt: skip
