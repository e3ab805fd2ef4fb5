# Triton's language, typed by its own compiler; the arguments of a kernel are positional.
# mypy: ignore-errors
# ruff: noqa: PLR0912, PLR0915, PLR0917
"""More tokens: tiles of rows x tokens on the tensor cores, weights decoded straight into the A operand's registers, and
entries added to them (patch.py)."""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from requant_kernels.dense_sparse.triton.decode import (
    CODEBOOK,
    SYMMETRIC,
    ask_for_words,
    in_steps,
    load_levels,
    load_span,
    load_steps,
    nothing,
    of_span,
    scaled_after,
    steps_of,
    weights,
)
from requant_kernels.dense_sparse.triton.finish import finish
from requant_kernels.dense_sparse.triton.patch import PATCH, clear, compared, fetch, locate, put, read, reserve


@triton.jit
def in_fours(operand):
    """[R, K], K a multiple of 32, with columns in an order that is the same for both operands of a product.

    Until 3.7 Triton hands the operands of ``mma`` to threads in fours instead of pairs of columns where one is joined
    of halves, and exchanges between threads what decode.py has put into pairs. In this order a thread's fours are its
    two columns of a plane of codes, and those of the next one.
    """
    R: tl.constexpr = operand.shape[0]
    K: tl.constexpr = operand.shape[1]
    pairs = tl.reshape(operand, (R, K // 32, 2, 2, 4, 2))  # pair of planes, plane of it, half of it, t, column
    return tl.reshape(tl.permute(pairs, (0, 1, 3, 4, 2, 5)), (R, K))


@triton.jit(do_not_specialize=["M", "blocks"], do_not_specialize_on_alignment=["bias_ptr"])
def middle_kernel(
    x_ptr, out_ptr, shares_ptr, arrived_ptr, bias_ptr, codes_ptr, scales_ptr, entries_ptr, starts_ptr, pairs_ptr,
    experts_ptr, M, N, K, blocks, width, scale_step,
    BITS: tl.constexpr, GROUP: tl.constexpr, KIND: tl.constexpr, ROUNDS: tl.constexpr, PTX: tl.constexpr,
    COLUMNS: tl.constexpr, EVEN: tl.constexpr, BIAS: tl.constexpr, SPLIT: tl.constexpr, TOKENS: tl.constexpr,
    S: tl.constexpr, STACK: tl.constexpr, SPAN: tl.constexpr, PDL: tl.constexpr, TOP: tl.constexpr,
    FOURS: tl.constexpr, APART: tl.constexpr, SIDES: tl.constexpr,
):  # fmt: skip
    """y [M, N] = x [M, K] (dense + sparse)^T + bias. Grid (splits of the columns, ceil(M / TOKENS), strips /
    (S * STACK)), S warps; of routed experts, with TOP, as ``one_kernel`` says, (.., blocks of tokens, .. of an expert).

    A program has STACK tiles of sums, one below the other, so that x is read once for all of them. Weights times steps,
    and entries, are added up and rounded to x's dtype before the product. Few tokens have fewer sums than weights:
    AFTER, a group's products are multiplied by its steps.
    entries, starts: ``Patches``, with ROUNDS; 0 where there are none. EVEN: K is a multiple of 256. FOURS: columns are
    multiplied in the order of ``in_fours``. APART: products are added to sums by an instruction of its own. SIDES:
    a tile's tokens are those of as many products, beside each other.
    SPAN columns, a block or half of one, are copied and decoded at a time, and a product takes COLUMNS
    of them, 128 or 256. Of wgmma the second of two in the same sums begins after the first has ended; beside one that
    is alone weights are decoded, those that it takes and those of the next one.
    """
    tl.static_assert((STACK == 1 and TOKENS <= 128) or (SPAN == COLUMNS and KIND != CODEBOOK))
    if PDL:
        gdc_launch_dependents()
    DT: tl.constexpr = x_ptr.dtype.element_ty
    R: tl.constexpr = 16 * S
    SPANS: tl.constexpr = 256 // SPAN  # of a block
    PATCHES: tl.constexpr = SPAN // PATCH
    NONE: tl.constexpr = nothing(BITS, KIND, DT)
    FEW: tl.constexpr = TOKENS <= 32 and GROUP >= COLUMNS
    AFTER: tl.constexpr = FEW and KIND == SYMMETRIC and (ROUNDS == 0 or in_steps(KIND, BITS))
    # x of so many tokens takes all of shared memory but the buffers of entries: what else is fetched ahead waits in
    # registers. So do sums, and from half as many on there are none for rows of x in 64 bits.
    MANY: tl.constexpr = TOKENS > 128
    NARROW: tl.constexpr = TOKENS >= 128
    STEPS_AHEAD: tl.constexpr = AFTER or MANY
    # Beside buffers of entries shared memory is short, and of so few tokens there are registers left for words.
    WORDS_AHEAD: tl.constexpr = (AFTER and ROUNDS > 0 and TOKENS <= 16) or MANY
    SIDE: tl.constexpr = TOKENS // SIDES
    split = tl.program_id(0)
    splits = tl.num_programs(0)
    block = tl.program_id(1)
    first = tl.program_id(2) * (S * STACK)
    m = ()
    for side in tl.static_range(SIDES):
        m = m + (block * TOKENS + side * SIDE + tl.arange(0, SIDE),)  # noqa: RUF005
    to_n = first * 16
    if TOP:
        if PDL:
            gdc_wait()
        expert = tl.load(experts_ptr + block)
        if expert < 0:
            return
        pairs_at = m
        m = ()
        for side in tl.static_range(SIDES):
            m = m + (tl.load(pairs_ptr + pairs_at[side]),)  # noqa: RUF005
        first += expert * tl.num_programs(2) * (S * STACK)

    lo = blocks * SPANS * split // splits
    hi = blocks * SPANS * (split + 1) // splits
    words_at = codes_ptr + ((first + tl.arange(0, S)).to(tl.int64) * blocks)[:, None] * (BITS * 128)
    words_at += tl.arange(0, 128)[None, :]
    steps_at = scales_ptr + first * 16
    levels = ()
    if KIND == CODEBOOK:
        levels = load_levels(steps_at, width, BITS, S)
    words_below = S * blocks.to(tl.int64) * (BITS * 128)
    starts_below = S * blocks * 2
    # Of the span that comes next, where the compiler does not copy them ahead.
    steps_ahead = ()
    words_ahead = ()
    for h in tl.static_range(STACK):
        if STEPS_AHEAD:
            at = steps_at + h * R
            steps = load_steps(at, lo, blocks * SPANS, scale_step, width, GROUP, KIND, S, 1, SPAN)
            steps_ahead = steps_ahead + (steps,)  # noqa: RUF005
        if WORDS_AHEAD:
            words = load_span(words_at + h * words_below, lo, BITS, S, SPAN)
            words_ahead = words_ahead + (words,)  # noqa: RUF005
    if ROUNDS:
        starts_at = starts_ptr + (first + tl.arange(0, 32 * S) // 32) * blocks * 2
    if ROUNDS and PTX:
        reserve(NONE, S)
        fetched = ()
        for h in tl.static_range(STACK):
            starts = locate(starts_at + h * starts_below, PATCHES * lo, None, PATCHES)
            fetched = fetched + (fetch(entries_ptr, starts, ROUNDS),)  # noqa: RUF005
    if PDL and not TOP:
        # Words are copied together with x, but so that they need not come from as far then.
        ask_for_words(codes_ptr, first, blocks, lo // SPANS, BITS, S)
        gdc_wait()  # what was read so far is the layer's; x may be the output of the kernel before

    x_at = ()
    for side in tl.static_range(SIDES):
        from_m = tl.minimum(m[side], M - 1)  # beyond the last token it again: not stored
        if TOP:
            from_m = from_m // TOP
        rows_at = from_m[:, None] * K
        x_at = x_at + (rows_at if NARROW else x_ptr + rows_at,)  # noqa: RUF005
    acc = ()
    for _ in tl.static_range(STACK * SIDES):
        acc = acc + (tl.zeros((R, SIDE), tl.float32),)  # noqa: RUF005
    for span in range(lo, hi):
        for start in tl.static_range(0, SPAN, COLUMNS):
            k = span * SPAN + start + tl.arange(0, COLUMNS)
            xs = ()
            for side in tl.static_range(SIDES):
                this = x_at[side] + k[None, :]
                if NARROW:
                    this = x_ptr + this
                if EVEN:  # noqa: SIM108 (of the two only one is compiled)
                    x = tl.load(this)
                else:
                    x = tl.load(this, mask=(k < K)[None, :], other=0.0)
                xs = xs + (in_fours(x) if FOURS else x,)  # noqa: RUF005
            sums = ()
            ahead = ()
            next_steps = ()
            next_words = ()
            for h in tl.static_range(STACK):
                if start == 0:
                    words = (
                        words_ahead[h] if WORDS_AHEAD else load_span(words_at + h * words_below, span, BITS, S, SPAN)
                    )
                    words = of_span(words, span, BITS, SPAN)
                    steps = ()
                    if STEPS_AHEAD:
                        steps = steps_ahead[h]
                    elif KIND != CODEBOOK:
                        at = steps_at + h * R
                        steps = load_steps(at, span, blocks * SPANS, scale_step, width, GROUP, KIND, S, 1, SPAN)
                    if ROUNDS and PTX:
                        located = locate(starts_at + h * starts_below, PATCHES * (span + 1), None, PATCHES)
                pairs = ()
                places = ()
                for patch in tl.static_range(start // PATCH, ((start + COLUMNS) if ROUNDS else start) // PATCH):
                    if PTX:
                        if patch > start // PATCH:
                            clear(places, fetched[h][patch - 1], NONE, ROUNDS)
                        places = put(fetched[h][patch], ROUNDS)
                        pairs = pairs + read(words[0], S, 1)
                    else:
                        at = starts_at + h * starts_below
                        pairs = pairs + compared(entries_ptr, locate(at, PATCHES * span + patch, None, 1), NONE, S, 1)
                now = steps_of(steps, span, GROUP, KIND, SPAN)
                w = weights(
                    words, levels, now, pairs, start // 16, COLUMNS // 16, S, 1, BITS, GROUP, KIND, DT, PTX, not AFTER
                )
                w = tl.reshape(w, (R, COLUMNS))
                if FOURS:
                    w = in_fours(w)
                if WORDS_AHEAD and start + COLUMNS == SPAN:  # the last ones' registers are free
                    words = load_span(words_at + h * words_below, span + 1, BITS, S, SPAN)
                    next_words = next_words + (words,)  # noqa: RUF005
                for side in tl.static_range(SIDES):
                    x = tl.trans(xs[side])
                    before = acc[h * SIDES + side]
                    if AFTER:
                        total = scaled_after(tl.dot(w, x), now, start // GROUP, KIND, DT) + before
                    elif APART:
                        total = tl.fma(tl.dot(w, x), 1.0, before)
                    else:
                        total = tl.dot(w, x, before)
                    sums = sums + (total,)  # noqa: RUF005
                if STEPS_AHEAD and start + COLUMNS == SPAN:
                    at = steps_at + h * R
                    steps = load_steps(at, span + 1, blocks * SPANS, scale_step, width, GROUP, KIND, S, 1, SPAN)
                    next_steps = next_steps + (steps,)  # noqa: RUF005
                if ROUNDS and PTX:  # only now, so that pairs are read when they are wanted, not all before weights
                    clear(places, fetched[h][(start + COLUMNS) // PATCH - 1], NONE, ROUNDS)
                    if start + COLUMNS == SPAN:  # the last ones' registers are free
                        ahead = ahead + (fetch(entries_ptr, located, ROUNDS),)  # noqa: RUF005
            acc = sums
            if start + COLUMNS == SPAN:
                steps_ahead = next_steps
                words_ahead = next_words
            if ROUNDS and PTX and start + COLUMNS == SPAN:
                fetched = ahead

    row_tiles = tl.num_programs(2)
    finish(
        acc, out_ptr, shares_ptr, arrived_ptr, bias_ptr, m, to_n, M, N, split, splits,
        block * row_tiles + tl.program_id(2), tl.num_programs(1) * row_tiles, SPLIT, BIAS, DT, PTX,
    )  # fmt: skip
