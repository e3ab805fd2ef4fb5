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
    CODEBOOK,
    load_levels,
    load_steps_at,
    load_words,
    rows_at,
    scaled_after,
    weights,
    words_of,
)
from requant_kernels.dense_sparse.triton.digits import add_block, columns, load_fours, reserve, weight_of
from requant_kernels.dense_sparse.triton.finish import WHOLE, finish
from requant_kernels.dense_sparse.triton.gather import (
    add_lanes,
    add_products,
    deepest,
    fetch_near,
    fetch_slots,
    gather_all,
    locate_strips,
    most_chunks,
    multiply_lists,
)
from requant_kernels.dense_sparse.triton.rows import add_up, put_digits, put_slots, reserve_rows


@triton.jit(do_not_specialize=["M", "blocks", "strips", "depth"], do_not_specialize_on_alignment=["bias_ptr"])
def one_kernel(
    x_ptr, out_ptr, shares_ptr, arrived_ptr, bias_ptr, codes_ptr, scales_ptr, slots_ptr, owners_ptr, further_ptr,
    entries_ptr, segments_ptr, bounds_ptr, pairs_ptr, experts_ptr,
    M, N, K, blocks, width, scale_step, strips, depth,
    BITS: tl.constexpr, GROUP: tl.constexpr, KIND: tl.constexpr, LISTS: tl.constexpr, Q: tl.constexpr,
    REST: tl.constexpr, MORE: tl.constexpr, BIAS: tl.constexpr, SPLIT: tl.constexpr, S: tl.constexpr,
    KW: tl.constexpr, PDL: tl.constexpr, EVEN: tl.constexpr, FULL: tl.constexpr, TOP: tl.constexpr, PTX: tl.constexpr,
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
    EVEN: 256 * KW divides K. FULL: that, and every block has Q steps of slots.
    """
    if PDL:
        gdc_launch_dependents()
    DT: tl.constexpr = x_ptr.dtype.element_ty
    T: tl.constexpr = S * KW
    DIGITS: tl.constexpr = PTX and KIND != CODEBOOK
    WORDS: tl.constexpr = words_of(GROUP, KIND)
    COLUMNS: tl.constexpr = 128 if KIND == CODEBOOK else min(GROUP, 128)  # of a product of numbers
    # One of each group of warps, or of each strip where they are one group: Triton 3.6 spreads the warps of a
    # batched product over the batch alone, and would have all of them compute all rows of a batch of one.
    BATCH: tl.constexpr = S if KW == 1 else KW
    ROWS: tl.constexpr = 16 if KW == 1 else 16 * S
    AFTER: tl.constexpr = 4  # steps at a time, when all else is done
    tile_at = tl.program_id(0)
    tiles = tl.num_programs(0)
    first = tile_at * S
    to_n = first * 16
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
    splits = tl.num_programs(1) if SPLIT != WHOLE else 1
    t = tl.arange(0, T)
    kw = tl.arange(0, KW)
    group = tl.arange(0, T * 32) // 32  # of each lane, its ``t``

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
    else:
        of = lo + tl.arange(0, 16 * T) // 16 % KW  # of each row's steps, their block
        steps_at = rows_at(steps_at, S, KW) + tl.minimum(of, blocks - 1) * scale_step
        steps = load_steps_at(steps_at, None, width, WORDS, S, KW)
    words = load_words(words_at, (lo + t % KW < hi)[:, None], BITS, S, KW)
    if Q:
        strip_of = strip + group // KW
        owners = tl.load(owners_ptr + strip_of * 32 + tl.arange(0, T * 32) % 32)
        if MORE:
            places = locate_strips(further_ptr, strip_of, first < strips, depth, strips)
        else:
            places = (strip_of * depth, strip_of * depth, tl.where(first < strips, depth, 0))
        near, _, _ = places
        beside = tl.minimum(depth, blocks * Q)  # steps that go with blocks
        at = (lo + group % KW) * Q
        inside = tl.minimum(depth, hi * Q)
        slots_at = slots_ptr + (near + at) * 32 + tl.arange(0, T * 32) % 32
        slots = fetch_near(slots_at, at, inside, Q, FULL)
        at += KW * Q
        slots_at += KW * Q * 32
        soon = fetch_near(slots_at, at, inside, Q, FULL)  # those of the next blocks
        products = tl.zeros((T * 32,), tl.float32)
    if REST:
        rest = beside + split * KW + group % KW
        left = fetch_slots(slots_ptr, places, rest, depth, splits * KW, REST)
    if MORE:
        more = deepest(further_ptr, strip, depth, S) - beside - splits * KW * REST
    if LISTS and BITS == 8:  # of others ptxas has no register left, of those it allows itself
        most = most_chunks(bounds_ptr, first, S)
    if DIGITS:
        reserve(T)
    if DIGITS or (Q and PTX):
        reserve_rows(T)
    if PDL and not TOP:
        gdc_wait()  # what was read so far is the layer's; x may be the output of the kernel before

    if DIGITS:
        k = (lo + group % KW) * 256 + columns(T)
        x_at = x_ptr + k
        fours = load_fours(x_at, k, last, EVEN)
        acc = tl.zeros((S, KW, 8, 4, 2, 2), tl.float32)
    else:
        acc = tl.zeros((BATCH, ROWS, 1), tl.float32)
    for block in range(lo, hi, KW):
        if Q:
            gathered = gather_all(x_ptr, slots, Q)
        if DIGITS:
            acc = add_block(acc, words, steps, fours, S, KW, BITS, GROUP, KIND, DT)
        else:
            for start in tl.static_range(0, 256, COLUMNS):
                k = (block + kw)[:, None, None] * 256 + start + tl.arange(0, COLUMNS)[None, :, None]
                x = tl.broadcast_to(tl.load(x_ptr + k, mask=k < last, other=0.0), (BATCH, COLUMNS, 1))
                w = weights(
                    words, levels, steps, (), start // 16, COLUMNS // 16, S, KW, BITS, GROUP, KIND, DT, PTX, False
                )  # fmt: skip
                part = tl.dot(tl.reshape(w, (BATCH, ROWS, COLUMNS)), x)
                if KIND != CODEBOOK:
                    part = tl.reshape(part, (KW, 16 * S, 1))
                    part = tl.reshape(scaled_after(part, steps, start // GROUP, KIND, DT), (BATCH, ROWS, 1))
                acc += part
        if Q:
            products = add_products(products, gathered, slots, Q, DT)
        if block + KW < hi:  # what is read only now takes no other registers than what it follows
            words_at += KW * BITS * 128
            words = load_words(words_at, None if EVEN else (block + KW + t % KW < hi)[:, None], BITS, S, KW)
            if KIND != CODEBOOK:
                of += KW
                steps_at += KW * scale_step
                steps = load_steps_at(steps_at, None if EVEN else of < blocks, width, WORDS, S, KW)
            if DIGITS:
                k += KW * 256
                x_at += KW * 256
                fours = load_fours(x_at, k, last, EVEN)
            if Q:
                slots = soon
                at += KW * Q
                slots_at += KW * Q * 32
                soon = fetch_near(slots_at, at, inside, Q, FULL)
    if LISTS and BITS < 8:
        most = most_chunks(bounds_ptr, first, S)
    if MORE:  # looked up again: what is kept takes registers while blocks want them
        places = locate_strips(further_ptr, strip + group // KW, first < strips, depth, strips)
    if REST:
        products = add_products(products, gather_all(x_ptr, left, REST), left, REST, DT)
    if MORE:
        rest += splits * KW * REST
        for _ in tl.range(0, tl.cdiv(more, splits * KW * AFTER), num_stages=1):
            few = fetch_slots(slots_ptr, places, rest, depth, splits * KW, AFTER)
            products = add_products(products, gather_all(x_ptr, few, AFTER), few, AFTER, DT)
            rest += splits * KW * AFTER
    if DIGITS:
        put_digits(acc, S, KW)
    if Q and PTX:
        put_slots(products, owners)
    y = tl.zeros((16 * S, 1), tl.float32)
    if not DIGITS:
        y = tl.reshape(acc, (16 * S, 1)) if KW == 1 else tl.sum(acc, 0)
    if DIGITS or (Q and PTX):
        y += tl.reshape(add_up(S, KW, DIGITS, Q > 0, weight_of(BITS, DT)), (16 * S, 1))
    if LISTS or (Q and not PTX):
        sums = tl.zeros((T, 16, 1), tl.float32)
        if Q and not PTX:
            sums = add_lanes(sums, products, owners)
        if LISTS:
            sums = multiply_lists(
                sums, most, x_ptr, entries_ptr, segments_ptr, bounds_ptr, first + t // KW, split * KW + t % KW,
                splits * KW, DT,
            )  # fmt: skip
        y += tl.reshape(tl.sum(tl.reshape(sums, (S, KW, 16)), 1), (16 * S, 1))

    finish(
        (y,), out_ptr, shares_ptr, arrived_ptr, bias_ptr, (m,), to_n, M, N, split, splits, tile_at, tiles,
        SPLIT, BIAS, DT, False,
    )  # fmt: skip
