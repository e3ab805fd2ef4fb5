"""Where tensor cores want their operands: fragments of mma.sync and wgmma, matrices of ldmatrix and stmatrix, and the
descriptors of matrices in shared memory (PTX ISA 8.7, sections 9.7.14 and 9.7.15).

A fragment is a list of registers, each uint32 [32]; ``e`` elements of 4 / e bytes in each.
"""

import numpy as np

from tests.emulator.lanes import LANES, Array, from_bf16

GROUP, QUAD = LANES // 4, LANES % 4
ITEMS = {"bf16": np.uint16, "f16": np.uint16, "tf32": np.uint32, "s8": np.uint8, "u8": np.uint8}


def numbers(items: Array, kind: str) -> Array:
    """Unsigned items, as memory holds them -> float64 or int64, of the same shape."""
    if kind == "bf16":
        return from_bf16(items).astype(np.float64)
    if kind == "f16":
        return items.view(np.float16).astype(np.float64)
    if kind == "tf32":
        return (items & np.uint32(0xFFFFE000)).view(np.float32).astype(np.float64)
    return (items if kind == "u8" else items.view(np.int8)).astype(np.int64)


def elements(register: Array, kind: str) -> Array:
    """[32] -> numbers [32, e]."""
    return numbers(np.ascontiguousarray(register).view(ITEMS[kind]).reshape(32, -1), kind)


def a_matrix(registers: list[Array], kind: str) -> Array:
    """Four registers -> [16, K]."""
    parts = [elements(register, kind) for register in registers]
    e = parts[0].shape[1]
    a = np.zeros((16, 8 * e), dtype=parts[0].dtype)
    columns = e * QUAD[:, None] + np.arange(e)
    for index, part in enumerate(parts):
        a[GROUP[:, None] + 8 * (index % 2), columns + 4 * e * (index // 2)] = part
    return a


def b_matrix(registers: list[Array], kind: str) -> Array:
    """Two registers -> [K, 8]."""
    parts = [elements(register, kind) for register in registers]
    e = parts[0].shape[1]
    b = np.zeros((8 * e, 8), dtype=parts[0].dtype)
    rows = e * QUAD[:, None] + np.arange(e)
    for index, part in enumerate(parts):
        b[rows + 4 * e * index, GROUP[:, None]] = part
    return b


def c_matrix(registers: list[Array], integer: bool) -> Array:
    """4 registers for every 8 columns -> [16, N], float64 or int64."""
    c = np.zeros((16, 2 * len(registers)), dtype=np.int64 if integer else np.float64)
    for index, register in enumerate(registers):
        values = register.view(np.int32 if integer else np.float32)
        c[GROUP + 8 * (index % 4 // 2), 8 * (index // 4) + 2 * QUAD + index % 2] = values
    return c


def c_registers(c: Array) -> list[Array]:
    """[16, N] -> its registers."""
    narrow = c.astype(np.int32 if c.dtype.kind == "i" else np.float32).view(np.uint32)
    count = c.shape[1] // 2
    return [narrow[GROUP + 8 * (i % 4 // 2), 8 * (i // 4) + 2 * QUAD + i % 2] for i in range(count)]


def spread(matrices: Array, transposed: bool) -> list[Array]:
    """uint16 [count, 8, 8] of ldmatrix -> a register for each."""
    if transposed:
        matrices = matrices.swapaxes(1, 2)
    pairs = np.ascontiguousarray(matrices).view(np.uint32)  # [count, 8, 4]
    return list(pairs.reshape(len(matrices), 32))


def gathered(registers: list[Array], transposed: bool) -> Array:
    """Registers -> uint16 [count, 8, 8] of stmatrix."""
    matrices = np.stack(registers).view(np.uint16).reshape(len(registers), 8, 8)
    return np.ascontiguousarray(matrices.swapaxes(1, 2)) if transposed else matrices


SWIZZLES = {0: (0, 16), 1: (3, 128), 2: (2, 64), 3: (1, 32)}  # of a descriptor -> (bits exchanged, bytes of a row)


def described(descriptor: int, strided: int, contiguous: int, itemsize: int, reduced_contiguous: bool) -> Array:
    """Addresses [strided, contiguous] of a matrix in shared memory: ``contiguous`` elements follow each other.

    ``reduced_contiguous``: the reduction runs along the contiguous axis (K-major), else along the strided one.
    """
    start, leading, stride = ((descriptor >> shift & 0x3FFF) << 4 for shift in (0, 16, 32))
    if descriptor >> 49 & 7:
        raise NotImplementedError("base offsets of descriptors")
    bits, row = SWIZZLES[descriptor >> 62]
    i = np.arange(strided)[:, None]
    j = np.arange(contiguous)[None, :] * itemsize
    if reduced_contiguous:
        # Rows of 8 that are ``stride`` apart; without a swizzle each row is cut into 16 bytes, ``leading`` apart.
        across = j // 16 * leading + j % 16 if bits == 0 else j
        if bits and contiguous * itemsize > row:
            raise NotImplementedError("a product wider than its swizzled rows")
        addresses = start + i // 8 * stride + i % 8 * row + across
    else:
        if bits == 0:
            raise NotImplementedError("matrices without a swizzle whose reduction is strided")
        addresses = start + i // 8 * stride + i % 8 * row + j // row * leading + j % row
    return addresses ^ ((addresses >> 7) & ((1 << bits) - 1)) << 4
