"""mma.sync and wgmma. Operands of the latter must not change, nor its results be read, before it is waited for."""

import re

import numpy as np

from tests.emulator import matrix
from tests.emulator.lanes import Array
from tests.emulator.memory import Fault
from tests.emulator.ptx import Instruction
from tests.emulator.pure import Step
from tests.emulator.registers import Product, Registers, Warp, waited_for


def multiply(registers: Registers, instruction: Instruction) -> Step:
    """mma.sync: a warp's 16 rows by 8 columns."""
    if instruction.parts[4:6] != ("row", "col"):
        raise NotImplementedError(instruction.text)
    *_, kind_a, kind_b, of_sums = instruction.parts
    to, a, b, c = (registers.vector(operand) for operand in instruction.operands)

    def step(warp: Warp) -> None:
        left = matrix.a_matrix([warp.registers[slot] for slot in a], kind_a)
        right = matrix.b_matrix([warp.registers[slot] for slot in b], kind_b)
        total = left @ right + matrix.c_matrix([warp.registers[slot] for slot in c], of_sums == "s32")
        for slot, register in zip(to, matrix.c_registers(total), strict=True):
            warp.registers[slot] = register

    return step


def multiply_group(registers: Registers, instruction: Instruction) -> Step:
    """wgmma.mma_async: a warp's 16 of the 64 rows of four warps. A in registers, or in shared memory as B is."""
    kind = instruction.parts[-1]
    shape = re.fullmatch(r"m64n(\d+)k(\d+)", instruction.parts[4])
    assert shape
    n, k = int(shape[1]), int(shape[2])
    to, a, b, keep, *immediates = instruction.operands
    signs, transposes = immediates[:2], immediates[2:]
    b_transposed = bool(transposes and transposes[-1])
    if signs not in ([], [1, 1]) or any(transposes[:-1]):
        raise NotImplementedError(instruction.text)
    targets, kept = registers.vector(to), registers.slot(keep)
    left = None if isinstance(a, str) else registers.vector(a)
    descriptors = [registers.slot(operand, 8) for operand in (a, b) if isinstance(operand, str)]
    itemsize = np.dtype(matrix.ITEMS[kind]).itemsize

    def read(warp: Warp, descriptor: int, rows: int, transposed: bool) -> Array:
        """[rows, k]."""
        if transposed:
            at = matrix.described(descriptor, k, rows, itemsize, reduced_contiguous=False).T
        else:
            at = matrix.described(descriptor, rows, k, itemsize, reduced_contiguous=True)
        items = warp.shared.locate(at.reshape(-1), itemsize, 1)
        return warp.shared.read(items, itemsize, warp).reshape(rows, k)

    def step(warp: Warp) -> None:
        first_row = 16 * (warp.index % 4)
        *of_a, of_b = (int(warp.registers[slot][0]) for slot in descriptors)

        def operands() -> list[Array]:
            rows = [read(warp, descriptor, 64, False)[first_row : first_row + 16] for descriptor in of_a]
            return [*rows, read(warp, of_b, n, b_transposed)]

        seen = operands()
        if left is None:
            rows = matrix.numbers(seen[0], kind)
        else:
            rows = matrix.a_matrix([warp.registers[slot] for slot in left], kind)
        total = rows @ matrix.numbers(seen[-1], kind).T
        if warp.registers[kept].all():
            total = total + matrix.c_matrix([warp.pending(slot) for slot in targets], kind == "s8")
        results = dict(zip(targets, matrix.c_registers(total), strict=True))
        warp.products[-1].append(Product(results, operands, seen))

    return step


def commit_products(registers: Registers, instruction: Instruction) -> Step:
    return lambda warp: warp.products.append([])


def wait_for_products(registers: Registers, instruction: Instruction) -> Step:
    allowed = instruction.operands[0]
    assert isinstance(allowed, int)

    def step(warp: Warp) -> None:
        for product in waited_for(warp.products, allowed):
            if any((now != then).any() for now, then in zip(product.operands(), product.seen, strict=True)):
                raise Fault("shared memory has changed under a product under way")
            for slot, register in product.results.items():
                warp.registers[slot] = register

    return step
