# Triton's language, typed by its own compiler; the arguments of a kernel are positional.
# mypy: ignore-errors
"""What the lanes of a program's warps have summed up becomes sums of rows, through shared memory, in a fixed order.

It is PTX: each of S * KW warps has 16 rows, KW warps the same. Of each there is room for the sums of 16 rows of codes'
products (digits.py), and behind them for those of entries (slots.py).
"""

import math

import triton
import triton.language as tl

from requant_kernels.dense_sparse.triton import slots

STRIDE = tl.constexpr(2 * 16 * 4)  # bytes from a warp's sums to the next one's
LAST = tl.constexpr(slots.LAST)


@triton.constexpr_function
def _reserve(warps):
    return f".shared .align 16 .b8 requant_rows[{STRIDE.value * warps}]; mov.b32 $0, $1;"


@triton.constexpr_function
def _put_digits():
    """$4 and $5: sums of two digits of a row, $6 and $7 of the one 8 behind it. Of the four lanes that have a row the
    first two have those that mean anything (digits.py); their sum goes behind $8."""
    return """{
        .reg .pred %odd, %first;
        .reg .b32 %lane, %one, %other, %upper, %lower, %n, %at;
        mov.u32 %lane, %laneid;
        and.b32 %n, %lane, 1;
        setp.ne.u32 %odd, %n, 0;
        selp.b32 %one, 0x47800000, 0x3f800000, %odd;
        selp.b32 %other, 0xca800000, 0x43800000, %odd;
        mul.f32 %upper, $4, %one;
        mul.f32 %lower, $6, %one;
        fma.rn.f32 %upper, $5, %other, %upper;
        fma.rn.f32 %lower, $7, %other, %lower;
        shfl.sync.bfly.b32 %n, %upper, 1, 31, -1;
        add.f32 %upper, %upper, %n;
        shfl.sync.bfly.b32 %n, %lower, 1, 31, -1;
        add.f32 %lower, %lower, %n;
        and.b32 %n, %lane, 3;
        setp.eq.u32 %first, %n, 0;
        mov.b32 %at, requant_rows;
        add.s32 %at, %at, $8;
        @%first st.shared.b32 [%at], %upper;
        @%first st.shared.b32 [%at+32], %lower;
        mov.b32 $0, 0; mov.b32 $1, 0; mov.b32 $2, 0; mov.b32 $3, 0;
        }"""


@triton.constexpr_function
def _put_slots():
    """The sums $1 of lanes, whose rows $2 tells, go behind $3: each takes in those before it of its row."""
    steps = "".join(
        f"""shfl.sync.up.b32 %n, %sum, {by}, 0, -1;
        setp.ge.u32 %mine, %before, {by};
        @%mine add.f32 %sum, %sum, %n;
        """
        for by in (1, 2, 4, 8, 16)
    )
    return f"""{{
        .reg .pred %mine;
        .reg .b32 %sum, %n, %before, %at;
        mov.b32 %sum, $1;
        shr.u32 %before, $2, 4;
        and.b32 %before, %before, 31;
        {steps}
        and.b32 %n, $2, 15;
        shl.b32 %n, %n, 2;
        mov.b32 %at, requant_rows;
        add.s32 %at, %at, $3;
        add.s32 %at, %at, %n;
        and.b32 %n, $2, {LAST.value};
        setp.ne.u32 %mine, %n, 0;
        @%mine st.shared.b32 [%at+64], %sum;
        mov.b32 $0, 0;
        }}"""


@triton.constexpr_function
def _add_up(warps, digits, entries, unit):
    """$0: the sum of what ``warps`` have put at $1 and behind it, digits' times ``unit``."""
    reads = ""
    for there, first, weight in ((digits, 0, unit), (entries, 64, 1.0)):
        for warp in range(warps if there else 0):
            at = first + STRIDE.value * warp
            reads += f"ld.shared.b32 %n, [%at+{at}]; fma.rn.f32 %sum, %n, 0f{_bits(weight):08X}, %sum;\n"
    return f"""{{
        .reg .b32 %n, %sum, %at;
        mov.b32 %at, requant_rows;
        add.s32 %at, %at, $1;
        mov.b32 %sum, 0;
        {reads}
        mov.b32 $0, %sum;
        }}"""


@triton.constexpr_function
def _bits(value):
    """Of a power of two as float32."""
    return int(math.log2(value)) + 127 << 23


@triton.jit
def reserve_rows(T: tl.constexpr):
    """Room for the sums. Once, at the beginning of a kernel."""
    tl.inline_asm_elementwise(_reserve(T), "=r,r", [tl.arange(0, 32 * T)], tl.int32, False, 1)


@triton.jit
def put_digits(sums, S: tl.constexpr, KW: tl.constexpr):
    """The sums of all digits fp32 [S, KW, 8, 4, 2, 2]."""
    T: tl.constexpr = S * KW
    at = tl.arange(0, T)[:, None] * STRIDE + tl.arange(0, 128)[None, :] // 16 * 4
    at = tl.reshape(at, (S, KW, 8, 4, 2, 2))
    sums = sums.to(tl.int32, bitcast=True)
    CODE: tl.constexpr = _put_digits()
    tl.inline_asm_elementwise(CODE, "=r,=r,=r,=r,r,r,r,r,r,r,r,r", [sums, at], tl.int32, False, 4)


@triton.jit
def put_slots(products, owners):
    """The sums of lanes fp32 [32 T]; owners int32 [32 T]: ``Slots.owners``."""
    at = tl.arange(0, products.shape[0]) // 32 * STRIDE
    CODE: tl.constexpr = _put_slots()
    tl.inline_asm_elementwise(CODE, "=r,r,r,r", [products.to(tl.int32, bitcast=True), owners, at], tl.int32, False, 1)


@triton.jit
def add_up(S: tl.constexpr, KW: tl.constexpr, DIGITS: tl.constexpr, ENTRIES: tl.constexpr, UNIT: tl.constexpr):
    """What has been put, fp32 [16 * S]: sums of digits, times UNIT, a power of two, and of lanes of slots."""
    tl.debug_barrier()
    row = tl.arange(0, 16 * S)
    CODE: tl.constexpr = _add_up(KW, DIGITS, ENTRIES, UNIT)
    at = row // 16 * (KW * STRIDE) + row % 16 * 4
    return tl.inline_asm_elementwise(CODE, "=r,r", [at], tl.int32, False, 1).to(tl.float32, bitcast=True)
