"""Arithmetic of PTX on the 32 lanes of a warp. A register is an unsigned array [32] of its width (bool: a predicate);
``typed`` looks at it as what an instruction takes it for, ``untyped`` goes back."""

from collections.abc import Callable

import numpy as np

LANES = np.arange(32)
UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
KINDS: dict[str, type] = {
    **{f"{letter}{8 * size}": kind for letter in "bu" for size, kind in UNSIGNED.items()},
    **{f"s{8 * size}": kind for size, kind in ((1, np.int8), (2, np.int16), (4, np.int32), (8, np.int64))},
    "f16": np.float16,
    "f32": np.float32,
    "f64": np.float64,
    "bf16": np.uint16,
    "f16x2": np.uint32,
    "bf16x2": np.uint32,
    "pred": np.bool_,
}
Array = np.ndarray


def typed(register: Array, kind: str) -> Array:
    to = KINDS[kind]
    if register.itemsize != np.dtype(to).itemsize:
        register = register.astype(UNSIGNED[np.dtype(to).itemsize])
    return register.view(to)


def untyped(values: Array) -> Array:
    return values if values.dtype == np.bool_ else values.view(UNSIGNED[values.itemsize])


def from_bf16(bits: Array) -> Array:
    """uint16 -> float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def to_bf16(values: Array) -> Array:
    """float -> uint16, half to even."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FFF), rounded)


def halves(words: Array) -> Array:
    """uint32 [n] -> uint16 [n, 2], the lower half first."""
    return np.ascontiguousarray(words).view(np.uint16).reshape(*words.shape, 2)


def words(pairs: Array) -> Array:
    """uint16 [n, 2] -> uint32 [n]."""
    return np.ascontiguousarray(pairs).view(np.uint32)[..., 0]


def _shift(left: bool) -> Callable[[Array, Array], Array]:
    def shift(value: Array, by: Array) -> Array:
        width = 8 * value.itemsize
        by = by.astype(np.uint32)
        clamped = np.minimum(by, width - 1).astype(value.dtype)
        if left:
            return np.where(by < width, value << clamped, value.dtype.type(0))
        if value.dtype.kind == "u":
            return np.where(by < width, value >> clamped, value.dtype.type(0))
        return value >> clamped

    return shift


def _divide(a: Array, b: Array) -> Array:
    if a.dtype.kind == "f":
        return a / b
    quotient = np.abs(a.astype(object)) // np.maximum(np.abs(b.astype(object)), 1)
    negative = (a < 0) != (b < 0)
    return np.where(negative, -quotient, quotient).astype(a.dtype)


def _fma(a: Array, b: Array, c: Array) -> Array:
    if a.dtype.kind != "f":
        return a * b + c
    return (a.astype(np.float64) * b + c).astype(a.dtype)


def _mul_hi(a: Array, b: Array) -> Array:
    wide = np.uint64 if a.dtype.kind == "u" else np.int64
    return ((a.astype(wide) * b.astype(wide)) >> 32).astype(a.dtype)


ARITHMETIC: dict[str, Callable[..., Array]] = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "fma": _fma,
    "mad": _fma,
    "div": _divide,
    "min": np.fmin,
    "max": np.fmax,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "not": np.invert,
    "neg": np.negative,
    "abs": np.abs,
    "shl": _shift(True),
    "shr": _shift(False),
    "mov": lambda value: value,
    "ex2": np.exp2,
}
COMPARISONS: dict[str, Callable[[Array, Array], Array]] = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}
"""setp's; of floats these are the ordered ones, but ``ne``, which no kernel of ours uses on floats."""


def arithmetic(name: str, kind: str, nan: bool = False) -> Callable[..., Array]:
    """raw registers -> raw register. nan: min and max of NaN and a number are NaN, else the number."""
    function = (np.maximum if name == "max" else np.minimum) if nan else ARITHMETIC[name]
    if kind == "bf16":
        return lambda *raw: to_bf16(function(*(from_bf16(typed(a, "u16")) for a in raw)))
    if kind == "bf16x2":
        return lambda *raw: words(to_bf16(function(*(from_bf16(halves(a)) for a in raw))))
    if kind == "f16x2":
        return lambda *raw: words(function(*(halves(a).view(np.float16) for a in raw)).view(np.uint16))
    return lambda *raw: untyped(function(*(typed(a, kind) for a in raw)))


def wide(name: str, kind: str) -> Callable[..., Array]:
    """mul.wide and mad.wide: factors of ``kind``, the sum twice as wide."""
    double = kind[0] + str(2 * int(kind[1:]))

    def product(a: Array, b: Array, *c: Array) -> Array:
        result: Array = typed(a, kind).astype(KINDS[double]) * typed(b, kind).astype(KINDS[double])
        return untyped(result + typed(c[0], double) if c else result)

    return product


def high(kind: str) -> Callable[[Array, Array], Array]:
    """mul.hi of 32 bits."""
    return lambda a, b: untyped(_mul_hi(typed(a, kind), typed(b, kind)))


def bit_field(kind: str) -> Callable[..., Array]:
    """bfe.u32, bfe.s32."""

    def extract(value: Array, position: Array, length: Array) -> Array:
        start = position.astype(np.uint64) & 0xFF
        size = length.astype(np.uint64) & 0xFF
        wide_value = value.view(np.int32).astype(np.int64).view(np.uint64) if kind == "s32" else value.astype(np.uint64)
        field = (wide_value >> start) & ((np.uint64(1) << size) - np.uint64(1))
        if kind == "s32":
            sign = np.uint64(1) << (size - np.uint64(1))
            field = (field ^ sign) - sign
        return field.astype(np.uint32)

    return extract


def logic(a: Array, b: Array, c: Array, table: Array) -> Array:
    """lop3.b32: bit i of the table is the result where bits of a, b and c are those of i, a's the highest."""
    result = np.zeros_like(a)
    for i in range(8):
        if int(table[0]) >> i & 1:
            result |= (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
    return result


def permute(a: Array, b: Array, selector: Array) -> Array:
    """prmt.b32."""
    eight = np.stack([a, b], axis=1).view(np.uint8)
    picks = (selector[:, None] >> np.arange(0, 16, 4, dtype=np.uint32)) & 15
    taken = np.take_along_axis(eight, (picks & 7).astype(np.int64), axis=1)
    signs = np.where(taken & 0x80, np.uint8(0xFF), np.uint8(0))
    return np.where(picks & 8, signs, taken).astype(np.uint8).view(np.uint32)[:, 0]


def _saturated(values: Array, kind: str) -> Array:
    """float -> integer, toward zero, NaN to 0."""
    limits = np.iinfo(KINDS[kind])
    return np.clip(np.nan_to_num(np.trunc(values.astype(np.float64))), limits.min, limits.max).astype(KINDS[kind])


def convert(to: str, of: str) -> Callable[..., Array]:
    """cvt with rounding to nearest even (floats) or toward zero (integers)."""
    if to in ("bf16x2", "f16x2"):
        narrow = to_bf16 if to == "bf16x2" else lambda values: values.astype(np.float16).view(np.uint16)
        return lambda upper, lower: words(narrow(np.stack([typed(lower, of), typed(upper, of)], axis=1)))

    def single(raw: Array) -> Array:
        values = from_bf16(typed(raw, "u16")) if of == "bf16" else typed(raw, of)
        if to == "bf16":
            return to_bf16(values)
        if values.dtype.kind == "f" and to[0] in "su":
            return untyped(_saturated(values, to))
        return untyped(values.astype(KINDS[to]))

    return single
