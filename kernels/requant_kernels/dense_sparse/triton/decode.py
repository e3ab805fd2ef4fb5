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

import math

import triton
import triton.language as tl

from requant_kernels.dense_sparse.triton import layer

SYMMETRIC, ASYMMETRIC, CODEBOOK = (tl.constexpr(kind) for kind in (layer.SYMMETRIC, layer.ASYMMETRIC, layer.CODEBOOK))


@triton.jit
def load_rows(ptr, stride, COUNT: tl.constexpr):
    """COUNT (a power of two) loads, ``stride`` apart, as a tuple."""
    if COUNT == 1:
        return (tl.load(ptr),)
    else:
        HALF: tl.constexpr = COUNT // 2
        return load_rows(ptr, stride, HALF) + load_rows(ptr + HALF * stride, stride, HALF)


@triton.jit
def _load(ptr, live, CACHE: tl.constexpr):
    if live is None:
        return tl.load(ptr, cache_modifier=CACHE)
    else:
        return tl.load(ptr, mask=live, cache_modifier=CACHE)


@triton.jit
def _word(ptr, live, S: tl.constexpr, KW: tl.constexpr):
    return tl.reshape(_load(ptr, live, ".cg"), (S, KW, 8, 4, 2, 2))  # past the L1, where x is to stay


@triton.jit
def load_words(ptr, live, BITS: tl.constexpr, S: tl.constexpr, KW: tl.constexpr):
    """The words of BITS sets, a block's; ``ptr`` is int32* [S * KW, 128] at the first of them. Nothing is read where
    ``live`` is false, and the words may be any; all are where it is None."""
    if BITS == 1:
        return (_word(ptr, live, S, KW),)
    elif BITS == 3:
        return load_words(ptr, live, 1, S, KW) + load_words(ptr + 128, live, 2, S, KW)
    else:
        HALF: tl.constexpr = BITS // 2
        return load_words(ptr, live, HALF, S, KW) + load_words(ptr + HALF * 128, live, HALF, S, KW)


@triton.jit
def load_span(ptr, span, BITS: tl.constexpr, S: tl.constexpr, SPAN: tl.constexpr):
    """The words of span ``span`` of SPAN columns, a block or half of one, as ``of_span`` wants them; ``ptr`` is int32*
    [S, 128] at the first words of the rows."""
    if SPAN == 256:
        return load_words(ptr + span * (BITS * 128), None, BITS, S, 1)
    elif BITS == 3:  # the second of three sets has codes of both halves
        first = ptr + span // 2 * (BITS * 128)
        return load_words(first + span % 2 * 256, None, 1, S, 1) + load_words(first + 128, None, 1, S, 1)
    else:
        return load_words(ptr + span * (BITS * 64), None, BITS // 2, S, 1)


@triton.jit
def of_span(words, span, BITS: tl.constexpr, SPAN: tl.constexpr):
    """Of what ``load_span`` has loaded those of ``span``, half a block as if it were the first."""
    if BITS == 3 and SPAN == 128:
        return (words[0], words[1] >> span % 2 * 4)
    else:
        return words


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
def rows_at(ptr, S: tl.constexpr, KW: tl.constexpr):
    """ptr, int32* at the program's first row, at the rows of S strips, each KW times: [16 * S * KW]."""
    e = tl.arange(0, 16 * S * KW)
    return ptr + e // (16 * KW) * 16 + _row(e)


@triton.jit
def load_steps_at(at, live, stride, COUNT: tl.constexpr, S: tl.constexpr, KW: tl.constexpr):
    """COUNT words of steps, ``stride`` apart, at the rows of ``rows_at``: a tuple of int32 [S, KW, 8, 1, 1, 2], for
    each thread those of its rows. Nothing is read where ``live`` is false; all are where it is None."""
    steps = ()
    for word in tl.static_range(COUNT):
        steps = steps + (tl.reshape(_load(at + word * stride, live, ""), (S, KW, 8, 1, 1, 2)),)  # noqa: RUF005
    return steps


@triton.jit
def load_steps(
    ptr, span, spans, scale_step, stride, GROUP: tl.constexpr, KIND: tl.constexpr, S: tl.constexpr, KW: tl.constexpr,
    SPAN: tl.constexpr,
):  # fmt: skip
    """Steps of KW spans from ``span`` on, of ``spans`` of SPAN columns (a block or half of one), as words of
    ``Strips.scales`` [blocks, .., stride]: as ``load_steps_at`` gives them. ptr int32* at the program's first row."""
    WORDS: tl.constexpr = words_of(GROUP, KIND)
    COUNT: tl.constexpr = max(1, WORDS * SPAN // 256)
    span = tl.minimum(span + tl.arange(0, 16 * S * KW) // 16 % KW, spans - 1)
    at = rows_at(ptr, S, KW) + span // (256 // SPAN) * scale_step
    if COUNT < WORDS:
        at += span % 2 * (COUNT * stride)
    return load_steps_at(at, None, stride, COUNT, S, KW)


@triton.jit
def steps_of(steps, span, GROUP: tl.constexpr, KIND: tl.constexpr, SPAN: tl.constexpr):
    """Of what ``load_steps`` has loaded for KW = 1 the steps of ``span``, where a word holds those of two spans."""
    if SPAN == 128 and GROUP == 128 and KIND == SYMMETRIC:
        return (steps[0] >> span % 2 * 16,)
    else:
        return steps


@triton.constexpr_function
def words_of(group, kind):
    """Of the steps of a row and block."""
    return 256 // group if kind == layer.ASYMMETRIC else max(1, 128 // group)


@triton.constexpr_function
def _unit_of(plane):
    """As strips.py says."""
    return plane // 4 * 2 + plane % 2


@triton.constexpr_function
def set_of(unit, bits):
    """Which set has the codes of ``unit``; where they are ``parted`` their upper bits."""
    if bits == 3:
        return 1 if unit % 4 == 3 else unit // 4 * 2
    return unit * bits // 8


@triton.constexpr_function
def parted(unit, bits):
    """Whether the last bits of codes of ``unit`` are elsewhere: of set 1 bit ``unit - 2``."""
    return bits == 3 and unit % 4 == 2


@triton.constexpr_function
def bit_of(unit, bits):
    """At which bit of a byte, that halves of words begin or end with, a code of ``unit`` is, or is put."""
    if bits == 3:
        return (5, 2, 0, unit - 2)[unit % 4]
    return unit * bits % 8


@triton.jit
def _codes(words, PLANE: tl.constexpr, BITS: tl.constexpr):
    """The two codes of each word that belong to plane PLANE, at bit ``bit_of`` of its low and high half."""
    SHIFT: tl.constexpr = PLANE // 2 % 2 * 8
    UNIT: tl.constexpr = _unit_of(PLANE)
    if parted(UNIT, BITS):
        upper = words[set_of(UNIT, BITS)] >> (SHIFT - 1) if SHIFT else words[set_of(UNIT, BITS)] << 1
        return (upper & 0x00060006) | (words[1] >> (SHIFT + UNIT - 2) & 0x00010001)
    else:
        MASK: tl.constexpr = (((1 << BITS) - 1) << bit_of(UNIT, BITS)) * 0x00010001
        return words[set_of(UNIT, BITS)] >> SHIFT & MASK


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
def _bit_masks(pair, FIRST: tl.constexpr, BITS: tl.constexpr):
    """Bit FIRST + i of each half, spread over the half, for i < BITS."""
    masks = ()
    for i in tl.static_range(FIRST, FIRST + BITS):
        masks = masks + (((pair >> i) & 0x00010001) * 0xFFFF,)  # noqa: RUF005 (triton knows no *)
    return masks


@triton.jit
def halves(pair, DT: tl.constexpr):
    """int32 [...] -> its 16-bit halves as DT [..., 2]."""
    low = pair.to(tl.int16).to(DT, bitcast=True)
    high = (pair >> 16).to(tl.int16).to(DT, bitcast=True)
    return tl.join(low, high)


@triton.constexpr_function
def _twice(value, dtype):
    """Words, of which both halves are ``value``, a power of two or 0, as ``dtype``."""
    exponent = int(math.log2(abs(value))) + (15 if dtype == tl.float16 else 127) if value else 0
    bits = (exponent << (10 if dtype == tl.float16 else 7)) | (0x8000 if math.copysign(1, value) < 0 else 0)
    return bits * 0x10001 - (1 << 32 if bits >> 15 else 0)


@triton.jit
def _fma(a, b, c, DT: tl.constexpr, PTX: tl.constexpr):
    """a * b + c of both halves of words: int32 [...], of one shape after broadcasting. Rounded once with PTX.

    With PTX, because of the same in Triton Triton 3.9 makes products of single halves, and then puts them together."""
    if PTX:
        FMA: tl.constexpr = "fma.rn.f16x2" if tl.float16 == DT else "fma.rn.bf16x2"
        return tl.inline_asm_elementwise(FMA + " $0, $1, $2, $3;", "=r,r,r,r", [a, b, c], tl.int32, True, 1)
    else:
        b += a * 0  # may be a number
        c += a * 0
        low = half_bits(a, 0, DT) * half_bits(b, 0, DT) + half_bits(c, 0, DT)
        high = half_bits(a, 1, DT) * half_bits(b, 1, DT) + half_bits(c, 1, DT)
        low, high = low.to(DT).to(tl.int16, bitcast=True), high.to(DT).to(tl.int16, bitcast=True)
        return (low.to(tl.int32) & 0xFFFF) | (high.to(tl.int32) << 16)


@triton.constexpr_function
def in_steps(kind, bits):
    """Whether entries are (residuals.py)."""
    return kind == layer.SYMMETRIC and bits <= layer.BITS_IN_STEPS


@triton.constexpr_function
def nothing(bits, kind, dtype):
    """A word of pairs (patch.py) that adds nothing to codes, where entries are ``in_steps``, or to weights."""
    return _twice(-_midpoint(bits, dtype), dtype) if in_steps(kind, bits) else 0


@triton.jit
def _plane(
    words, levels, steps, pairs, PLANE: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, KIND: tl.constexpr,
    DT: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """Plane PLANE of a block, int32 [S, KW, 8, 4, 2, 2] of two DT each: levels, or codes less zero points, times
    ``strips.unit``, plus ``pairs`` where they are ``in_steps``.

    The lowest bits of a float whose other bits are zero are an integer times the least subnormal number, up to 8 bits
    of bfloat16 and 11 of float16 wherever they stand among them: a product makes it a number, without a conversion.
    """
    pair = _codes(words, PLANE, BITS)
    if KIND == CODEBOOK:
        return _select(levels, _bit_masks(pair, bit_of(_unit_of(PLANE), BITS), BITS), BITS, 0)
    else:
        UNIT: tl.constexpr = _twice(2.0 ** ((15 if tl.float16 == DT else 127) - bit_of(_unit_of(PLANE), BITS)), DT)
        if KIND == ASYMMETRIC:
            less = _both(steps[PLANE * 16 // GROUP], 1, PTX)
        elif len(pairs) > 0 and in_steps(KIND, BITS):
            less = pairs[PLANE % len(pairs)]
        else:
            less = _twice(-_midpoint(BITS, DT), DT)
        return _fma(pair, UNIT, less, DT, PTX)


@triton.jit
def _weights(
    words, levels, steps, pairs, PLANE: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, KIND: tl.constexpr,
    DT: tl.constexpr, PTX: tl.constexpr, STEPPED: tl.constexpr,
):  # fmt: skip
    """Plane PLANE of a block, int32 [S, KW, 8, 4, 2, 2] of two DT each, as ``weights`` says."""
    w = _plane(words, levels, steps, pairs, PLANE, BITS, GROUP, KIND, DT, PTX)
    more = _twice(-0.0, DT)
    if len(pairs) > 0 and not in_steps(KIND, BITS):
        more = pairs[PLANE % len(pairs)]
    if KIND == CODEBOOK:
        if len(pairs) > 0:
            w = _fma(w, _twice(1.0, DT), more, DT, PTX)
    elif STEPPED and KIND == ASYMMETRIC:
        w = _fma(w, _both(steps[PLANE * 16 // GROUP], 0, PTX), more, DT, PTX)
    elif STEPPED:
        w = _fma(w, _both(steps[PLANE * 16 // GROUP // 2], PLANE * 16 // GROUP % 2, PTX), more, DT, PTX)
    return w


@triton.jit
def _planes(
    words, levels, steps, pairs, FIRST: tl.constexpr, STEP: tl.constexpr, COUNT: tl.constexpr,
    BITS: tl.constexpr, GROUP: tl.constexpr, KIND: tl.constexpr, DT: tl.constexpr, PTX: tl.constexpr,
    STEPPED: tl.constexpr,
):  # fmt: skip
    """Planes FIRST, FIRST + STEP, ... (COUNT, a power of two), stacked behind the last dimension in that order, and
    their halves before it."""
    if COUNT > 1:
        e = _planes(words, levels, steps, pairs, FIRST, 2 * STEP, COUNT // 2, BITS, GROUP, KIND, DT, PTX, STEPPED)
        o = _planes(
            words, levels, steps, pairs, FIRST + STEP, 2 * STEP, COUNT // 2, BITS, GROUP, KIND, DT, PTX, STEPPED
        )
        return tl.join(e, o)
    else:
        return halves(_weights(words, levels, steps, pairs, FIRST, BITS, GROUP, KIND, DT, PTX, STEPPED), DT)


@triton.jit
def weights(
    words, levels, steps, pairs, FIRST: tl.constexpr, PLANES: tl.constexpr, S: tl.constexpr, KW: tl.constexpr,
    BITS: tl.constexpr, GROUP: tl.constexpr, KIND: tl.constexpr, DT: tl.constexpr, PTX: tl.constexpr,
    STEPPED: tl.constexpr = True,
):  # fmt: skip
    """Columns [16 * FIRST, 16 * (FIRST + PLANES)) of a block times their steps, as ``load_steps`` gives them, or their
    levels, plus ``pairs``, words of 8 planes (patch.py) for each 128 columns, if there are any: DT [KW, R, columns].
    Without STEPPED they are left to be multiplied by their steps, so that pairs must be ``in_steps``."""
    p = _planes(words, levels, steps, pairs, FIRST, 1, PLANES, BITS, GROUP, KIND, DT, PTX, STEPPED)
    # strip, kw, g, t, kh, rh, half, plane -> kw, (strip, rh, g), (plane, kh, t, half)
    p = tl.reshape(p, (S, KW, 8, 4, 2, 2, 2, PLANES))
    p = tl.permute(p, (1, 0, 5, 2, 7, 4, 3, 6))
    return tl.reshape(p, (KW, 16 * S, 16 * PLANES))


@triton.jit
def _both(word, HALF: tl.constexpr, PTX: tl.constexpr):
    """int32 words, both halves of which are half HALF of ``word``."""
    if PTX:
        BYTES: tl.constexpr = "prmt.b32 $0, $1, 0, " + ("0x3232;" if HALF else "0x1010;")
        return tl.inline_asm_elementwise(BYTES, "=r,r", [word], tl.int32, True, 1)
    elif HALF:
        return (word & -0x10000) | (word >> 16 & 0xFFFF)
    else:
        return (word << 16) | (word & 0xFFFF)


@triton.jit
def half_bits(word, HALF: tl.constexpr, DT: tl.constexpr):
    """16 bits of an int32 word as the DT value that they are."""
    return (word >> (16 * HALF)).to(tl.int16).to(DT, bitcast=True)


@triton.jit
def half_number(word, HALF: tl.constexpr, DT: tl.constexpr):
    """16 bits of an int32 word, a DT value, as float32."""
    if tl.float16 == DT:
        return half_bits(word, HALF, DT).to(tl.float32)
    elif HALF:
        return (word & -0x10000).to(tl.float32, bitcast=True)
    else:
        return (word << 16).to(tl.float32, bitcast=True)


@triton.jit
def group_scale(steps, GROUP: tl.constexpr, KIND: tl.constexpr, DT: tl.constexpr):
    """float32 [..]: the step of the block's group GROUP. A word holds two steps, or a step below its zero point."""
    if KIND == ASYMMETRIC:
        return half_number(steps[GROUP], 0, DT)
    else:
        return half_number(steps[GROUP // 2], GROUP % 2, DT)


@triton.jit
def scaled_after(part, steps, GROUP: tl.constexpr, KIND: tl.constexpr, DT: tl.constexpr):
    """part fp32 [KW, R, 1], or of KW = 1 [R, tokens], sums of codes less zero points of the block's group GROUP, times
    their steps."""
    step = tl.permute(group_scale(steps, GROUP, KIND, DT), (1, 0, 5, 2, 3, 4))
    return part * tl.reshape(step, part.shape[:-1] + [1])  # noqa: RUF005


@triton.constexpr_function
def _midpoint(bits, dtype):
    """The zero point in the middle of all codes, times ``strips.unit``."""
    return (1 << (bits - 1)) * (2.0**-9 if dtype == tl.float16 else 2.0**-6)


@triton.jit
def beside_midpoint(steps, GROUP: tl.constexpr, BITS: tl.constexpr, DT: tl.constexpr):
    """float32 [..]: by what ``codes`` are too small where the block's group GROUP is ASYMMETRIC."""
    return half_number(steps[GROUP], 1, DT) + _midpoint(BITS, DT)
