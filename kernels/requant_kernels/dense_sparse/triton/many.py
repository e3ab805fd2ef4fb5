# Triton's language, typed by its own compiler; the arguments of a kernel are positional.
# mypy: ignore-errors
# ruff: noqa: PLR0912, PLR0915, PLR0917
"""Many tokens: weights are decoded once, dense and sparse, for the matrix product of the vendor's library."""

import triton
import triton.language as tl

from requant_kernels.dense_sparse.triton.decode import CODEBOOK, load_levels, load_steps, load_words, nothing, weights
from requant_kernels.dense_sparse.triton.patch import PATCH, clear, compared, fetch, locate, put, read, reserve


@triton.jit(do_not_specialize=["first_strip", "rows", "blocks"])
def decode_kernel(
    w_ptr, codes_ptr, scales_ptr, entries_ptr, starts_ptr, first_strip, rows, K, blocks, width, scale_step,
    BITS: tl.constexpr, GROUP: tl.constexpr, KIND: tl.constexpr, ROUNDS: tl.constexpr, PTX: tl.constexpr,
    S: tl.constexpr, KW: tl.constexpr,
):  # fmt: skip
    """w DT [rows, K] = dense + sparse of ``rows`` rows from strip ``first_strip`` on, KW blocks of columns at a time.
    Grid (ceil(rows / (16 * S)),), of S * KW warps. entries, starts: ``Patches``, with ROUNDS; 0 where there are none.
    """
    DT: tl.constexpr = w_ptr.dtype.element_ty
    # Words wait in registers for an iteration where there are enough of both.
    AHEAD: tl.constexpr = BITS < 8 and KIND != CODEBOOK and GROUP >= 128
    R: tl.constexpr = 16 * S
    t = tl.arange(0, S * KW)
    kw = tl.arange(0, KW)
    row = tl.program_id(0) * R + tl.arange(0, R)
    first = first_strip + tl.program_id(0) * S
    words_at = codes_ptr + ((first + t // KW).to(tl.int64) * blocks + t % KW)[:, None] * (BITS * 128)
    words_at += tl.arange(0, 128)[None, :]
    steps_at = scales_ptr + first * 16
    NONE: tl.constexpr = nothing(BITS, KIND, DT)
    levels = ()
    if KIND == CODEBOOK:
        levels = load_levels(steps_at, width, BITS, S)
    if ROUNDS:
        lane = tl.arange(0, 32 * S * KW) // 32
        starts_at = starts_ptr + (first + lane // KW) * blocks * 2
        lane %= KW
    if ROUNDS and PTX:
        reserve(NONE, S * KW)
        fetched = fetch(entries_ptr, locate(starts_at, 2 * lane, lane < blocks, 2), ROUNDS)
        located = locate(starts_at, 2 * (KW + lane), KW + lane < blocks, 2)
    words = ()
    if AHEAD:
        words = load_words(words_at, (t % KW < blocks)[:, None], BITS, S, KW)
    for start in range(0, blocks, KW):
        if AHEAD:
            now = words
            after = start + KW
            words = load_words(words_at + after * (BITS * 128), (after + t % KW < blocks)[:, None], BITS, S, KW)
        else:
            now = load_words(words_at + start * (BITS * 128), (start + t % KW < blocks)[:, None], BITS, S, KW)
        steps = ()
        if KIND != CODEBOOK:
            steps = load_steps(steps_at, start, blocks, scale_step, width, GROUP, KIND, S, KW, 256)
        if ROUNDS and PTX:
            entries = fetched
            fetched = fetch(entries_ptr, located, ROUNDS)
            after = start + 2 * KW + lane
            located = locate(starts_at, 2 * after, after < blocks, 2)
        for at in tl.static_range(0, 256, PATCH):
            pairs = ()
            if ROUNDS and PTX:
                places = put(entries[at // PATCH], ROUNDS)
                pairs = read(now[0], S, KW)
            elif ROUNDS:
                starts = locate(starts_at, 2 * (start + lane) + at // PATCH, start + lane < blocks, 1)
                pairs = compared(entries_ptr, starts, NONE, S, KW)
            w = weights(now, levels, steps, pairs, at // 16, 8, S, KW, BITS, GROUP, KIND, DT, PTX)
            k = (start + kw)[:, None, None] * 256 + at + tl.arange(0, PATCH)[None, None, :]
            to = w_ptr + row[None, :, None].to(tl.int64) * K + k
            tl.store(to, w, mask=(row < rows)[None, :, None] & (k < K))
            if ROUNDS and PTX:
                clear(places, entries[at // PATCH], NONE, ROUNDS)
