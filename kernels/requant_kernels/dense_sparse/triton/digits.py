# Triton's language, typed by its own compiler; the arguments of a kernel are positional.
# mypy: ignore-errors
# ruff: noqa: PLR0917
"""One token's product in integers: x of a block in fixed point, cut into bytes, which are as many columns of an 8-bit
product; codes are its other operand as they are, so that nothing is decoded.

``mma.m16n8k32`` multiplies 16 rows by 8 columns, of which one token has use for one. Columns 0, 1 and 2 are the bytes
of u = 2**22 + x / scale, 23 bits, unsigned, with the power of two for scale that lets the largest of the block's x fit.
Column 3 is all ones: what 2**22 adds, that many times the sum of the codes, is subtracted at the end (rows.py). x is
off by no more than 2**-22 of the largest of its block, and the sums under a step are exact.

It is PTX: one warp for each strip and block, which touches no buffer but its own. T of them work side by side; what a
lane of a warp has is an element of [32 T], four words of it in turn of [.., 8, 4, 2, 2] (decode.py).
"""

import triton
import triton.language as tl

from requant_kernels.dense_sparse.triton.decode import ASYMMETRIC, beside_midpoint, bit_of, group_scale, parted, set_of
from requant_kernels.dense_sparse.triton.patch import read_words

ROW = tl.constexpr(256 + 64)  # bytes from one column's digits to the next one's: no two lanes of four meet in a bank
STRIDE = tl.constexpr(4 * ROW.value)  # of a warp


@triton.constexpr_function
def _reserve(warps):
    """Buffers; $1: where a lane's 8 of the ones are."""
    return f""".shared .align 16 .b8 requant_digits[{STRIDE.value * warps}];
        {{
        .reg .b32 %at, %ones;
        mov.b32 %ones, 0x01010101;
        mov.b32 %at, requant_digits;
        add.s32 %at, %at, $1;
        st.shared.v2.b32 [%at], {{%ones, %ones}};
        mov.b32 $0, 0;
        }}"""


@triton.constexpr_function
def _float(half, kind, word):
    """A half of x's word as float32 ``%f``: instructions."""
    if kind == "f16":
        return f"mov.b32 {{%low, %high}}, {word}; cvt.f32.f16 %f, %{'high' if half else 'low'};"
    return f"and.b32 %f, {word}, 0xffff0000;" if half else f"shl.b32 %f, {word}, 16;"


@triton.constexpr_function
def _cut(kind):
    """Four of x from the lane's first column on, $1, and four 32 columns behind, $2, go to the buffer at $3; $0: the
    scale."""
    code = "mov.b64 {%w0, %w1}, $1; mov.b64 {%w2, %w3}, $2;\n"
    code += "\n".join(f"and.b32 %m{i}, %w{i}, 0x7fff7fff;" for i in range(4))
    most = f"max.NaN.{kind}x2"
    exponent = "mov.b32 {%low, %high}, %m0; cvt.f32.f16 %m0, %high;" if kind == "f16" else ""
    # The largest of a warp's x is below 2**(e - 126), where e is its biased exponent: times 2**(148 - e) below 2**22.
    # Added to 1.5 * 2**23, the lowest 23 bits of the sum are u.
    code += f"""
        {most} %m0, %m0, %m1; {most} %m2, %m2, %m3; {most} %m0, %m0, %m2;
        prmt.b32 %m1, %m0, 0, 0x1032; {most} %m0, %m0, %m1; {exponent}
        and.b32 %m0, %m0, 0x7f800000;
        redux.sync.max.u32 %m0, %m0, 0xffffffff;
        setp.eq.u32 %wrong, %m0, 0x7f800000;
        max.u32 %m0, %m0, {22 << 23};
        sub.u32 %scale, {275 << 23}, %m0;
        sub.u32 %m0, %m0, {21 << 23};
        selp.b32 $0, 0x7fffffff, %m0, %wrong;
        mov.b32 %at, requant_digits;
        add.s32 %at, %at, $3;"""
    for i in range(4):
        for half in range(2):
            code += f"\n{_float(half, kind, f'%w{i}')} fma.rn.f32 %u{2 * i + half}, %f, %scale, 0f4B400000;"
    for i in range(2):  # bytes: first column, the one 32 behind it, then the next of both
        a, b = 2 * i, 2 * i + 4
        code += f"""
        prmt.b32 %p, %u{a}, %u{b}, 0x5140; prmt.b32 %q, %u{a + 1}, %u{b + 1}, 0x5140;
        prmt.b32 %x{i}, %p, %q, 0x5410; prmt.b32 %y{i}, %p, %q, 0x7632;
        prmt.b32 %p, %u{a}, %u{b}, 0x0062; prmt.b32 %q, %u{a + 1}, %u{b + 1}, 0x0062;
        prmt.b32 %z{i}, %p, %q, 0x5410;"""
    stores = "\n".join(
        f"st.shared.b32 [%at+{row * ROW.value + 16 * i}], %{name}{i};"
        for row, name in enumerate("xyz")
        for i in range(2)
    )
    return f"""{{
        .reg .pred %wrong;
        .reg .b16 %low, %high;
        .reg .b32 %w<4>, %m<4>, %u<8>, %x<2>, %y<2>, %z<2>, %p, %q, %f, %scale, %at;
        {code}
        bar.warp.sync 0xffffffff;
        {stores}
        bar.warp.sync 0xffffffff;
        }}"""


@triton.constexpr_function
def _signed(unit, bits, words, keep):
    """Bytes of ``words``, a register of each set that has some of them: the codes of ``unit``, less the midpoint, in
    their upper bits: instructions to ``%a``."""
    mask = (0xFF00 >> bits & 0xFF) * 0x01010101 & keep
    if parted(unit, bits):
        # of lop3, 0x6A is first & second ^ third
        code = f"shl.b32 %b, {words[1]}, {7 - unit}; lop3.b32 %a, %b, {0x20202020 & keep}, %top, 0x6A;"
        return code + f"shl.b32 %b, {words[0]}, 6; lop3.b32 %a, %b, {0xC0C0C0C0 & keep}, %a, 0x6A;"
    up = 8 - bits - bit_of(unit, bits)
    return f"shl.b32 %b, {words[0]}, {up}; lop3.b32 %a, %b, {mask}, %top, 0x6A;"


@triton.constexpr_function
def _sets(unit, bits):
    """Which words have the codes of ``unit``."""
    return (set_of(unit, bits), 1) if parted(unit, bits) else (set_of(unit, bits),)


@triton.constexpr_function
def _multiply(unit, bits, keep):
    """$0 to $3 are the sums from the last four arguments on plus the products of codes, words of some sets, with the
    digits behind them; without ``bits`` of ones."""
    sets = len(_sets(unit, bits)) if bits else 0
    digits = 4 + 4 * sets + 2 * (unit % 2)
    sums = 8 + 4 * sets
    code = ""
    for i in range(4):
        words = [f"${4 + 4 * s + i}" for s in range(sets)]
        ones = f"mov.b32 %a, {0x01010101 & keep};"
        code += f"{_signed(unit, bits, words, keep) if bits else ones} mov.b32 %a{i}, %a;\n"
    return f"""{{
        .reg .b32 %a, %b, %top, %a<4>;
        mov.b32 %top, {0x80808080 & keep};
        {code}
        mma.sync.aligned.m16n8k32.row.col.s32.s8.u8.s32 {{$0, $1, $2, $3}}, {{%a0, %a1, %a2, %a3}},
        {{${digits}, ${digits + 1}}}, {{${sums}, ${sums + 1}, ${sums + 2}, ${sums + 3}}};
        }}"""


@triton.jit
def reserve(T: tl.constexpr):
    """Buffers. Once, at the beginning of a kernel."""
    lane = tl.arange(0, 32 * T)
    at = lane // 32 * STRIDE + 3 * ROW + lane % 32 * 8
    tl.inline_asm_elementwise(_reserve(T), "=r,r", [at], tl.int32, False, 1)


@triton.jit
def columns(T: tl.constexpr):
    """Of a block, which a warp each shares out, a lane's first column: int32 [32 T]."""
    lane = tl.arange(0, 32 * T) % 32
    return lane // 8 * 64 + lane % 8 * 4


@triton.jit
def load_fours(x_at, k, last, EVEN: tl.constexpr):
    """A lane's x of a block: int64 [32 T], four in a row, and the four 32 columns behind. x_at [32 T]: at its first
    column, which is ``k`` [32 T]; zero from column ``last`` on, unless EVEN: then all of it is there."""
    fours = ()
    for i in tl.static_range(2):
        if EVEN:
            four = tl.load((x_at + 32 * i).to(tl.pointer_type(tl.int64), bitcast=True))
        else:
            four = tl.zeros(k.shape, tl.int64)
            for j in tl.static_range(4):
                at = 32 * i + j
                one = tl.load(x_at + at, mask=k + at < last, other=0.0).to(tl.int16, bitcast=True)
                four |= (one.to(tl.int64) & 0xFFFF) << (16 * j)
        fours = fours + (four,)  # noqa: RUF005 (triton knows no *)
    return fours


@triton.jit
def _cut_up(fours, DT: tl.constexpr):
    """Their digits go to the buffers. Their scale, fp32 [32 T], a warp's all the same; NaN where an x of its block is
    not finite."""
    CODE: tl.constexpr = _cut("f16" if tl.float16 == DT else "bf16")
    lane = tl.arange(0, fours[0].shape[0])
    at = lane // 32 * STRIDE + lane % 32 // 8 * 64 + lane % 2 * 32 + lane % 8 // 4 * 8 + lane // 2 % 2 * 4
    scale = tl.inline_asm_elementwise(CODE, "=&r,l,l,r", [fours[0], fours[1], at], tl.int32, False, 1)
    return scale.to(tl.float32, bitcast=True)


@triton.jit
def _read_pairs(like, FIRST: tl.constexpr, COUNT: tl.constexpr, S: tl.constexpr, KW: tl.constexpr):
    """The digits of COUNT pairs of units from FIRST on, for each int32 [S, KW, 8, 4, 2, 2] in the layout of ``like``,
    words of codes."""
    T: tl.constexpr = S * KW
    word = tl.arange(0, 128)[None, :]
    at = tl.arange(0, T)[:, None] * STRIDE + word // 16 % 4 * ROW + word // 4 % 4 * 16
    at = tl.reshape(at, (S, KW, 8, 4, 2, 2))
    digits = ()
    for pair in tl.static_range(COUNT):
        words = tl.inline_asm_elementwise(
            read_words("requant_digits", 64 * (FIRST + pair)),
            "=r,=r,=r,=r,r,r,r,r,r,r,r,r",
            [at, like],
            tl.int32,
            False,
            4,
        )
        digits = digits + (words,)  # noqa: RUF005
    return digits


@triton.jit
def _add_unit(sums, words, digits, UNIT: tl.constexpr, BITS: tl.constexpr, KEEP: tl.constexpr):
    """sums int32 [S, KW, 8, 4, 2, 2], whose last two dimensions are rows, 8 apart, and digits, plus the products of the
    columns of UNIT that KEEP, a mask of bytes, leaves."""
    CODE: tl.constexpr = _multiply(UNIT, BITS, KEEP)
    SETS: tl.constexpr = _sets(UNIT, BITS)
    OUT: tl.constexpr = "=r,=r,=r,=r" + ",r" * (8 + 4 * len(SETS))
    if len(SETS) == 1:
        return tl.inline_asm_elementwise(CODE, OUT, [words[SETS[0]], digits, sums], tl.int32, True, 4)
    else:
        return tl.inline_asm_elementwise(CODE, OUT, [words[SETS[0]], words[SETS[1]], digits, sums], tl.int32, True, 4)


@triton.jit
def _add_ones(sums, digits, UNIT: tl.constexpr, KEEP: tl.constexpr):
    """The same of ones instead of codes: the sum of x."""
    CODE: tl.constexpr = _multiply(UNIT, 0, KEEP)
    OUT: tl.constexpr = "=r,=r,=r,=r,r,r,r,r,r,r,r,r"
    return tl.inline_asm_elementwise(CODE, OUT, [digits, sums], tl.int32, True, 4)


@triton.constexpr_function
def _first_unit(start, span):
    """That has any of ``span`` columns from ``start`` on."""
    return start // 64 * 2 + (start // 16 % 2 if span == 16 else 0)


@triton.constexpr_function
def _units(span):
    return max(1, span // 32) if span != 32 else 2


@triton.constexpr_function
def _kept(start, span):
    """Which bytes of a unit are of them."""
    return 0xFFFFFFFF if span >= 64 else 0xFF00FF00 if start % 64 >= 32 else 0x00FF00FF


@triton.constexpr_function
def weight_of(bits, dtype):
    """What sums are to be taken times: codes are the upper bits of bytes, and steps are over ``strips.unit``."""
    return 2.0 ** (bits - 8) * (2.0**-9 if dtype == tl.float16 else 2.0**-6)


@triton.jit
def add_block(
    acc, words, steps, fours, S: tl.constexpr, KW: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr,
    KIND: tl.constexpr, DT: tl.constexpr,
):  # fmt: skip
    """acc fp32 [S, KW, 8, 4, 2, 2], whose last two dimensions are rows, 8 apart, and digits, plus the products of a
    block for each warp: ``words`` and ``steps`` as decode.py loads them, ``fours`` of x."""
    SPAN: tl.constexpr = min(GROUP, 128)  # columns under one step, and in one sum
    scale = tl.reshape(_cut_up(fours, DT), (S, KW, 8, 4, 1, 1))
    digits = ()
    for start in tl.static_range(0, 256, SPAN):
        if start % 64 == 0:
            digits = _read_pairs(words[0], start // 64, max(1, SPAN // 64), S, KW)
        sums = tl.zeros((S, KW, 8, 4, 2, 2), tl.int32)
        if KIND == ASYMMETRIC:  # not the middle was to be subtracted, but the zero point
            for unit in tl.static_range(_units(SPAN)):
                sums = _add_ones(sums, digits[unit // 2], _first_unit(start, SPAN) + unit, _kept(start, SPAN))
            beside = beside_midpoint(steps, start // GROUP, BITS, DT) / weight_of(BITS, DT)
            sums *= tl.reshape(beside.to(tl.int32), (S, KW, 8, 1, 2, 1))
        for unit in tl.static_range(_units(SPAN)):
            sums = _add_unit(sums, words, digits[unit // 2], _first_unit(start, SPAN) + unit, BITS, _kept(start, SPAN))
        step = tl.reshape(group_scale(steps, start // GROUP, KIND, DT), (S, KW, 8, 1, 2, 1)) * scale
        acc += sums.to(tl.float32) * step
    return acc
