# Triton's language, typed by its own compiler; the arguments of a kernel are positional.
# mypy: ignore-errors
# ruff: noqa: PLR0917
"""Entries put into decoded weights, in the registers of the tensor core's operand: what they cost does not grow with
the tokens. windows.py says which slots are looked at for which columns."""

import triton
import triton.language as tl

from requant_kernels.dense_sparse.triton.decode import half_bits, halves


@triton.jit
def load_windows(row_at, starts, block, depth, blocks, WIDTH: tl.constexpr):
    """The slots of a block's four windows, one after the other: 4 * WIDTH int32 [R], zero beyond the last slot of a
    row. row_at int32* [R]: each row's first slot; starts int32 [R]: the block's word of ``Windows.starts``."""
    pace = depth * 2048 // (blocks * 4)
    slots = ()
    for q in tl.static_range(4):
        first = (starts >> (8 * q) & 0xFF) + (((block * 4 + q) * pace >> 10) - 128)
        for i in tl.static_range(WIDTH):
            slot = first + i
            at = row_at + ((slot >> 1) * 32 + (slot & 1))
            slots = slots + (tl.load(at, mask=slot < 2 * depth, other=0),)  # noqa: RUF005
    return slots


@triton.jit
def _pairs(slots, first, Q: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr):
    """int32 [R, COLUMNS // 8, 4]: window Q's entries among COLUMNS columns from ``first`` on, two columns a word."""
    pair = first + 2 * tl.arange(0, 4)[None, None, :]
    eight = 8 * tl.arange(0, COLUMNS // 8)[None, :, None]  # added to the other side it would be no constant there
    pairs = tl.zeros((slots[0].shape[0], COLUMNS // 8, 4), tl.int32)
    for i in tl.static_range(WIDTH):
        entry = slots[Q * WIDTH + i][:, None, None]
        value = (entry.to(tl.uint32, bitcast=True) >> 16).to(tl.int32, bitcast=True) << (entry << 4 & 16)
        pairs |= tl.where((entry & 0xFFFE) - pair == eight, value, 0)  # an empty slot adds nothing
    return pairs


@triton.jit
def patch(slots, block, PART: tl.constexpr, SPAN: tl.constexpr, WIDTH: tl.constexpr, DT: tl.constexpr):
    """DT [R, SPAN]: what ``load_windows`` found for the block's part PART of SPAN columns, zero elsewhere."""
    R: tl.constexpr = slots[0].shape[0]
    first = block * 256 + PART * SPAN
    if SPAN == 128:
        low = _pairs(slots, first, 2 * PART, 64, WIDTH)
        high = _pairs(slots, first + 64, 2 * PART + 1, 64, WIDTH)
        pairs = tl.permute(tl.join(low, high), (0, 3, 1, 2))
    else:
        pairs = _pairs(slots, first, PART * SPAN // 64, SPAN, WIDTH)
    return tl.reshape(halves(tl.reshape(pairs, (R, SPAN // 2)), DT), (R, SPAN))


@triton.jit
def multiply_leftovers(
    acc, start, end, x_at, columns_ptr, words_ptr, n, split, splits, PIECE: tl.constexpr, DT: tl.constexpr
):
    """acc fp32 [R, TOKENS] plus the products of x with every ``splits``-th piece, from ``split`` on, of the leftovers
    from ``start`` to ``end``, those of rows ``n`` [R]: PIECE entries, told apart by a one-hot matrix. x_at DT*
    [TOKENS, 1]: each token."""
    for at in tl.range(start + split * PIECE, end, splits * PIECE, num_stages=1):
        entry = at + tl.arange(0, PIECE)
        column = tl.load(columns_ptr + entry, mask=entry < end, other=0)
        word = tl.load(words_ptr + entry, mask=entry < end, other=0)
        x = tl.load(x_at + column[None, :], mask=(entry < end)[None, :], other=0.0)
        hit = (word & 0xFFFF)[None, :] == (n & 0xFFFF)[:, None]
        acc = tl.dot(tl.where(hit, half_bits(word, 1, DT)[None, :], 0.0).to(DT), tl.trans(x), acc)
    return acc
