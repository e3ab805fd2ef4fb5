# Triton's language, typed by its own compiler; the arguments of a kernel are positional.
# mypy: ignore-errors
# ruff: noqa: PLR0917
"""Packed words -> weights, in the registers where a tensor core wants them: the helpers that all kernels share.

Shapes: S strips of 16 rows make R = 16 * S rows; KW blocks of columns are decoded side by side, one for each group of
warps. The words of a block (strips.py) are a tuple of BITS int32 tensors [S, KW, 8, 4, 2, 2]. The reshapes
below only rename registers: on NVIDIA GPUs the order of a strip is that of the A operand of ``mma.m16n8k16``, so
nothing passes through shared memory between the copy that fetches the words and the matrix instruction.

KIND says what a code means: SYMMETRIC (code - midpoint) * step, ASYMMETRIC (code - zero point) * step, or
CODEBOOK levels[row][code].
"""

import triton
import triton.language as tl

from requant_kernels.dense_sparse.triton import layer

SYMMETRIC, ASYMMETRIC, CODEBOOK = (tl.constexpr(kind) for kind in (layer.SYMMETRIC, layer.ASYMMETRIC, layer.CODEBOOK))
SHIFTED = tl.constexpr(3)  # asymmetric, zero points subtracted from the codes as integers (``_shifted_exponent``)


@triton.jit
def load_rows(ptr, stride, COUNT: tl.constexpr):
    """COUNT (a power of two) loads, ``stride`` apart, as a tuple."""
    if COUNT == 1:
        return (tl.load(ptr),)
    else:
        HALF: tl.constexpr = COUNT // 2
        return load_rows(ptr, stride, HALF) + load_rows(ptr + HALF * stride, stride, HALF)


@triton.jit
def _word(ptr, live, S: tl.constexpr, KW: tl.constexpr):
    word = tl.load(ptr) if live is None else tl.load(ptr, mask=live, other=0)
    return tl.reshape(word, (S, KW, 8, 4, 2, 2))


@triton.jit
def load_words(ptr, live, BITS: tl.constexpr, S: tl.constexpr, KW: tl.constexpr):
    """The words of one block; ``ptr`` is int32* [S * KW, 128] at the first of its BITS sets. Nothing is read, and the
    words are zero, where ``live`` is false; all are where it is None."""
    if BITS == 1:
        return (_word(ptr, live, S, KW),)
    elif BITS == 3:
        return load_words(ptr, live, 1, S, KW) + load_words(ptr + 128, live, 2, S, KW)
    else:
        HALF: tl.constexpr = BITS // 2
        return load_words(ptr, live, HALF, S, KW) + load_words(ptr + HALF * 128, live, HALF, S, KW)


@triton.jit
def ask_for_words(codes_ptr, first, blocks, block, BITS: tl.constexpr, S: tl.constexpr):
    """Asks the L2 for the first 4 KiB of words from ``block`` on, of S strips, by a warp each. NVIDIA's GPUs."""
    lane = tl.arange(0, 32 * S)
    at = ((first + lane // 32).to(tl.int64) * blocks + block) * (BITS * 128) + lane % 32 * 32
    tl.inline_asm_elementwise("prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [codes_ptr + at], tl.int32, False, 1)


@triton.jit
def _row(e):
    """Which row of a strip element ``e`` of [.., 8, 1, 1, 2] is: 8 rh + g."""
    return e % 2 * 8 + e // 2 % 8


@triton.jit
def load_levels(ptr, stride, BITS: tl.constexpr, S: tl.constexpr):
    """The codebooks of R rows: 2**BITS int32 tensors [S, 1, 8, 1, 1, 2], a level in both halves of each word.

    ptr int32* at the program's first row of a table [2**BITS, stride].
    """
    e = tl.arange(0, 16 * S)
    words = load_rows(ptr + e // 16 * 16 + _row(e), stride, 1 << BITS)
    levels = ()
    for code in tl.static_range(1 << BITS):
        levels = levels + (tl.reshape(words[code], (S, 1, 8, 1, 1, 2)),)  # noqa: RUF005 (triton knows no *)
    return levels


@triton.jit
def load_steps(
    ptr, block, blocks, scale_step, stride, GROUP: tl.constexpr, KIND: tl.constexpr, S: tl.constexpr, KW: tl.constexpr
):  # fmt: skip
    """Steps of KW blocks from ``block`` on, as words of ``Strips.scales`` [blocks, .., stride]: a tuple of int32
    [S, KW, 8, 1, 1, 2], for each thread those of its rows. ptr int32* at the program's first row."""
    e = tl.arange(0, 16 * S * KW)
    at = ptr + e // (16 * KW) * 16 + _row(e) + tl.minimum(block + e // 16 % KW, blocks - 1) * scale_step
    words = load_rows(at, stride, words_of(GROUP, KIND))
    steps = ()
    for word in tl.static_range(len(words)):
        steps = steps + (tl.reshape(words[word], (S, KW, 8, 1, 1, 2)),)  # noqa: RUF005
    return steps


@triton.constexpr_function
def words_of(group, kind):
    """Of the steps of a row and block."""
    return 256 // group if kind == layer.ASYMMETRIC else max(1, 128 // group)


@triton.jit
def _shift_right(word, BY: tl.constexpr):
    if BY >= 0:
        return word >> BY
    else:
        return word << (-BY)


@triton.jit
def _codes(words, PLANE: tl.constexpr, BITS: tl.constexpr, AT: tl.constexpr):
    """The two codes of each word that belong to plane PLANE, at bit AT of its low and high half."""
    if BITS == 3 and PLANE == 15:  # five codes fill 15 bits of a half; the 16th takes the spare bit of three words
        a = _shift_right(words[0], 15 - AT) & (0x00010001 << AT)
        b = _shift_right(words[1], 14 - AT) & (0x00020002 << AT)
        c = _shift_right(words[2], 13 - AT) & (0x00040004 << AT)
        return a | b | c
    else:
        PER: tl.constexpr = 16 // BITS
        MASK: tl.constexpr = (((1 << BITS) - 1) << AT) * 0x00010001
        return _shift_right(words[PLANE // PER], (PLANE % PER) * BITS - AT) & MASK


@triton.jit
def _select(levels, masks, BITS: tl.constexpr, FIRST: tl.constexpr):
    """levels[code] for both halves at once: a binary tree of bitwise selections, one instruction each."""
    if BITS == 0:
        return levels[FIRST]
    else:
        low = _select(levels, masks, BITS - 1, FIRST)
        high = _select(levels, masks, BITS - 1, FIRST + (1 << (BITS - 1)))
        return low ^ ((low ^ high) & masks[BITS - 1])


@triton.jit
def _bit_masks(pair, BITS: tl.constexpr):
    """Bit i of each half, spread over the half, for i < BITS."""
    masks = ()
    for i in tl.static_range(BITS):
        masks = masks + (((pair >> i) & 0x00010001) * 0xFFFF,)  # noqa: RUF005 (triton knows no *)
    return masks


@triton.jit
def halves(pair, DT: tl.constexpr):
    """int32 [...] -> its 16-bit halves as DT [..., 2]."""
    low = pair.to(tl.int16).to(DT, bitcast=True)
    high = (pair >> 16).to(tl.int16).to(DT, bitcast=True)
    return tl.join(low, high)


@triton.jit
def _plane(
    words, levels, exponent, PLANE: tl.constexpr, BITS: tl.constexpr, KIND: tl.constexpr, DT: tl.constexpr,
):  # fmt: skip
    """Plane PLANE of a block, [S, KW, 8, 4, 2, 2, 2]: levels, or codes as DT before they are centred.

    A code in the mantissa under a fixed exponent is a float without a conversion: bfloat16 1 + code / 2**BITS,
    float16 1024 + code. 8 bits do not fit bfloat16's mantissa and take the same way through float32. ``exponent`` is
    ``EXPONENTS`` (launch.py) as an argument of the kernel: of two constants in one instruction the compiler
    would make two instructions.
    """
    if KIND == CODEBOOK:
        pair = _codes(words, PLANE, BITS, 0)
        return halves(_select(levels, _bit_masks(pair, BITS), BITS, 0), DT)
    elif KIND == SHIFTED:
        return halves(_codes(words, PLANE, BITS, 0 if tl.float16 == DT else 6 - BITS) + exponent, DT)
    elif tl.float16 == DT:
        return halves(_codes(words, PLANE, BITS, 0) | exponent, DT)
    elif BITS == 8:
        pair = _codes(words, PLANE, BITS, 0)
        codes = tl.join(pair & 0xFFFF, (pair >> 16) & 0xFFFF)
        return (codes | 0x4B000000).to(tl.float32, bitcast=True) - 8388608.0
    else:
        return halves(_codes(words, PLANE, BITS, 7 - BITS) | exponent, DT)


@triton.jit
def _shifted_exponent(word, BITS: tl.constexpr, DT: tl.constexpr):
    """What takes the place of the exponent for SHIFTED: with it 2**BITS - zero point is added to both codes of a word,
    whose sums have a bit more. Subtracted as floats, zero points cost the compiler one more instruction for every
    weight, in which it packs them in pairs again. word: of steps and zero points."""
    zero = word >> 16 & 0xFFFF
    if tl.float16 == DT:  # noqa: SIM108
        above = 0xC800 + (1 << BITS) - zero  # 1024 + 2**BITS - zero point; ``zero`` is 1024 + zero point
    else:
        above = 0x5F80 - (zero >> 1)  # 1 + (1 - zero point / 2**BITS) / 2; ``zero`` is 1 + zero point / 2**BITS
    return above * 0x10001


@triton.jit
def _weights(
    words, levels, steps, exponent, pairs, PLANE: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr,
    KIND: tl.constexpr, DT: tl.constexpr,
):  # fmt: skip
    """Plane PLANE of a block, DT [S, KW, 8, 4, 2, 2, 2], as ``weights`` says."""
    MODE: tl.constexpr = SHIFTED if KIND == ASYMMETRIC and (tl.float16 == DT or BITS < 8) else KIND
    AT: tl.constexpr = PLANE * 16 // GROUP
    above = exponent
    if MODE == SHIFTED:
        above = _shifted_exponent(steps[AT], BITS, DT)
    w = _plane(words, levels, above, PLANE, BITS, MODE, DT)
    if MODE == SHIFTED:
        w = (w - (1024.0 + (1 << BITS)) if tl.float16 == DT else w * 2.0 - 3.0).to(DT)
    elif KIND != CODEBOOK:
        zero = midpoint(steps, AT, BITS, KIND, DT)
        w = (w - (zero[:, :, :, :, :, :, None] if KIND == ASYMMETRIC else zero)).to(DT)
    if KIND != CODEBOOK:
        w = w * group_scale(steps, AT, KIND, DT)[:, :, :, :, :, :, None]
    if len(pairs) > 0:
        w = (w + halves(pairs[PLANE % len(pairs)], DT)).to(DT)
    return w


@triton.jit
def _planes(
    words, levels, steps, exponent, pairs, FIRST: tl.constexpr, STEP: tl.constexpr, COUNT: tl.constexpr,
    BITS: tl.constexpr, GROUP: tl.constexpr, KIND: tl.constexpr, DT: tl.constexpr,
):  # fmt: skip
    """Planes FIRST, FIRST + STEP, ... (COUNT, a power of two), stacked behind the last dimension in that order; codes
    where GROUP is None."""
    if COUNT > 1:
        even = _planes(words, levels, steps, exponent, pairs, FIRST, 2 * STEP, COUNT // 2, BITS, GROUP, KIND, DT)
        odd = _planes(words, levels, steps, exponent, pairs, FIRST + STEP, 2 * STEP, COUNT // 2, BITS, GROUP, KIND, DT)
        return tl.join(even, odd)
    elif GROUP is None:
        return _plane(words, levels, exponent, FIRST, BITS, KIND, DT)
    else:
        return _weights(words, levels, steps, exponent, pairs, FIRST, BITS, GROUP, KIND, DT)


@triton.jit
def _tile(p, S: tl.constexpr, KW: tl.constexpr, PLANES: tl.constexpr, QUADS: tl.constexpr):
    """What ``_planes`` gives as [KW, R, 16 * PLANES]. With QUADS a thread's two columns of a plane are next to those of
    the next one (operand.py)."""
    if QUADS:
        # strip, kw, g, t, kh, rh, half, pair, plane of it -> kw, (strip, rh, g), (pair, kh, t, plane of it, half)
        p = tl.reshape(p, (S, KW, 8, 4, 2, 2, 2, PLANES // 2, 2))
        p = tl.permute(p, (1, 0, 5, 2, 7, 4, 3, 8, 6))
    else:
        # strip, kw, g, t, kh, rh, half, plane -> kw, (strip, rh, g), (plane, kh, t, half)
        p = tl.reshape(p, (S, KW, 8, 4, 2, 2, 2, PLANES))
        p = tl.permute(p, (1, 0, 5, 2, 7, 4, 3, 6))
    return tl.reshape(p, (KW, 16 * S, 16 * PLANES))


@triton.jit
def codes(
    words, levels, exponent, FIRST: tl.constexpr, PLANES: tl.constexpr, S: tl.constexpr, KW: tl.constexpr,
    BITS: tl.constexpr, KIND: tl.constexpr, DT: tl.constexpr, QUADS: tl.constexpr,
):  # fmt: skip
    """Columns [16 * FIRST, 16 * (FIRST + PLANES)) of a block: [KW, R, 16 * PLANES], see ``_plane`` for the values."""
    p = _planes(words, levels, (), exponent, (), FIRST, 1, PLANES, BITS, None, KIND, DT)
    return _tile(p, S, KW, PLANES, QUADS)


@triton.jit
def weights(
    words, levels, steps, exponent, pairs, FIRST: tl.constexpr, PLANES: tl.constexpr, S: tl.constexpr, KW: tl.constexpr,
    BITS: tl.constexpr, GROUP: tl.constexpr, KIND: tl.constexpr, DT: tl.constexpr, QUADS: tl.constexpr,
):  # fmt: skip
    """Columns [16 * FIRST, 16 * (FIRST + PLANES)) of a block times their steps, as ``load_steps`` gives them, or their
    levels, plus ``pairs``, words of 8 planes (patch.py) for each 128 columns, if there are any: DT [KW, R, columns]."""
    p = _planes(words, levels, steps, exponent, pairs, FIRST, 1, PLANES, BITS, GROUP, KIND, DT)
    return _tile(p, S, KW, PLANES, QUADS)


@triton.jit
def half_bits(word, HALF: tl.constexpr, DT: tl.constexpr):
    """16 bits of an int32 word as the DT value that they are."""
    return (word >> (16 * HALF)).to(tl.int16).to(DT, bitcast=True)


@triton.jit
def group_scale(steps, GROUP: tl.constexpr, KIND: tl.constexpr, DT: tl.constexpr):
    """DT [..]: the step of the block's group GROUP. A word holds two steps, or a step below its zero point."""
    if KIND == ASYMMETRIC:
        return half_bits(steps[GROUP], 0, DT)
    else:
        return half_bits(steps[GROUP // 2], GROUP % 2, DT)


@triton.jit
def midpoint(steps, GROUP: tl.constexpr, BITS: tl.constexpr, KIND: tl.constexpr, DT: tl.constexpr):
    """What ``_plane`` gives for the zero point of the block's group GROUP: DT [..], or a number for all rows."""
    if KIND == ASYMMETRIC:
        return half_bits(steps[GROUP], 1, DT)
    elif tl.float16 == DT:
        return 1024.0 + (1 << (BITS - 1))
    else:
        return 128.0 if BITS == 8 else 1.5
