# Triton's language, typed by its own compiler; the arguments of a kernel are positional.
# mypy: ignore-errors
# ruff: noqa: PLR0912, PLR0915, PLR0917
"""Many tokens: weights are decoded once, dense and sparse, for the matrix product of the vendor's library."""

import triton
import triton.language as tl

from requant_kernels.dense_sparse.triton.decode import (
    ASYMMETRIC,
    CODEBOOK,
    half_bits,
    load_levels,
    load_rows,
    load_words,
    stepped,
)
from requant_kernels.dense_sparse.triton.gather import locate_strips


@triton.jit
def _add(w_ptr, row, column, entry, rows, K, DT: tl.constexpr):
    """w [rows, K] += the values of ``entry``, each at its own place; nothing where they are zero."""
    at = w_ptr + row.to(tl.int64) * K + column
    used = ((entry >> 16) != 0) & (row < rows)
    dense = tl.load(at, mask=used, other=0.0).to(tl.float32)
    tl.store(at, (dense + half_bits(entry, 1, DT).to(tl.float32)).to(DT), mask=used)


@triton.jit
def _slots(slots_ptr, places, at, depth):
    """The slots ``at``, 32 a step, of the strip at ``places`` (``locate_strips``), zero behind the last."""
    near, far, steps = places
    step = at // 32
    return tl.load(slots_ptr + (tl.where(step < depth, near, far) + step) * 32 + at % 32, mask=step < steps, other=0)


@triton.jit(do_not_specialize=["first_strip", "strips", "rows", "blocks", "exponent", "depth"])
def decode_kernel(
    w_ptr, codes_ptr, scales_ptr, slots_ptr, owners_ptr, further_ptr, entries_ptr, segments_ptr, chunks_ptr,
    first_strip, strips, rows, K, blocks, width, scale_step, exponent, depth,
    BITS: tl.constexpr, GROUP: tl.constexpr, KIND: tl.constexpr, SLOTS: tl.constexpr, LISTS: tl.constexpr,
    S: tl.constexpr, KW: tl.constexpr,
):  # fmt: skip
    """w DT [rows, K] = dense + sparse of ``rows`` rows from strip ``first_strip`` on. Grid (ceil(rows / (16 * S)),).

    A program writes the dense part of its strips, KW blocks at a time, then adds their entries (each its own element).
    """
    DT: tl.constexpr = w_ptr.dtype.element_ty
    SPAN: tl.constexpr = min(GROUP, 128)
    WORDS: tl.constexpr = 256 // GROUP if KIND == ASYMMETRIC else max(1, 128 // GROUP)
    COLUMNS: tl.constexpr = 128  # stored at a time
    CHUNK: tl.constexpr = 16  # steps of slots at a time
    # Words wait in registers for an iteration where there are enough of both.
    AHEAD: tl.constexpr = BITS < 8 and KIND != CODEBOOK and GROUP >= 128 and KW <= 2
    R: tl.constexpr = 16 * S
    t = tl.arange(0, S * KW)
    kw = tl.arange(0, KW)
    row = tl.program_id(0) * R + tl.arange(0, R)
    first = first_strip + tl.program_id(0) * S
    words_at = codes_ptr + ((first + t // KW).to(tl.int64) * blocks + t % KW)[:, None] * (BITS * 128)
    words_at += tl.arange(0, 128)[None, :]
    scales_at = scales_ptr + first * 16 + tl.arange(0, R)[None, :]
    levels = ()
    if KIND == CODEBOOK:
        levels = load_levels(scales_ptr + first * 16, width, BITS, S)
    if SLOTS:  # what the entries wait for is asked for before the weights are, whose decoding takes longer
        slot = tl.arange(0, CHUNK * 32)
        owners = ()
        early = ()
        located = ()
        for strip in tl.static_range(S):
            places = locate_strips(further_ptr, first + strip, True, depth, strips)
            located = located + (places,)  # noqa: RUF005
            owners = owners + (tl.load(owners_ptr + (first + strip) * 32 + slot % 32),)  # noqa: RUF005
            early = early + (_slots(slots_ptr, places, slot, depth),)  # noqa: RUF005
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
        scales = ()
        if KIND != CODEBOOK:
            block = tl.minimum(start + kw, blocks - 1)
            scales = load_rows(scales_at + (block * scale_step)[:, None], width, WORDS)
        for at in tl.static_range(0, 256, COLUMNS):
            w = stepped(now, levels, scales, exponent, at, COLUMNS, SPAN, GROUP, S, KW, BITS, KIND, DT, False)
            k = (start + kw)[:, None, None] * 256 + at + tl.arange(0, COLUMNS)[None, None, :]
            to = w_ptr + row[None, :, None].to(tl.int64) * K + k
            tl.store(to, w, mask=(row < rows)[None, :, None] & (k < K))
    if SLOTS or LISTS:
        tl.debug_barrier()  # the entries are added to what other threads of this program have just written
    if SLOTS:
        for strip in tl.static_range(S):
            places = located[strip]
            row = tl.program_id(0) * R + strip * 16 + owners[strip]
            _add(w_ptr, row, early[strip] & 0xFFFF, early[strip], rows, K, DT)
            for step in tl.range(CHUNK, places[2], CHUNK, num_stages=1):
                e = _slots(slots_ptr, places, step * 32 + slot, depth)
                _add(w_ptr, row, e & 0xFFFF, e, rows, K, DT)
    if LISTS:
        for strip in tl.static_range(S):
            chunk = tl.load(chunks_ptr + first + strip) + tl.arange(0, 16)
            end = tl.load(chunks_ptr + first + strip + 1)
            for _ in range(tl.cdiv(end - tl.min(chunk), 16)):
                live = chunk < end
                e = tl.load(entries_ptr + chunk[:, None] * 32 + tl.arange(0, 32)[None, :], mask=live[:, None], other=0)
                column = tl.load(segments_ptr + chunk, mask=live, other=0)[:, None] + (e & 0xFFF)
                _add(w_ptr, tl.program_id(0) * R + strip * 16 + ((e >> 12) & 0xF), column, e, rows, K, DT)
                chunk += 16
