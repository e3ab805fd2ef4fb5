# Triton's language, typed by its own compiler; the arguments of a kernel are positional.
# mypy: ignore-errors
# ruff: noqa: PLR0917
"""Entries put into decoded weights, in the registers of the tensor core's operand: what they cost does not grow with
the tokens. windows.py says which slots are looked at for which columns."""

import triton
import triton.language as tl

from requant_kernels.dense_sparse.triton import windows
from requant_kernels.dense_sparse.triton.decode import half_bits, halves

IN_SIGHT, QUARTER = tl.constexpr(windows.IN_SIGHT), tl.constexpr(windows.QUARTER)


@triton.jit
def locate_rows(strip, rows, further, depth, strips, blocks):
    """Where the slots of each row stand, for ``load_windows``: int32 [R, 1] all. strip: each row's; rows:
    ``Slots.rows``; further: ``Slots.further`` of the strip."""
    first = rows & 31
    lanes = tl.maximum(rows >> 5 & 31, 1)
    held = rows >> 10
    near = strip * depth * 32 + first
    far = ((strips - 1) * depth + further) * 32 + first
    pace = held * 1024 // (blocks * 4)
    # 2**32 / lanes from below, and, in the bits that do not count, the lanes
    divisor = (tl.full(rows.shape, 0xFFFFFFFF, tl.uint32) // lanes.to(tl.uint32) - 31) & 0xFFFFFFE0
    return near, far, held, pace, divisor.to(tl.int32, bitcast=True) | lanes


@triton.jit
def load_windows(slots_ptr, places, starts, block, depth, WIDTH: tl.constexpr):
    """The entries of a block's windows: WIDTH int32 [R, 4], zero beyond the last entry of a row. places:
    ``locate_rows``; starts int32 [R, 1]: the block's word of ``Windows.starts``."""
    near, far, held, pace, divisor = places
    t = tl.arange(0, 4)[None, :]
    first = (starts >> (8 * t) & 0xFF) - 128 + ((block * 4 + t) * pace >> 10)
    entries = ()
    for i in tl.static_range(WIDTH):
        entry = first + i
        step = tl.umulhi((entry + 1).to(tl.uint32), tl.broadcast_to(divisor, first.shape).to(tl.uint32, bitcast=True))
        step = step.to(tl.int32)
        at = tl.where(step < depth, near, far) + (step * 32 + entry - step * (divisor & 31))
        entries = entries + (tl.load(slots_ptr + at, mask=entry < held, other=0),)  # noqa: RUF005
    return entries


@triton.jit
def patch(slots, block, START: tl.constexpr, SPAN: tl.constexpr, DT: tl.constexpr):
    """DT [R, SPAN]: what ``load_windows`` found for SPAN of the block's columns from START on, zero elsewhere."""
    WIDTH: tl.constexpr = len(slots)
    R: tl.constexpr = slots[0].shape[0]
    # Where no more are loaded than are in sight, all are.
    SIGHT: tl.constexpr = SPAN if WIDTH <= IN_SIGHT else min(QUARTER, SPAN)
    SEEN: tl.constexpr = min(WIDTH, IN_SIGHT)
    start = START + SIGHT * tl.arange(0, SPAN // SIGHT)[None, :, None, None]
    bound = block * 256 + start // QUARTER * QUARTER
    column = start + 8 * tl.arange(0, SIGHT // 8)[None, None, :, None]
    t = tl.arange(0, 4)[None, None, None, :]
    pairs = tl.zeros((R, SPAN // SIGHT, SIGHT // 8, 4), tl.int32)
    # The first of a window is put in last: an empty slot behind it, zero at column 0, then hides nothing.
    for ahead in tl.static_range(SEEN - 1, -1, -1):
        entry = slots[WIDTH - SEEN + ahead][:, None, None, :]
        for i in tl.static_range(WIDTH - SEEN - 1, -1, -1):
            passed = (slots[i][:, None, None, :] & 0xFFFF) < bound
            entry = tl.where(passed, entry, slots[i + ahead][:, None, None, :])
        value = (entry.to(tl.uint32, bitcast=True) >> 16).to(tl.int32, bitcast=True) << (entry << 4 & 16)
        pairs = tl.where((entry & 0xFFFE) - (block * 256 + 2 * t) == column, value, pairs)
    return tl.reshape(halves(tl.reshape(pairs, (R, SPAN // 2)), DT), (R, SPAN))


@triton.jit
def multiply_leftovers(acc, start, end, x_at, stride, columns_ptr, words_ptr, n, split, splits, DT: tl.constexpr):
    """acc fp32 [R, TOKENS] plus the products of x with every ``splits``-th piece, from ``split`` on, of the leftovers
    from ``start`` to ``end``, those of rows ``n`` [R]: 32 entries, told apart by a one-hot matrix. x_at DT* [TOKENS,
    1]: each token, ``stride`` from a column to the next."""
    for at in tl.range(start + split * 32, end, splits * 32, num_stages=3):
        entry = at + tl.arange(0, 32)
        column = tl.load(columns_ptr + entry, mask=entry < end, other=0)
        word = tl.load(words_ptr + entry, mask=entry < end, other=0)
        x = tl.load(x_at + column[None, :] * stride, mask=(entry < end)[None, :], other=0.0)
        hit = (word & 0xFFFF)[None, :] == (n & 0xFFFF)[:, None]
        acc = tl.dot(tl.where(hit, half_bits(word, 1, DT)[None, :], 0.0).to(DT), tl.trans(x), acc)
    return acc
